"""Any source of images with captions -> a retrieval benchmark. `longclip_hf/sources.py` opens and reads it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longclip_hf.errors import BenchmarkError, DataError, ImageError
from longclip_hf.evaluation.data import ImageFile, LeftOut, Retrieval, counted, retrieval
from longclip_hf.image_files import IMAGE_SUFFIXES, Access, ImageFiles, Kind
from longclip_hf.rows import BadRow, field, texts_of
from longclip_hf.sources import Columns as Found
from longclip_hf.sources import Source, find_columns, kind_of, only, open_source, place_of


@dataclass(frozen=True)
class Columns:
    """Where a source keeps what, and how it is read.

    Args:
        image: of images, encoded images, or paths. None: the obvious one.
        captions: one column or several, of texts, lists of texts, or conversations. None given: the obvious one. A dot
            leads into a structure: `meta.caption`.
        split: or None, where there is only one.
        image_root: where names of image files begin, and what they may not leave; by default the folder `data`, or
            where the source lies.
        image_access: of images outside it; see `longclip_hf.image_files.ImageFiles`.
        kind: how it is read; by default as its layout says.
    """

    image: str | None = None
    captions: Sequence[str] = ()
    split: str | None = None
    image_root: str | None = None
    image_access: Access = "root"
    kind: Kind = "auto"


def read_source(source: str, root: Path | None, columns: Columns, left_out: LeftOut) -> Retrieval:
    """See `longclip_hf.evaluation.benchmarks.load_benchmark`."""
    try:
        kind = columns.kind if columns.kind != "auto" else kind_of(Path(source).expanduser())
        opened = open_source(
            source,
            kind,
            split=columns.split,
            image_root=columns.image_root or (None if kind in ("imagefolder", "pairs") else root),
            image_access=columns.image_access,
        )
        found = find_columns(opened, columns.image, columns.captions)
        opened = only(opened, found)
        # Rows of one file, or that hold the same bytes, are one image: two equal candidates would tie: a miss.
        merged: dict[str | bytes, tuple[ImageFile, list[str]]] = {}
        for number, key, image in _images(opened, found, left_out):
            try:
                texts = _texts(opened, found, number)
            except BadRow as bad:
                place = place_of(opened, number)
                left_out.add(place, bad.cause, f"{_begun(place)} cannot be read: {bad}.")
                continue
            merged.setdefault(key, (image, []))[1].extend(texts)
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    return retrieval(source, merged.values(), _notes(source, opened, columns, found, merged, left_out))


def _notes(
    source: str, opened: Source, columns: Columns, found: Found, merged: Mapping[Any, Any], left_out: LeftOut
) -> list[str]:
    folder = Path(source).expanduser()
    unnamed = 0
    if folder.is_dir():
        files = {file.resolve() for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES}
        unnamed = len(files - {Path(key).resolve() for key in merged if isinstance(key, str)})
    joined = len(opened.rows) - len(left_out.rows) - len(merged)
    notes = counted(
        [
            ("rows with the image of an earlier row (one image, several captions)", joined),
            ("images in the folder that no row names, left out", unnamed),
        ]
    )
    plain = found.image in ("image", "file_name") and list(found.captions) == ["caption"]
    if not plain and not (columns.image and columns.captions):
        notes.append(f"images from column {found.image!r}, captions from {', '.join(map(repr, found.captions))}")
    return notes


def _texts(source: Source, columns: Found, number: int) -> list[str]:
    """The captions of a row; None is an empty one."""
    row = source.rows[number]
    return [text for column in columns.captions for text in texts_of(field(row, column), column) or [""]]


def _images(source: Source, columns: Found, left_out: LeftOut) -> Iterator[tuple[int, str | bytes, ImageFile]]:
    """The image of every row, and what tells it from others: its path, or the digest of the bytes in the row."""
    cells = _cells(source, columns.image)
    for number, (digest, path) in enumerate(cells):
        place = place_of(source, number)
        if isinstance(path, BadRow):
            left_out.add(place, path.cause, f"{_begun(place)} cannot be read: {path}.")
        elif digest is not None:
            yield number, digest, ImageFile(place, partial(_read_cell, source.rows, number, columns.image))
        elif not path:
            left_out.add(place, "missing", f"{_begun(place)} has no image in column {columns.image!r}.")
        else:
            yield from _file(number, path, place, source.files, left_out)


def _file(
    number: int, path: str, place: str, files: ImageFiles, left_out: LeftOut
) -> Iterator[tuple[int, str | bytes, ImageFile]]:
    try:
        where = files.place(path)
    except ImageError as error:
        left_out.add(place, error.cause, f"{_begun(place)}: {error}.")
        return
    if "://" in where or Path(where).exists():
        yield number, where, ImageFile(where, partial(files.read, path))
    else:
        left_out.add(
            place,
            "missing",
            f"There is no image {where}, which {place} names. Relative paths begin in --image_root, --data, or beside "
            "the source.",
        )


def _cells(source: Source, column: str) -> Iterator[tuple[bytes | None, Any]]:
    """Of every row the digest of the bytes it holds, and the path or the `BadRow` that stands there."""
    rows = source.rows
    if hasattr(rows, "with_format") and column in rows.features:
        yield from _arrow_cells(rows.select_columns([column]).with_format("arrow"), column, source.name)
        return
    for number in range(len(rows)):
        try:
            cell = field(rows[number], column)
        except BadRow as bad:
            yield None, bad
            continue
        held, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, cell)
        if isinstance(held, bytes):
            yield hashlib.sha256(held).digest(), None
        elif path is None or isinstance(path, str):
            yield None, path
        else:
            raise DataError(
                f"Column {column!r} of {source.name} must hold images or paths, found {type(path).__name__}."
            )


def _arrow_cells(rows: Any, column: str, name: str) -> Iterator[tuple[bytes | None, str | None]]:
    """Without a copy of the bytes."""
    import pyarrow
    import pyarrow.compute

    for batch in rows.iter(1000):
        cells = batch[column]
        if pyarrow.types.is_struct(cells.type) and {"bytes", "path"} <= {field.name for field in cells.type}:
            held = pyarrow.compute.struct_field(cells, "bytes")
            paths = pyarrow.compute.struct_field(cells, "path").to_pylist()
        elif pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
            held, paths = [None] * len(cells), cells.to_pylist()
        elif pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type):
            held, paths = cells, [None] * len(cells)
        else:
            raise DataError(f"Column {column!r} of {name} must hold images or paths, found {cells.type}.")
        for content, path in zip(held, paths, strict=True):
            here = content is not None and content.is_valid
            yield (hashlib.sha256(content.as_buffer()).digest() if here else None), path


def _begun(place: str) -> str:
    return place[:1].upper() + place[1:]


def _read_cell(rows: Any, number: int, column: str) -> bytes:
    cell: Any = field(rows[number], column)
    content: bytes = cell["bytes"] if isinstance(cell, Mapping) else cell
    return content
