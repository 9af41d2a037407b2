"""Rows that are held out from training: which, without the bad ones, and without their images among the others."""

import logging
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from longclip_hf.errors import DataError
from longclip_hf.rows import BAD_ROW_CAUSES, BadRow, RowLog, bad_rows_report, image_key
from longclip_hf.training.captions import all_bad
from longclip_hf.training.joined import Joined, JoinedReader
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.streams import shard_rows

logger = logging.getLogger(__name__)


def is_stream(rows: Any) -> bool:
    """Whether rows come one after the other only."""
    return not hasattr(rows, "__len__")


def held_out(rows: Any, data: DataArguments, seed: int) -> tuple[Any, Sequence[int], tuple[int, int] | None]:
    """A table, which of its rows are held out, and of a stream the shard and row behind them, or None at its end.

    Raises:
        DataError: for rows that are to be drawn from a stream.
    """
    if is_stream(rows):
        if data.heldout_shuffle:
            raise DataError("Of a stream the first rows are held out: leave --heldout_shuffle out.")
        first, end = first_of(rows, data.heldout_rows)
        return first, range(len(first)), end
    count = min(data.heldout_rows, len(rows))
    if data.heldout_shuffle:
        return rows, sorted(random.Random(f"{seed} held out").sample(range(len(rows)), count)), None
    return rows, range(count), None


def first_of(rows: Any, count: int) -> tuple[list[Any], tuple[int, int] | None]:
    """The first `count` rows of a stream, and the shard and row behind them, or None at the end."""
    first: list[Any] = []
    for shard in range(rows.num_shards):
        for number, row in enumerate(shard_rows(rows, shard)):
            if len(first) == count:
                return first, (shard, number)
            first.append(row)
    return first, None


def keys_of(rows: Any, places: Sequence[int], read: Any) -> set[Any]:
    """What tells the images of some rows from others; see `image_key`."""
    return {key for place in places if (key := _key(read, rows[place])) is not None}


def other_images(rows: Any, read: Any, taken: Sequence[int], keys: Collection[Any]) -> Sequence[int]:
    """All rows of a table but those taken and those that show an image in `keys`; a range where it can be one."""
    left: Sequence[int] = range(len(taken), len(rows))
    if taken and not isinstance(taken, range):
        left = np.setdiff1d(np.arange(len(rows)), taken)  # type: ignore[assignment]
    if not keys:
        return left
    twice = np.intersect1d(left, list(_showing(rows, read, keys)))
    if not len(twice):
        return left
    logger.warning("%d rows show an image that is held out, and are not trained on.", len(twice))
    return np.setdiff1d(left, twice)  # type: ignore[return-value]


def good_ones(
    rows: Any, places: Sequence[int], read: Any, place_of: Callable[[int], str], log: RowLog | None
) -> Sequence[int]:
    """`places` without the bad rows. A substitute, as in training, would be a second right answer in retrieval.

    Raises:
        DataError: if all are bad.
    """
    good, counts, last = [], [0] * len(BAD_ROW_CAUSES), None
    for place in places:
        try:
            read(rows[place])
        except BadRow as bad:
            logger.info("%s: %s", place_of(place), bad)
            if log is not None:
                log.add(place_of(place), bad.cause, bad.detail)
            counts[bad.index] += 1
            last = bad
        else:
            good.append(place)
    if not good:
        raise all_bad(f"the {len(places)} held-out rows", counts, last)
    if last is not None:
        logger.warning("%d of %d held-out rows are left out. %s.", sum(counts), len(places), bad_rows_report(counts))
    return good


def _key(read: Any, row: Any) -> Any:
    try:
        return image_key(read.image(row))
    except BadRow:
        return None


def _showing(rows: Any, read: Any, keys: Collection[Any]) -> Iterator[int]:
    """The rows that show one of the images. Bytes are looked at only where their number is one of theirs."""
    if isinstance(rows, Joined) and isinstance(read, JoinedReader):
        begins = [0, *rows.ends]
        for begin, table, reader in zip(begins, rows.tables, read.readers, strict=False):
            yield from (begin + place for place in _showing(table, reader, keys))
        return
    sizes = {key[0] for key in keys if isinstance(key, tuple)}
    column = read.image_column
    if hasattr(rows, "sizes"):
        candidates: Any = (place for place, size in enumerate(rows.sizes(column)) if size in sizes)
    elif hasattr(rows, "features") and column in rows.features:
        candidates = _of_size(rows, column, keys, sizes)
    else:
        candidates = range(len(rows))
    yield from (place for place in candidates if _key(read, rows[place]) in keys)


def _of_size(rows: Any, column: str, keys: Collection[Any], sizes: Collection[int]) -> Iterator[int]:
    """Rows of a `datasets.Dataset` whose path is in `keys`, or whose bytes are as many as one of `sizes`."""
    import pyarrow
    import pyarrow.compute

    begin, paths = 0, pyarrow.array([key for key in keys if isinstance(key, str)], pyarrow.string())
    for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
        cells = batch[column].combine_chunks()
        if isinstance(cells, pyarrow.ChunkedArray):
            cells = cells.chunk(0)
        held, named = None, cells
        if pyarrow.types.is_struct(cells.type):
            held, named = cells.field("bytes"), cells.field("path")
        elif pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type):
            held, named = cells, None
        found = np.zeros(len(cells), dtype=bool)
        if held is not None and sizes:
            lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(held), -1).to_numpy(zero_copy_only=False)
            found |= np.isin(lengths, list(sizes))
        if named is not None and len(paths):
            found |= pyarrow.compute.is_in(named.cast(pyarrow.string()), paths).to_numpy(zero_copy_only=False)
        yield from (begin + int(place) for place in found.nonzero()[0])
        begin += len(cells)
