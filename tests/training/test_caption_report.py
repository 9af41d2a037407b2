"""What is said of a run's captions before it begins, counted by hand."""

from pathlib import Path
from typing import Any

import pytest
from caption_files import imagefolder, make_rows, webdataset

from longclip_hf.training.caption_report import report_captions
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.sources import load_rows

CAPTIONS = [
    "A dog runs. It is brown. It barks at a cat.",  # 3 words and 12 in all
    "A dog runs. It is black.",  # the short caption of the first row
    "A house.",  # its own short caption, and of 2 words
    "A tree <|endoftext|> stands. It is green.",
    "",  # a bad row
]


def words(texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
    """A tokenizer of words."""
    return {"input_ids": [[0, *range(len(text.split())), 0] for text in texts]}


def test_counts(tmp_path: Path) -> None:
    rows = make_rows(len(CAPTIONS))
    for row, caption in zip(rows, CAPTIONS, strict=True):
        row["caption"] = caption
    train, _ = load_rows(DataArguments(**imagefolder(rows, tmp_path), heldout_rows=0))
    report = report_captions(train, words, 10)
    assert report is not None
    assert (report.rows, report.of, report.long, report.short) == (4, 5, [13, 8, 4, 9], [5, 5, 4, 6])
    assert (report.equal, report.repeated, report.hiding) == (1, 2, 1)
    said = str(report)
    assert "4 of 5 rows, in tokens: long 8 in the mean, 8 the median, 9 at 95 %, 13 the most, 1 beyond 10; s" in said
    assert "1 equal the long one, 1 have fewer than 3 tokens, 2 repeat another row's. 1 rows hold a literal" in said


@pytest.mark.parametrize("write", [imagefolder, webdataset])
def test_no_image_is_decoded(write: Any, tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows:
        row["bytes"] = row["bytes"][:60]
    train, _ = load_rows(DataArguments(**write(rows, tmp_path), heldout_rows=0))
    report = report_captions(train, words, 10)
    assert report is not None and report.rows == len(rows)
    assert ("the first 13 rows" in str(report)) == (write is webdataset)


def test_captions_that_are_all_bad(tmp_path: Path) -> None:
    rows = make_rows(3)
    for row in rows:
        row["caption"] = ""
    train, _ = load_rows(DataArguments(**imagefolder(rows, tmp_path), heldout_rows=0))
    assert report_captions(train, words, 10) is None
