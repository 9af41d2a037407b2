"""Rows: the bad ones among them, their order and division."""

import itertools
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_files import (
    COUNTS,
    ROWS,
    SPOILED,
    STREAMS,
    Write,
    first_pass,
    imagefolder,
    make_rows,
    number_of,
    parquet_of_images,
    parquet_of_paths,
    png,
    sharegpt4v,
    spoil,
    webdataset,
    write_images,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from trainer_runs import BATCH, make_trainer

from longclip_hf.errors import DataError
from longclip_hf.image_files import ImageFiles
from longclip_hf.images import to_rgb
from longclip_hf.rows import BAD_ROW_CAUSES, bad_rows_report, read_image
from longclip_hf.training.captions import CaptionRows, RowReader, drawn, walk
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.sources import load_rows
from longclip_hf.training.streams import CaptionStream, share, shuffled

# Python 3.12 warns of the fork by which dataloader workers begin.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

READER = RowReader("image", "caption", None, ImageFiles(None, access="local"), 10_000)


# Bad rows


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
    expected = [sum(walked[place] for place in SPOILED.get(cause, ())) for cause in BAD_ROW_CAUSES]
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
@pytest.mark.parametrize("cause", SPOILED)
def test_a_bad_row_as_an_error(write: Write, cause: str, tmp_path: Path) -> None:
    rows = spoil(make_rows(), {cause: [7]})
    setting = write(rows, tmp_path)
    data = DataArguments(**setting, heldout_rows=2, max_image_pixels=20_000, on_bad_row="error")
    train, _ = load_rows(data)
    if write is sharegpt4v:
        place, path = r"Object 8 of \S*captions\.json", "0007.png"
    else:
        place, path = r"Row 3 of \S*shard-1\.tar \(0007\)", "0007.png"
    detail = {"empty_caption": "column", "missing": "no path" if write is webdataset else path}.get(cause, path)
    with pytest.raises(DataError, match=rf"{place} cannot be trained on: {cause} \(.*{detail}.*--on_bad_row skip"):
        first_pass(train, ROWS)


def test_the_error_reaches_the_main_process(tmp_path: Path) -> None:
    setting = sharegpt4v(spoil(make_rows(), {"missing": [4]}), tmp_path)
    train, _ = load_rows(DataArguments(**setting, heldout_rows=0, on_bad_row="error"))
    loader: Any = batches_of(train, 2)
    with pytest.raises(DataError, match=r"Object 5 of \S* cannot be .*: missing \(there is no image \S*0004\.png\)"):
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
    with pytest.raises(DataError, match=r"Column 'caption' must hold texts or lists of texts, found int: 3"):
        CaptionRows([{"image": png(1), "caption": 3}], READER)[0]
    with pytest.raises(DataError, match="must hold images, files or paths, found int"):
        CaptionRows([{"image": 3, "caption": "A caption."}], READER)[0]


def test_report_of_bad_rows() -> None:
    assert bad_rows_report([0, 0, 0, 0, 0]) == "0 bad rows"
    assert bad_rows_report(torch.tensor([10, 0, 3, 0, 0])) == "13 bad rows: 10 missing, 3 oversized"


# Captions that are lists


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_every_epoch_of_a_run_draws_anew(workers: dict[str, Any], longclip_folder: Path, tmp_path: Path) -> None:
    """What is drawn depends on seed, epoch and row, not on the order of rows, nor on who reads them."""
    rows = make_rows(2 * BATCH)
    write_images(rows, tmp_path)
    lines = [{"image": f"{row['key']}.png", "caption": [f"{text}." for text in "abcdefgh"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    data = DataArguments(str(tmp_path / "rows.jsonl"), heldout_rows=0)
    train, _ = load_rows(
        data, transform=lambda image: torch.full((3, 32, 32), 1.0 * image.getpixel((3, 3))[0]), seed=7
    )
    assert isinstance(train, CaptionRows)
    settings = {"max_steps": -1, "num_train_epochs": 3, **workers}
    trainer = make_trainer(longclip_folder, tmp_path / "out", train, **settings)
    seen: list[list[tuple[int, str]]] = [[] for _ in range(3)]
    compute = trainer.compute_loss

    def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        texts = trainer.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        numbers = inputs["pixel_values"][:, 0, 0, 0].int().tolist()
        seen[trainer.state.global_step // 2] += zip(numbers, texts, strict=True)
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = keep  # type: ignore[method-assign]
    trainer.train()
    for epoch, found in enumerate(seen):
        texts = ["abcdefgh"[drawn(7, epoch, row) % 8] for row in range(2 * BATCH)]
        assert sorted(found) == [(row, f"{text} .") for row, text in enumerate(texts)]
    assert len({tuple(sorted(found)) for found in seen}) == 3


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
    with pytest.raises(DataError, match=r"/.*shard-2\.tar breaks off soon after row 21 \(0030\)"):
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
    image = read_image("deep.png", ImageFiles(tmp_path), 100)
    assert np.asarray(image)[..., 0].tolist() == (levels // 256).tolist()


def test_a_photo_stands_upright(tmp_path: Path) -> None:
    photo = Image.new("RGB", (30, 20))
    exif = photo.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image("photo.jpg", ImageFiles(tmp_path), 1000).size == (20, 30)


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
    rows = CaptionRows(
        [{"image": value, "caption": "A caption."}], RowReader("image", "caption", None, ImageFiles("/"), 10_000)
    )
    with pytest.raises(DataError, match=f"1 bad rows: 1 {cause};"):
        rows[0]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="1 missing"):
        CaptionRows([{"image": str(tmp_path / "folder.png"), "caption": "A caption."}], READER)[0]


def test_decompression_bombs_are_oversized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from its own limit on, and refuses twice that, whatever `max_image_pixels` allows."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(png(1, (40, 40)), ImageFiles(None), 10_000).size == (40, 40)
    with pytest.raises(Exception, match=r"oversized .*decompression bomb"):
        read_image(png(1, (60, 60)), ImageFiles(None), 10_000)
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"oversized .*40 x 40"):
        read_image(png(1, (40, 40)), ImageFiles(None), 1500)
