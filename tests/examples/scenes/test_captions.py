"""What captions say is read back from the pixels, by a reader that knows the words and not the writer."""

import re
from typing import Any

import numpy as np
import pytest

from examples.scenes.captions import CLASS_NAMES
from examples.scenes.dataset import example
from examples.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    DETAIL_SIZES,
    MIDDLE,
    PLACES,
    SHAPES,
    TEXTURES,
    box,
    draw_scene,
    mask,
)

SIZE, TEXTURE = f"({'|'.join(DETAIL_SIZES)})", f"({'|'.join(TEXTURES)})"
COLOUR, SHAPE = f"({'|'.join(COLOURS)})", f"({'|'.join(SHAPES)})"
# A phrase of a place -> row and column.
WHERE = {
    "top left": (0, 0), "upper left": (0, 0), "very top": (0, 1), "above the large": (0, 1), "top right": (0, 2),
    "upper right": (0, 2), "left side": (1, 0), "left of the large": (1, 0), "right side": (1, 2),
    "right of the large": (1, 2), "bottom left": (2, 0), "lower left": (2, 0), "very bottom": (2, 1),
    "below the large": (2, 1), "bottom right": (2, 2), "lower right": (2, 2),
}  # fmt: skip
STEPS = {"below": (-1, 0), "above": (1, 0), "to the right of": (0, -1), "to the left of": (0, 1)}
Kind = tuple[str, str, str, str]  # size, texture, colour, shape


def seen(picture: np.ndarray, place: tuple[int, int]) -> Kind | None:
    """What the pixels show at a place."""
    sizes = ("large",) if place == MIDDLE else DETAIL_SIZES
    region = picture[box(place, sizes[0])]
    covered = (region != picture[0, 0]).any(2)
    if not covered.any():
        return None
    (colour,) = {tuple(map(int, pixel)) for pixel in region[covered]}
    found = []
    for size in sizes:
        for texture in TEXTURES:
            for shape in SHAPES:
                expected = np.zeros_like(covered)
                edge = (len(covered) - len(mask(shape, size))) // 2
                inner = slice(edge, len(covered) - edge)
                expected[inner, inner] = mask(shape, size, texture)
                if (expected == covered).all():
                    found.append((size, texture, {rgb: name for name, rgb in COLOURS.items()}[colour], shape))
    assert len(found) == 1
    return found[0]


def all_seen(picture: np.ndarray) -> dict[tuple[int, int], Kind]:
    return {place: kind for place in PLACES if (kind := seen(picture, place))}


def one(pattern: str, text: str) -> str:
    (found,) = re.findall(rf"\b{pattern}\b", text)
    return str(found)


def read_detail(sentence: str) -> tuple[tuple[int, int], Kind, list[tuple[str, str]]]:
    """Place, kind, and relations (words for the direction, name of the other detail) of a sentence on one detail."""
    sentence = sentence.lower()
    relations = re.findall(rf"directly ({'|'.join(STEPS)}) the (\w+ \w+ \w+)", sentence)
    own = re.sub(r", directly .*", "", sentence)
    places = {place for phrase, place in WHERE.items() if phrase in own}
    own = re.sub(r"\blarge \w+", "", own)  # the main object
    assert len(places) == 1, sentence
    return places.pop(), (one(SIZE, own), one(TEXTURE, own), one(COLOUR, own), one(SHAPE, own)), relations


def picture_of(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(row["image"])


@pytest.mark.parametrize("split", ["train", "validation", "long", "hard"])
def test_long_captions_are_true_and_leave_nothing_out(split: str) -> None:
    related = 0
    for index in range(150):
        row = example(split, index)
        main, *sentences = row["caption"].removesuffix(".").split(". ")
        assert row["short_caption"] == f"{main}."
        there = all_seen(picture_of(row))
        said = {}
        for sentence in sentences:
            place, said[place], relations = read_detail(sentence)
            for direction, name in relations:
                step = STEPS[direction]
                size, _, colour, shape = there[place[0] + step[0], place[1] + step[1]]
                assert name == f"{size} {colour} {shape}"
                assert [(kind[0], *kind[2:]) for kind in there.values()].count((size, colour, shape)) == 1
                related += 1
        assert said == there and len(sentences) == len(said)
    assert related > 100


def test_main_sentences_are_true() -> None:
    for index in range(210):
        row = example("short", index)
        assert row["caption"] == row["short_caption"]
        picture, text = picture_of(row), row["caption"].lower()
        size, texture, colour, shape = seen(picture, MIDDLE) or ()
        assert (size, texture) == ("large", "plain")
        assert f"large {colour} {shape}" == CLASS_NAMES[row["label"]] == re.findall(r"large \w+ \w+", text)[0]
        assert BACKGROUNDS[one(f"({'|'.join(BACKGROUNDS)})", text)] == tuple(picture[0, 0])


def test_captions_for_pretraining_are_true_and_of_four_kinds() -> None:
    main = lists = placed = sentences = both = 0
    for index in range(600):
        row = example("pretrain", index)
        text, picture = row["caption"].lower().removesuffix("."), picture_of(row)
        there = all_seen(picture)
        if ". " in text:
            both += 1
            first, text = text.split(". ")
            assert CLASS_NAMES[row["label"]] in first
            place, kind, _ = read_detail(text)
            assert there[place] == kind
        elif "large" in text and not re.search(SIZE, text):
            main += 1
            assert CLASS_NAMES[row["label"]] in text
            assert all(BACKGROUNDS[name] == tuple(picture[0, 0]) for name in BACKGROUNDS if name in text)
        elif len(items := re.split(r", | and (?=an? )", text)) == 3 and text.startswith("a"):
            lists += 1
            left = dict(there)
            for item in items:
                words = item.split()[1:]
                places = [place for phrase, place in TERSE.items() if item.endswith(f" {phrase}")][:1]
                placed += bool(places)
                kinds = [
                    place
                    for place, kind in left.items()
                    if kind[2:] == (one(COLOUR, item), one(SHAPE, item))
                    and set(kind[:2]) >= {word for word in words if word in (*DETAIL_SIZES, *TEXTURES)}
                    and (not places or place == places[0])
                ]
                assert kinds, (text, there)
                if places:
                    del left[kinds[0]]
        else:
            sentences += 1
            place, kind, _ = read_detail(text)
            assert there[place] == kind
    assert main / 600 == pytest.approx(0.25, abs=0.06)
    assert lists / 600 == pytest.approx(0.55, abs=0.06)
    assert sentences / 600 == pytest.approx(0.1, abs=0.04)
    assert both / 600 == pytest.approx(0.1, abs=0.04)
    assert placed / lists / 3 == pytest.approx(0.25, abs=0.1)


# Longer names first: "top left" ends with "left" too.
TERSE = {
    "top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2),
    "top": (0, 1), "left": (1, 0), "right": (1, 2), "bottom": (2, 1),
}  # fmt: skip


@pytest.mark.parametrize(("split", "count"), [("long", 1000), ("hard", 500), ("validation", 500)])
def test_no_two_pictures_have_the_same_caption(split: str, count: int) -> None:
    assert len({example(split, index)["caption"] for index in range(count)}) == count


def test_short_captions_are_all_different() -> None:
    """Each picture has its own main object and background: a short caption can belong to no other."""
    assert len({(one("large (\\w+ \\w+)", row["caption"]), row["image"].getpixel((0, 0)))
                for row in (example("short", index) for index in range(210))}) == 210  # fmt: skip


def test_details_are_told_in_varying_order_and_hard_ones_last() -> None:
    orders = set()
    for index in range(40):
        scene = draw_scene("hard", index)
        sentences = example("hard", index)["caption"].removesuffix(".").split(". ")[1:]
        places = [read_detail(sentence)[0] for sentence in sentences]
        assert set(places[-2:]) == set(scene.told_last)
        orders.add(tuple(places))
        # Nothing that is told first names a detail that is told last.
        last = {f"{d.size} {d.colour} {d.shape}" for d in scene.details if d.place in scene.told_last}
        assert not [name for sentence in sentences[:4] for _, name in read_detail(sentence)[2] if name in last]
    assert len(orders) > 36


def test_articles() -> None:
    texts = " ".join(example(split, index)["caption"] for split in ("pretrain", "train") for index in range(300))
    assert " an orange " in texts
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", texts, re.IGNORECASE)
