"""Scenes are the same everywhere, no two of them are alike, and no two splits show the same things."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from examples.scenes.dataset import example
from examples.scenes.world import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    DETAILS,
    FAMILY,
    FLAG_COLOURS,
    FLAG_SIDE,
    FLAGS,
    IMAGE_SIZE,
    MAIN_RADIUS,
    MAINS,
    MIDDLE,
    PLACES,
    SETTINGS,
    SHAPES,
    SPLITS,
    TELLING_DETAILS,
    Draws,
    Scene,
    box,
    draw_scene,
    flag_pixels,
    mask,
)

# Of pixels, captions and labels of rows 0 .. 7. What was measured on the world holds for these only.
HASHES = {
    "pretrain": "a6a90ecfe3cb4644",
    "train": "1af7d3f92686b5d5",
    "validation": "0f6811143edc1f37",
    "short": "b35cdf923a8b1ea6",
    "long": "4a9a1b07df7f5697",
    "hard": "22e276777c07e0fa",
    "classes": "cfae1692522281de",
}


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_rows_are_the_same_on_every_machine(split: str) -> None:
    digest = hashlib.sha256()
    for index in range(8):
        row = example(split, index)
        digest.update(row["image"].tobytes())
        digest.update(f"{row['caption']}\n{row['short_caption']}\n{row['label']}\n".encode())
    assert digest.hexdigest()[:16] == HASHES[split]


def test_lots_do_not_depend_on_what_was_drawn_before() -> None:
    alone = draw_scene("train", 7)
    assert [draw_scene("train", index) for index in range(10)][7] == alone
    assert draw_scene("train", 7, seed=1) != alone
    draws = Draws(0, "here")
    assert Counter(draws.one_of("abc") for _ in range(3000)).most_common()[-1][1] > 900
    assert sorted(draws.shuffled(range(20))) == list(range(20))
    assert sum(draws.chance(0.3) for _ in range(3000)) == pytest.approx(900, abs=100)
    often = Counter(draws.often_the_first("abc") for _ in range(11_000))  # 1 : 1/2 : 1/3
    assert [often[letter] for letter in "abc"] == pytest.approx([6000, 3000, 2000], rel=0.1)


def test_things_can_be_told_apart() -> None:
    assert len({mask(shape).tobytes() for shape in SHAPES}) == len(SHAPES) >= 6
    assert len(set(COLOURS.values()) | set(BACKGROUNDS.values())) == len(COLOURS) + len(BACKGROUNDS) >= 12
    assert len({flag_pixels(flag).tobytes() for flag in FLAGS}) == len(FLAGS) == 56
    assert not set(BACKGROUNDS.values()) & set(FLAG_COLOURS.values())  # every flag has an edge on every background
    for flag in FLAGS:
        colours = Counter(map(tuple, flag_pixels(flag).reshape(-1, 3).tolist()))
        assert len(colours) == 2 and min(colours.values()) >= FLAG_SIDE**2 / 4  # both are seen at a glance


def test_things_do_not_touch_and_each_lies_in_its_cell() -> None:
    covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
    for place, side in [(MIDDLE, 2 * MAIN_RADIUS + 1), *((place, FLAG_SIDE) for place in PLACES)]:
        rows, columns = box(place, side)
        covered[rows.start - 1 : rows.stop, columns.start - 1 : columns.stop] += 1  # with a pixel to the next one
        assert (rows.start // CELL, (rows.stop - 1) // CELL) == (place[0], place[0])
        assert (columns.start // CELL, (columns.stop - 1) // CELL) == (place[1], place[1])
    assert covered.max() == 1 and IMAGE_SIZE == 3 * CELL


def test_splits_have_no_content_in_common_and_repeat_no_picture() -> None:
    of_split = {split: [draw_scene(split, i) for i in range(min(count, 1000))] for split, count in SPLITS.items()}
    for split, scenes in of_split.items():
        assert {scene.split for scene in scenes} == {split}
        assert len({(scene.colour, scene.shape, scene.background, scene.details) for scene in scenes}) == len(scenes)
    contents = {split: {things(scene) for scene in scenes} for split, scenes in of_split.items()}
    assert all(not contents[a] & contents[b] for a, b in itertools.combinations(SPLITS, 2))


def things(scene: Scene) -> tuple[str, ...]:
    """What there is, wherever it is."""
    return (scene.colour, scene.shape, scene.background, *sorted(detail.flag for detail in scene.details))


def test_ordinary_scenes() -> None:
    drawn = [draw_scene("long", index) for index in range(600)]
    assert {len(scene.details) for scene in drawn} == set(DETAILS)
    assert {detail.flag for scene in drawn for detail in scene.details} == set(FLAGS)
    assert all(len(set(things(scene))) == 3 + len(scene.details) for scene in drawn)  # no flag twice
    settings = Counter((scene.colour, scene.shape, scene.background) for scene in drawn)
    assert len(settings) == 8 and min(settings.values()) > 40  # of 75 on average


@pytest.mark.parametrize("split", ["train", "validation"])
def test_main_objects_are_as_unequally_frequent_as_things_are(split: str) -> None:
    """Zipf's law: the most frequent of 42 has a share of 1 / (1 + 1/2 + ... + 1/42) = 23 %, of 5 one of 44 %."""
    drawn = [draw_scene(split, index) for index in range(500)]
    mains = Counter(MAINS[scene.label] for scene in drawn).most_common()
    assert mains[0][1] / 500 == pytest.approx(0.231, abs=0.05) and len(mains) > 35
    grounds = Counter(scene.background for scene in drawn).most_common()
    assert grounds[0][1] / 500 == pytest.approx(0.438, abs=0.06) and len(grounds) == len(BACKGROUNDS)
    most_frequent = {split: Counter(draw_scene(split, i).label for i in range(300)).most_common(1)[0][0]
                     for split in ("train", "validation")}  # fmt: skip
    assert len(set(most_frequent.values())) == 1


def test_short_test_has_every_setting_once() -> None:
    drawn = [draw_scene("short", index) for index in range(SPLITS["short"])]
    assert sorted((scene.colour, scene.shape, scene.background) for scene in drawn) == sorted(SETTINGS)
    with pytest.raises(ValueError, match=r"'short' has scenes 0 \.\. 209, asked for 210"):
        draw_scene("short", 210)


def test_classes_are_equally_frequent() -> None:
    labels = Counter(draw_scene("classes", index).label for index in range(2 * len(MAINS)))
    assert labels == dict.fromkeys(range(len(MAINS)), 2)


def test_hard_scenes_of_a_family_differ_in_places_alone() -> None:
    drawn = [draw_scene("hard", index) for index in range(SPLITS["hard"])]
    assert len({(scene.colour, scene.shape, scene.background) for scene in drawn}) == 1
    families = [drawn[first : first + FAMILY] for first in range(0, len(drawn), FAMILY)]
    assert len({things(family[0]) for family in families}) == len(families)
    for family in families:
        assert len({things(scene) for scene in family}) == 1
        assert len({scene.details for scene in family}) == FAMILY
        told_first = [{d for d in scene.details if d.place not in scene.told_last} for scene in family]
        assert all(a == b for a, b in itertools.pairwise(told_first))
        assert len(told_first[0]) == len(family[0].details) - TELLING_DETAILS


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="no split 'test': choose one of pretrain, train"):
        draw_scene("test", 0)
    with pytest.raises(ValueError, match=r"'train' has scenes 0, 1, 2 \.\.\., asked for -1"):
        draw_scene("train", -1)
