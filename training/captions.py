"""Rows -> (image, long caption, short caption).

A source (`sources.py`) gives a table, `CaptionRows`, which a sampler indexes, or a stream, `CaptionStream`, which
never ends and is divided among processes and dataloader workers. Both give the same `CaptionRow`s, which `collator.py`
batches.

Rows that cannot be trained on are skipped without changing the number of batches, and counted by cause. The counts
travel with the batches, because the rows are read in other processes than the one that reports them.
"""

import hashlib
import itertools
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from longclip_hf.errors import DataError
from longclip_hf.image_files import ImageFiles
from longclip_hf.images import RESCALED
from longclip_hf.rows import BAD_ROW_CAUSES, BadRow, RowLog, bad_rows_report, field, image_key, read_image, texts_of
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
        places: which of the rows; by default all.
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
        seed: int = 0,
        log: RowLog | None = None,
    ) -> None:
        self.rows = rows
        self.read = read
        self.on_bad_row = on_bad_row
        self.places = range(len(rows)) if places is None else places
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
        at = int(self.places[index])
        within = self.rows.place(at) if hasattr(self.rows, "place") else ""
        return f"Row {at}" + (f" ({within})" if within else "")

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
                    raise _forbid(place, bad) from bad
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


def shard_rows(rows: Any, shard: int) -> Iterator[Any]:
    """The rows of one shard of a `FileStream` or a `datasets.IterableDataset`, in order.

    Raises:
        DataError: where the shard breaks off.
    """
    position, last = 0, "its beginning"
    try:
        for row in rows.read_shard(shard) if hasattr(rows, "read_shard") else _dataset_shard(rows, shard):
            yield row
            last = f"row {position} {_tar_place(row)}".rstrip()
            position += 1
    except DataError:  # says where it was
        raise
    except Exception as error:  # of the file system, of tarfile, of a decoder
        raise DataError(
            f"Shard {shard} of {rows.num_shards} breaks off soon after {last}: {type(error).__name__}: {error}. "
            "Fetch or write it again, or leave it out."
        ) from error


def _dataset_shard(rows: Any, shard: int) -> Iterator[dict[str, Any]]:
    # `iter(batch_size)` and not `iter()`, which would divide the shards among dataloader workers once more.
    for batch in rows.shard(num_shards=rows.num_shards, index=shard).iter(batch_size=16):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _tar_place(row: Any) -> str:
    return f"({row['__key__']} in {row['__url__']})" if isinstance(row, Mapping) and "__key__" in row else ""


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
        heldout: keys of images that are held out (`image_key`); their other rows are not trained on either.
        shuffle_buffer: rows that are held, undecoded, to draw from.
        seed: of the order.
        rank, world_size: this process and how many there are.
        log: where bad rows are written down.

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
        heldout: Collection[Any] = (),
        shuffle_buffer: int = 1000,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        log: RowLog | None = None,
    ) -> None:
        self.rows = rows
        self.read = read
        self.on_bad_row = on_bad_row
        self.begin = begin
        self.heldout = frozenset(heldout)
        self.log = log
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
                    image, caption, short = self.read(row, drawn(self.seed, epoch, place))
                except BadRow as bad:
                    if self.on_bad_row == "error":
                        raise _forbid(place, bad) from bad
                    logger.info("%s: %s", place, bad)
                    if self.log is not None:
                        self.log.add(place, bad.cause, bad.detail)
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

    def one_pass(self, epoch: int) -> Iterator[tuple[str, Any]]:
        """This reader's rows once, undecoded and shuffled, each with its place in the source."""
        slot, slots = self._slot()
        rng = random.Random(f"{self.seed} {epoch} {slot}")
        shares = share(slot, slots, self.rows.num_shards - self.begin[0])
        rng.shuffle(shares)
        return shuffled((row for part in shares for row in self._part(*part, slots)), self.shuffle_buffer, rng)

    def _part(self, trained: int, residues: range, slots: int) -> Iterator[tuple[str, Any]]:
        """The rows in `residues` of a shard, counted from the one that training begins with."""
        shard = self.begin[0] + trained
        begin = 0 if trained else self.begin[1]
        for number, row in enumerate(shard_rows(self.rows, shard)):
            if number >= begin and (number - begin) % slots in residues and not self._is_held_out(row):
                yield f"Row {number} of shard {shard} {_tar_place(row)}".rstrip(), row

    def _is_held_out(self, row: Any) -> bool:
        if not self.heldout or isinstance(row, BadRow):
            return False
        try:
            return image_key(self.read.image(row)) in self.heldout
        except BadRow:
            return False

    def _slot(self) -> tuple[int, int]:
        """Which reader this is, of how many: every dataloader worker of every process is one."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return self.rank * workers + number, self.world_size * workers
