"""Orders of rows in which no batch repeats a short caption."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from trainer_runs import BATCH, arguments, make_rows, make_trainer

from longclip_hf.errors import TrainingError
from longclip_hf.training.sampling import DistinctSampler, SayEpoch, short_captions
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.sources import load_rows

captions = st.lists(st.sampled_from([*"abcdefgh", None]), min_size=1, max_size=60)


@settings(deadline=None)
@given(captions, st.integers(1, 5), st.integers(0, 3))
def test_no_batch_repeats_a_caption_and_as_many_are_made_as_can_be(
    rows: list[str | None], batch: int, epoch: int
) -> None:
    """The most: n batches take a caption n times at most, a row without one as often as there are such rows."""
    counts = [*Counter(row for row in rows if row is not None).values(), *[1] * rows.count(None)]
    most = max(n for n in range(len(rows) + 1) if sum(min(count, n) for count in counts) >= n * batch)
    if not most:
        with pytest.raises(TrainingError, match="too few for one batch"):
            DistinctSampler(rows, batch, seed=0)
        return
    sampler = DistinctSampler(rows, batch, seed=0)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler) == most * batch
    assert len(set(order)) == len(order)
    for begin in range(0, len(order), batch):
        named = [rows[row] for row in order[begin : begin + batch] if rows[row] is not None]
        assert len(set(named)) == len(named)
    assert order == list(sampler)


def test_every_row_comes_by_and_in_any_batch() -> None:
    """Of 40 rows with two captions in pairs, 8 at a time: in 300 epochs every row meets nearly every other one."""
    rows = [f"{row // 2}" for row in range(40)]
    sampler = DistinctSampler(rows, 8, seed=1)
    met = np.zeros((40, 40), dtype=int)
    orders = set()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        order = list(sampler)
        orders.add(tuple(order))
        assert sorted(order) == list(range(40))
        for begin in range(0, 40, 8):
            met[np.ix_(order[begin : begin + 8], order[begin : begin + 8])] += 1
    assert len(orders) == 300
    partners = met[~np.kron(np.eye(20, dtype=bool), np.ones((2, 2), dtype=bool))]
    assert partners.min() > 30 and partners.max() < 90  # 300 * 7 / 38 = 55 in the mean
    assert met[np.arange(0, 40, 2), np.arange(1, 40, 2)].max() == 0


def test_a_frequent_caption_is_left_out_in_part_and_other_rows_of_it_every_epoch() -> None:
    rows = ["same"] * 20 + [str(row) for row in range(12)]
    sampler = DistinctSampler(rows, 4, seed=0)
    seen: set[int] = set()
    for epoch in range(50):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == 16 and sum(row < 20 for row in order) == 4
        seen |= set(order)
    assert seen == set(range(32))


class Batches:
    """Keeps the short captions that were trained on."""

    def __init__(self, trainer: Any) -> None:
        self.seen: list[list[tuple[int, ...]]] = []
        compute = trainer.compute_loss

        def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append([tuple(row) for row in inputs["short_input_ids"].tolist()])
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = keep


def repeating(count: int) -> list[Any]:
    rows: list[Any] = make_rows(count)
    for row in rows[: BATCH + 2]:
        row["short_caption"] = "a dog"
    return rows


def test_the_trainer_uses_it_in_every_epoch(longclip_folder: Path, tmp_path: Path) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 3, "distinct_short_captions": True}
    trainer = make_trainer(longclip_folder, tmp_path, repeating(4 * BATCH), **settings)
    batches = Batches(trainer)
    trainer.train()
    assert len(batches.seen) == trainer.state.global_step == 3 * 3  # 34 others, and 3 of "a dog" make 3 of 12
    assert all(len(set(batch)) == BATCH for batch in batches.seen)
    assert len({tuple(sorted(batch)) for batch in batches.seen}) == 9


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_captions_are_read_without_images(kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"caption": f"A dog {number}. It runs.", "image": "missing.png"} for number in range(3)]
    assert short_captions(rows if kind == "list" else datasets.Dataset.from_list(rows)) == [
        f"A dog {number}" for number in range(3)
    ]


def test_sampler_and_rows_know_the_epoch_however_they_are_wrapped() -> None:
    """As accelerate does it for several processes that go on within an epoch."""
    sampler = DistinctSampler([str(row) for row in range(8)], 2, seed=0)
    rows = SimpleNamespace(epoch=0, set_epoch=lambda epoch: setattr(rows, "epoch", epoch))
    batches = SkipBatchSampler(BatchSamplerShard(BatchSampler(sampler, 2, True), 2, 0), 1)
    loader = SimpleNamespace(batch_sampler=batches, dataset=rows)
    SayEpoch().on_epoch_begin(None, SimpleNamespace(epoch=3.25), None, train_dataloader=loader)
    assert sampler.epoch == rows.epoch == 3


def test_captions_that_are_drawn_from_lists(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.png", "caption": [f"A dog {n}. It runs.", f"A dog {n}. It sits."]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train, _ = load_rows(DataArguments(str(tmp_path / "rows.jsonl"), heldout_rows=0))
    assert short_captions(train) == ["A dog 0", "A dog 1", "A dog 2"]  # whichever is drawn
    rows[1]["caption"] = ["A dog.", "A cat. It sits."]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train, _ = load_rows(DataArguments(str(tmp_path / "rows.jsonl"), heldout_rows=0))
    with pytest.raises(TrainingError, match="every epoch draws another of 2: 'A dog', 'A cat'"):
        short_captions(train)


def test_what_cannot_be_kept_apart_is_refused(longclip_folder: Path, tmp_path: Path) -> None:
    class Own(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __getitem__(self, index: int) -> Any:
            return make_rows(BATCH)[index]

        def __len__(self) -> int:
            return BATCH

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(make_rows(BATCH))

    for dataset, message in ((Own(), "a Own gives none"), (Stream(), "Captions of a stream")):
        trainer = make_trainer(longclip_folder, tmp_path, dataset, distinct_short_captions=True)
        with pytest.raises(TrainingError, match=message):
            trainer.train()
    with pytest.raises(TrainingError, match="1 different short captions, too few for one batch of 12"):
        same = [row | {"short_caption": "a dog"} for row in make_rows(BATCH)]
        make_trainer(longclip_folder, tmp_path, same, distinct_short_captions=True).train()
    with pytest.raises(ValueError, match="long-only uses none"):
        arguments(tmp_path, strategy="long-only", distinct_short_captions=True)
    with pytest.raises(ValueError, match="debias draws others at every step"):
        arguments(tmp_path, strategy="debias", distinct_short_captions=True)
