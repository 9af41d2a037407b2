"""A hand-made corpus: the same rows in every form that a source may have, each with what reads it.

`tests/longclip_hf/test_sources.py` runs all of it through training's and evaluation's readers.
"""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import zstandard
from caption_files import imagefolder, parquet_of_images, parquet_of_paths, png, sharegpt4v, write_images

Row = dict[str, Any]
Writer = Callable[[Sequence[Row], Path], str]


def packed(name: str, content: bytes) -> bytes:
    """As its suffix says."""
    if name.endswith(".gz"):
        return gzip.compress(content)
    return zstandard.compress(content) if name.endswith(".zst") else content


def jsonl(name: str, image: str = "image", caption: str = "caption") -> Writer:
    def write(rows: Sequence[Row], folder: Path) -> str:
        write_images(rows, folder)
        lines = [json.dumps({image: f"{row['key']}.png", caption: row["caption"], "other": 1}) for row in rows]
        (folder / name).write_bytes(packed(name, "\r\n".join(["", *lines, ""]).encode()))
        return str(folder / name)

    return write


def table(name: str, separator: str) -> Writer:
    def write(rows: Sequence[Row], folder: Path) -> str:
        write_images(rows, folder)
        text = io.StringIO()
        writer = csv.writer(text, delimiter=separator)
        writer.writerow(["file_name", "text"])
        writer.writerows([f"{row['key']}.png", row["caption"]] for row in rows)
        (folder / name).write_bytes(packed(name, text.getvalue().encode()))
        return str(folder / name)

    return write


def nested(rows: Sequence[Row], folder: Path) -> str:
    write_images(rows, folder)
    lines = [json.dumps({"image": f"{r['key']}.png", "meta": {"caption": r["caption"], "n": 1}}) for r in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def llava(rows: Sequence[Row], folder: Path) -> str:
    """ShareGPT4V's conversations in a metadata.jsonl."""
    write_images(rows, folder)
    lines = []
    for row in rows:
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": row["caption"]}]
        lines.append(json.dumps({"file_name": f"{row['key']}.png", "conversations": turns}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def metadata(write: Writer) -> Writer:
    """Beside its images, so that the folder is the source."""

    def of_folder(rows: Sequence[Row], folder: Path) -> str:
        return str(Path(write(rows, folder)).parent)

    return of_folder


def saved(rows: Sequence[Row], folder: Path) -> str:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {
        "image": [row["bytes"] and {"path": None, "bytes": row["bytes"]} for row in rows],
        "caption": [row["caption"] for row in rows],
    }
    datasets.Dataset.from_dict(columns, features).save_to_disk(folder / "saved")
    return str(folder / "saved")


def arrow(rows: Sequence[Row], folder: Path) -> str:
    saved(rows, folder)
    (file,) = (folder / "saved").glob("*.arrow")
    return str(file)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tars(rows: Sequence[Row], folder: Path) -> str:
    """img2dataset's, beside its tables and counts."""
    for shard, part in enumerate((rows[:4], rows[4:])):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for row in part:
                if row["bytes"] is not None:
                    add(tar, f"{row['key']}.jpg", row["bytes"])
                caption = row["caption"]
                add(tar, f"{row['key']}.txt", caption if isinstance(caption, bytes) else caption.encode())
                add(tar, f"{row['key']}.json", b'{"status": "success", "url": "http://a/b"}')
        (folder / f"{shard:05}_stats.json").write_text('{"count": 4}')
        datasets.Dataset.from_dict({"key": ["a"]}).to_parquet(folder / f"{shard:05}.parquet")
    return str(folder)


def files_of_img2dataset(rows: Sequence[Row], folder: Path) -> str:
    for shard, part in enumerate((rows[:4], rows[4:])):
        below = folder / f"{shard:05}"
        below.mkdir()
        write_images(part, below)
        for row in part:
            (below / f"{row['key']}.txt").write_text(row["caption"], encoding="utf-8")
            (below / f"{row['key']}.json").write_text('{"status": "success"}')
        (folder / f"{shard:05}_stats.json").write_text('{"count": 4}')
    return str(folder)


def of_settings(write: Callable[[Sequence[Row], Path], Row]) -> Writer:
    """One of `caption_files`, whose source is enough."""
    return lambda rows, folder: str(write(rows, folder)["data"])


# Sources whose columns are obvious.
OBVIOUS: dict[str, Writer] = {
    "jsonl": jsonl("rows.jsonl"),
    "jsonl.gz": jsonl("rows.jsonl.gz"),
    "jsonl.zst": jsonl("rows.jsonl.zst"),
    "jsonl of other names": jsonl("rows.ndjson", "file_name", "text"),
    "csv": table("rows.csv", ","),
    "csv.gz": table("rows.csv.gz", ","),
    "csv.zst": table("rows.csv.zst", ","),
    "tsv": table("rows.tsv", "\t"),
    "tsv.gz": table("rows.tsv.gz", "\t"),
    "parquet of paths": lambda rows, folder: of_settings(parquet_of_paths)(rows, folder) + "/train.parquet",
    "saved": saved,
    "arrow": arrow,
    "imagefolder": of_settings(imagefolder),
    "metadata.csv": metadata(table("metadata.csv", ",")),
    "metadata.tsv.zst": metadata(table("metadata.tsv.zst", "\t")),
    "metadata.jsonl.gz": metadata(jsonl("metadata.jsonl.gz", "file_name", "caption")),
    "llava": llava,
    "sharegpt4v": of_settings(sharegpt4v),
    "tars": tars,
    "img2dataset": files_of_img2dataset,
}
# With columns that must be named.
NAMED: dict[str, tuple[Writer, str | None, str]] = {
    "nested": (nested, None, "meta.caption"),
    "parquet of images": (of_settings(parquet_of_images), "photo", "text"),
}

__all__ = ["NAMED", "OBVIOUS", "Row", "Writer", "add", "png"]
