"""Writes a split of the embedded world to disk, for tools that read files.

    python -m examples.scenes.write --split hard --format imagefolder --output scenes/hard
    longclip-evaluate MODEL --benchmark scenes/hard

imagefolder: DIR/00000.png ... and DIR/metadata.jsonl with the captions; for the split "classes" a folder for each
class, which the benchmark "imagefolder" reads, and DIR/templates.txt. webdataset: DIR/scenes-00000.tar ... with a .png
and a .json of every row, 1000 rows in each.
"""

import argparse
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longclip_hf.errors import ConversionError
from longclip_hf.files import new_folder

ROWS_PER_SHARD = 1000
BYTES_PER_ROW = 3000  # at most, picture and captions


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.scenes.write",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--split", required=True, help="pretrain, train, validation, short, long, hard or classes")
    parser.add_argument("--format", choices=("imagefolder", "webdataset"), default="imagefolder", help="%(default)s")
    parser.add_argument("--count", type=int, metavar="N", help="rows; default: as many as README.md's table says")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the whole world, %(default)s")
    options = parser.parse_args(args)
    if options.output.exists():
        parser.error(f"{options.output} exists already: remove it or name another --output.")

    from rich.console import Console
    from rich.progress import track

    from examples.scenes.captions import TEMPLATES
    from examples.scenes.dataset import example, row_count

    console = Console(stderr=True)
    try:
        count = row_count(options.split, options.count)
        made = (example(options.split, index, options.seed) for index in range(count))
        rows = iter(track(made, options.split, count, console=console))
        with new_folder(options.output, count * BYTES_PER_ROW) as folder:
            if options.format == "webdataset":
                write_shards(folder, rows)
            elif options.split == "classes":
                write_class_folders(folder, rows)
                (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
            else:
                write_images(folder, rows)
    except (ValueError, ConversionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {count} rows of {options.split}, seed {options.seed}, as {options.format}")
    return 0


def write_images(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Pictures, and metadata.jsonl with `file_name`, `caption`, `short_caption` and `label`."""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number, row in enumerate(rows):
            name = f"{number:05d}.png"
            row.pop("image").save(folder / name)
            metadata.write(json.dumps({"file_name": name} | row) + "\n")


def write_class_folders(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Pictures in folders with the names of their classes, such as `large_red_star`."""
    from examples.scenes.captions import CLASS_NAMES

    for number, row in enumerate(rows):
        own = folder / CLASS_NAMES[row["label"]].replace(" ", "_")
        own.mkdir(exist_ok=True)
        row["image"].save(own / f"{number:05d}.png")


def write_shards(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Tar files for webdataset: of every row a .png, and a .json with its captions and label."""
    for shard in itertools.count():
        batch = list(itertools.islice(rows, ROWS_PER_SHARD))
        if not batch:
            return
        with tarfile.open(folder / f"scenes-{shard:05d}.tar", "w") as tar:
            for number, row in enumerate(batch, start=shard * ROWS_PER_SHARD):
                picture = io.BytesIO()
                row.pop("image").save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("json", json.dumps(row).encode())):
                    entry = tarfile.TarInfo(f"{number:05d}.{suffix}")  # its time is 0: equal rows, equal files
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    sys.exit(main())
