"""Any source of images with captions -> a retrieval benchmark. `longclip_hf/sources.py` opens and reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longclip_hf.errors import BenchmarkError, DataError, ImageError
from longclip_hf.evaluation.data import ImageFile, LeftOut, Retrieval, counted, retrieval
from longclip_hf.image_files import IMAGE_SUFFIXES, Access, Kind
from longclip_hf.rows import BadRow, begun, field, image_key, texts_of
from longclip_hf.sources import Columns as Found
from longclip_hf.sources import Source, find_columns, kind_of, only, open_source


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
        group: of numbers or texts that images which are alike share, such as frames of one film: intervals resample
            groups. None: every image is its own.
    """

    image: str | None = None
    captions: Sequence[str] = ()
    split: str | None = None
    image_root: str | None = None
    image_access: Access = "root"
    kind: Kind = "auto"
    group: str | None = None


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
        if columns.group is not None and columns.group.partition(".")[0] not in opened.columns:
            raise DataError(
                f"{source} has no column {columns.group!r} but {', '.join(opened.columns)}: name the right one with "
                "--group_column."
            )
        opened = only(opened, found, [columns.group] if columns.group else [])
        # Rows of one file, or that hold the same bytes, are one image: two equal candidates would tie: a miss.
        merged: dict[Any, tuple[ImageFile, list[str]]] = {}
        groups: dict[Any, Any] = {}
        for number in range(len(opened.rows)):
            place = opened.place(number)
            try:
                key, image, texts = _read_row(opened, found, number, place)
                group = field(opened.rows[number], columns.group) if columns.group else None
            except BadRow as bad:
                left_out.add(place, bad.cause, f"{begun(place)} cannot be read: {bad}.")
                continue
            if columns.group and group in (None, ""):
                left_out.add(place, "no_group", f"{begun(place)} has no group in column {columns.group!r}.")
                continue
            merged.setdefault(key, (image, []))[1].extend(texts)
            if groups.setdefault(key, group) != group:
                raise DataError(
                    f"{begun(place)} has the group {group!r}, and another row of its image {groups[key]!r}: an image "
                    "is of one group."
                )
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    made = retrieval(source, merged.values(), _notes(source, opened, columns, found, merged, left_out))
    if columns.group is None:
        return made
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    return replace(made, group_of=[numbers[groups[key]] for key in merged])


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


def _read_row(source: Source, columns: Found, number: int, place: str) -> tuple[Any, ImageFile, list[str]]:
    """What tells a row's image from others, the image, and the captions, of which None is an empty one.

    Raises:
        BadRow: if the row cannot be evaluated.
        DataError: for a column of something else.
    """
    row = source.rows[number]
    value = field(row, columns.image)
    texts = [text for column in columns.captions for text in texts_of(field(row, column), column) or [""]]
    if not any(text.strip() for text in texts):
        raise BadRow("empty_caption", f"column {' and '.join(map(repr, columns.captions))}")
    held, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, value)
    if isinstance(held, bytes):
        return image_key(held), ImageFile(place, partial(_held, source.rows, number, columns.image)), texts
    if not path:
        raise BadRow("missing", f"there is no image in column {columns.image!r}")
    if not isinstance(path, str):
        raise DataError(
            f"Column {columns.image!r} of {source.name} must hold images or paths, found {type(path).__name__}."
        )
    try:
        where = source.files.place(path)
    except ImageError as error:
        raise BadRow(error.cause, str(error)) from error
    if "://" not in where and not Path(where).exists():
        raise BadRow(
            "missing",
            f"there is no image {where}; relative paths begin in --image_root, --data, or beside the source",
        )
    return where, ImageFile(where, partial(source.files.read, path)), texts


def _held(rows: Any, number: int, column: str) -> bytes:
    """The bytes of a row's image."""
    value: Any = field(rows[number], column)
    content: bytes = value["bytes"] if isinstance(value, Mapping) else value
    return content
