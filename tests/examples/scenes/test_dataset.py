"""Rows are made when they are read, in any process, and training takes them as they are."""

import pickle

import pytest
from PIL import Image

from examples.scenes.dataset import example, row_count, scenes
from examples.scenes.world import SPLITS
from longclip_hf.training.captions import CaptionRows, RowReader


def test_rows_are_examples() -> None:
    rows = scenes("hard", 12)
    assert len(rows) == 12
    assert rows[5] == example("hard", 5)
    assert rows[[1, 3]]["caption"] == [example("hard", 1)["caption"], example("hard", 3)["caption"]]
    assert isinstance(rows[0]["image"], Image.Image) and rows[0]["image"].mode == "RGB"
    assert rows.select([7, 2])[0] == rows[7]
    assert rows.shuffle(seed=0)[0] in list(rows)
    assert scenes("hard", 12, seed=1)[5]["caption"] != rows[5]["caption"]
    assert pickle.loads(pickle.dumps(rows))[4] == rows[4]


@pytest.mark.parametrize("split", SPLITS)
def test_default_counts(split: str) -> None:
    assert len(scenes(split)) == SPLITS[split]


def test_training_reads_them() -> None:
    rows = CaptionRows(scenes("train", 3), RowReader("image", "caption", "short_caption", None, 10_000), "error")
    row, plain = rows[1], example("train", 1)
    assert (row["caption"], row["short_caption"]) == (plain["caption"], plain["short_caption"])
    assert row["image"].tobytes() == plain["image"].tobytes()


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="no split 'valid'"):
        scenes("valid")
    with pytest.raises(ValueError, match=r"0 \.\. 209, asked for 299"):
        row_count("short", 300)
    with pytest.raises(ValueError, match="asked for -1"):
        row_count("train", 0)
