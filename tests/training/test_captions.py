"""Rows of every source, the bad ones among them, their order and division, and batches of them."""

import io
import itertools
import json
import logging
import random
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoProcessor, CLIPTokenizer, CLIPTokenizerFast, HfArgumentParser

from training.arguments import DataArguments
from training.captions import (
    BAD_ROW_CAUSES,
    CaptionCollator,
    CaptionRows,
    CaptionStream,
    DataError,
    RowReader,
    bad_rows_report,
    first_sentence,
    length_groups,
    load_rows,
    read_image,
    share,
    shuffled,
    to_rgb,
    walk,
)
from training.captions import _json_objects as json_objects

# Python 3.12 warns of the fork by which dataloader workers begin.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

ROWS = 13
READER = RowReader("image", "caption", None, None, 10_000)
Write = Callable[[Sequence[dict[str, Any]], Path], dict[str, Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its tables where this test alone finds them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(number: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A picture whose colour is its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number, 2 * number, 99)).save(file, "PNG")
    return file.getvalue()


def make_rows(count: int = ROWS) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{i:04}",
            "bytes": png(i),
            "caption": f"Picture {i} is plain. It shows one colour.",
            "title": f"Plain {i}",
        }
        for i in range(count)
    ]


def number_of(row: Mapping[str, Any]) -> int:
    """The number that the picture shows."""
    red, green, blue = row["image"].getpixel((3, 3))
    assert (green, blue) == (2 * red, 99)
    return int(red)


# What the sources look like on disk. Each writer returns the settings that read it.


def write_images(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    for row in rows:
        if row["bytes"] is not None:
            (folder / f"{row['key']}.png").write_bytes(row["bytes"])


def sharegpt4v(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    write_images(rows, folder)
    entries = [
        {
            "id": row["key"],
            "image": f"{row['key']}.png",
            "conversations": [
                {"from": "human", "value": "Describe. <image>"},
                {"from": "gpt", "value": row["caption"]},
            ],
        }
        for row in rows
    ]
    (folder / "captions.json").write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    return {"data": str(folder / "captions.json"), "data_format": "sharegpt4v", "image_root": str(folder)}


def imagefolder(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    write_images(rows, folder)
    lines = [{"file_name": f"{r['key']}.png", "caption": r["caption"], "title": r["title"]} for r in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": str(folder), "data_format": "imagefolder"}


def folder_as_found(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    return imagefolder(rows, folder) | {"data_format": "datasets"}


def parquet_of_images(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    for shard, part in enumerate((rows[:4], rows[4:9], rows[9:])):
        columns = {
            "photo": [row["bytes"] and {"path": f"{row['key']}.png", "bytes": row["bytes"]} for row in part],
            "text": [row["caption"] for row in part],
        }
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"part-{shard}.parquet")
    return {
        "data": str(folder / "*.parquet"),
        "data_format": "parquet",
        "image_column": "photo",
        "long_column": "text",
    }


def parquet_of_paths(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    write_images(rows, folder)
    columns = {"image": [f"{row['key']}.png" for row in rows], "caption": [row["caption"] for row in rows]}
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    return {"data": str(folder), "data_format": "parquet", "image_root": str(folder)}


def streamed_parquet(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    return parquet_of_images(rows, folder) | {"streaming": True}


def webdataset(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    for shard, part in enumerate((rows[:4], rows[4:9], rows[9:])):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for row in part:
                described = json.dumps({"caption": row["caption"], "title": row["title"]}).encode()
                for extension, data in (("png", row["bytes"]), ("json", described)):
                    if data is not None:
                        info = tarfile.TarInfo(f"{row['key']}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    (folder / "README.md").write_text("Not a shard.")
    return {
        "data": str(folder),
        "data_format": "webdataset",
        "image_column": "png",
        "long_column": "json.caption",
        "shuffle_buffer": 5,
    }


TABLES = [sharegpt4v, imagefolder, folder_as_found, parquet_of_images, parquet_of_paths]
STREAMS = [streamed_parquet, webdataset]


def first_pass(rows: CaptionRows | CaptionStream, count: int) -> list[Any]:
    return (
        [rows[i] for i in range(len(rows))] if isinstance(rows, CaptionRows) else list(itertools.islice(rows, count))
    )


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
        assert row["bad_rows"] == [0, 0, 0, 0]
    assert len(given_rows) == ROWS - 6


@pytest.mark.parametrize("write", [imagefolder, webdataset])
def test_a_column_of_short_captions(write: Write, tmp_path: Path) -> None:
    setting = write(make_rows(), tmp_path)
    short = "json.title" if write is webdataset else "title"
    train, heldout = load_rows(DataArguments(**setting, short_column=short, heldout_rows=0))
    assert heldout is None
    assert sorted(row["short_caption"] for row in first_pass(train, ROWS)) == sorted(f"Plain {i}" for i in range(ROWS))


def test_the_transform_is_applied_to_rows_of_both_datasets(tmp_path: Path) -> None:
    train, heldout = load_rows(
        DataArguments(**imagefolder(make_rows(), tmp_path), heldout_rows=3), transform=lambda image: image.size
    )
    assert isinstance(train, CaptionRows)
    assert heldout is not None
    assert train[0]["image"] == heldout[0]["image"] == (40, 32)


@pytest.mark.parametrize(
    ("caption", "first"),
    [
        ("A dog runs. It is brown. It barks.", "A dog runs"),
        ("A dog runs.It is brown.", "A dog runs.It is brown."),
        ("It costs 3.50 dollars. Cheap.", "It costs 3.50 dollars"),
        ("A dog runs.\nIt is brown.", "A dog runs"),
        ("A dog\nruns.\n\nIt is brown.", "A dog runs"),
        ("A dog runs.", "A dog runs."),
        ("Really? Yes. No.", "Really? Yes"),
        (". Nothing before it.", ""),
        ("", ""),
    ],
)
def test_first_sentence(caption: str, first: str) -> None:
    assert first_sentence(caption) == first


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


# Bad rows


def spoil(rows: list[dict[str, Any]], numbers: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    for cause, places in numbers.items():
        for place in places:
            if cause == "empty_caption":
                rows[place]["caption"] = ""
            else:
                other = {"missing": None, "unreadable": png(7)[:80], "oversized": png(7, (200, 101))}
                rows[place]["bytes"] = other[cause]
    return rows


# The first shard is spared missing images: `datasets` finds out there what a shard consists of.
SPOILED = {"missing": [8, 10], "unreadable": [5], "oversized": [6, 11], "empty_caption": [0]}
COUNTS = [2, 1, 2, 1]


def batches_of(rows: Any, workers: int, **options: Any) -> Iterator[Any]:
    """Batches of 3 through a dataloader; the collator keeps the rows and sums their counts."""
    return iter(DataLoader(rows, batch_size=3, num_workers=workers, collate_fn=list, **options))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write", [sharegpt4v, imagefolder, parquet_of_images, parquet_of_paths])
def test_bad_rows_of_a_table_are_replaced_and_counted(write: Write, workers: int, tmp_path: Path) -> None:
    setting = write(spoil(make_rows(), SPOILED), tmp_path)
    train, _ = load_rows(DataArguments(**setting, heldout_rows=0, max_image_pixels=20_000))
    batches = list(batches_of(train, workers))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 1]  # as many as without bad rows
    rows = [row for batch in batches for row in batch]
    bad = {place for places in SPOILED.values() for place in places}
    for number, row in enumerate(rows):
        assert number_of(row) not in bad
        assert (number_of(row) == number) == (number not in bad) == (sum(row["bad_rows"]) == 0)
    # Every bad row was met at its own place, and where the walk from another came by.
    walked = Counter(
        place for start in range(ROWS) for place in itertools.takewhile(lambda place: place in bad, walk(start, ROWS))
    )
    expected = [sum(walked[place] for place in SPOILED[cause]) for cause in BAD_ROW_CAUSES]
    assert np.sum([row["bad_rows"] for row in rows], axis=0).tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write", STREAMS)
def test_bad_rows_of_a_stream_are_passed_over_and_counted(write: Write, workers: int, tmp_path: Path) -> None:
    setting = write(spoil(make_rows(), SPOILED), tmp_path)
    train, _ = load_rows(DataArguments(**setting, heldout_rows=0, max_image_pixels=20_000))
    loader = batches_of(train, workers)
    rows = [row for batch in itertools.islice(loader, 40) for row in batch]
    assert len(rows) == 120
    seen = Counter(number_of(row) for row in rows)
    assert set(seen) == {1, 2, 3, 4, 7, 9, 12}
    # 120 good rows are about 17 passes; what is counted is met once a pass, in both workers' shares.
    passes = 120 / 7
    counts = np.sum([row["bad_rows"] for row in rows], axis=0) / passes
    assert np.abs(counts - COUNTS).max() < 0.5
    del loader


def test_counts_of_one_pass_are_exact(tmp_path: Path) -> None:
    """The last rows of a pass may be bad: their counts travel with the first good row of the next."""
    rows = make_rows()[:4]
    rows[3]["caption"] = rows[0]["caption"] = ""
    train, _ = load_rows(DataArguments(**webdataset(rows, tmp_path) | {"shuffle_buffer": 1}, heldout_rows=0))
    given_rows = first_pass(train, 6)
    assert [number_of(row) for row in given_rows] == [1, 2] * 3
    assert [row["bad_rows"][3] for row in given_rows] == [1, 0, 2, 0, 2, 0]


@pytest.mark.parametrize("write", [sharegpt4v, webdataset])
@pytest.mark.parametrize("cause", BAD_ROW_CAUSES)
def test_a_bad_row_as_an_error(write: Write, cause: str, tmp_path: Path) -> None:
    rows = spoil(make_rows(), {cause: [7]})
    setting = write(rows, tmp_path)
    data = DataArguments(**setting, heldout_rows=2, max_image_pixels=20_000, on_bad_row="error")
    train, _ = load_rows(data)
    if write is sharegpt4v:
        place, path = "Row 7", "0007.png"
    else:
        place, path = r"Row 3 of shard 1 \(0007 in \S*shard-1\.tar\)", "0007.png"
    detail = {"empty_caption": "column", "missing": "no path" if write is webdataset else path}.get(cause, path)
    with pytest.raises(DataError, match=rf"{place} cannot be trained on: {cause} \(.*{detail}.*--on_bad_row skip"):
        first_pass(train, ROWS)


def test_the_error_reaches_the_main_process(tmp_path: Path) -> None:
    setting = sharegpt4v(spoil(make_rows(), {"missing": [4]}), tmp_path)
    train, _ = load_rows(DataArguments(**setting, heldout_rows=0, on_bad_row="error"))
    loader: Any = batches_of(train, 2)
    with pytest.raises(DataError, match=r"Row 4 cannot be trained on: missing \(\S*0004\.png\)"):
        list(loader)
    loader._shutdown_workers()  # left to the garbage collector, which finds it in a cycle, torch takes 10 s


@pytest.mark.parametrize("write", [sharegpt4v, webdataset])
def test_data_that_is_all_bad_is_an_error(write: Write, tmp_path: Path) -> None:
    rows = spoil(make_rows(), {"unreadable": range(8), "empty_caption": range(8, ROWS)})
    train, _ = load_rows(DataArguments(**write(rows, tmp_path), heldout_rows=0))
    with pytest.raises(
        DataError, match=r"None of the 13 rows.* 13 bad rows: 8 unreadable, 5 empty_caption; the last one"
    ):
        next(batches_of(train, 0))


def test_rows_that_are_bad_together_get_different_substitutes() -> None:
    rows = [{"image": png(i), "caption": "" if 20 <= i < 60 else "A caption."} for i in range(100)]
    train = CaptionRows(rows, READER)
    substitutes = [number_of(train[i]) for i in range(20, 60)]
    # The next row in order would give row 60 forty times.
    assert len(set(substitutes)) >= 30
    assert substitutes == [number_of(train[i]) for i in range(20, 60)]


@given(st.integers(1, 300), st.data())
def test_walk_comes_by_every_row(size: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    places = list(walk(start, size))
    assert places[0] == start
    assert sorted(places) == list(range(size))


def test_an_index_outside_the_table() -> None:
    rows = CaptionRows([{"image": png(1), "caption": "A caption."}], READER)
    assert len(list(iter(rows))) == 1  # ends: Python iterates until IndexError
    for index in (-1, 1):
        with pytest.raises(IndexError):
            rows[index]


def test_a_caption_column_of_another_type() -> None:
    with pytest.raises(DataError, match=r"Column 'caption' must hold texts, found list: \['a', 'b'\]"):
        CaptionRows([{"image": png(1), "caption": ["a", "b"]}], READER)[0]
    with pytest.raises(DataError, match="must hold images, files or paths, found int"):
        CaptionRows([{"image": 3, "caption": "A caption."}], READER)[0]


def test_report_of_bad_rows() -> None:
    assert bad_rows_report([0, 0, 0, 0]) == "0 bad rows"
    assert bad_rows_report(torch.tensor([10, 0, 3, 0])) == "13 bad rows: 10 missing, 3 oversized"


# Streams


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
def test_every_row_of_every_shard_has_one_reader(slots: int, shards: int, rows: int) -> None:
    owners = Counter(
        (shard, row)
        for slot in range(slots)
        for shard, residues in share(slot, slots, shards)
        for row in range(rows)
        if row % slots in residues
    )
    assert owners == Counter(itertools.product(range(shards), range(rows)))


@given(st.integers(1, 12), st.integers(1, 12))
def test_readers_read_equally_much(slots: int, shards: int) -> None:
    columns = [sum(len(residues) for _, residues in share(slot, slots, shards)) for slot in range(slots)]
    assert columns == [shards] * slots
    if shards % slots == 0:  # whole shards, each opened by one reader
        assert all(len(share(slot, slots, shards)) == shards // slots for slot in range(slots))


class OnePass(IterableDataset[str]):
    """The keys of one pass of a stream, as its reader sees them."""

    def __init__(self, stream: CaptionStream, epoch: int) -> None:
        self.stream = stream
        self.epoch = epoch

    def __iter__(self) -> Iterator[str]:
        return (row["__key__"] for _, row in self.stream.one_pass(self.epoch))


def keys_of_pass(folder: Path, ranks: int, workers: int, epoch: int = 0, seed: int = 0) -> list[list[str]]:
    """The keys that each process reads in a pass, in order."""
    data = DataArguments(data=str(folder), data_format="webdataset", image_column="png", long_column="json.caption",
                         heldout_rows=5, shuffle_buffer=4)  # fmt: skip
    keys = []
    for rank in range(ranks):
        train, _ = load_rows(data, seed=seed, rank=rank, world_size=ranks)
        assert isinstance(train, CaptionStream)
        keys.append(list(DataLoader(OnePass(train, epoch), batch_size=None, num_workers=workers)))
    return keys


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (3, 0), (2, 2)])
def test_a_pass_covers_every_row_once(ranks: int, workers: int, tmp_path: Path) -> None:
    webdataset(make_rows(30), tmp_path)  # shards of 4, 5 and 21 rows
    keys = keys_of_pass(tmp_path, ranks, workers)
    assert sorted(itertools.chain(*keys)) == [f"{i:04}" for i in range(5, 30)]
    assert all(len(part) >= 3 for part in keys)


def test_the_order_depends_on_seed_and_pass_alone(tmp_path: Path) -> None:
    webdataset(make_rows(30), tmp_path)
    orders = {(epoch, seed): keys_of_pass(tmp_path, 2, 0, epoch, seed) for epoch in (0, 1) for seed in (0, 1)}
    assert orders[0, 0] == keys_of_pass(tmp_path, 2, 0, 0, 0)
    assert len({json.dumps(order) for order in orders.values()}) == 4
    assert len({json.dumps([sorted(part) for part in order]) for order in orders.values()}) == 1


def test_a_stream_goes_on_for_ever_and_begins_where_it_is_told(tmp_path: Path) -> None:
    webdataset(make_rows(), tmp_path)
    data = DataArguments(data=str(tmp_path / "*.tar"), data_format="webdataset", image_column="png",
                         long_column="json.caption", heldout_rows=3)  # fmt: skip
    train, _ = load_rows(data, seed=7)
    assert isinstance(train, CaptionStream)
    three = [number_of(row) for row in itertools.islice(train, 30)]
    passes = [three[:10], three[10:20], three[20:]]
    assert all(sorted(part) == list(range(3, 13)) for part in passes)
    assert len({tuple(part) for part in passes}) == 3
    train.set_epoch(2)
    assert [number_of(row) for row in itertools.islice(train, 10)] == passes[2]


def test_more_readers_than_rows(tmp_path: Path) -> None:
    webdataset(make_rows(2), tmp_path)
    (tmp_path / "shard-1.tar").unlink()
    (tmp_path / "shard-2.tar").unlink()
    data = DataArguments(data=str(tmp_path), data_format="webdataset", image_column="png",
                         long_column="json.caption", heldout_rows=0)  # fmt: skip
    train, _ = load_rows(data, rank=2, world_size=3)
    with pytest.raises(DataError, match="Nothing is left to read for reader 2 of 3"):
        next(iter(train))


def test_a_shard_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    setting = webdataset(make_rows(40), tmp_path) | {"shuffle_buffer": 1}
    shard = tmp_path / "shard-2.tar"
    shard.write_bytes(shard.read_bytes()[: 512 * 89])  # in the middle of the data of a file
    train, _ = load_rows(DataArguments(**setting, heldout_rows=0))
    with pytest.raises(DataError, match=r"Shard 2 of 3 breaks off soon after row 15 \(0024 in .*shard-2\.tar\)"):
        first_pass(train, 40)


@given(st.lists(st.integers(), max_size=30), st.integers(1, 12), st.integers())
def test_shuffled_is_a_permutation(rows: list[int], size: int, seed: int) -> None:
    given_rows = list(shuffled(rows, size, random.Random(seed)))
    assert sorted(given_rows) == sorted(rows)
    assert given_rows == list(shuffled(rows, size, random.Random(seed)))


# Images


def test_odd_modes_become_rgb() -> None:
    colour = (200, 100, 50)
    for mode in ("RGB", "RGBA", "RGBX", "CMYK"):
        assert to_rgb(Image.new("RGB", (4, 4), colour).convert(mode)).getpixel((0, 0)) == colour, mode
    palette = Image.new("RGB", (4, 4), colour).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = bytes([128] * 3)
    assert to_rgb(palette).getpixel((0, 0)) == colour
    grey: dict[str, tuple[Any, int]] = {"L": (90, 90), "LA": ((90, 7), 90), "1": (1, 255), "I": (90 * 256 + 5, 90)}
    grey |= {"F": (90.0, 90), "I;16": (90 * 256 + 5, 90), "I;16B": (255 * 256, 255)}
    for mode, (value, level) in grey.items():
        image = to_rgb(Image.new(mode, (4, 4), value))
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (level,) * 3), mode


def test_sixteen_bits_in_a_file(tmp_path: Path) -> None:
    levels = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image = read_image("deep.png", str(tmp_path), 100)
    assert np.asarray(image)[..., 0].tolist() == (levels // 256).tolist()


def test_a_photo_stands_upright(tmp_path: Path) -> None:
    photo = Image.new("RGB", (30, 20))
    exif = photo.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image("photo.jpg", str(tmp_path), 1000).size == (20, 30)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (None, "missing"),
        ("", "missing"),
        ("no/such.png", "missing"),
        ({"path": None, "bytes": None}, "missing"),
        ({"path": "x.png", "bytes": b""}, "unreadable"),
        (b"not an image", "unreadable"),
        (png(1)[:50], "unreadable"),
        (png(1)[:-30], "unreadable"),
        (png(1, (101, 100)), "oversized"),
        (png(1, (2, 401)), "oversized"),
    ],
)
def test_what_is_wrong_with_an_image(value: Any, cause: str, tmp_path: Path) -> None:
    rows = CaptionRows([{"image": value, "caption": "A caption."}], RowReader("image", "caption", None, "/", 10_000))
    with pytest.raises(DataError, match=f"1 bad rows: 1 {cause};"):
        rows[0]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="1 missing"):
        CaptionRows([{"image": str(tmp_path / "folder.png"), "caption": "A caption."}], READER)[0]


def test_decompression_bombs_are_oversized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from its own limit on, and refuses twice that, whatever `max_image_pixels` allows."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(png(1, (40, 40)), None, 10_000).size == (40, 40)
    with pytest.raises(Exception, match=r"oversized .*decompression bomb"):
        read_image(png(1, (60, 60)), None, 10_000)
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"oversized .*40 x 40"):
        read_image(png(1, (40, 40)), None, 1500)


def test_an_image_behind_an_address() -> None:
    import fsspec

    with fsspec.open("memory://there.png", "wb") as file:
        file.write(png(5))
    assert read_image("memory://there.png", "/somewhere", 10_000).getpixel((0, 0)) == (5, 10, 99)
    with pytest.raises(Exception, match=r"missing \(memory://elsewhere\.png"):
        read_image("memory://elsewhere.png", None, 10_000)


# ShareGPT4V's file


@pytest.mark.parametrize("chunk", [2, 7, 64, 1 << 20])
def test_json_is_read_in_pieces(chunk: int, tmp_path: Path) -> None:
    entries = [{"id": i, "text": 'é"]},{[' * i, "more": [{"a": []}, 1.5, None]} for i in range(9)]
    for indent in (None, 2):
        (tmp_path / "list.json").write_text(json.dumps(entries, ensure_ascii=False, indent=indent), encoding="utf-8")
        assert list(json_objects(tmp_path / "list.json", chunk)) == entries
    (tmp_path / "list.json").write_text(" [] ")
    assert list(json_objects(tmp_path / "list.json", chunk)) == []


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
    with pytest.raises(DataError, match=message):
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
    assert [train[i]["bad_rows"] for i in (0, 1)] == [[1, 0, 0, 0], [1, 0, 0, 1]]


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
    with pytest.raises(DataError, match=r"no column 'description' but \['\w+', .*--long_column"):
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
    with pytest.raises(ImportError, match=r'`datasets`, of the extra "train".*pip install -e "\.\[train\]"'):
        load_rows(DataArguments(**setting))


# Batches


@pytest.fixture(scope="module")
def processor(clip_folder: Path) -> Any:
    return AutoProcessor.from_pretrained(clip_folder)


def words(count: int) -> str:
    """A caption of `count + 2` tokens: every `a` is one."""
    return " ".join(["a"] * count)


def row_of(caption: str, number: int = 1, bad_rows: Sequence[int] = (0, 0, 0, 0), short: str = "a") -> Any:
    image = Image.open(io.BytesIO(png(number)))
    return {"image": image, "caption": caption, "short_caption": short, "bad_rows": bad_rows}


def tokenizers(clip_folder: Path, processor: Any) -> list[Any]:
    kinds = [processor.tokenizer]
    if CLIPTokenizer is not CLIPTokenizerFast:  # 4.57 has a slow one besides
        kinds += [CLIPTokenizer.from_pretrained(clip_folder), CLIPTokenizerFast.from_pretrained(clip_folder)]
    return kinds


def test_a_batch_by_hand(clip_folder: Path, processor: Any) -> None:
    for tokenizer in tokenizers(clip_folder, processor):
        bos, eot, a = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a")["input_ids"][1]
        collator = CaptionCollator(tokenizer, processor.image_processor, 7)
        rows = [
            row_of(words(2), 10, (1, 0, 0, 2), short=words(1)),
            row_of(words(5), 20),
            row_of(words(6), 30, (1, 1, 0, 0), short=words(3)),
            row_of(words(50), 40),
        ]
        batch = collator(rows)
        assert next(iter(batch)) == "pixel_values"  # the Trainer takes the batch size from the first
        assert batch["input_ids"].tolist() == [
            [bos, a, a, eot, eot, eot, eot],
            [bos, a, a, a, a, a, eot],
            [bos, a, a, a, a, a, eot],
            [bos, a, a, a, a, a, eot],
        ]
        assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 3] + [[1] * 7] * 3
        assert batch["short_input_ids"].tolist() == [
            [bos, a, eot, eot, eot],
            [bos, a, eot, eot, eot],
            [bos, a, a, a, eot],
            [bos, a, eot, eot, eot],
        ]
        assert batch["short_attention_mask"].sum(1).tolist() == [3, 3, 5, 3]
        assert batch["truncated"].tolist() == 2
        assert batch["bad_rows"].tolist() == [2, 1, 0, 2]
        assert {value.dtype for name, value in batch.items() if name != "pixel_values"} == {torch.long}
        reference = processor.image_processor(images=[row["image"] for row in rows], return_tensors="pt")
        assert torch.equal(batch["pixel_values"], reference["pixel_values"])
        assert batch["pixel_values"].shape == (4, 3, 32, 32)


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.integers(3, 20))
def test_tokens_are_those_of_the_tokenizer(processor: Any, captions: list[str], max_length: int) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, max_length)
    input_ids, attention_mask, cut = collator.tokens(captions)
    expected = processor.tokenizer(captions, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    assert torch.equal(input_ids, expected["input_ids"])
    assert torch.equal(attention_mask, expected["attention_mask"])
    full = processor.tokenizer(captions, verbose=False)["input_ids"]
    assert cut == sum(len(ids) > max_length for ids in full)


def test_pixels_may_be_made_beforehand_and_of_any_mode(processor: Any) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, 7)
    row = row_of("a b c")
    made = collator([row | {"image": collator.pixels(row["image"])}])
    assert torch.equal(made["pixel_values"], collator([row])["pixel_values"])
    for mode in ("P", "LA", "CMYK", "I;16", "1", "RGBA"):
        image = Image.new(mode, (50, 40))
        assert torch.equal(collator.pixels(image), collator.pixels(to_rgb(image))), mode


@pytest.mark.parametrize("size", [(3, 3), (64, 3), (3, 64), (1, 1), (1, 40), (40, 1)])
def test_tiny_images_keep_their_channels(size: tuple[int, int], processor: Any) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, 7)
    colour = (250, 120, 10)
    pixels = collator.pixels(Image.new("RGB", size, colour))
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    expected = (torch.tensor(colour) / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(pixels, expected[:, None, None].expand(3, 32, 32), atol=1e-5)


def test_a_tokenizer_without_padding(processor: Any) -> None:
    class NoPadding:
        pad_token_id = None

    with pytest.raises(ValueError, match="no pad_token"):
        CaptionCollator(NoPadding(), processor.image_processor, 7)


def test_counts_through_workers_and_collator(processor: Any, tmp_path: Path) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, 8)
    setting = sharegpt4v(spoil(make_rows(), SPOILED), tmp_path)
    data = DataArguments(**setting, heldout_rows=0, max_image_pixels=20_000)
    train, _ = load_rows(data, transform=collator.pixels)
    batches = list(DataLoader(train, batch_size=4, num_workers=2, collate_fn=collator))
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4, 4, 1]
    counts = sum(batch["bad_rows"] for batch in batches)
    assert isinstance(counts, torch.Tensor)
    assert counts.shape == (len(BAD_ROW_CAUSES),)
    assert all(counts >= torch.tensor(COUNTS))
    assert sum(int(batch["truncated"]) for batch in batches) == ROWS  # every caption is longer than 8 tokens


# Groups of similar length


def padded_tokens(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    ends = list(itertools.accumulate(sizes))
    return sum(size * max(lengths[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def least_tokens(lengths: Sequence[int], groups: int) -> int:
    """By trying every way to cut the sorted lengths."""
    batch = len(lengths)
    return min(
        padded_tokens(sorted(lengths), np.diff([0, *cuts, batch]).tolist())
        for count in range(min(groups, batch))
        for cuts in itertools.combinations(range(1, batch), count)
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 10))
def test_length_groups_are_the_best(lengths: list[int], groups: int) -> None:
    order, sizes = length_groups(torch.tensor(lengths), groups)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert len(sizes) <= groups
    assert min(sizes) >= 1
    assert sum(sizes) == len(lengths)
    along = [lengths[i] for i in order.tolist()]
    assert along == sorted(lengths)
    assert padded_tokens(along, sizes) == least_tokens(lengths, groups)


def test_length_groups_by_hand() -> None:
    order, sizes = length_groups(torch.tensor([248, 10, 12, 240, 11, 12]), 2)
    assert order.tolist() == [1, 4, 2, 5, 3, 0]
    assert sizes == [4, 2]  # 4 x 12 + 2 x 248; [3, 3] would take 3 x 12 + 3 x 248
    assert length_groups(torch.tensor([7, 7, 7]), 4)[1] == [3]
    assert length_groups(torch.tensor([3, 9]), 1)[1] == [2]


def test_length_groups_restore_the_batch_and_suit_a_large_one() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 249, (2048,), generator=generator)
    totals = []
    for groups in (1, 2, 4, 8, 300):
        order, sizes = length_groups(lengths, groups)
        assert torch.equal(torch.cat(lengths[order].split(sizes))[order.argsort()], lengths)
        totals.append(padded_tokens(lengths[order].tolist(), sizes))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 2048 * int(lengths.max())
    assert totals[-1] == int(lengths.sum())


@pytest.mark.parametrize(("lengths", "groups"), [([], 2), ([1, 2], 0), ([[1, 2]], 2)])
def test_length_groups_of_nothing(lengths: Any, groups: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        length_groups(torch.tensor(lengths), groups)
