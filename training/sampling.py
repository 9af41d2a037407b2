"""The order of rows in which no batch has the same short caption twice: each would be the other's wrong answer."""

import bisect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback

from longclip_hf.errors import TrainingError
from longclip_hf.rows import BadRow
from longclip_hf.sentences import first_sentence
from longclip_hf.training.caption_report import text_rows
from longclip_hf.training.captions import CaptionRows

logger = logging.getLogger(__name__)


def short_captions(dataset: Any) -> list[str | None]:
    """The short caption of every row, read without its image; None where it has none.

    Raises:
        TrainingError: for a data set whose captions cannot be read alone, or that are drawn from lists.
    """
    if isinstance(dataset, IterableDataset):
        raise TrainingError(
            "Captions of a stream are not known before they are read: distinct_short_captions is for tables of rows."
        )
    if isinstance(dataset, CaptionRows):
        return [_of_row(dataset, row) for row in text_rows(dataset)]
    rows: Iterable[Mapping[str, Any]] = dataset
    if hasattr(dataset, "select_columns"):  # of the library datasets
        rows = dataset.select_columns([name for name in ("caption", "short_caption") if name in dataset.column_names])
    elif not isinstance(dataset, list | tuple):
        raise TrainingError(
            f"distinct_short_captions looks at the captions of all rows, and a {type(dataset).__name__} gives none "
            "without its image. Train on a datasets.Dataset, a list, or by the command."
        )
    return [row.get("short_caption") or first_sentence(str(row.get("caption", ""))) for row in rows]


def _of_row(dataset: CaptionRows, row: Mapping[str, Any]) -> str | None:
    try:
        captions = dict.fromkeys(dataset.read.short_captions(row))
    except BadRow:
        return None
    if len(captions) > 1:
        raise TrainingError(
            "distinct_short_captions is for rows of one short caption, and of this one every epoch draws another of "
            f"{len(captions)}: {', '.join(map(repr, captions))}. Leave it out, or train on a column without lists."
        )
    return next(iter(captions))


class SayEpoch(TrainerCallback):
    """Says to the sampler and to the rows which epoch begins, whatever accelerate wrapped around them.

    It tells the sampler or the data set, not both, and neither where a run goes on within an epoch of several
    processes.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        parts: list[Any] = [getattr(batches, "sampler", None), train_dataloader.dataset]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))


class DistinctSampler(Sampler[int]):
    """Rows in an order of which every `batch` that follow each other have different captions; another one every epoch.

    As many batches as can be made. Rows are left out where their caption is too frequent for that, other ones in every
    epoch, and at the end as many as do not fill a batch.

    Args:
        captions: of every row; None is like no other.
        batch: rows of all processes in a step.
        seed: of the order, the same on every process.

    Raises:
        TrainingError: if not one such batch can be made.
    """

    def __init__(self, captions: Sequence[str | None], batch: int, seed: int) -> None:
        numbers: dict[str, int] = {}
        self.keys = np.array(
            [
                len(captions) + row if caption is None else numbers.setdefault(caption, row)
                for row, caption in enumerate(captions)
            ]
        )
        self.batch, self.seed, self.epoch = batch, seed, 0
        _, counts = np.unique(self.keys, return_counts=True)
        # n batches hold every caption n times at most, and what n batches cannot, more of them cannot either.
        numbers_of_batches = range(1, len(captions) // batch + 1)
        too_many = lambda n: bool(np.minimum(counts, n).sum() < n * batch)  # noqa: E731
        self.batches = bisect.bisect_left(numbers_of_batches, True, key=too_many)
        if not self.batches:
            raise TrainingError(
                f"The {len(captions)} rows have {len(counts)} different short captions, too few for one batch of "
                f"{batch} without repetition. Take a smaller batch, or leave out --distinct_short_captions."
            )
        left_out = len(captions) - len(self)
        logger.info("No batch of %d repeats a short caption; %d rows are left out of an epoch.", batch, left_out)

    def set_epoch(self, epoch: int) -> None:
        """Of which the order follows, with the seed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        # Rows of a caption stand together, captions and the rows within them in random order.
        order = rng.permutation(len(self.keys))
        of_caption = rng.permutation(int(self.keys.max()) + 1)[self.keys[order]]
        order = order[np.argsort(of_caption, kind="stable")]
        keys = self.keys[order]
        begins = np.r_[True, keys[1:] != keys[:-1]]
        number = np.arange(len(keys)) - np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
        order = order[number < self.batches]
        kept = np.sort(rng.permutation(len(order))[: len(self)])
        # Dealt out in turn, no more rows of a caption than there are batches come to different ones.
        dealt = order[kept].reshape(self.batch, self.batches).T
        for rows in dealt[rng.permutation(self.batches)]:
            yield from rng.permutation(rows).tolist()
