"""What there is in a scene, how it is drawn by lot, and how it is rendered. No captions here.

A scene has a main object in the middle of a plain background and framed signal flags around it, at most one in each of
the eight outer cells of a 3 x 3 grid. It is a pure function of `(seed, split, index)`, the same on every machine: lots
come from `Draws`, and pixels from comparisons of integers, without antialiasing.
"""

import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Option = TypeVar("Option")

COLOURS = {
    "red": (220, 20, 30),
    "yellow": (250, 225, 0),
    "green": (20, 150, 50),
    "cyan": (0, 210, 230),
    "blue": (20, 70, 225),
    "purple": (130, 40, 170),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {
    "beige": (235, 215, 180),
    "gray": (150, 150, 150),
    "navy": (15, 20, 60),
    "brown": (95, 60, 30),
    "teal": (0, 90, 95),
}
STAR_TIPS = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))  # directions, 1000 long
# x and y (downwards) in -r .. r -> inside or not. Integers only.
SHAPES: dict[str, Callable[[Any, Any, int], Any]] = {
    "circle": lambda x, y, r: x * x + y * y <= r * r + r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= r * 7 // 8,
    "triangle": lambda x, y, r: 2 * abs(x) <= y + r,
    "cross": lambda x, y, r: np.minimum(abs(x), abs(y)) <= r // 4,
    "ring": lambda x, y, r: (x * x + y * y <= r * r + r) & (3 * (x * x + y * y) > r * r),
    # Inside four at least of the five lines that draw it.
    "star": lambda x, y, r: sum(a * x + b * y <= 309 * r for a, b in STAR_TIPS) >= 4,
}
# The flags: a name each, one token long, that tells nothing of the look. The names are of spelling alphabets (NATO's,
# the American one of 1941, eight words of the RAF's), the looks are this world's own.
FLAG_NAMES = (
    "alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo",
    "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor",
    "whiskey", "xray", "yankee", "zulu", "able", "baker", "dog", "easy", "fox", "george", "how", "item",
    "jig", "king", "love", "nan", "oboe", "peter", "queen", "roger", "sugar", "tare", "uncle", "william",
    "yoke", "zebra", "apple", "butter", "edward", "harry", "ink", "london", "monkey", "robert",
)  # fmt: skip
FLAG_COLOURS = {
    "white": (255, 255, 255),
    "yellow": (250, 225, 0),
    "red": (220, 20, 30),
    "blue": (20, 70, 225),
    "black": (0, 0, 0),
    "green": (20, 150, 50),
}
# The colour of the ground, and that of the figure on it.
FLAG_PAIRS = (
    ("white", "red"), ("white", "blue"), ("white", "black"), ("white", "green"), ("yellow", "red"), ("yellow", "blue"),
    ("yellow", "black"),
)  # fmt: skip
# x and y (downwards) in -17, -15 .. 17 -> where the figure is.
FLAG_FIGURES: dict[str, Callable[[Any, Any], Any]] = {
    "right half": lambda x, y: x > y * 0,
    "lower half": lambda x, y: y > x * 0,
    "quarters": lambda x, y: x * y > 0,
    "diagonal": lambda x, y: x + y > 0,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 11,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) < 5,
    "saltire": lambda x, y: abs(abs(x) - abs(y)) < 6,
    "bar": lambda x, y: abs(y + x * 0) < 8,
}

IMAGE_SIZE = 72
CELL = 24  # pixels: take it as the patch size, and the image has 10 tokens
MAIN_RADIUS = 11  # pixels: a main object covers at most 23 of its cell, and nothing of it stands in its neighbours
FLAG_SIDE, FRAME_SIDE = 18, 22  # pixels
MIDDLE = (1, 1)
PLACES = tuple((row, column) for row in range(3) for column in range(3) if (row, column) != MIDDLE)

MAINS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SETTINGS = tuple((colour, shape, ground) for ground in BACKGROUNDS for colour, shape in MAINS)
FLAGS = dict(zip(FLAG_NAMES, ((figure, *pair) for figure in FLAG_FIGURES for pair in FLAG_PAIRS), strict=True))

# Split -> how many scenes it has where nobody asks for another number.
SPLITS = {
    "pretrain": 200_000,
    "train": 20_000,
    "validation": 500,
    "short": len(SETTINGS),
    "long": 1000,
    "hard": 1000,
    "classes": 20 * len(MAINS),
}
DETAILS = (5, 6, 7)  # how many flags an ordinary scene has
TOGETHER = 200  # sets of flags that occur together, the first most often
LONG_SETTINGS = 8  # pairs of main object and background in the test of long captions
# Hard scenes come in families that share all flags, places and colours, and differ in which of the last four flags, told
# last, has which frame: whoever knows what there is and not what goes with what, or reads no further, finds one in twenty.
FAMILY = 20
SHARED_DETAILS, TELLING_DETAILS = 3, 4


class Draws:
    """Lots that are the same in every Python: of `random`, only `Random.random` is promised to stay as it is."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key)))

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def one_of(self, options: Sequence[Option]) -> Option:
        return options[int(self._random.random() * len(options))]

    def often_the_first(self, options: Sequence[Option]) -> Option:
        """By Zipf's law: the second half as often as the first, the third a third."""
        left = self._random.random() * sum(1 / rank for rank in range(1, len(options) + 1))
        for rank, option in enumerate(options, start=1):
            left -= 1 / rank
            if left < 0:
                return option
        return options[-1]

    def shuffled(self, options: Iterable[Option]) -> list[Option]:
        return sorted(options, key=lambda _: self._random.random())


@dataclass(frozen=True, order=True)
class Detail:
    place: tuple[int, int]  # row and column, a member of PLACES
    flag: str  # a member of FLAGS
    frame: str  # its colour, a member of COLOURS


@dataclass(frozen=True)
class Scene:
    colour: str  # of the main object
    shape: str
    background: str
    details: tuple[Detail, ...]  # in the order of PLACES
    told_last: tuple[tuple[int, int], ...] = ()  # places of the details that captions tell last

    @property
    def label(self) -> int:
        """The class of the main object: its place in MAINS."""
        return MAINS.index((self.colour, self.shape))

    @property
    def split(self) -> str:
        """The one split that this content belongs to, by its checksum: no two splits show the same things."""
        content = repr((self.colour, self.shape, self.background, sorted(detail.flag for detail in self.details)))
        return tuple(SPLITS)[zlib.crc32(content.encode()) % len(SPLITS)]


def draw_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of `split`.

    Args:
        split: a key of `SPLITS`. "short" has every main object on every background once, "classes" every main object
            equally often, "long" few main objects and backgrounds, "hard" one of each and families of `FAMILY` scenes.
            In "train" and "validation" they are as unequally frequent as things are (Zipf's law).
        index: from 0. There is no last one, but in "short".
        seed: of the whole world.

    Raises:
        ValueError: for a split that is not there, or an index outside it.
    """
    check_index(split, index)
    draws = Draws(seed, split, index)
    if split == "hard":
        return _hard_scene(index, seed)
    of_split = Draws(seed, split)
    if split == "short":
        setting = of_split.shuffled(SETTINGS)[index]
    elif split == "long":
        setting = draws.one_of(of_split.shuffled(SETTINGS)[:LONG_SETTINGS])
    elif split == "classes":
        setting = (*MAINS[index % len(MAINS)], draws.one_of(tuple(BACKGROUNDS)))
    else:
        setting = draws.one_of(SETTINGS)
    while True:
        flags = draws.shuffled(FLAGS)
        if split in ("train", "validation"):
            frequent = Draws(seed, "frequent")  # the same order in both
            setting = (
                *draws.often_the_first(frequent.shuffled(MAINS)),
                draws.often_the_first(frequent.shuffled(BACKGROUNDS)),
            )
            flags = Draws(seed, "together", draws.often_the_first(range(TOGETHER))).shuffled(FLAGS)
        places = draws.shuffled(PLACES)[: draws.one_of(DETAILS)]
        frames = [draws.one_of(tuple(COLOURS)) for _ in places]
        scene = Scene(*setting, _details(places, flags, frames))
        if scene.split == split:
            return scene


def check_index(split: str, index: int) -> None:
    """
    Raises:
        ValueError: for a split that is not there, or an index outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    if index < 0 or (split == "short" and index >= len(SETTINGS)):
        last = f" .. {len(SETTINGS) - 1}" if split == "short" else ", 1, 2 ..."
        raise ValueError(f"Split {split!r} has scenes 0{last}, asked for {index}.")


def _hard_scene(index: int, seed: int) -> Scene:
    setting = Draws(seed, "hard").one_of(SETTINGS)
    family = Draws(seed, "hard", "family", index // FAMILY)
    places = family.shuffled(PLACES)[: SHARED_DETAILS + TELLING_DETAILS]
    frames = family.shuffled(COLOURS)[: SHARED_DETAILS + TELLING_DETAILS]
    arrangements = family.shuffled(itertools.permutations(frames[SHARED_DETAILS:]))
    frames[SHARED_DETAILS:] = arrangements[index % FAMILY]
    while True:
        scene = Scene(*setting, _details(places, family.shuffled(FLAGS), frames), tuple(places[SHARED_DETAILS:]))
        if scene.split == "hard":
            return scene


def _details(places: Sequence[tuple[int, int]], flags: Sequence[str], frames: Sequence[str]) -> tuple[Detail, ...]:
    """As many as there are places, in their order."""
    return tuple(sorted(map(Detail, places, flags, frames)))


@cache
def mask(shape: str) -> NDArray[np.bool_]:
    """Which pixels a main object covers, of shape `(2 r + 1, 2 r + 1)` for its radius r."""
    y, x = np.mgrid[-MAIN_RADIUS : MAIN_RADIUS + 1, -MAIN_RADIUS : MAIN_RADIUS + 1]
    covered: NDArray[np.bool_] = SHAPES[shape](x, y, MAIN_RADIUS)
    return covered


@cache
def flag_pixels(flag: str) -> NDArray[np.uint8]:
    """What a flag looks like, of shape `(FLAG_SIDE, FLAG_SIDE, 3)`, in RGB."""
    figure, ground, colour = FLAGS[flag]
    y, x = np.mgrid[1 - FLAG_SIDE : FLAG_SIDE : 2, 1 - FLAG_SIDE : FLAG_SIDE : 2]
    pixels = np.empty((FLAG_SIDE, FLAG_SIDE, 3), np.uint8)
    pixels[:] = FLAG_COLOURS[ground]
    pixels[FLAG_FIGURES[figure](x, y)] = FLAG_COLOURS[colour]
    return pixels


def box(place: tuple[int, int], side: int) -> tuple[slice, slice]:
    """Rows and columns of the picture that something of this side, in pixels, has in the middle of a cell."""
    row, column = (CELL * axis + (CELL - side + 1) // 2 for axis in place)
    return slice(row, row + side), slice(column, column + side)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene, of shape `(IMAGE_SIZE, IMAGE_SIZE, 3)`, in RGB."""
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    picture[box(MIDDLE, 2 * MAIN_RADIUS + 1)][mask(scene.shape)] = COLOURS[scene.colour]
    for detail in scene.details:
        picture[box(detail.place, FRAME_SIDE)] = COLOURS[detail.frame]
        picture[box(detail.place, FLAG_SIDE)] = flag_pixels(detail.flag)
    return picture
