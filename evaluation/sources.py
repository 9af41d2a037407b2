"""Any source of the library `datasets` -> a retrieval benchmark: columns, images in rows, images in files."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longclip_hf.errors import BenchmarkError, ImageError
from longclip_hf.evaluation.data import IMAGE_SUFFIXES, ImageFile, Retrieval, counted, retrieval
from longclip_hf.image_files import Access, ImageFiles

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Columns:
    """Where a source of `datasets` keeps what.

    Args:
        image: of images, encoded images, or paths.
        captions: one column or several, of texts or lists of texts.
        split: or None, where there is only one.
        image_root: where names of image files begin, and what they may not leave; by default the folder `data`, or
            where the source lies.
        image_access: of images outside it; see `longclip_hf.image_files.ImageFiles`.
    """

    image: str = "image"
    captions: Sequence[str] = ("caption",)
    split: str | None = None
    image_root: str | None = None
    image_access: Access = "root"


def read_source(source: str, root: Path | None, columns: Columns) -> Retrieval:
    """See `longclip_hf.evaluation.benchmarks.load_benchmark`."""
    rows = _open_source(source, columns.split)
    missing = [name for name in (columns.image, *columns.captions) if name not in rows.column_names]
    if missing:
        raise BenchmarkError(f"{source} has no column {missing[0]!r} but {', '.join(rows.column_names)}.")
    files = ImageFiles.of(source, columns.image_root or root, columns.image_access)
    # Rows of one file, or that hold the same bytes, are one image: two equal candidates would tie, which is a miss.
    merged: dict[str | bytes, tuple[ImageFile, list[str]]] = {}
    images = _row_images(rows, columns.image, source, files)
    for (key, image), row in zip(images, rows.select_columns(list(dict.fromkeys(columns.captions))), strict=True):
        texts = merged.setdefault(key, (image, []))[1]
        for column in columns.captions:
            texts += _texts(row[column], column, source)
    joined = len(rows) - len(merged)
    folder = Path(source).expanduser()
    unnamed = 0
    if folder.is_dir():
        unnamed = len(_image_files(folder) - {Path(key).resolve() for key in merged if isinstance(key, str)})
    notes = counted(
        [
            ("rows with the image of an earlier row (one image, several captions)", joined),
            ("images in the folder that no row names, left out", unnamed),
        ]
    )
    return retrieval(source, merged.values(), notes)


def _image_files(folder: Path) -> set[Path]:
    return {file.resolve() for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES}


def _open_source(source: str, split: str | None) -> Any:
    """A `datasets.Dataset` whose images stay undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Sources other than the named benchmarks are read with the package `datasets`, of the extra "evaluate": '
            'pip install "longclip-hf[evaluate]"'
        ) from error
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() not in FORMATS:
        raise BenchmarkError(f"{source} is none of the files that are read here: {', '.join(FORMATS)}.")
    try:
        if path.is_file():
            rows = datasets.load_dataset(FORMATS[path.suffix.lower()], data_files=str(path))
        elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise BenchmarkError(f"{source} cannot be read by `datasets`: {type(cause).__name__}: {cause}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows and (split is not None or len(rows) > 1):
            raise BenchmarkError(f"{source} has no split {split!r}: name one of {', '.join(map(str, rows))}.")
        rows = rows[split or next(iter(rows))]
    elif split is not None:
        raise BenchmarkError(f"{source} has no splits, so there is no {split!r} in it: leave it out.")
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _row_images(rows: Any, column: str, source: str, files: ImageFiles) -> Iterator[tuple[str | bytes, ImageFile]]:
    """The image of every row, and what tells it from others: its path, or the digest of the bytes in the row."""
    import pyarrow
    import pyarrow.compute

    number = 0
    rows = rows.select_columns([column])
    for batch in rows.with_format("arrow").iter(1000):
        cells = batch[column]
        if pyarrow.types.is_struct(cells.type) and {"bytes", "path"} <= {field.name for field in cells.type}:
            held = pyarrow.compute.struct_field(cells, "bytes")
            paths = pyarrow.compute.struct_field(cells, "path").to_pylist()
        elif pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
            held, paths = [None] * len(cells), cells.to_pylist()
        elif pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type):
            held, paths = cells, [None] * len(cells)
        else:
            raise BenchmarkError(f"Column {column!r} of {source} must hold images or paths, found {cells.type}.")
        for content, path in zip(held, paths, strict=True):
            if content is not None and content.is_valid:
                digest = hashlib.sha256(content.as_buffer()).digest()
                yield digest, ImageFile(f"row {number} of {source}", partial(_read_cell, rows, number, column))
            elif not path:
                raise BenchmarkError(f"Row {number} of {source} has no image in column {column!r}.")
            else:
                try:
                    place = files.place(path)
                except ImageError as error:
                    raise BenchmarkError(f"Row {number} of {source}: {error}") from error
                if "://" not in place and not Path(place).exists():
                    raise BenchmarkError(
                        f"There is no image {place}, which row {number} of {source} names. Relative paths begin in "
                        "--image_root, --data, or beside the source."
                    )
                yield place, ImageFile(place, partial(files.read, path))
            number += 1


def _read_cell(rows: Any, number: int, column: str) -> bytes:
    cell: Any = rows[number][column]
    content: bytes = cell["bytes"] if isinstance(cell, Mapping) else cell
    return content


def _texts(cell: Any, column: str, source: str) -> list[str]:
    """The captions in a cell: one, or a list of them. None is an empty one."""
    texts = ["" if text is None else text for text in (cell if isinstance(cell, list) else [cell])]
    if not all(isinstance(text, str) for text in texts):
        raise BenchmarkError(f"Column {column!r} of {source} must hold texts or lists of texts, found {cell!r:.60}.")
    return texts
