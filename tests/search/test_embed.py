"""Sources become tables: every row once, with what stood in it, whatever happened on the way."""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import fork_server
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caption_files import imagefolder, make_rows, parquet_of_images, png, webdataset, write_images
from torch.nn import functional as F

from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.search.embed import main
from longclip_hf.search.source_rows import Row, column_of, open_rows

lancedb = pytest.importorskip("lancedb", reason="the extra `search` is not installed")

ROWS = 13
CHUNK = 4


def embed(source: str | Path, model: Path, output: Path, *more: str | Path) -> int:
    words = [source, "--model", model, "--output", output, "--chunk_rows", CHUNK, "--device", "cpu", *more]
    return main(list(map(str, words)))


def table_of(folder: Path) -> dict[str, list[Any]]:
    """All of it, in the order of the source's rows."""
    found: dict[str, list[Any]] = (
        lancedb.connect(str(folder))
        .open_table("rows")
        .to_arrow()
        .sort_by([("source", "ascending"), ("row", "ascending")])
    ).to_pydict()
    return found


def vectors(column: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(np.array(column, dtype=np.float32))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images with captions, prices and names, the third gone and the sixth no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = make_rows(ROWS)
    imagefolder(rows, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    priced = [line | {"price": number + 0.5, "row": f"r{number}"} for number, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in priced))
    (folder / "0002.png").unlink()
    (folder / "0005.png").write_bytes(b"no image")
    return folder


GOOD = [number for number in range(ROWS) if number not in (2, 5)]


def test_a_folder(photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Vectors are the encoder's, of unit length and in half precision; columns travel; bad rows are named."""
    assert embed(photos, longclip_folder, tmp_path / "table") == 0
    printed, errors = capsys.readouterr()
    assert f"{len(GOOD)} rows of {photos} added" in printed
    assert "2 bad rows: 1 missing, 1 unreadable" in errors and "line 3 of" in errors and "line 6 of" in errors

    found = table_of(tmp_path / "table")
    assert found["row"] == GOOD and set(found["source"]) == {str(photos)}
    assert found["price"] == [number + 0.5 for number in GOOD]
    assert found["row_"] == [f"r{number}" for number in GOOD], "the source's own column of a name that is taken"
    assert found["location"] == [str(photos / f"{number:04}.png") for number in GOOD]
    assert found["text"] == found["caption"] == [f"Picture {n} is plain. It shows one colour." for n in GOOD]
    assert not any(found["thumbnail"])

    encoder = Encoder(longclip_folder, device="cpu", quiet=True)
    texts = encoder.encode_texts(found["text"])
    assert found["tokens"] == texts.lengths.tolist()
    assert torch.allclose(vectors(found["text_vector"]), F.normalize(texts.embeds, dim=1), atol=1e-3)
    from longclip_hf.evaluation.data import image_file

    images = encoder.encode_images([image_file(Path(place)) for place in found["location"]])
    assert torch.allclose(vectors(found["image_vector"]), F.normalize(images, dim=1), atol=1e-3)
    kinds = lancedb.connect(str(tmp_path / "table")).open_table("rows").schema
    assert kinds.field("image_vector").type == pa.list_(pa.float16(), 24)

    bad = [json.loads(line) for line in (tmp_path / "table" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["cause"]) for row in bad] == [(2, "missing"), (5, "unreadable")]
    settings = json.loads((tmp_path / "table" / "longclip.json").read_text())
    assert settings["fingerprint"] == encoder.fingerprint and settings["length"] == encoder.positions == 248


def test_again_and_grown(photos: Path, longclip_folder: Path, tmp_path: Path) -> None:
    """The same command adds what is missing, what was mended and what is new, and nothing else."""
    assert embed(photos, longclip_folder, tmp_path / "table") == 0
    first = table_of(tmp_path / "table")
    (photos / "0002.png").write_bytes(png(2))
    lines = (photos / "metadata.jsonl").read_text()
    new = {"file_name": "0001.png", "caption": "One more.", "title": "x", "price": 1.0, "row": "r"}
    (photos / "metadata.jsonl").write_text(lines + json.dumps(new) + "\n")
    assert embed(photos, longclip_folder, tmp_path / "table") == 0
    found = table_of(tmp_path / "table")
    assert found["row"] == sorted([*GOOD, 2, ROWS])
    kept = [found["row"].index(number) for number in GOOD]
    assert [found["image_vector"][at] for at in kept] == first["image_vector"]
    bad = (tmp_path / "table" / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in bad] == [5]


KILLED = """
import os, signal, sys
from longclip_hf.search import embed, tables
original, chunks = tables.{kind}.{method}, []
def add(self, *given):
    if {before} and len(chunks) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, *given)
    chunks.append(1)
    if not {before} and len(chunks) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
tables.{kind}.{method} = add
sys.exit(embed.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("format", "kind", "method", "before"),
    [
        ("lance", "LanceTable", "add", True),
        ("lance", "LanceTable", "add", False),
        ("npy", "NumpyParts", "_write", True),
    ],
)
def test_killed(
    format: str, kind: str, method: str, before: bool, photos: Path, longclip_folder: Path, tmp_path: Path
) -> None:
    """After SIGKILL the same command ends with the rows of a run of one piece, bit for bit, none lost or double."""
    options = ["--format", format]
    code = KILLED.format(kind=kind, method=method, before=before)
    words = [photos, "--model", longclip_folder, "--output", tmp_path / "killed", "--chunk_rows", CHUNK]
    line = [sys.executable, "-W", "error", "-c", code, *words, "--device", "cpu", *options]
    done = fork_server.run(list(map(str, line)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert embed(photos, longclip_folder, tmp_path / "killed", *options) == 0
    assert embed(photos, longclip_folder, tmp_path / "whole", *options) == 0
    if format == "lance":
        assert table_of(tmp_path / "killed") == table_of(tmp_path / "whole")
        return
    for name in sorted(file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*_*.*")):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_disk(photos: Path, longclip_folder: Path, tmp_path: Path) -> None:
    """One clear error, and the same command goes on when there is room."""
    code = """
import resource, sys
from longclip_hf.search import embed, tables
original, chunks = tables.LanceTable.add, []
def add(self, rows):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if len(chunks) == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        original(self, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # what is printed goes to a file too
    chunks.append(1)
tables.LanceTable.add = add
sys.exit(embed.main(sys.argv[1:]))
"""
    words = [photos, "--model", longclip_folder, "--output", tmp_path / "table", "--chunk_rows", CHUNK]
    done = fork_server.run([sys.executable, "-W", "error", "-c", code, *map(str, words), "--device", "cpu"])
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in error and "goes on from it" in error
    assert embed(photos, longclip_folder, tmp_path / "table") == 0
    assert table_of(tmp_path / "table")["row"] == GOOD


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_other_formats(format: str, photos: Path, longclip_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert embed(photos, longclip_folder, tmp_path / "out", "--format", format) == 0
    assert embed(photos, longclip_folder, tmp_path / "lance") == 0
    lance = table_of(tmp_path / "lance")
    if format == "parquet":
        files = sorted((tmp_path / "out").glob("part-*.parquet"))
        found = pa.concat_tables(pq.read_table(file) for file in files).to_pydict()
        assert len(files) == 4 and found == lance
        return
    parts = [np.load(file) for file in sorted((tmp_path / "out" / "img_emb").glob("*.npy"))]
    images = np.concatenate(parts)
    assert images.dtype == np.float16 and images.tolist() == lance["image_vector"]
    metadata = sorted((tmp_path / "out" / "metadata").glob("*.parquet"))
    assert [len(pq.read_table(file)) for file in metadata] == [len(part) for part in parts]
    assert pa.concat_tables(pq.read_table(file) for file in metadata)["price"].to_pylist() == lance["price"]


def test_images_alone(longclip_folder: Path, tmp_path: Path) -> None:
    """In folders of any depth, without a word of text."""
    (tmp_path / "bare" / "deep").mkdir(parents=True)
    write_images(make_rows(5), tmp_path / "bare" / "deep")
    assert embed(tmp_path / "bare", longclip_folder, tmp_path / "table") == 0
    found = table_of(tmp_path / "table")
    assert found["location"] == [str(tmp_path / "bare" / "deep" / f"{number:04}.png") for number in range(5)]
    assert "text_vector" not in found and found["text"] == [None] * 5


def test_texts_alone(longclip_folder: Path, tmp_path: Path) -> None:
    """An empty one is a bad row; of several, the first is embedded, and that is said."""
    captions = [["one dog", "another"], ["two dogs"], [""], []]
    datasets.Dataset.from_dict({"caption": captions, "n": [1, 2, 3, 4]}).to_parquet(tmp_path / "texts.parquet")
    assert embed(tmp_path / "texts.parquet", longclip_folder, tmp_path / "table", "--precision", "float32") == 0
    found = table_of(tmp_path / "table")
    assert found["text"] == ["one dog", "two dogs"] and found["n"] == [1, 2] and "image_vector" not in found
    assert vectors(found["text_vector"]).norm(dim=1) == pytest.approx([1, 1])


@pytest.mark.parametrize("write", [parquet_of_images, webdataset])
def test_images_in_rows(write: Any, longclip_folder: Path, tmp_path: Path) -> None:
    """They have no file of their own, so a thumbnail is kept, and not their bytes."""
    (tmp_path / "source").mkdir()
    found = write(make_rows(ROWS), tmp_path / "source")
    source = found["data"] if write is parquet_of_images else tmp_path / "source"
    column = ["--image_column", "photo"] if write is parquet_of_images else []
    assert embed(source, longclip_folder, tmp_path / "table", *column) == 0
    table = table_of(tmp_path / "table")
    assert all(data.startswith(b"\xff\xd8") for data in table["thumbnail"])
    assert table["location"] == [None] * ROWS and not {"photo", "png"} & set(table)
    assert table["text"] == [row["caption"] for row in make_rows(ROWS)]
    if write is webdataset:
        assert table["title"] == [f"Plain {number}" for number in range(ROWS)]


def test_a_second_source(photos: Path, longclip_folder: Path, tmp_path: Path) -> None:
    assert embed(photos, longclip_folder, tmp_path / "table", "--columns", "price") == 0
    (tmp_path / "more").mkdir()
    write_images(make_rows(3), tmp_path / "more")
    assert embed(tmp_path / "more", longclip_folder, tmp_path / "table", "--columns") == 0
    found = table_of(tmp_path / "table")
    assert found["source"].count(str(tmp_path / "more")) == 3 and len(found["row"]) == len(GOOD) + 3


class TestRefusals:
    """One clear error, and what was there stays."""

    def said(self, capsys: pytest.CaptureFixture[str]) -> str:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    def test_another_model(
        self,
        photos: Path,
        clip_folder: Path,
        longclip_folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert embed(photos, longclip_folder, tmp_path / "table") == 0
        before = table_of(tmp_path / "table")
        capsys.readouterr()
        assert embed(photos, clip_folder, tmp_path / "table") == 2
        assert "fingerprint" in (line := self.said(capsys)) and "length 248 and not 77" in line
        assert embed(photos, longclip_folder, tmp_path / "table", "--precision", "float32") == 2
        assert "precision float16 and not float32" in self.said(capsys)
        assert embed(photos, longclip_folder, tmp_path / "table", "--format", "npy") == 2
        assert "format lance and not npy" in self.said(capsys)
        assert table_of(tmp_path / "table") == before

    def test_columns_that_the_table_has_not(
        self, photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert embed(photos, longclip_folder, tmp_path / "table", "--columns", "price") == 0
        capsys.readouterr()
        (tmp_path / "more").mkdir()
        imagefolder(make_rows(3), tmp_path / "more")
        assert embed(tmp_path / "more", longclip_folder, tmp_path / "table") == 2
        assert "The table has no column 'file_name', 'caption', 'title'" in self.said(capsys)

    def test_two_writers(
        self, photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from longclip_hf.files import only_writer

        (tmp_path / "table").mkdir()
        with only_writer(tmp_path / "table"):
            assert embed(photos, longclip_folder, tmp_path / "table") == 2
        assert "Another process writes to" in self.said(capsys)
        assert embed(photos, longclip_folder, tmp_path / "table") == 0

    def test_a_damaged_table(
        self, photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert embed(photos, longclip_folder, tmp_path / "table") == 0
        capsys.readouterr()
        for file in (tmp_path / "table" / "rows.lance" / "data").iterdir():
            file.write_bytes(file.read_bytes()[:100])
        assert embed(photos, longclip_folder, tmp_path / "table") == 2
        assert "cannot be read" in self.said(capsys)

    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            (["--image_column", "nope"], "has no column 'nope' but"),
            (["--caption_column", "nope"], "name one with --caption_column"),
            (["--columns", "nope"], "see --columns"),
            (["--split", "test"], "has no splits"),
        ],
    )
    def test_settings(
        self, more: list[str], expected: str, photos: Path, longclip_folder: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        assert embed(photos, longclip_folder, tmp_path / "table", *more) == 2
        assert expected in self.said(capsys) and not (tmp_path / "table").exists()

    def test_a_folder_of_other_things(
        self, photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert embed(photos, longclip_folder, photos) == 2
        assert "holds other files" in self.said(capsys)
        for file in photos.glob("*.png"):
            file.unlink()
        assert embed(photos, longclip_folder, tmp_path / "table") == 2
        assert f"None of the {ROWS} rows" in self.said(capsys)


def test_values_that_do_not_fit() -> None:
    assert column_of([1, "x", None, 2**70], pa.int64()) == (pa.array([1, None, None, None], pa.int64()), 2)
    assert column_of(["a", {"b": 1}, b"c\xff", None], pa.string())[0].to_pylist() == ["a", '{"b": 1}', "c�", None]


def test_every_row_says_what_is_wrong_with_it(photos: Path) -> None:
    rows = open_rows(str(photos), max_pixels=100)
    read: list[Row] = [rows.read(number) for number in range(len(rows))]
    assert {row.bad.cause for row in read if row.bad} == {"missing", "oversized", "unreadable"}
