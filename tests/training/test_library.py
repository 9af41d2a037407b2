"""The trainer from a notebook: data sets of every kind, and what transformers' `Trainer` lets one bring along."""

import io
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from trainer_runs import BATCH, arguments, make_rows, make_trainer
from transformers import AutoProcessor, EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import BestRun

from longclip_hf.errors import DataError, TrainingError
from longclip_hf.training.trainer import LongCLIPTrainer
from modeling_longclip import LongCLIPModel

ROOT = Path(__file__).resolve().parents[2]


def picture(number: int) -> Image.Image:
    rng = random.Random(number)
    return Image.effect_noise((40, 32), 60 + rng.randrange(60)).convert("RGB")


def own_rows(count: int, folder: Path, kind: str, short: bool) -> list[dict[str, Any]]:
    """Nothing but pictures and captions."""
    rows = []
    for number, row in enumerate(make_rows(count)):
        file = folder / f"{number}.png"
        picture(number).save(file)
        image = {"image": picture(number), "path": str(file), "bytes": file.read_bytes()}[kind]
        rows.append({"image": image, "caption": row["caption"]} | ({"short_caption": "a dog"} if short else {}))
    return rows


class Table(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def hf_table(rows: list[Any]) -> Any:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(
        [row | ({"image": encoded(row["image"])} if isinstance(row["image"], Image.Image) else {}) for row in rows]
    )
    return made.cast_column("image", datasets.Image()) if isinstance(rows[0]["image"], Image.Image) else made


def encoded(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "torch table": Table,
    "torch stream": Stream,
    "datasets table": hf_table,
    "datasets stream": lambda rows: hf_table(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("image", "short"), [("image", True), ("path", False), ("bytes", False)])
def test_data_sets_without_bookkeeping(
    kind: str, image: str, short: bool, longclip_folder: Path, tmp_path: Path
) -> None:
    """Trained to the same weights as the rows in a list, whatever holds them; streams come in their own order."""
    rows = own_rows(2 * BATCH, tmp_path, image, short)
    trainer = make_trainer(longclip_folder, tmp_path / "out", KINDS[kind](rows))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.figures.captions_seen == 2 * BATCH
    assert trainer.figures.bad_rows.tolist() == [0] * 5
    expected = make_trainer(longclip_folder, tmp_path / "out", Stream(rows) if "stream" in kind else rows)
    expected.train()
    for name, value in expected.model.state_dict().items():
        assert value.equal(trainer.model.state_dict()[name]), name


def test_a_row_that_cannot_be_trained_on(longclip_folder: Path, tmp_path: Path) -> None:
    good = own_rows(BATCH, tmp_path, "path", False)
    for change, message in (
        ({"image": str(tmp_path / "none.png")}, r"Row 3 of a batch cannot be trained on: missing \(.*none.png"),
        ({"image": "http://10.0.0.1/a.png"}, r"cannot be trained on: refused \("),
        ({"caption": " "}, r"its caption must be a text that is not empty, got ' ' \(the row holds image, caption\)"),
        ({"caption": 7}, "its caption must be a text that is not empty, got 7"),
        ({"image": 7}, "must hold images, files or paths, found int"),
    ):
        rows = [row | (change if number == 3 else {}) for number, row in enumerate(good)]
        trainer = make_trainer(longclip_folder, tmp_path / "out", rows)
        with pytest.raises(DataError, match=message):
            trainer.data_collator(rows)


def snippet() -> str:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?LongCLIPTrainer\(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    assert f"```py\n{found[1]}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    return found[1]


def test_the_notebook_of_the_documents(longclip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in docs/training.md, with its folder of photographs and its checkpoint made here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "long-clip").symlink_to(longclip_folder)
    rows = own_rows(40, tmp_path, "image", False)
    (tmp_path / "photos").mkdir()
    lines = []
    for number, row in enumerate(rows):
        row["image"].save(tmp_path / "photos" / f"{number}.png")
        lines.append(f'{{"file_name": "{number}.png", "caption": "{row["caption"]}"}}')
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    code = snippet()
    assert len(code.strip().splitlines()) <= 12
    small = 'LongCLIPTrainingArguments("out", use_cpu=True, report_to="none", disable_tqdm=True, num_components=4, '
    scope: dict[str, Any] = {}
    exec(code.replace('LongCLIPTrainingArguments("out", ', small), scope)
    assert scope["trainer"].state.global_step > 0
    assert (tmp_path / "tuned" / "modeling_longclip.py").is_file()


# What transformers' Trainer takes


def test_a_model_init_is_prepared_like_a_model(longclip_folder: Path, tmp_path: Path) -> None:
    settings = {"logit_scale": 50.0, "learning_rate": 1e-2}
    rows = make_rows(2 * BATCH)
    expected = make_trainer(longclip_folder, tmp_path, rows, **settings)
    expected.train()
    trainer = LongCLIPTrainer(
        args=arguments(tmp_path, **settings),
        model_init=lambda: LongCLIPModel.from_pretrained(longclip_folder),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(longclip_folder),
    )
    for _ in range(2):  # as a search of hyper-parameters does: every train() begins with a new model
        trainer.train()
        for name, value in expected.model.state_dict().items():
            assert value.equal(trainer.model.state_dict()[name]), name
    table = "text_model.embeddings.position_embedding.weight"
    assert trainer.model.state_dict()[table][:20].equal(
        LongCLIPModel.from_pretrained(longclip_folder).state_dict()[table][:20]
    )


def test_checkpoints_of_a_search_lie_in_its_run(
    longclip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every trial in a folder of its own, and older ones are deleted there."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(longclip_folder, tmp_path / "out", make_rows(2 * BATCH), **settings)
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / "run-7"))
    trainer.train()
    assert [folder.name for folder in (tmp_path / "run-7").iterdir()] == ["checkpoint-2"]
    assert (tmp_path / "run-7" / "checkpoint-2" / "COMPLETE.json").is_file()


def test_own_metrics_collator_and_callbacks(longclip_folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(longclip_folder)
    seen: list[int] = []

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        """Long captions alone, by the processor."""
        texts = processor.tokenizer(
            [row["caption"] for row in rows], padding=True, truncation=True, return_tensors="pt"
        )
        return {"pixel_values": torch.stack([row["image"] for row in rows]), **texts}

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    trainer = LongCLIPTrainer(
        LongCLIPModel.from_pretrained(longclip_folder),
        arguments(tmp_path, strategy="long-only"),
        make_rows(2 * BATCH),
        make_rows(7, seed=1),
        processor,
        collate,
        compute_metrics=lambda prediction: {"width": prediction.predictions[0].shape[1]},
        callbacks=[Count()],
    )
    trainer.train()
    assert seen == [1, 2]
    assert trainer.evaluate()["eval_width"] == 24
    predicted = trainer.predict(make_rows(5, seed=2))
    assert [part.shape for part in predicted.predictions] == [(5, 24)] * 2 and predicted.metrics["test_width"] == 24


def test_several_evaluation_sets_and_early_stopping(longclip_folder: Path, tmp_path: Path) -> None:
    sets = {"near": make_rows(5, seed=1), "far": make_rows(7, seed=2)}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 40}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_far_mean_t2i_r1", "learning_rate": 0.0}
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), sets, **settings)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 3  # nothing moves, so the second and the third are no better than the first
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        alone = trainer.evaluate(eval_dataset=rows)
        for figure in ("long_t2i_r1", "short_i2t_r5", "mean_t2i_r1"):
            assert metrics[f"eval_{name}_{figure}"] == alone[f"eval_{figure}"]
    assert all(0 <= value <= 1 for name, value in metrics.items() if "_r1" in name or "_r5" in name)


def test_a_stream_needs_steps(longclip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(longclip_folder, tmp_path, Stream(make_rows(BATCH)), max_steps=-1)


def test_no_processor_no_collator(longclip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="CLIPProcessor"):
        LongCLIPTrainer(LongCLIPModel.from_pretrained(longclip_folder), arguments(tmp_path), make_rows(BATCH))


def test_a_search_tries_settings(longclip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that tries three learning rates: each begins with the same model, and records its own settings."""
    from transformers import hyperparameter_search as search

    tried: dict[float, dict[str, Any]] = {}

    class Three:
        default_hp_space = None

        @staticmethod
        def ensure_available() -> None:
            pass

        def run(self, trainer: LongCLIPTrainer, n_trials: int, direction: str) -> Any:
            objectives = {}
            for number, rate in enumerate((1e-9, 1e-3, 1e-2)[:n_trials]):
                trainer.train(trial={"learning_rate": rate})
                tried[rate] = trainer.record() | {"model": trainer.model}
                objectives[number] = trainer.compute_objective(trainer.evaluate())
            best = max(objectives, key=lambda number: objectives[number])
            return BestRun(str(best), objectives[best], {})

    # Whose trials are dictionaries; of the package itself, the Trainer asks for the run's name.
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="one")))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, search.HPSearchBackend.WANDB, Three)
    trainer = LongCLIPTrainer(
        args=arguments(tmp_path),
        train_dataset=make_rows(BATCH),
        eval_dataset=make_rows(5, seed=1),
        processing_class=AutoProcessor.from_pretrained(longclip_folder),
        model_init=lambda: LongCLIPModel.from_pretrained(longclip_folder),
    )
    best = trainer.hyperparameter_search(
        backend="wandb", n_trials=3, direction="maximize", compute_objective=lambda found: found["eval_mean_t2i_r1"]
    )
    assert best.run_id in ("0", "1", "2")
    assert [record["settings"]["learning_rate"] for record in tried.values()] == [1e-9, 1e-3, 1e-2]
    assert len({record["settings"]["model"] for record in tried.values()}) == 1
    before = LongCLIPModel.from_pretrained(longclip_folder).state_dict()
    moved = [
        max((value - before[name]).abs().max().item() for name, value in record["model"].state_dict().items())
        for record in tried.values()
    ]
    assert moved[0] < 1e-7 < moved[1] < moved[2]
