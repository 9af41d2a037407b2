"""A row of any source -> its image and its captions, or one error that says what is wrong with it.

Training and evaluation read rows by this. What a row is read from is `sources.py`'s.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.errors import DataError, ImageError, LongCLIPError
from longclip_hf.files import write_atomically
from longclip_hf.image_files import ImageFiles

if TYPE_CHECKING:
    from PIL import Image

# In the order of the counts that travel with rows and batches.
BAD_ROW_CAUSES = ("missing", "unreadable", "oversized", "empty_caption", "refused")
# Who answers in a conversation, LLaVA's and the one of chat templates.
_ANSWERS = frozenset({"gpt", "assistant"})


class BadRow(LongCLIPError):
    """One row that cannot be used, for the cause `BAD_ROW_CAUSES[index]`."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause} ({detail})")
        self.cause = cause
        self.detail = detail
        self.index = BAD_ROW_CAUSES.index(cause)

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return type(self), (self.cause, self.detail)


def begun(place: str) -> str:
    """A place as a sentence begins with it: no other letter is changed, of a path."""
    return place[:1].upper() + place[1:]


def bad_rows_report(counts: Iterable[int]) -> str:
    """`"13 bad rows: 10 missing, 3 unreadable"`, from counts in the order of `BAD_ROW_CAUSES`."""
    named = [(int(count), cause) for count, cause in zip(counts, BAD_ROW_CAUSES, strict=True)]
    causes = ", ".join(f"{count} {cause}" for count, cause in named if count)
    return f"{sum(count for count, _ in named)} bad rows" + (f": {causes}" if causes else "")


def field(row: Any, column: str) -> Any:
    """`row[column]`, or what lies within a structure, `"json.caption"`, or None.

    Raises:
        BadRow: where a source found that the row, or this part of it, is broken.
    """
    if isinstance(row, BadRow):
        raise row
    if column in row:
        if isinstance(row[column], BadRow):
            raise row[column]
        return row[column]
    outer, _, inner = column.partition(".")
    if not inner or outer not in row:
        return None
    return field(row[outer], inner) if isinstance(row[outer], Mapping | BadRow) else None


def texts_of(cell: Any, column: str) -> list[str]:
    """The captions in a cell: a text, a list of them, or the answers of a conversation. None is an empty list.

    Bytes that are not UTF-8, and halves of surrogate pairs, become U+FFFD.

    Raises:
        DataError: if the cell holds something else.
    """
    if cell is None:
        return []
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "replace")
    if isinstance(cell, str):
        return [_mended(cell)]
    if isinstance(cell, Mapping):  # as `datasets` before 4 gives lists of structures: a structure of lists
        cell = [dict(zip(cell, values, strict=False)) for values in zip(*cell.values(), strict=False)]
    if isinstance(cell, list):
        if cell and all(isinstance(part, Mapping) for part in cell):
            values = [part.get("value", part.get("content")) for part in cell if _answers(part)]
            return [_mended(value) for value in values[:1] if isinstance(value, str)]
        if all(part is None or isinstance(part, str) for part in cell):
            return ["" if part is None else _mended(part) for part in cell]
    raise DataError(f"Column {column!r} must hold texts or lists of texts, found {type(cell).__name__}: {cell!r:.60}")


def _answers(part: Mapping[str, Any]) -> bool:
    return part.get("from", part.get("role")) in _ANSWERS


def _mended(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # pairs of surrogates are one character, halves none
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_image(value: Any, files: ImageFiles, max_pixels: int, target: int | None = None) -> "Image.Image":
    """Opens, checks and decodes an image, upright and in RGB.

    Args:
        value: a path, the bytes of a file, the `{"bytes", "path"}` of an undecoded `datasets.Image`, or a PIL image.
        files: what paths may name.
        max_pixels: of the largest image that is decoded.
        target: see `decode_image`.

    Raises:
        BadRow: if it is missing, unreadable, oversized or refused.
        DataError: if `value` is nothing of that kind.
    """
    from PIL import Image  # a list of rows can be read without it

    from longclip_hf.images import decode_image

    name = "an image without a path"
    if isinstance(value, Mapping):
        name = value.get("path") or name
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        raise BadRow("missing", "no path is given")
    if not isinstance(value, str | bytes | Image.Image):
        raise DataError(f"The image column must hold images, files or paths, found {type(value).__name__}.")
    try:
        if isinstance(value, str):
            name, value = value, files.read(value)
        return decode_image(value, name, max_pixels, target)
    except ImageError as error:
        raise BadRow(error.cause, str(error)) from error


def image_key(value: Any) -> Any:
    """What tells an image from others, without decoding: its path, or the length and digest of its bytes; or None."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return len(value), hashlib.sha256(value).hexdigest()
    return value if isinstance(value, str) and value else None


class RowLog:
    """`bad_rows.jsonl`: a line for each bad row, which any number of processes write to; `rescaled_images.jsonl` too.

    Each process writes a row once. Rows that several met, or a run that was taken up again, are there more than once
    until `distinct` is called.

    Args:
        file: where; it is made with the first row.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seen: set[str] = set()

    def add(self, place: str, cause: str, detail: str) -> None:
        """Writes a row down, as whole lines only: other processes append at the same time."""
        if place not in self._seen:
            self._seen.add(place)
            line = json.dumps({"row": place, "cause": cause, "detail": detail})
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as file:
                file.write(f"{line}\n".encode())

    def distinct(self) -> Counter[str]:
        """Leaves every row in the file once, and counts them by cause."""
        if not self.file.is_file():
            return Counter()
        lines = self.file.read_text(encoding="utf-8").splitlines()
        rows = {row["row"]: row for row in map(json.loads, lines)}
        if len(rows) < len(lines):
            write_atomically(self.file, "".join(f"{json.dumps(row)}\n" for row in rows.values()).encode())
        return Counter(row["cause"] for row in rows.values())
