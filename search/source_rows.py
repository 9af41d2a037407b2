"""A source's rows as they are embedded: an image, a text or both, and all else that stands in them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longclip_hf.errors import DataError, ImageError
from longclip_hf.evaluation.misses import thumbnail
from longclip_hf.image_files import Access
from longclip_hf.rows import BadRow, read_image, texts_of
from longclip_hf.rows import field as field_of
from longclip_hf.sources import CAPTION_COLUMNS, IMAGE_COLUMNS, Source, open_source

Thumbnails = Literal["needed", "all", "none"]
THUMBNAIL_SIDE = 256
# Columns of the table that are not the source's; a column of the source that is called so gets a `_` behind its name.
OWN = ("source", "row", "location", "text", "tokens", "thumbnail", "image_vector", "text_vector")
_PEEKED = 100


@dataclass
class Row:
    """One row, read.

    Attributes:
        number: in the source.
        place: what an error calls it.
        bad: what is wrong with it, if anything.
        location: path or address of the image, where it has one of its own.
        image: decoded, in RGB, where images are embedded.
        text: the caption, or None where there is none.
        texts: how many captions there are; the first is embedded.
        thumbnail: a small JPEG.
        others: the other columns.
    """

    number: int
    place: str
    bad: BadRow | None = None
    location: str | None = None
    image: Any = None
    text: str | None = None
    texts: int = 0
    thumbnail: bytes | None = None
    others: dict[str, Any] = field(default_factory=dict)


class SourceRows:
    """The rows of a table by index. It can be pickled, for dataloader workers.

    Args:
        source: opened.
        kinds: column -> its type; what lies within `json` counts as a column.
        image, caption: columns, or None for what is not embedded.
        columns: which of the others are carried; None for all.
        max_pixels: of the largest image that is decoded.
        thumbnails: for which images: those without a file of their own, all, or none.
        prepare: done to every text.

    Attributes:
        name: of the source, by which its rows are known in the table; a path is absolute.
        carried: name in the table -> column of the source.
        kinds: name in the table -> type of `pyarrow`.
    """

    def __init__(
        self,
        source: Source,
        kinds: Mapping[str, Any],
        image: str | None,
        caption: str | None,
        columns: Sequence[str] | None,
        max_pixels: int,
        thumbnails: Thumbnails = "needed",
        prepare: Callable[[str], str] | None = None,
    ) -> None:
        self.source = source
        self.name = absolute(source.name)
        self.image, self.caption = image, caption
        self.max_pixels = max_pixels
        self.thumbnails = thumbnails
        self.prepare = prepare
        if missing := [name for name in columns or () if name not in kinds]:
            raise DataError(f"{source.name} has no column {missing[0]!r} but {', '.join(kinds)}: see --columns.")
        kept = [name for name in kinds if columns is None or name in columns]
        # The bytes of images stay where they are, and a caption that is called like the table's own is that.
        kept = [name for name in kept if name != image or _is_text(kinds[name])]
        kept = [name for name in kept if not name == caption == "text" or not _is_text(kinds[name])]
        self.carried = {f"{name}_" if name in OWN else name: name for name in kept}
        self.kinds = {name: kinds[column] for name, column in self.carried.items()}

    def __len__(self) -> int:
        return len(self.source.rows)

    def read(self, number: int) -> Row:
        """The row, which says itself what is wrong with it.

        Raises:
            DataError: if a column holds something else than images or texts.
        """
        row = Row(number, self.source.place(number))
        try:
            found = self.source.rows[number]
            if isinstance(found, BadRow):
                raise found
            flat = _flat(found)
            if self.caption is not None:
                texts = [text for text in self._texts(found) if text.strip()]
                row.text, row.texts = (texts[0] if texts else None), len(texts)
                if row.text is None and self.image is None:
                    raise BadRow("empty_caption", f"column {self.caption!r}")
            if self.image is not None:
                self._read_image(field_of(found, self.image), row)
            row.others = {name: flat.get(column) for name, column in self.carried.items()}
        except BadRow as bad:
            row.bad = bad
        return row

    def _texts(self, found: Any) -> list[str]:
        texts = texts_of(field_of(found, str(self.caption)), str(self.caption))
        return texts if self.prepare is None else [self.prepare(text) for text in texts]

    def _read_image(self, value: Any, row: Row) -> None:
        row.image = read_image(value, self.source.files, self.max_pixels)
        if isinstance(value, str):
            try:
                row.location = self.source.files.place(value)
            except ImageError as error:
                raise BadRow(error.cause, str(error)) from error
            if "://" not in row.location:
                row.location = str(Path(row.location).absolute())
        if self.thumbnails == "all" or (self.thumbnails == "needed" and row.location is None):
            row.thumbnail = thumbnail(row.image, THUMBNAIL_SIDE)


def open_rows(
    name: str,
    *,
    image: str | None = None,
    caption: str | None = None,
    embed: Sequence[str] = ("images", "texts"),
    columns: Sequence[str] | None = None,
    split: str | None = None,
    config: str | None = None,
    image_root: str | None = None,
    image_access: Access = "root",
    max_pixels: int,
    thumbnails: Thumbnails = "needed",
    prepare: Callable[[str], str] | None = None,
) -> SourceRows:
    """Opens a folder, a file, a pattern of files or a Hub id; captions are not needed, nor are images.

    Args:
        name: which.
        image, caption: their columns; by default the obvious ones.
        embed: `"images"`, `"texts"` or both, as far as there are any.
        columns, max_pixels, thumbnails, prepare: see `SourceRows`.
        split, config, image_root, image_access: see `longclip_hf.sources.open_source`.

    Raises:
        DataError: if there is no such source or column, or nothing to embed.
    """
    source = open_source(
        name, split=split, config=config, image_root=image_root, image_access=image_access, captions=False
    )
    kinds = _kinds(source)
    found_image = _column(source, kinds, image, IMAGE_COLUMNS, "--image_column") if "images" in embed else None
    found_caption = _column(source, kinds, caption, CAPTION_COLUMNS, "--caption_column") if "texts" in embed else None
    if found_image is None and found_caption is None:
        raise DataError(
            f"{name} has no obvious column of {' or '.join(embed)}; its columns are {', '.join(source.columns)}: "
            "name one with --image_column or --caption_column."
        )
    return SourceRows(source, kinds, found_image, found_caption, columns, max_pixels, thumbnails, prepare)


def absolute(name: str) -> str:
    """A path, if there is one of that name, from the root on; else `name`."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _column(
    source: Source, kinds: Mapping[str, Any], asked: str | None, names: Sequence[str], setting: str
) -> str | None:
    there = source.columns
    if asked is not None:
        if asked in there or asked.partition(".")[0] in there:
            return asked
        if asked in kinds:
            return f"json.{asked}"
        raise DataError(f"{source.name} has no column {asked!r} but {', '.join(there)}: name one with {setting}.")
    found = [name for name in names if name in there]
    found = found or [f"json.{name}" for name in names[:1] if name in kinds]
    if len(found) > 1 and found[0] != names[0]:
        raise DataError(f"{source.name} has columns {' and '.join(found)}: name the right one with {setting}.")
    return found[0] if found else None


def _kinds(source: Source) -> dict[str, Any]:
    """The columns and their types: as the source says, or as its first rows have them."""
    features = getattr(source.rows, "features", None)
    if features is not None:
        outer = {field.name: _plain(field.type) for field in features.arrow_schema}
        inner = outer.pop("json", None)
        return {field.name: _plain(field.type) for field in (inner if _is_struct(inner) else ())} | outer
    rows = [source.rows[number] for number in range(min(len(source.rows), _PEEKED))]
    flat = [_flat(row) for row in rows if isinstance(row, Mapping)]
    names = dict.fromkeys(name for row in flat for name in row)
    return {name: _kind([row.get(name) for row in flat]) for name in names}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """What img2dataset writes into `.json` beside an image is columns like others."""
    inner = row.get("json")
    return {**(inner if isinstance(inner, Mapping) else {}), **{k: v for k, v in row.items() if k != "json"}}


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return kind is not None and bool(pa.types.is_struct(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _plain(kind: Any) -> Any:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return pa.string() if pa.types.is_null(kind) else kind


def _kind(values: Sequence[Any]) -> Any:
    """Of values of JSON and tars. What is no number, truth value, text or list of texts is kept as JSON."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if any(isinstance(value, Mapping) and "bytes" in value for value in values):
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # an image
    if kinds == {bool}:
        return pa.bool_()
    if kinds and kinds <= {int, float}:
        return pa.int64() if kinds == {int} else pa.float64()
    return pa.string()


def column_of(values: Sequence[Any], kind: Any) -> tuple[Any, int]:
    """A `pyarrow.Array`, and how many values did not fit into it and are null."""
    import pyarrow as pa

    if _is_text(kind):
        values = [value if value is None or isinstance(value, str) else _as_text(value) for value in values]
    try:
        return pa.array(values, kind), 0
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        kept = [value if _fits(value, kind) else None for value in values]
        return pa.array(kept, kind), sum(
            old is not None and new is None for old, new in zip(values, kept, strict=True)
        )


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return json.dumps(value, ensure_ascii=False, default=str)


def _fits(value: Any, kind: Any) -> bool:
    import pyarrow as pa

    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True
