"""Rows -> (image, long caption, short caption).

A source (`sources.py`) gives a table, `CaptionRows`, which a sampler indexes, or a stream, `CaptionStream`, which
never ends and is divided among processes and dataloader workers. Both give the same `CaptionRow`s, which `collator.py`
batches.

Rows that cannot be trained on are skipped without changing the number of batches, and counted by cause. The counts
travel with the batches, because the rows are read in other processes than the one that reports them.
"""

import itertools
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from longclip_hf.errors import DataError, ImageError, LongCLIPError
from longclip_hf.image_files import ImageFiles
from longclip_hf.images import decode_image
from longclip_hf.sentences import first_sentence

logger = logging.getLogger(__name__)

# In the order of the counts that travel with rows and batches.
BAD_ROW_CAUSES = ("missing", "unreadable", "oversized", "empty_caption", "refused")


class BadRow(LongCLIPError):
    """One row that cannot be trained on, for the cause `BAD_ROW_CAUSES[index]`."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause} ({detail})")
        self.index = BAD_ROW_CAUSES.index(cause)


class CaptionRow(TypedDict):
    """What the datasets give and the collator takes."""

    image: Any  # a PIL image of any mode, or what `transform` made of it: pixel values of shape (3, height, width)
    caption: str  # the long one
    short_caption: str
    bad_rows: Sequence[int]  # how many were skipped on the way to this one, in the order of BAD_ROW_CAUSES


def bad_rows_report(counts: Iterable[int]) -> str:
    """`"13 bad rows: 10 missing, 3 unreadable"`, from counts in the order of `BAD_ROW_CAUSES`."""
    named = [(int(count), cause) for count, cause in zip(counts, BAD_ROW_CAUSES, strict=True)]
    causes = ", ".join(f"{count} {cause}" for count, cause in named if count)
    return f"{sum(count for count, _ in named)} bad rows" + (f": {causes}" if causes else "")


# One row


def read_image(value: Any, files: ImageFiles, max_pixels: int, target: int | None = None) -> Image.Image:
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


def field(row: Mapping[str, Any], column: str) -> Any:
    """`row[column]`, or what lies within a structure, `"json.caption"`, or None."""
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    return field(row[outer], inner) if inner and isinstance(row.get(outer), Mapping) else None


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

    def __call__(self, row: Mapping[str, Any]) -> tuple[Any, str, str]:
        """
        Raises:
            BadRow: if the row cannot be trained on.
        """
        caption, short = self.captions(row)
        image = read_image(field(row, self.image_column), self.files, self.max_image_pixels, self.target)
        return (image if self.transform is None else self.transform(image)), caption, short

    def captions(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The long and the short caption.

        Raises:
            BadRow: if one is empty.
        """
        caption = self._caption(row, self.long_column)
        short = self._caption(row, self.short_column) if self.short_column else self.first_sentence(caption)
        if not short.strip():
            raise BadRow("empty_caption", f"{caption[:40]!r} has no first sentence")
        return caption, short

    def _caption(self, row: Mapping[str, Any], column: str) -> str:
        caption = field(row, column)
        if caption is not None and not isinstance(caption, str):
            raise DataError(f"Column {column!r} must hold texts, found {type(caption).__name__}: {caption!r:.80}")
        if caption is not None and self.prepare is not None:
            caption = self.prepare(caption)
        if caption is None or not caption.strip():
            raise BadRow("empty_caption", f"column {column!r}")
        return caption


def _forbid(place: str, bad: BadRow) -> DataError:
    return DataError(f"{place} cannot be trained on: {bad}. Mend or remove it, or skip such rows: --on_bad_row skip.")


def all_bad(rows: str, counts: Iterable[int], example: BadRow | None) -> DataError:
    """The error that says so."""
    return DataError(f"None of {rows} can be trained on. {bad_rows_report(counts)}; the last one: {example}.")


# Tables


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
        first_row: the number of `rows[0]` in its source, for error messages.

    Raises:
        DataError: on access, at a bad row under `"error"`, or if all rows are bad.
    """

    def __init__(self, rows: Any, read: RowReader, on_bad_row: str = "skip", first_row: int = 0) -> None:
        self.rows = rows
        self.read = read
        self.on_bad_row = on_bad_row
        self.first_row = first_row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CaptionRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        counts = [0] * len(BAD_ROW_CAUSES)
        last = None
        for place in walk(index, len(self)):
            try:
                image, caption, short = self.read(self.rows[place])
            except BadRow as bad:
                if self.on_bad_row == "error":
                    raise _forbid(f"Row {self.first_row + place}", bad) from bad
                logger.info("row %d: %s", self.first_row + place, bad)
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


# Streams


def share(slot: int, slots: int, shards: int) -> list[tuple[int, range]]:
    """Which rows one of `slots` readers reads: `(shard, residues)` for those with `row % slots` in `residues`.

    Every row of every shard belongs to one reader, and all read equally much where the shards are of equal size.
    Shards are read whole where their number is a multiple of the readers', and by as few as can be where it is not.
    """
    # Every shard is `slots` columns, row r in column r % slots; all columns, in a line, are dealt out: `shards` each.
    first, end = slot * shards, (slot + 1) * shards
    return [
        (shard, range(max(0, first - shard * slots), min(slots, end - shard * slots)))
        for shard in range(first // slots, -(-end // slots))
    ]


def shuffled(rows: Iterable[Any], size: int, rng: random.Random) -> Iterator[Any]:
    """`rows` in another order, each drawn by `rng` from `size` that are held."""
    held: list[Any] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        drawn = rng.randrange(size)
        yield held[drawn]
        held[drawn] = row
    rng.shuffle(held)
    yield from held


def shard_rows(rows: Any, shard: int) -> Iterator[Mapping[str, Any]]:
    """The rows of one shard of a `datasets.IterableDataset`, in order.

    Raises:
        DataError: where the shard breaks off.
    """
    position, last = 0, "its beginning"
    try:
        # `iter(batch_size)` and not `iter()`, which would divide the shards among dataloader workers once more.
        for batch in rows.shard(num_shards=rows.num_shards, index=shard).iter(batch_size=16):
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                yield row
                last = f"row {position} {_tar_place(row)}".rstrip()
                position += 1
    except Exception as error:  # of the file system, of tarfile, of a decoder
        raise DataError(
            f"Shard {shard} of {rows.num_shards} breaks off soon after {last}: {type(error).__name__}: {error}. "
            "Fetch or write it again, or leave it out."
        ) from error


def _tar_place(row: Mapping[str, Any]) -> str:
    return f"({row['__key__']} in {row['__url__']})" if "__key__" in row else ""


class CaptionStream(IterableDataset[CaptionRow]):
    """A stream of rows without end, of which every process and every dataloader worker reads its own share.

    A pass comes by every row once; after it the next begins, in another order. Training ends by `max_steps`, so no
    process ends before the others. The order depends on the seed, the pass, the numbers of processes and of workers.

    The stream divides itself: nothing may divide it again. `accelerate` would; prepare its dataloader with
    `accelerate.data_loader.prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True,
    dispatch_batches=False)`.

    Args:
        rows: a `datasets.IterableDataset`.
        read: makes of a row what is trained on.
        on_bad_row: `"skip"`, or `"error"`.
        begin: shard and row that training begins with. Those before are held out.
        shuffle_buffer: rows that are held, undecoded, to draw from.
        seed: of the order.
        rank, world_size: this process and how many there are.

    Raises:
        DataError: on iteration, at a bad row under `"error"`, at a shard that breaks off, after a pass without a good
            row, or where there are more readers than rows.
    """

    def __init__(
        self,
        rows: Any,
        read: RowReader,
        on_bad_row: str = "skip",
        *,
        begin: tuple[int, int] = (0, 0),
        shuffle_buffer: int = 1000,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rows = rows
        self.read = read
        self.on_bad_row = on_bad_row
        self.begin = begin
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The number of the pass that the next iteration begins with."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[CaptionRow]:
        counts = [0] * len(BAD_ROW_CAUSES)
        for epoch in itertools.count(self.epoch):
            good, total, last = 0, 0, None
            for place, row in self.one_pass(epoch):
                total += 1
                try:
                    image, caption, short = self.read(row)
                except BadRow as bad:
                    if self.on_bad_row == "error":
                        raise _forbid(place, bad) from bad
                    logger.info("%s: %s", place, bad)
                    counts[bad.index] += 1
                    last = bad
                else:
                    good += 1
                    yield CaptionRow(image=image, caption=caption, short_caption=short, bad_rows=counts)
                    counts = [0] * len(BAD_ROW_CAUSES)
            slot, slots = self._slot()
            if not total:
                raise DataError(f"Nothing is left to read for reader {slot} of {slots}: fewer processes or workers.")
            if not good:
                raise all_bad(f"the {total} rows of reader {slot} of {slots}", counts, last)

    def one_pass(self, epoch: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """This reader's rows once, undecoded and shuffled, each with its place in the source."""
        slot, slots = self._slot()
        rng = random.Random(f"{self.seed} {epoch} {slot}")
        shares = share(slot, slots, self.rows.num_shards - self.begin[0])
        rng.shuffle(shares)
        return shuffled((row for part in shares for row in self._part(*part, slots)), self.shuffle_buffer, rng)

    def _part(self, trained: int, residues: range, slots: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The rows in `residues` of a shard, counted from the one that training begins with."""
        shard = self.begin[0] + trained
        begin = 0 if trained else self.begin[1]
        for number, row in enumerate(shard_rows(self.rows, shard)):
            if number >= begin and (number - begin) % slots in residues:
                yield f"Row {number} of shard {shard} {_tar_place(row)}".rstrip(), row

    def _slot(self) -> tuple[int, int]:
        """Which reader this is, of how many: every dataloader worker of every process is one."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return self.rank * workers + number, self.world_size * workers
