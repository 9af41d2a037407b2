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
    FLAG_SIDE,
    FLAGS,
    MAIN_RADIUS,
    MAINS,
    MIDDLE,
    PLACES,
    SHAPES,
    TELLING_DETAILS,
    box,
    draw_scene,
    flag_pixels,
    mask,
)

MAIN = f"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
FLAG = f"({'|'.join(FLAGS)})"
# A phrase of a place -> row and column.
WHERE = {
    "top left": (0, 0), "upper left": (0, 0), "very top": (0, 1), "straight above the": (0, 1), "top right": (0, 2),
    "upper right": (0, 2), "left side": (1, 0), "to the left of the": (1, 0), "right side": (1, 2),
    "to the right of the": (1, 2), "bottom left": (2, 0), "lower left": (2, 0), "very bottom": (2, 1),
    "straight below the": (2, 1), "bottom right": (2, 2), "lower right": (2, 2),
}  # fmt: skip
STEPS = {"below": (-1, 0), "above": (1, 0), "to the right of": (0, -1), "to the left of": (0, 1)}
# Of lists. Longer names first: "top left" ends with "left" too.
TERSE = {
    "top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2),
    "top": (0, 1), "left": (1, 0), "right": (1, 2), "bottom": (2, 1),
}  # fmt: skip


def flags_seen(picture: np.ndarray) -> dict[tuple[int, int], str]:
    """What the pixels show: place -> flag."""
    looks = {flag_pixels(flag).tobytes(): flag for flag in FLAGS}
    return {place: looks[look] for place in PLACES if (look := picture[box(place, FLAG_SIDE)].tobytes()) in looks}


def main_seen(picture: np.ndarray) -> str:
    """Colour and shape of the main object."""
    region = picture[box(MIDDLE, 2 * MAIN_RADIUS + 1)]
    covered = (region != picture[0, 0]).any(2)
    (rgb,) = {tuple(map(int, pixel)) for pixel in region[covered]}
    (shape,) = (shape for shape in SHAPES if (mask(shape) == covered).all())
    return f"{dict(zip(COLOURS.values(), COLOURS, strict=True))[rgb]} {shape}"


def one(pattern: str, text: str) -> str:
    (found,) = re.findall(rf"\b{pattern}\b", text)
    return str(found)


def read_detail(sentence: str) -> tuple[tuple[int, int], str, list[tuple[str, str]]]:
    """Place, flag, and relations (words for the direction, the other flag) of a sentence on one flag."""
    sentence = sentence.lower()
    relations = re.findall(rf"directly ({'|'.join(STEPS)}) the flag (\w+)", sentence)
    own = re.sub(r", directly .*", "", sentence)
    places = {place for phrase, place in WHERE.items() if phrase in own}
    assert len(places) == 1, sentence
    return places.pop(), one(FLAG, own), relations


def picture_of(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(row["image"])


@pytest.mark.parametrize("split", ["train", "validation", "long", "hard"])
def test_long_captions_are_true_and_leave_nothing_out(split: str) -> None:
    related = 0
    for index in range(150):
        row = example(split, index)
        main, *sentences = row["caption"].removesuffix(".").split(". ")
        assert row["short_caption"] == f"{main}."
        there = flags_seen(picture_of(row))
        said = {}
        for sentence in sentences:
            place, said[place], relations = read_detail(sentence)
            for direction, flag in relations:
                step = STEPS[direction]
                assert there[place[0] + step[0], place[1] + step[1]] == flag
                related += 1
        assert said == there and len(sentences) == len(said)
    assert related > 100


def test_main_sentences_are_true() -> None:
    for index in range(210):
        row = example("short", index)
        assert row["caption"] == row["short_caption"]
        picture, text = picture_of(row), row["caption"].lower()
        assert main_seen(picture) == CLASS_NAMES[row["label"]] == one(MAIN, text)
        assert BACKGROUNDS[one(f"({'|'.join(BACKGROUNDS)})", text)] == tuple(picture[0, 0])


def test_captions_for_pretraining_are_true_and_of_four_kinds() -> None:
    main = lists = placed = sentences = both = 0
    for index in range(600):
        row = example("pretrain", index)
        text, picture = row["caption"].lower().removesuffix("."), picture_of(row)
        there = flags_seen(picture)
        if ". " in text:
            both += 1
            first, text = text.split(". ")
            assert one(MAIN, first) == CLASS_NAMES[row["label"]]
            place, flag, _ = read_detail(text)
            assert there[place] == flag
        elif re.search(MAIN, text):
            main += 1
            assert one(MAIN, text) == CLASS_NAMES[row["label"]]
            assert all(BACKGROUNDS[name] == tuple(picture[0, 0]) for name in BACKGROUNDS if name in text)
        elif len(items := re.split(r", | and ", text)) == 3 and items[0].split()[0] in FLAGS:
            lists += 1
            for item in items:
                flag, *words = item.split()
                assert flag in there.values()
                if words:
                    placed += 1
                    assert there[TERSE[" ".join(words)]] == flag
        else:
            sentences += 1
            place, flag, _ = read_detail(text)
            assert there[place] == flag
    assert main / 600 == pytest.approx(0.3, abs=0.06)
    assert lists / 600 == pytest.approx(0.5, abs=0.06)
    assert sentences / 600 == pytest.approx(0.1, abs=0.04)
    assert both / 600 == pytest.approx(0.1, abs=0.04)
    assert placed / lists / 3 == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(("split", "count"), [("long", 1000), ("hard", 1000), ("validation", 500)])
def test_no_two_pictures_have_the_same_caption(split: str, count: int) -> None:
    assert len({example(split, index)["caption"] for index in range(count)}) == count


def test_short_captions_are_all_different() -> None:
    """Each picture has its own main object and background: a short caption can belong to no other."""
    rows = [example("short", index) for index in range(210)]
    assert len({(one(MAIN, row["caption"]), row["image"].getpixel((0, 0))) for row in rows}) == 210


def test_details_are_told_in_varying_order_and_hard_ones_last() -> None:
    orders = set()
    for index in range(40):
        scene = draw_scene("hard", index)
        sentences = example("hard", index)["caption"].removesuffix(".").split(". ")[1:]
        places = [read_detail(sentence)[0] for sentence in sentences]
        assert set(places[-TELLING_DETAILS:]) == set(scene.told_last)
        orders.add(tuple(places))
        # Nothing that is told first names a flag that is told last.
        last = {detail.flag for detail in scene.details if detail.place in scene.told_last}
        told_first = sentences[:-TELLING_DETAILS]
        assert not [flag for sentence in told_first for _, flag in read_detail(sentence)[2] if flag in last]
    assert len(orders) > 36


def test_words_have_one_meaning() -> None:
    """No name of a flag is a word that captions use otherwise, and articles need no look at the next letter."""
    assert not set(FLAGS) & {word for name in (*COLOURS, *SHAPES, *BACKGROUNDS) for word in name.split()}
    texts = " ".join(example(split, index)["caption"] for split in ("pretrain", "train") for index in range(300))
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", texts, re.IGNORECASE)
    assert len(CLASS_NAMES) == len(MAINS)
