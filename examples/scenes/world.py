"""What there is in a scene, how it is drawn by lot, and how it is rendered. No captions here.

A scene has one large main object in the middle of a plain background and small details around it, at most one in each
of the eight outer cells of a 3 x 3 grid. It is a pure function of `(seed, split, index)`, the same on every machine:
lots come from `Draws`, and pixels from comparisons of integers, without antialiasing.
"""

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
    "orange": (255, 140, 0),
    "yellow": (250, 225, 0),
    "green": (20, 150, 50),
    "blue": (20, 70, 225),
    "purple": (130, 40, 170),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "black": (0, 0, 0),
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
# x and y as above -> what shows of an object; the background shines through the rest.
TEXTURES: dict[str, Callable[[Any, Any], Any]] = {
    "plain": lambda x, y: x == x,
    "striped": lambda x, y: y % 3 > 0,
    "dotted": lambda x, y: (x % 3 > 0) | (y % 3 > 0),
}
RADIUS = {"large": 17, "small": 8, "tiny": 5}  # pixels; an object covers at most 2 r + 1
DETAIL_SIZES = ("small", "tiny")

IMAGE_SIZE = 72
CELL = 24  # pixels: take it as the patch size, and the image has 10 tokens
CENTRES = (9, 36, 63)  # pixels: clear of the main object, and each in its cell
MIDDLE = (1, 1)
PLACES = tuple((row, column) for row in range(3) for column in range(3) if (row, column) != MIDDLE)

MAINS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SETTINGS = tuple((colour, shape, ground) for ground in BACKGROUNDS for colour, shape in MAINS)
KINDS = tuple((size, texture, *main) for size in DETAIL_SIZES for texture in TEXTURES for main in MAINS)

# Split -> how many scenes it has where nobody asks for another number.
SPLITS = {
    "pretrain": 200_000,
    "train": 20_000,
    "validation": 500,
    "short": len(SETTINGS),
    "long": 1000,
    "hard": 500,
    "classes": 20 * len(MAINS),
}
DETAILS = (5, 6)  # how many an ordinary scene has
LONG_SETTINGS = 8  # pairs of main object and background in the test of long captions
# Hard scenes come in families that share everything but two of their six details, which captions tell last: whoever
# reads no further finds one scene in four.
FAMILY = 4
SHARED_DETAILS, TELLING_DETAILS = 4, 2


class Draws:
    """Lots that are the same in every Python: of `random`, only `Random.random` is promised to stay as it is."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key)))

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def one_of(self, options: Sequence[Option]) -> Option:
        return options[int(self._random.random() * len(options))]

    def shuffled(self, options: Iterable[Option]) -> list[Option]:
        return sorted(options, key=lambda _: self._random.random())


@dataclass(frozen=True, order=True)
class Detail:
    place: tuple[int, int]  # row and column, a member of PLACES
    size: str
    texture: str
    colour: str
    shape: str

    @property
    def kind(self) -> tuple[str, str, str, str]:
        return self.size, self.texture, self.colour, self.shape


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
        """The one split that this content belongs to, by its checksum: no two splits have a picture in common."""
        content = repr((self.colour, self.shape, self.background, [(*d.place, *d.kind) for d in self.details]))
        return tuple(SPLITS)[zlib.crc32(content.encode()) % len(SPLITS)]


def draw_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of `split`.

    Args:
        split: a key of `SPLITS`. "short" has every main object on every background once, "classes" every main object
            equally often, "long" few main objects and backgrounds, "hard" one of each and families of `FAMILY` scenes.
        index: from 0. There is no last one, but in "short".
        seed: of the whole world.

    Raises:
        ValueError: for a split that is not there, or an index outside it.
    """
    check_index(split, index)
    draws = Draws(seed, split, index)
    if split == "hard":
        return _hard_scene(index, seed, draws)
    of_split = Draws(seed, split)
    if split == "short":
        setting = of_split.shuffled(SETTINGS)[index]
    elif split == "long":
        setting = draws.one_of(of_split.shuffled(SETTINGS)[:LONG_SETTINGS])
    elif split == "classes":
        setting = (*MAINS[index % len(MAINS)], draws.one_of(tuple(BACKGROUNDS)))
    else:
        setting = draws.one_of(SETTINGS)
    places = draws.shuffled(PLACES)[: draws.one_of(DETAILS)]
    kinds = {place: draws.one_of(KINDS) for place in places}
    while (scene := Scene(*setting, _details(kinds))).split != split:
        kinds[places[0]] = draws.one_of(KINDS)
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


def _hard_scene(index: int, seed: int, draws: Draws) -> Scene:
    setting = Draws(seed, "hard").one_of(SETTINGS)
    family = Draws(seed, "hard", "family", index // FAMILY)
    places = family.shuffled(PLACES)[: SHARED_DETAILS + TELLING_DETAILS]
    shared = {place: family.one_of(KINDS) for place in places[:SHARED_DETAILS]}
    told_last = tuple(places[SHARED_DETAILS:])
    # Each scene of the family has its own quarter of all kinds in either place, so that siblings differ in both.
    choices = {place: family.shuffled(KINDS)[index % FAMILY :: FAMILY] for place in told_last}
    while True:
        telling = {place: draws.one_of(kinds) for place, kinds in choices.items()}
        scene = Scene(*setting, _details(shared | telling), told_last)
        if scene.split == "hard":
            return scene


def _details(kinds: dict[tuple[int, int], tuple[str, str, str, str]]) -> tuple[Detail, ...]:
    return tuple(Detail(place, *kinds[place]) for place in sorted(kinds))


@cache
def mask(shape: str, size: str, texture: str = "plain") -> NDArray[np.bool_]:
    """Which pixels an object covers, of shape `(2 r + 1, 2 r + 1)` for the radius r of its size."""
    radius = RADIUS[size]
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    covered: NDArray[np.bool_] = SHAPES[shape](x, y, radius) & TEXTURES[texture](x, y)
    return covered


def box(place: tuple[int, int], size: str) -> tuple[slice, slice]:
    """Rows and columns of the picture that an object of this size has at this place."""
    row, column = (CENTRES[axis] for axis in place)
    radius = RADIUS[size]
    return slice(row - radius, row + radius + 1), slice(column - radius, column + radius + 1)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene, of shape `(IMAGE_SIZE, IMAGE_SIZE, 3)`, in RGB."""
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    picture[box(MIDDLE, "large")][mask(scene.shape, "large")] = COLOURS[scene.colour]
    for detail in scene.details:
        covered = mask(detail.shape, detail.size, detail.texture)
        picture[box(detail.place, detail.size)][covered] = COLOURS[detail.colour]
    return picture
