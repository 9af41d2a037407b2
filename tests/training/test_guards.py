"""The trainer never trains something else than its settings say, or nothing."""

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from datasets import Dataset
from trainer_runs import BATCH, arguments, make_rows, make_trainer
from transformers import TrainingArguments

from longclip_hf.errors import CheckpointError, TrainingError
from longclip_hf.training.checkpoints import read_record
from longclip_hf.training.run_settings import COMPARED, changes_since, describe_run
from longclip_hf.training.settings import DataArguments, MethodSettings
from longclip_hf.training.sources import load_rows
from longclip_hf.training.trainer import LongCLIPTrainer
from modeling_longclip import LongCLIPModel

ROOT = Path(__file__).resolve().parents[2]
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


# Processes

ALONE_TOGETHER = """
import sys
from pathlib import Path
from trainer_runs import make_rows, make_trainer
from longclip_hf.errors import TrainingError
try:
    trainer = make_trainer(Path(sys.argv[1]), Path(sys.argv[2]), make_rows(24), use_cpu=sys.argv[3] == "True")
    print("trains with", trainer.accelerator.num_processes)
except TrainingError as error:
    print("error:", error)
"""


@pytest.mark.parametrize("use_cpu", [False, True])
@pytest.mark.skipif(torch.cuda.is_available(), reason="processes that see their GPU do train together")
def test_processes_that_would_train_apart(use_cpu: bool, longclip_folder: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-c", ALONE_TOGETHER, str(longclip_folder), str(tmp_path), str(use_cpu)]
    for process in fork_server.run_ranks(command, 2, env=env):
        said = process.stdout
        refused = "How many processes train together? accelerate says 1" in said and "--use_cpu" in said
        # Without a GPU, accelerate counted both of them, use_cpu or not, until 1.13; then only if it is asked to.
        assert refused != ("trains with 2" in said) and not (refused and use_cpu), said


# A run's settings


def test_a_run_goes_on_as_what_it_is(longclip_folder: Path, tmp_path: Path) -> None:
    """Every difference is refused by name; with `resume_with_changes` it goes on and records both."""
    rows = make_rows(3 * BATCH)
    make_trainer(longclip_folder, tmp_path, rows, **SAVING).train()
    checkpoint = str(tmp_path / "checkpoint-1")

    def go_on(checkpoint: str = checkpoint, rows: Any = rows, **settings: Any) -> LongCLIPTrainer:
        trainer = make_trainer(longclip_folder, tmp_path, rows, **{**SAVING, **settings})
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    other = {
        "strategy": "undistinguished",
        "learning_rate": 5e-4,
        "seed": 1,
        "max_steps": 4,
        "optim": "sgd",
        "weight_decay": 0.1,
        "per_device_train_batch_size": BATCH - 1,
        "num_components": 4,
    }
    for name, value in other.items():
        with pytest.raises(CheckpointError, match=rf"run with other settings: {name} was .* and is {value}\. Give"):
            go_on(**{name: value})
    with pytest.raises(CheckpointError, match="data was 36 rows and is 35 rows"):
        go_on(rows=rows[:-1])

    def scaled(model: LongCLIPModel) -> LongCLIPModel:
        model.text_projection.weight.data.mul_(1.01)
        return model

    with pytest.raises(CheckpointError, match="other settings: model was "):
        go_on(adapt=scaled)
    go_on(cache_chunk_size=4, logging_steps=2, length_groups=1, eval_strategy="no")  # the same weights, to rounding
    trainer = go_on(learning_rate=5e-4, seed=1, resume_with_changes=True)
    assert trainer.state.global_step == 3
    record = read_record(tmp_path / "checkpoint-3")
    change = {"after_step": 1, "was": {"learning_rate": 1e-3, "seed": 42}, "is": {"learning_rate": 5e-4, "seed": 1}}
    assert record["changes"] == [change] and record["settings"]["learning_rate"] == 5e-4
    go_on(str(tmp_path / "checkpoint-2"), learning_rate=5e-4, seed=1)  # what it is now
    assert read_record(tmp_path / "checkpoint-3")["changes"] == [change]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"first_sentence": "released"}, "first_sentence was first_sentence and is released_first_sentence"),
        ({"neutralise_special_tokens": True}, "captions_prepared_by was None and is neutralised"),
        ({"reduced_decoding": True}, "images_decoded_for was None and is 64"),
    ],
)
def test_a_run_goes_on_reading_as_it_began(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    """The rows are the same, and what is made of them would not be."""
    rows = [{"image": "a.jpg", "caption": f"Picture {n}. More.", "short": "Picture."} for n in range(4)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")

    place = str(tmp_path / "rows.parquet")

    def described(**more: Any) -> dict[str, Any]:
        train, _ = load_rows(DataArguments(place, heldout_rows=0, **more), image_side=64)
        return describe_run(None, {}, train, processes=1)

    for several in ({}, {"more_data": [place]}):
        before, now = described(**several), described(**several, **settings)
        assert before["data"] == now["data"]
        with pytest.raises(CheckpointError, match="run with other settings: ") as refused:
            changes_since("checkpoint-1", {"settings": before}, now, allowed=False)
        assert several or f"settings: {named}. Give" in str(refused.value)


def test_a_run_goes_on_with_the_rows_it_began_with(tmp_path: Path) -> None:
    """As many rows of the same file, of which others are held out."""
    rows = [{"image": f"{n}.jpg", "caption": f"Picture {n}. More."} for n in range(9)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")

    def data(seed: int, **more: Any) -> str:
        arguments = DataArguments(str(tmp_path / "rows.parquet"), heldout_rows=3, on_bad_row="error", **more)
        said: str = describe_run(None, {}, load_rows(arguments, seed=seed)[0], processes=1)["data"]
        return said

    assert data(0) == data(1)
    assert data(0, heldout_shuffle=True) == data(0, heldout_shuffle=True)
    assert len({data(0), data(0, heldout_shuffle=True), data(1, heldout_shuffle=True)}) == 3


def test_every_setting_of_the_method_is_compared_or_decides_no_weight() -> None:
    without_effect = {
        "length_groups",
        "cache_chunk_size",
        "resume_with_changes",
        "log_retrieved",
        "eval_effective_length",
    }
    assert {field.name for field in fields(MethodSettings)} - set(COMPARED) == without_effect


def test_data_that_changed_its_texts(longclip_folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{key: row[key] for key in ("caption", "short_caption")} for row in make_rows(2 * BATCH)]
    from longclip_hf.training.run_settings import fingerprint

    made = fingerprint(datasets.Dataset.from_list(rows))
    assert made.startswith("24 rows: ") and made == fingerprint(datasets.Dataset.from_list([dict(r) for r in rows]))
    rows[8]["caption"] = "another"
    assert fingerprint(datasets.Dataset.from_list(rows)) != made


# The batch


def test_a_batch_made_smaller_is_checked_again(longclip_folder: Path, tmp_path: Path) -> None:
    """Memory runs out at 12 images; what is tried next is few enough for 9 components to reproduce it."""
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), num_components=9, auto_find_batch_size=True)
    step = trainer.training_step

    def short_of_memory(model: Any, inputs: Any, *args: Any) -> Any:
        if len(inputs["input_ids"]) == BATCH:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *args)

    trainer.training_step = short_of_memory  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"(10|6) images per process span \d dimensions"):
        trainer.train()


def test_more_batch_than_rows(longclip_folder: Path, tmp_path: Path) -> None:
    message = "There are 10 rows to train on, fewer than one batch of 12: nothing would be trained"
    with pytest.raises(TrainingError, match=message):
        make_trainer(longclip_folder, tmp_path, make_rows(10))


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_stream_without_a_batch(longclip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Nothing was trained: the data held not a single batch of 12 rows"):
        make_trainer(longclip_folder, tmp_path, Stream(make_rows(10))).train()


@pytest.mark.parametrize(("components", "said"), [(10, 1), (2, 0)])
def test_matching_that_does_next_to_nothing_is_said_once(
    components: int, said: int, longclip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), num_components=components, max_steps=7)
    trainer.train()
    kept = [entry["variance_kept"] for entry in trainer.state.log_history if "variance_kept" in entry]
    assert (min(kept) > 0.95) == bool(said), kept
    assert caplog.text.count("primary component matching does next to nothing") == said


# Evaluation


def test_the_best_model_is_chosen_by_recall(longclip_folder: Path, tmp_path: Path) -> None:
    settings = SAVING | {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), make_rows(7, seed=1), **settings)
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_mean_t2i_r1" in entry]
    means = [entry["eval_mean_t2i_r1"] for entry in evaluated]
    for entry in evaluated:
        expected = (entry["eval_long_t2i_r1"] + entry["eval_short_t2i_r1"]) / 2
        assert entry["eval_mean_t2i_r1"] == pytest.approx(expected)
    assert trainer.state.best_metric == max(means) and trainer.args.greater_is_better
    best = trainer.state.best_model_checkpoint
    assert best is not None and Path(best).name == f"checkpoint-{1 + means.index(max(means))}"


def test_a_figure_of_ones_own_must_be_named(longclip_folder: Path, tmp_path: Path) -> None:
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    model = LongCLIPModel.from_pretrained(longclip_folder)
    for sets, own in ((make_rows(3), lambda _: {"mine": 1.0}), ({"a": make_rows(3)}, None)):
        with pytest.raises(TrainingError, match="say with metric_for_best_model"):
            LongCLIPTrainer(
                model, arguments(tmp_path, **settings), make_rows(BATCH), sets, data_collator=list, compute_metrics=own
            )


def test_arguments_that_leave_nothing(longclip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prediction_loss_only leaves evaluation nothing"):
        arguments(tmp_path, prediction_loss_only=True)
    model = LongCLIPModel.from_pretrained(longclip_folder)
    theirs = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TrainingError, match="args must be LongCLIPTrainingArguments"):
        LongCLIPTrainer(model, theirs)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="the processing_class is needed"):
        LongCLIPTrainer(model, arguments(tmp_path))


def test_a_batch_of_ones_own_that_lacks_something(longclip_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH))
    batch = trainer.data_collator(make_rows(BATCH))
    del batch["short_input_ids"]
    with pytest.raises(TrainingError, match="lack short_input_ids, which the strategy primary-component trains on"):
        trainer.compute_loss(trainer.model, batch)
