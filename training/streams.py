"""Streams of rows, which never end and are divided among processes and dataloader workers."""

import itertools
import logging
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from longclip_hf.errors import DataError
from longclip_hf.rows import BAD_ROW_CAUSES, BadRow, RowLog, begun, image_key
from longclip_hf.training.captions import CaptionRow, RowReader, all_bad, drawn, forbidden

logger = logging.getLogger(__name__)


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
        place = rng.randrange(size)
        yield held[place]
        held[place] = row
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
            last = f"row {position}{_tar_key(row)}"
            position += 1
    except DataError:  # says where it was
        raise
    except Exception as error:  # of the file system, of tarfile, of a decoder
        raise DataError(
            f"{begun(shard_name(rows, shard))} breaks off soon after {last}: {type(error).__name__}: {error}. "
            "Fetch or write it again, or leave it out."
        ) from error


def _dataset_shard(rows: Any, shard: int) -> Iterator[dict[str, Any]]:
    # `iter(batch_size)` and not `iter()`, which would divide the shards among dataloader workers once more.
    for batch in rows.shard(num_shards=rows.num_shards, index=shard).iter(batch_size=16):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def shard_name(rows: Any, shard: int) -> str:
    """Of a shard, for errors: its file, or its number."""
    name: str = rows.shard_name(shard) if hasattr(rows, "shard_name") else f"shard {shard} of {rows.num_shards}"
    return name


def _tar_key(row: Any) -> str:
    return f" ({row['__key__']})" if isinstance(row, Mapping) and "__key__" in row else ""


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
                        raise forbidden(place, bad) from bad
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
                yield f"row {number} of {shard_name(self.rows, shard)}{_tar_key(row)}", row

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
