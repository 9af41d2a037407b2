"""Scenes are the same everywhere, no two of them are alike, and no two splits have one in common."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from examples.scenes.dataset import example
from examples.scenes.world import (
    BACKGROUNDS,
    CELL,
    CENTRES,
    COLOURS,
    DETAIL_SIZES,
    DETAILS,
    FAMILY,
    IMAGE_SIZE,
    KINDS,
    MAINS,
    MIDDLE,
    PLACES,
    RADIUS,
    SETTINGS,
    SHAPES,
    SPLITS,
    TELLING_DETAILS,
    TEXTURES,
    Draws,
    box,
    draw_scene,
    mask,
)

# Of pixels, captions and labels of rows 0 .. 7. What was measured on the world holds for these only.
HASHES = {
    "pretrain": "fc26628d221beed7",
    "train": "8c5db488a9cce703",
    "validation": "b95151526d2af024",
    "short": "a784812cadc8da96",
    "long": "6bba53c0cc1a698f",
    "hard": "7c4dbc2659524c18",
    "classes": "079bbcc56ebd81fb",
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


def test_objects_can_be_told_apart() -> None:
    for size in RADIUS:
        masks = {(shape, texture): mask(shape, size, texture).tobytes() for shape in SHAPES for texture in TEXTURES}
        assert len(set(masks.values())) == len(masks)
    assert len(set(COLOURS.values()) | set(BACKGROUNDS.values())) == len(COLOURS) + len(BACKGROUNDS)
    assert len(COLOURS) >= 7 and len(SHAPES) >= 6


def test_objects_do_not_touch_and_details_lie_in_their_cells() -> None:
    covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
    for place, size in [(MIDDLE, "large"), *((place, "small") for place in PLACES)]:
        rows, columns = box(place, size)
        covered[rows.start - 1 : rows.stop, columns.start - 1 : columns.stop] += 1  # with a pixel to the next one
        if place != MIDDLE:
            assert (rows.start // CELL, (rows.stop - 1) // CELL) == (place[0], place[0])
            assert (columns.start // CELL, (columns.stop - 1) // CELL) == (place[1], place[1])
    assert covered.max() == 1
    assert IMAGE_SIZE == 3 * CELL and len(CENTRES) == 3 and RADIUS["tiny"] < RADIUS["small"] < RADIUS["large"]


def test_splits_have_no_picture_in_common_and_repeat_none() -> None:
    contents = Counter(
        (scene.colour, scene.shape, scene.background, scene.details)
        for split, count in SPLITS.items()
        for scene in (draw_scene(split, index) for index in range(min(count, 1000)))
        if scene.split == split or pytest.fail(f"{scene} is in {split}")
    )
    assert contents.total() == sum(min(count, 1000) for count in SPLITS.values())
    assert max(contents.values()) == 1


@pytest.mark.parametrize("split", ["train", "long"])
def test_ordinary_scenes(split: str) -> None:
    drawn = [draw_scene(split, index) for index in range(600)]
    assert {len(scene.details) for scene in drawn} == set(DETAILS)
    kinds = Counter(detail.kind for scene in drawn for detail in scene.details)
    assert len(kinds) == len(KINDS) == len(COLOURS) * len(SHAPES) * len(TEXTURES) * len(DETAIL_SIZES)
    settings = Counter((scene.colour, scene.shape, scene.background) for scene in drawn)
    assert len(settings) == (8 if split == "long" else pytest.approx(len(SETTINGS), rel=0.1))
    if split == "long":
        assert min(settings.values()) > 40  # of 75 on average


def test_short_test_has_every_setting_once() -> None:
    drawn = [draw_scene("short", index) for index in range(SPLITS["short"])]
    assert sorted((scene.colour, scene.shape, scene.background) for scene in drawn) == sorted(SETTINGS)
    with pytest.raises(ValueError, match=r"'short' has scenes 0 \.\. 209, asked for 210"):
        draw_scene("short", 210)


def test_classes_are_equally_frequent() -> None:
    labels = Counter(draw_scene("classes", index).label for index in range(2 * len(MAINS)))
    assert labels == dict.fromkeys(range(len(MAINS)), 2)


def test_hard_scenes_differ_in_two_details_at_least() -> None:
    drawn = [draw_scene("hard", index) for index in range(SPLITS["hard"])]
    assert len({(scene.colour, scene.shape, scene.background) for scene in drawn}) == 1
    known = {kind: number for number, kind in enumerate(KINDS, start=1)}
    kinds = np.zeros((len(drawn), len(PLACES)), int)  # 0: nothing there
    for row, scene in zip(kinds, drawn, strict=True):
        for detail in scene.details:
            row[PLACES.index(detail.place)] = known[detail.kind]
    different = (kinds[:, None] != kinds[None]).sum(2)
    family = np.arange(len(drawn)) // FAMILY
    siblings = (family[:, None] == family[None]) & ~np.eye(len(drawn), dtype=bool)
    assert set(different[siblings]) == {TELLING_DETAILS}
    assert different[family[:, None] != family[None]].min() >= TELLING_DETAILS


def test_siblings_share_what_is_told_first() -> None:
    for first in range(0, 80, FAMILY):
        siblings = [draw_scene("hard", first + number) for number in range(FAMILY)]
        assert len({scene.told_last for scene in siblings}) == 1
        told_first = [{d for d in scene.details if d.place not in scene.told_last} for scene in siblings]
        assert all(a == b for a, b in itertools.pairwise(told_first))


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="no split 'test': choose one of pretrain, train"):
        draw_scene("test", 0)
    with pytest.raises(ValueError, match=r"'train' has scenes 0, 1, 2 \.\.\., asked for -1"):
        draw_scene("train", -1)
