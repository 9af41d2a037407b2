"""Rows of any source: ShareGPT4V's JSON, or anything that the library `datasets` reads."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Subset

from longclip_hf.cleaning import preparation
from longclip_hf.errors import DataError, JSONListError
from longclip_hf.image_files import ImageFiles
from longclip_hf.json_list import json_objects
from longclip_hf.sentences import first_sentence, released_first_sentence
from longclip_hf.training.captions import (
    BAD_ROW_CAUSES,
    BadRow,
    CaptionRows,
    CaptionStream,
    RowReader,
    all_bad,
    bad_rows_report,
    shard_rows,
)
from longclip_hf.training.settings import DataArguments

logger = logging.getLogger(__name__)


def load_rows(
    data: DataArguments,
    *,
    transform: Callable[[Image.Image], Any] | None = None,
    image_side: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[CaptionRows | CaptionStream, CaptionRows | None]:
    """The rows to train on, and those held out: the first `heldout_rows` of their split, less the bad ones among them.

    Args:
        data: which rows, and how to read them.
        transform: applied to every image as it is read, such as `CaptionCollator.pixels`.
        image_side: of the images that the model sees, which `data.reduced_decoding` needs.
        seed: of the order of a stream. The order of a table is its sampler's affair.
        rank, world_size: this process and how many there are, for a stream. A table is divided by its sampler. The
            held-out rows are the same on every process.

    Raises:
        DataError: if the rows or columns that `data` names are not there.
        ImportError: if `datasets` is not installed.
    """
    rows = _open(data, data.train_split)
    files = ImageFiles.of(data.data, data.image_root, data.image_access)
    read = RowReader(
        data.image_column,
        data.long_column,
        data.short_column,
        files,
        data.max_image_pixels,
        transform,
        image_side if data.reduced_decoding else None,
        first_sentence if data.first_sentence == "punctuation" else released_first_sentence,
        preparation(data.clean_captions, data.neutralise_special_tokens),
    )
    if data.heldout_split in (None, data.train_split):
        heldout, begin = _first(rows, data.heldout_rows)
    else:
        heldout, _ = _first(_open(data, str(data.heldout_split)), data.heldout_rows)
        _, begin = _first(rows, 0)
    if begin is None:
        raise DataError(
            f"{data.data} has no rows in {data.train_split!r} beyond the {len(heldout)} held out: hold out fewer than "
            f"--heldout_rows {data.heldout_rows}, or rows of another --heldout_split."
        )
    train: CaptionRows | CaptionStream
    if _is_stream(rows):
        train = CaptionStream(
            rows,
            read,
            data.on_bad_row,
            begin=begin,
            shuffle_buffer=data.shuffle_buffer,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
    else:
        train = CaptionRows(rows.select(range(begin[1], len(rows))), read, data.on_bad_row, first_row=begin[1])
    if not len(heldout):
        return train, None
    if data.on_bad_row == "skip":
        heldout = _good_rows(heldout, replace(read, transform=None))
    return train, CaptionRows(heldout, read, "error")


def _first(rows: Any, count: int) -> tuple[Any, tuple[int, int] | None]:
    """The first `count` rows, and the shard and row behind them, or None at the end. A table is one shard."""
    if not _is_stream(rows):
        count = min(count, len(rows))
        return rows.select(range(count)), (0, count) if count < len(rows) else None
    first: list[Mapping[str, Any]] = []
    for shard in range(rows.num_shards):
        for number, row in enumerate(shard_rows(rows, shard)):
            if len(first) == count:
                return first, (shard, number)
            first.append(row)
    return first, None


def _good_rows(rows: Any, read: RowReader) -> Any:
    """`rows` without the bad ones. A substitute, as in training, would be a second right answer in retrieval."""
    good, counts, last = [], [0] * len(BAD_ROW_CAUSES), None
    for index in range(len(rows)):
        try:
            read(rows[index])
        except BadRow as bad:
            logger.info("held-out row %d: %s", index, bad)
            counts[bad.index] += 1
            last = bad
        else:
            good.append(index)
    if not good:
        raise all_bad(f"the {len(rows)} held-out rows", counts, last)
    if last is not None:
        logger.warning("%d of %d held-out rows are left out. %s.", sum(counts), len(rows), bad_rows_report(counts))
    return Subset(rows, good)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Training data is read with the package `datasets`, of the extra "train". In the checkout: '
            'pip install -e ".[train]"'
        ) from error
    return datasets


def _is_stream(rows: Any) -> bool:
    return isinstance(rows, _datasets().IterableDataset)


def _open(data: DataArguments, split: str) -> Any:
    """A `datasets.Dataset`, or an `IterableDataset` where streamed: undecoded images, and only the columns needed.

    Raises:
        DataError: if a column is not there.
    """
    datasets = _datasets()
    if data.data_format == "sharegpt4v":
        rows = _open_sharegpt4v(data)
    elif data.data_format == "datasets":
        rows = datasets.load_dataset(data.data, data.data_config, split=split, streaming=data.streaming)
    else:
        where = {"data_dir" if Path(data.data).is_dir() else "data_files": data.data}
        streaming = data.streaming or data.data_format == "webdataset"
        rows = datasets.load_dataset(data.data_format, split=split, streaming=streaming, **where)
    names = rows.column_names or list(next(shard_rows(rows, 0), {}))
    needed = []
    for setting in ("image_column", "long_column", "short_column"):
        column = getattr(data, setting)
        if column is not None:
            needed.append(column if column in names else column.partition(".")[0])
            if needed[-1] not in names:
                raise DataError(
                    f"{data.data} has no column {column!r} but {names}: name the right one with --{setting}."
                )
    if rows.features and isinstance(rows.features[needed[0]], datasets.Image):
        rows = rows.cast_column(needed[0], datasets.Image(decode=False))
    return rows.select_columns(
        list(dict.fromkeys(needed)) + [name for name in ("__key__", "__url__") if name in names]
    )


def _open_sharegpt4v(data: DataArguments) -> Any:
    """A table of paths and captions on disk, made once. As Python objects, every worker would copy 1.2 M rows."""
    datasets = _datasets()
    path, root = Path(data.data), Path(str(data.image_root))
    if not path.is_file():
        raise DataError(f"There is no file {path}; sharegpt4v needs its JSON file.")
    if not root.is_dir():
        raise DataError(f"--image_root {root} is not a folder.")
    state = path.stat()
    try:
        return datasets.Dataset.from_generator(
            _sharegpt4v_rows,
            features=datasets.Features({"image": datasets.Value("string"), "caption": datasets.Value("string")}),
            gen_kwargs={"path": str(path.resolve()), "size": state.st_size, "mtime": state.st_mtime_ns},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, JSONListError):
            raise error.__cause__ from None
        raise


def _sharegpt4v_rows(path: str, size: int, mtime: int) -> Iterator[dict[str, str | None]]:
    """ShareGPT4V's rows. `size` and `mtime` are for the table's name: a file that changed gets a new table."""
    for entry in json_objects(Path(path)):
        turns = entry.get("conversations") or ()
        yield {
            "image": entry.get("image"),
            "caption": next((t["value"] for t in turns if t.get("from") == "gpt"), None),
        }
