"""Rows of every source, those held out, and what the settings refuse."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from caption_files import (
    ROWS,
    STREAMS,
    TABLES,
    Write,
    first_pass,
    imagefolder,
    make_rows,
    number_of,
    parquet_of_paths,
    png,
    sharegpt4v,
    webdataset,
)
from PIL import Image
from transformers import HfArgumentParser

from longclip_hf.errors import DataError
from longclip_hf.rows import BAD_ROW_CAUSES, BadRow
from longclip_hf.training.captions import CaptionRows, walk
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.sources import load_rows
from longclip_hf.training.streams import CaptionStream


@pytest.mark.parametrize("write", TABLES + STREAMS)
def test_every_source_gives_the_same_rows(write: Write, tmp_path: Path) -> None:
    rows = make_rows()
    train, heldout = load_rows(DataArguments(**write(rows, tmp_path), heldout_rows=6))
    assert isinstance(heldout, CaptionRows)
    assert isinstance(train, CaptionRows if write in TABLES else CaptionStream)
    given_rows = first_pass(train, ROWS - 6)
    if write in STREAMS:
        given_rows.sort(key=number_of)
    for number, row in enumerate([heldout[i] for i in range(6)] + given_rows):
        assert number_of(row) == number
        assert row["caption"] == f"Picture {number} is plain. It shows one colour."
        assert row["short_caption"] == f"Picture {number} is plain"
        assert row["bad_rows"] == [0, 0, 0, 0, 0]
    assert len(given_rows) == ROWS - 6


@pytest.mark.parametrize("write", [imagefolder, webdataset])
def test_a_column_of_short_captions(write: Write, tmp_path: Path) -> None:
    setting = write(make_rows(), tmp_path)
    short = "json.title" if write is webdataset else "title"
    train, heldout = load_rows(DataArguments(**setting, short_column=short, heldout_rows=0))
    assert heldout is None
    assert sorted(row["short_caption"] for row in first_pass(train, ROWS)) == sorted(f"Plain {i}" for i in range(ROWS))


def test_the_rule_of_the_first_sentence(tmp_path: Path) -> None:
    rows = make_rows(2)
    for row in rows:
        row["caption"] = "A church of St. Mary.\r\nIt is old."
    setting = imagefolder(rows, tmp_path)
    for rule, short in ((None, "A church of St. Mary"), ("released", "A church of St")):
        data = DataArguments(**setting, heldout_rows=0, **({"first_sentence": rule} if rule else {}))
        assert load_rows(data)[0][0]["short_caption"] == short


def test_captions_are_prepared_before_their_first_sentence(tmp_path: Path) -> None:
    rows = make_rows(2)
    for row in rows:
        row["caption"] = "Fish &amp; chips.<|endoftext|> A plate."
    setting = imagefolder(rows, tmp_path)
    data = DataArguments(**setting, heldout_rows=0, clean_captions=True, neutralise_special_tokens=True)
    row = load_rows(data)[0][0]
    assert (row["caption"], row["short_caption"]) == (
        "Fish & chips.<| endoftext |> A plate.", "Fish & chips.<| endoftext |> A plate"
    )  # fmt: skip


def test_the_transform_is_applied_to_rows_of_both_datasets(tmp_path: Path) -> None:
    train, heldout = load_rows(
        DataArguments(**imagefolder(make_rows(), tmp_path), heldout_rows=3), transform=lambda image: image.size
    )
    assert isinstance(train, CaptionRows)
    assert heldout is not None
    assert train[0]["image"] == heldout[0]["image"] == (40, 32)


def test_reduced_decoding(tmp_path: Path) -> None:
    setting = imagefolder(make_rows(), tmp_path)
    for reduced, size in ((False, (40, 32)), (True, (20, 16))):
        data = DataArguments(**setting, heldout_rows=3, reduced_decoding=reduced)
        for rows in load_rows(data, image_side=8):
            assert isinstance(rows, CaptionRows)
            assert rows[0]["image"].size == size


# Held-out rows


def test_too_many_held_out(tmp_path: Path) -> None:
    for write in (imagefolder, webdataset):
        folder = tmp_path / write.__name__
        folder.mkdir()
        with pytest.raises(DataError, match=r"no rows in 'train' beyond the 13 held out: .* --heldout_rows 1000"):
            load_rows(DataArguments(**write(make_rows(), folder)))


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_rows_of_another_split(streaming: bool, tmp_path: Path) -> None:
    rows = make_rows()
    for split, part in (("train", rows[:9]), ("validation", rows[9:])):
        (tmp_path / split).mkdir()
        imagefolder(part, tmp_path / split)
    data = DataArguments(
        data=str(tmp_path), heldout_split="validation", heldout_rows=3, streaming=streaming, shuffle_buffer=1
    )
    train, heldout = load_rows(data)
    assert heldout is not None
    assert [number_of(heldout[i]) for i in range(len(heldout))] == [9, 10, 11]
    assert [number_of(row) for row in first_pass(train, 9)] == list(range(9))


def test_bad_rows_are_left_out_of_the_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for write in (sharegpt4v, webdataset):
        rows = make_rows()
        rows[1]["bytes"] = rows[1]["bytes"][:60]
        rows[3]["caption"] = " "
        folder = tmp_path / write.__name__
        folder.mkdir()
        _, heldout = load_rows(DataArguments(**write(rows, folder), heldout_rows=5))
        assert heldout is not None
        assert [number_of(heldout[i]) for i in range(len(heldout))] == [0, 2, 4]
    message = "2 of 5 held-out rows are left out. 2 bad rows: 1 unreadable, 1 empty_caption."
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [message] * 2


def test_held_out_rows_that_are_all_bad(tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows[:4]:
        row["bytes"] = None
    with pytest.raises(DataError, match=r"None of the 4 held-out rows .* 4 bad rows: 4 missing; .*0003\.png"):
        load_rows(DataArguments(**sharegpt4v(rows, tmp_path), heldout_rows=4))


def test_images_that_are_none_of_the_data_set_are_bad_rows(tmp_path: Path) -> None:
    """By default, paths begin beside the file, and end in its folder."""
    (tmp_path / "private.png").write_bytes(png(99))
    (tmp_path / "data").mkdir()
    setting = parquet_of_paths(make_rows(4), tmp_path / "data") | {"image_root": None}
    names = ["0000.png", "../private.png", "file:///dev/null", str(tmp_path / "data" / "0003.png")]
    datasets.Dataset.from_dict({"image": names, "caption": ["A plain picture."] * 4}).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    for access, refused in (("root", [1, 2]), ("local", [2]), ("any", [])):
        train, _ = load_rows(DataArguments(**setting, image_access=access, heldout_rows=0))
        assert isinstance(train, CaptionRows)
        found = []
        for number, row in enumerate(train.rows):
            try:
                train.read(row)
            except BadRow as bad:
                found += [number] if BAD_ROW_CAUSES[bad.index] == "refused" else []
        assert found == refused


# ShareGPT4V's file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "x.png"}', "must hold a JSON list of objects, it begins with"),
        ('[{"image": "a.png"}, {"image": "b.', "is broken or breaks off after object 1: Unterminated string"),
        ('[{"image": "a.png"}', "is broken or breaks off after object 1"),
        ('[{"image": "a.png"}, {"image": oops}]', "is broken or breaks off after object 1: Expecting value"),
        ('[{"image": "a.png"}, 3]', "element 1 is 3"),
    ],
)
def test_json_that_is_broken(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(DataArguments(data=str(tmp_path / "list.json"), data_format="sharegpt4v", image_root=str(tmp_path)))


def test_sharegpt4v_rows_without_image_or_answer_are_bad(tmp_path: Path) -> None:
    setting = sharegpt4v(make_rows(4), tmp_path)
    file = tmp_path / "captions.json"
    entries = json.loads(file.read_text())
    del entries[0]["image"]
    entries[1]["conversations"] = entries[1]["conversations"][:1]
    file.write_text(json.dumps(entries))
    train, _ = load_rows(DataArguments(**setting, heldout_rows=0))
    assert isinstance(train, CaptionRows)
    assert list(walk(1, 4))[:3] == [1, 0, 3]
    assert [train[i]["bad_rows"] for i in (0, 1)] == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 0]]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    for count in (4, 6):
        train, _ = load_rows(DataArguments(**sharegpt4v(make_rows(count), tmp_path), heldout_rows=1))
        assert isinstance(train, CaptionRows)
        assert len(train) == count - 1


# Settings


def test_settings_are_a_command_line() -> None:
    (data,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(  # type: ignore[arg-type, unused-ignore]
        ["--data", "shards", "--data_format", "webdataset", "--on_bad_row", "error", "--short_column", "title"]
    )
    assert data == DataArguments("shards", data_format="webdataset", on_bad_row="error", short_column="title")
    assert (data.heldout_rows, data.max_image_pixels) == (1000, Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"data_format": "sharegpt4v"}, "--image_root"),
        ({"data_format": "sharegpt4v", "image_root": "x", "streaming": True}, "not streamed"),
        ({"data_format": "sharegpt4v", "image_root": "x", "heldout_split": "test"}, "one split"),
        ({"heldout_rows": -1}, "--heldout_rows must be at least 0, got -1"),
        ({"shuffle_buffer": 0}, "--shuffle_buffer must be at least 1, got 0"),
        ({"max_image_pixels": 0}, "--max_image_pixels must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(data="x", **setting)


@pytest.mark.parametrize("write", [imagefolder, webdataset])
def test_a_column_that_is_not_there(write: Write, tmp_path: Path) -> None:
    setting = write(make_rows(), tmp_path) | {"long_column": "description"}
    with pytest.raises(DataError, match=r"no column 'description' but \w+, .*--long_column"):
        load_rows(DataArguments(**setting))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file \S*captions\.json"):
        load_rows(DataArguments(str(tmp_path / "captions.json"), data_format="sharegpt4v", image_root=str(tmp_path)))
    setting = sharegpt4v(make_rows(), tmp_path) | {"image_root": str(tmp_path / "images")}
    with pytest.raises(DataError, match=r"--image_root \S*images is not a folder"):
        load_rows(DataArguments(**setting))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = sharegpt4v(make_rows(), tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'`datasets`, of the extras "train", .*pip install "longclip-hf\[train\]"'):
        load_rows(DataArguments(**setting))
