"""Rows -> (image, long caption, short caption).

A source (`sources.py`) gives a table, `CaptionRows`, which a sampler indexes, or a stream (`streams.py`). Both give
the same `CaptionRow`s, which `collator.py` batches.

Rows that cannot be trained on are skipped without changing the number of batches, and counted by cause. The counts
travel with the batches, because the rows are read in other processes than the one that reports them.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from PIL import Image
from torch.utils.data import Dataset

from longclip_hf.errors import DataError
from longclip_hf.image_files import ImageFiles
from longclip_hf.images import RESCALED
from longclip_hf.rows import (
    BAD_ROW_CAUSES,
    BadRow,
    RowLog,
    bad_rows_report,
    begun,
    field,
    image_key,
    read_image,
    texts_of,
)
from longclip_hf.sentences import first_sentence

logger = logging.getLogger(__name__)


class CaptionRow(TypedDict):
    """What the datasets give and the collator takes."""

    image: Any  # a PIL image of any mode, or what `transform` made of it: pixel values of shape (3, height, width)
    caption: str  # the long one
    short_caption: str
    bad_rows: Sequence[int]  # how many were skipped on the way to this one, in the order of BAD_ROW_CAUSES


@dataclass(frozen=True)
class RowReader:
    """Makes of a source's row what is trained on: `(image, long caption, short caption)`.

    Args:
        image_column, long_column: where they are.
        short_column: or None, for the first sentence of the long caption, which keeps it.
        files: what paths of images may name.
        max_image_pixels: of the largest image that is decoded.
        transform: what an RGB image becomes, such as `CaptionCollator.pixels`. Without it, a dataloader worker holds
            the decoded images of a whole batch: 18 GB for 2048 of 3 megapixels.
        target: of the side that the model sees, if images need not have more than twice that; see `decode_image`.
        first_sentence: of a long caption.
        prepare: done to every caption before, such as cleaning; see `longclip_hf.cleaning.preparation`.
        rescaled: where images of more than 8 bits are written down.
    """

    image_column: str
    long_column: str
    short_column: str | None
    files: ImageFiles
    max_image_pixels: int
    transform: Callable[[Image.Image], Any] | None = None
    target: int | None = None
    first_sentence: Callable[[str], str] = first_sentence
    prepare: Callable[[str], str] | None = None
    rescaled: RowLog | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides what a row becomes, as JSON has it; a run that goes on must read as it began."""
        return {
            "long_column": self.long_column,
            "short_column": self.short_column,
            "first_sentence": self.first_sentence.__name__,
            "captions_prepared_by": None if self.prepare is None else self.prepare.__name__,
            "images_decoded_for": self.target,
        }

    def __call__(self, row: Any, draw: int = 0) -> tuple[Any, str, str]:
        """
        Args:
            row: a mapping, or the `BadRow` that stands in its place.
            draw: which caption is taken where there are several: the remainder of this.

        Raises:
            BadRow: if the row cannot be trained on.
        """
        caption, short = self.captions(row, draw)
        value = self.image(row)
        image = read_image(value, self.files, self.max_image_pixels, self.target)
        if self.rescaled is not None and RESCALED in image.info:
            self.rescaled.add(str(image_key(value)), "rescaled", image.info[RESCALED])
        return (image if self.transform is None else self.transform(image)), caption, short

    def __str__(self) -> str:
        short = "their first sentences" if self.short_column is None else repr(self.short_column)
        return f"images from {self.image_column!r}, captions from {self.long_column!r}, short ones: {short}"

    def without_transform(self) -> "RowReader":
        """A reader that decodes and leaves it at that."""
        return replace(self, transform=None)

    def image(self, row: Any) -> Any:
        """What stands in the image's column."""
        return field(row, self.image_column)

    def captions(self, row: Any, draw: int = 0) -> tuple[str, str]:
        """The long and the short caption.

        Raises:
            BadRow: if one is empty.
        """
        texts = self._texts(row, self.long_column)
        caption = texts[draw % len(texts)]
        if self.short_column is None:
            return caption, self._first_sentence(caption)
        texts = self._texts(row, self.short_column)
        return caption, texts[draw % len(texts)]

    def short_captions(self, row: Any) -> list[str]:
        """All that may be drawn as the short caption.

        Raises:
            BadRow: if there is none.
        """
        if self.short_column is not None:
            return self._texts(row, self.short_column)
        return [self._first_sentence(text) for text in self._texts(row, self.long_column)]

    def _first_sentence(self, caption: str) -> str:
        short = self.first_sentence(caption)
        if not short.strip():
            raise BadRow("empty_caption", f"{caption[:40]!r} has no first sentence")
        return short

    def _texts(self, row: Any, column: str) -> list[str]:
        texts = texts_of(field(row, column), column)
        if self.prepare is not None:
            texts = [self.prepare(text) for text in texts]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise BadRow("empty_caption", f"column {column!r}")
        return texts


def drawn(seed: int, epoch: int, row: int | str) -> int:
    """A number that follows from these three alone, for one of a row's captions."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {row}".encode(), digest_size=8).digest())


def forbidden(place: str, bad: BadRow) -> DataError:
    """The error that a bad row is under `on_bad_row` `"error"`."""
    return DataError(
        f"{begun(place)} cannot be trained on: {bad}. Mend or remove it, or skip such rows: --on_bad_row skip."
    )


def all_bad(rows: str, counts: Iterable[int], example: BadRow | None) -> DataError:
    """The error that says so."""
    return DataError(f"None of {rows} can be trained on. {bad_rows_report(counts)}; the last one: {example}.")


class CaptionRows(Dataset[CaptionRow]):
    """A table of rows whose images are decoded when asked for.

    A bad row is replaced, so that an epoch has the same number of batches on every process. Its substitute is the
    first good row on a walk from it that comes by every row in strides of about 0.618 of the table. So rows that are
    bad together (of ShareGPT4V, a collection of images that was not downloaded) get substitutes from all over the
    table, not all the same one.

    Args:
        rows: the source's rows by index: a `datasets.Dataset`, mapped from disk, or any sequence.
        read: makes of a row what is trained on.
        on_bad_row: `"skip"`, or `"error"`.
        places: which of the rows; by default all.
        place_of: where one of `rows` stands, for errors.
        seed: of the captions that are drawn where a row has several.
        log: where bad rows are written down.

    Raises:
        DataError: on access, at a bad row under `"error"`, or if all rows are bad.
    """

    def __init__(
        self,
        rows: Any,
        read: RowReader,
        on_bad_row: str = "skip",
        *,
        places: Sequence[int] | None = None,
        place_of: Callable[[int], str] = "row {}".format,
        seed: int = 0,
        log: RowLog | None = None,
    ) -> None:
        self.rows = rows
        self.read = read
        self.on_bad_row = on_bad_row
        self.places = range(len(rows)) if places is None else places
        self.place_of = place_of
        self.seed = seed
        self.log = log
        # Shared with dataloader workers that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.places)

    def set_epoch(self, epoch: int) -> None:
        """Of the row's captions, where there are several, each epoch draws another."""
        self._epoch.fill_(epoch)

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        return self.place_of(int(self.places[index]))

    def __getitem__(self, index: int) -> CaptionRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        counts = [0] * len(BAD_ROW_CAUSES)
        last = None
        epoch = int(self._epoch)
        for step in walk(index, len(self)):
            at = int(self.places[step])
            try:
                image, caption, short = self.read(self.rows[at], drawn(self.seed, epoch, at))
            except BadRow as bad:
                place = self.place(step)
                if self.on_bad_row == "error":
                    raise forbidden(place, bad) from bad
                logger.info("%s: %s", place, bad)
                if self.log is not None:
                    self.log.add(place, bad.cause, bad.detail)
                counts[bad.index] += 1
                last = bad
            else:
                return CaptionRow(image=image, caption=caption, short_caption=short, bad_rows=counts)
        raise all_bad(f"the {len(self)} rows", counts, last)


def walk(start: int, size: int) -> Iterator[int]:
    """Every index below `size` once, beginning with `start`, in strides of about `0.618 * size`."""
    stride = max(1, int(0.618 * size))
    while math.gcd(stride, size) != 1:
        stride += 1
    return ((start + step * stride) % size for step in range(size))
