"""Images with captions, as each kind of source has them on disk, and what can be wrong with them."""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from longclip_hf.training.captions import CaptionRows
from longclip_hf.training.streams import CaptionStream

ROWS = 13
Write = Callable[[Sequence[dict[str, Any]], Path], dict[str, Any]]


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
COUNTS = [2, 1, 2, 1, 0]
