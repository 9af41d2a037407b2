"""`LongCLIPTrainer`, with numbers: every fast path equals the slow one, and two processes equal one."""

import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fork_server
import pytest
import torch
import trainer_runs
from conftest import run_python
from device_copies import Copies
from torch.nn import functional as F
from trainer_runs import BATCH, CASES, HELD_OUT, STEPS, Gradients, arguments, make_rows, make_trainer, with_adapters
from transformers import AutoProcessor

from longclip_hf.errors import TrainingError
from longclip_hf.evaluation.retrieval import ranks_among
from longclip_hf.training.checkpoints import COMPLETE, last_complete_checkpoint
from longclip_hf.training.collator import CaptionCollator, even_groups, length_groups
from longclip_hf.training.encoding import encode
from longclip_hf.training.figures import retrieval_metrics
from longclip_hf.training.trainer import LongCLIPTrainer
from modeling_longclip import LongCLIPModel
from modeling_longclip.compat import features

ROOT = Path(__file__).resolve().parents[2]
TABLE = "text_model.embeddings.position_embedding.weight"
KEEP = 20

Named = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 leaves the precision of a run in the environment, where the next one finds it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def batch(longclip_folder: Path) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(longclip_folder)
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, 248, sentences=True)
    made: dict[str, torch.Tensor] = collator(make_rows(BATCH))
    return made


def assert_close(got: Named, expected: Named, rtol: float) -> None:
    """Relative in the norm of each tensor, or of a hundredth of the largest: those of key biases are only rounding."""
    assert set(got) == set(expected)
    floor = max(value.norm().item() for value in expected.values()) / 100
    for name, value in expected.items():
        error, bound = (got[name] - value).norm().item(), rtol * max(value.norm().item(), floor)
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> Named:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# 1. encoding


@pytest.mark.parametrize("grouping", [length_groups, even_groups])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_groups_equal_padding_to_248(
    longclip_folder: Path, batch: dict[str, torch.Tensor], groups: int, grouping: Any
) -> None:
    """Features to 1e-6 and every gradient to 1e-5, relative, in float32."""
    model = LongCLIPModel.from_pretrained(longclip_folder)
    found = encode(model, batch, True, lambda lengths: grouping(lengths, groups), chunk_size=None)
    assert found.short is not None

    def padded(prefix: str) -> torch.Tensor:
        ids, mask = (batch[f"{prefix}{key}"] for key in ("input_ids", "attention_mask"))
        ids, mask = (
            F.pad(ids, (0, 248 - ids.shape[1]), value=ids[0].max().item()),
            F.pad(mask, (0, 248 - ids.shape[1])),
        )
        return features(model.get_text_features(input_ids=ids, attention_mask=mask))

    image = features(model.get_image_features(pixel_values=batch["pixel_values"]))
    slow = [image, padded(""), padded("short_")]
    fast = [found.image, found.long, found.short]
    weights = torch.randn(3, *image.shape, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(fast, slow, strict=True):
        assert (got - expected).norm() <= 1e-6 * expected.norm()
    expected = gradients(sum((w * part).sum() for w, part in zip(weights, slow, strict=True)), model)
    got = gradients(sum((w * part).sum() for w, part in zip(weights, fast, strict=True)), model)
    assert_close(got, expected, rtol=1e-5)


UNCACHED = {name: settings for name, settings in CASES.items() if not settings["cache_chunk_size"]}


@pytest.mark.parametrize("case", UNCACHED)
def test_the_gradient_cache_changes_nothing(
    longclip_folder: Path, batch: dict[str, torch.Tensor], tmp_path: Path, case: str
) -> None:
    """Loss and every gradient to 1e-5 relative, for chunks of 1, of 3 and of the whole batch."""
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), **UNCACHED[case])
    model = trainer.model.train()
    if case in (
        "bounded",
        "long-only-distillation",
    ):  # at the start the current and the frozen features are the same, and the term's gradient 0
        with torch.no_grad():
            model.text_projection.weight.mul_(1.5)
    results = {}
    for chunk_size in (0, 1, 3, BATCH):
        trainer.args.cache_chunk_size = chunk_size
        loss = trainer.compute_loss(model, dict(batch))
        results[chunk_size] = gradients(loss, model) | {"loss": loss.detach()}
    assert {"logit_scale", TABLE, "loss"} <= set(results[0])
    assert len(results[0]) == len(list(model.parameters())) + 1
    for chunk_size in (1, 3, BATCH):
        assert_close(results[chunk_size], results[0], rtol=1e-5)


def test_the_gradient_cache_keeps_less(longclip_folder: Path, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Bytes of tensors saved for the backward pass: without, and with a cache, less than a tenth."""
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH))
    saved = {}
    for chunk_size in (0, 3):
        trainer.args.cache_chunk_size = chunk_size
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        saved[chunk_size] = sum(kept.values())
        loss.backward()
    assert 0 < saved[3] < saved[0] / 10, saved


# 2. and 5. two processes


@pytest.fixture(scope="module")
def runs(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """By (rank, processes): one process with the whole batch, and two of half of it, all at once.

    They run once for all workers of xdist: who comes first makes the folder, and the others wait for the results.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trainer-runs"
    outputs = {key: folder / f"{key[0]}-of-{key[1]}.pt" for key in ((0, 1), (0, 2), (1, 2))}
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        until = time.monotonic() + 200
        while not done.is_file() and time.monotonic() < until:
            time.sleep(0.2)
    else:
        try:
            run_all(longclip_folder, outputs)
        finally:
            done.touch()
    return {key: torch.load(output, weights_only=False) for key, output in outputs.items()}


def run_all(checkpoint: Path, outputs: dict[tuple[int, int], Path]) -> None:
    started, ranks = [], fork_server.ranks(2)
    for (index, processes), output in outputs.items():
        env = {"PYTHONPATH": str(ROOT), **(ranks[index] if processes > 1 else {})}
        command = [sys.executable, str(ROOT / "tests" / "trainer_runs.py"), str(checkpoint), str(output)]
        started.append(fork_server.Fork(command, env=env, stderr=subprocess.STDOUT))
    with contextlib.ExitStack() as stack:
        for process in started:
            stack.enter_context(process)
        for process in started:
            printed, _ = process.communicate(timeout=150)
            assert process.returncode == 0, printed


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(runs: dict[tuple[int, int], dict[str, Any]], case: str) -> None:
    """Under DDP in float32: losses and every gradient of two steps to 1e-4 relative. Of the local scope, the one
    process decomposes its halves apart. The other rows of mixed-length would change the loss by far more.
    """
    expected = runs[0, 1][case]
    assert len(expected["gradients"]) == len(expected["logs"]) == STEPS
    for index in range(2):
        got = runs[index, 2][case]
        for one, two in zip(expected["gradients"], got["gradients"], strict=True):
            assert_close(two, one, rtol=1e-4)
    logged = ("loss_long", "loss_short", "logit_scale", "variance_kept")
    for one, two in zip(expected["logs"], runs[0, 2][case]["logs"], strict=True):
        assert set(one) == set(two)
        # The Trainer of transformers 4 rounds the loss to four places.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=2e-4)
        for name in set(logged) & set(one):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name
    assert [runs[key][case]["seen"] for key in runs] == [BATCH * STEPS] * 3


def test_every_case_is_another(runs: dict[tuple[int, int], dict[str, Any]]) -> None:
    """In the second step, when bounded has left its start; the cache changes none."""
    losses = {case: runs[0, 1][case]["logs"][1]["loss"] for case in CASES}
    assert len({round(losses[case], 4) for case in UNCACHED}) == len(UNCACHED)
    for case in UNCACHED:
        assert losses[f"{case}-cached"] == pytest.approx(losses[case], rel=1e-4)


def test_evaluation_loses_and_doubles_no_row(runs: dict[tuple[int, int], dict[str, Any]]) -> None:
    """Seven rows in batches of three, by one process and by two: the features in order, and the metrics."""
    one, two = (runs[key]["evaluation"] for key in ((0, 1), (0, 2)))
    for part, parts in zip(one["features"], two["features"], strict=True):
        assert part.shape == parts.shape == (HELD_OUT, 24)
        assert abs(part - parts).max() <= 1e-3
    keys = [name for name in one["metrics"] if "_r" in name and "runtime" not in name]
    assert len([key for key in keys if key.endswith(("r1", "r5", "r10"))]) == 13  # the mean, too
    for name in keys:
        if name.endswith(("_r1", "_r5", "_r10")):
            assert one["metrics"][name] == two["metrics"][name] == runs[1, 2]["evaluation"]["metrics"][name]


def test_every_process_names_rows_that_are_not_finite(runs: dict[tuple[int, int], dict[str, Any]]) -> None:
    said = {run["not finite"] for run in runs.values()}
    assert len(said) == 1
    assert said.pop().startswith(f"Features of the global batch of {BATCH} at step 1 hold NaN or Inf: image rows [")


# 3. the optimizer


@pytest.mark.parametrize("decay_all", [False, True])
def test_only_the_first_rows_stay(longclip_folder: Path, tmp_path: Path, decay_all: bool) -> None:
    settings = {"max_steps": 4, "weight_decay": 0.5, "decay_all": decay_all, "logit_scale": 100.0}
    rows = make_rows(2 * BATCH, longest=240)
    rows[0]["caption"] += " dog" * 300  # so that a caption reaches the last position
    trainer = make_trainer(longclip_folder, tmp_path, rows, learning_rate=1e-3, **settings)
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(100))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert after[TABLE][:KEEP].equal(before[TABLE][:KEEP])
    assert (after[TABLE][KEEP:] != before[TABLE][KEEP:]).any(dim=1).all()
    assert [name for name in before if after[name].equal(before[name])] == []


def test_which_parameters_decay(longclip_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH))
    names = {name for name, _ in trainer.model.named_parameters()}
    kept = {name for name in names if "norm" in name or "layrnorm" in name or name.endswith("bias")}
    kept |= {"logit_scale", "vision_model.embeddings.class_embedding"} | {n for n in names if "position" in n}
    assert set(trainer.get_decay_parameter_names(trainer.model)) == names - kept
    assert {"text_projection.weight", "text_model.embeddings.token_embedding.weight"} <= names - kept
    trainer.args.decay_all = True
    assert set(trainer.get_decay_parameter_names(trainer.model)) == names - {TABLE}
    trainer.create_optimizer()
    assert sorted(group["weight_decay"] for group in trainer.optimizer.param_groups) == [0.0, 0.0]


def test_the_logit_scale_is_held(longclip_folder: Path, tmp_path: Path) -> None:
    """From above the bound it comes to it at once, and the bound does not take its gradient away."""
    trainer = make_trainer(
        longclip_folder, tmp_path, make_rows(BATCH), logit_scale=200.0, max_logit_scale=100.0, max_steps=3
    )
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    history = [entry["logit_scale"] for entry in trainer.state.log_history if "logit_scale" in entry]
    assert history[0] == pytest.approx(100.0, rel=1e-6)
    assert all(value <= 100.0001 for value in history)
    assert all(step["logit_scale"].abs() > 1e-3 for step in seen.steps)


def test_accumulation_is_the_mean_of_the_micro_batches(longclip_folder: Path, tmp_path: Path) -> None:
    rows = make_rows(2 * BATCH)
    trainer = make_trainer(longclip_folder, tmp_path, rows, gradient_accumulation_steps=2, max_steps=1)
    model = trainer.model.train()
    losses, expected = [], {}
    for inputs in trainer.get_train_dataloader():
        loss = trainer.compute_loss(model, inputs)
        losses.append(loss.item())
        for name, grad in gradients(loss, model).items():
            expected[name] = expected.get(name, 0) + grad / 2
    model.zero_grad()
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.figures.sums.clear()
    trainer.train()
    assert_close(seen.steps[0], expected, rtol=1e-5)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert entry["loss_long"] + entry["loss_short"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_label_smoothing_by_hand(longclip_folder: Path, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trainer = make_trainer(
        longclip_folder, tmp_path, make_rows(BATCH), strategy="long-only", label_smoothing_factor=0.1
    )
    loss, found = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    image, text = F.normalize(found.image, dim=1), F.normalize(found.long, dim=1)
    logits = found.logit_scale.exp() * image @ text.T
    target = 0.9 * torch.eye(BATCH) + 0.1 / BATCH
    by_hand = [-(target * scores.log_softmax(dim=1)).sum(dim=1).mean() for scores in (logits, logits.T)]
    assert loss.item() == pytest.approx((sum(by_hand) / 2).item(), rel=1e-5)


# 4. what is logged


@pytest.mark.parametrize("strategy", ["primary-component", "mixed-length", "long-only"])
def test_what_is_logged(
    longclip_folder: Path, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The clock ticks once a look: a second from the start to the first log, and to the next. Of five steps, logged at
    two and four, the fifth is in the last entry.
    """
    clock = itertools.count(1.0)
    monkeypatch.setattr("longclip_hf.training.figures.time", SimpleNamespace(perf_counter=clock.__next__))
    rows = make_rows(BATCH)
    rows[0]["caption"] += " dog" * 300
    rows[1]["bad_rows"] = [0, 2, 1, 0, 0]
    settings = {"strategy": strategy, "max_steps": 5, "logging_steps": 2, "mixed_length_share": 1.0}
    trainer = make_trainer(longclip_folder, tmp_path, rows, **settings)
    trainer.train()
    tokenizer = AutoProcessor.from_pretrained(longclip_folder).tokenizer

    def tokens(captions: list[str]) -> int:
        return sum(min(248, len(tokenizer(caption, verbose=False)["input_ids"])) for caption in captions)

    long, short = tokens([row["caption"] for row in rows]), tokens([row["short_caption"] for row in rows])
    expected = {"primary-component": long + short, "mixed-length": short, "long-only": long}[strategy]
    entries = trainer.state.log_history
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert [entry["tokens_per_second"] for entry in entries] == [2 * expected, 2 * expected, expected]
    assert [entry["images_per_second"] for entry in entries] == [2 * BATCH, 2 * BATCH, BATCH]
    names = {"loss_long", "logit_scale"} | (
        {"loss_short", "variance_kept"} if strategy == "primary-component" else set()
    )
    for entry in entries:
        assert {name for name in entry if name.startswith("loss_")} | {"logit_scale"} == names - {"variance_kept"}
        assert all(math.isfinite(value) for value in entry.values())
        if strategy == "primary-component":
            assert 0 < entry["variance_kept"] < 1
            if "loss" in entry:
                assert entry["loss"] == pytest.approx(entry["loss_long"] + entry["loss_short"], abs=1e-4)
    assert trainer.report() == (
        f"{5 * BATCH} images with captions were trained on. 15 bad rows: 10 unreadable, 5 oversized. "
        "Long captions cut at the model's length: 5."
    )
    from PIL import Image

    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 800
        assert image.convert("L").getextrema() == (0, 255)


def test_evaluation_is_not_counted_in_the_speed(
    longclip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation between every two logs looks at the clock twice, and so takes a second of it; the next log comes
    three looks after the last one, less that second.
    """
    monkeypatch.setattr(
        "longclip_hf.training.figures.time", SimpleNamespace(perf_counter=itertools.count(1.0).__next__)
    )
    trainer = make_trainer(
        longclip_folder, tmp_path, make_rows(BATCH), make_rows(4, seed=1), eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    speeds = [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert speeds == [BATCH, BATCH / 2]


# 5. evaluation


def test_recall_by_hand(longclip_folder: Path, tmp_path: Path) -> None:
    """All rows, the uneven last batch too, and with the features of each caption encoded alone."""
    heldout = make_rows(HELD_OUT, seed=1)
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), heldout)
    trainer.train()
    metrics = trainer.evaluate()
    model, processor = trainer.model.eval(), AutoProcessor.from_pretrained(longclip_folder)
    with torch.no_grad():
        image = torch.cat([features(model.get_image_features(row["image"][None])) for row in heldout])
        text = {
            name: torch.cat([
                features(model.get_text_features(processor.tokenizer(row[key], return_tensors="pt")["input_ids"]))
                for row in heldout
            ])
            for name, key in (("long", "caption"), ("short", "short_caption"))
        }  # fmt: skip
    for name in ("long", "short"):
        for direction, pair in (("i2t", (image, text[name])), ("t2i", (text[name], image))):
            ranks = ranks_among(*pair, torch.arange(HELD_OUT))
            for k in (1, 5, 10):
                assert metrics[f"eval_{name}_{direction}_r{k}"] == pytest.approx(ranks.recall(k)), (name, direction, k)
    assert "eval_loss" not in metrics
    assert metrics["eval_long_i2t_r10"] == 1.0
    assert trainer.predict(heldout).predictions[0].shape == (HELD_OUT, 24)


def test_effective_length_by_hand(longclip_folder: Path, tmp_path: Path) -> None:
    """With captions that the tokenizer cut, each encoded alone."""
    heldout = make_rows(HELD_OUT, seed=1)
    settings = {"eval_effective_length": True, "train_length": 95}
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), heldout, **settings)
    prediction = trainer.predict(heldout)
    model, tokenizer = trainer.model.eval(), AutoProcessor.from_pretrained(longclip_folder).tokenizer
    lengths = [*range(10, 95, 10), 95]
    image, *_, cut = map(torch.from_numpy, prediction.predictions)
    assert cut.shape == (HELD_OUT, len(lengths), 24)
    for place, length in enumerate(lengths):
        for row, found in zip(heldout, cut[:, place], strict=True):
            ids = tokenizer(row["caption"], truncation=True, max_length=length, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                torch.testing.assert_close(found, features(model.get_text_features(ids))[0], rtol=1e-4, atol=1e-5)
        recall = ranks_among(cut[:, place], image, torch.arange(HELD_OUT)).recall(1)
        assert prediction.metrics[f"test_long_t2i_r1_at_{length}"] == pytest.approx(recall)
    assert prediction.metrics["test_long_t2i_r1_at_95"] == prediction.metrics["test_long_t2i_r1"]


def test_effective_length_where_there_is_one_and_where_not() -> None:
    image = torch.eye(40)
    wrong, right = image.roll(1, 0), image
    rising = torch.stack([wrong, right, right, right], dim=1)
    found = retrieval_metrics(SimpleNamespace(predictions=(image, right, rising)), [10, 20, 30, 40])
    assert found["effective_length"] == 20
    assert [found[f"long_t2i_r1_at_{length}"] for length in (10, 20, 30, 40)] == [0, 1, 1, 1]
    flat = torch.stack([right] * 4, dim=1)
    assert "effective_length" not in retrieval_metrics(
        SimpleNamespace(predictions=(image, right, flat)), [10, 20, 30, 40]
    )


def test_evaluation_needs_no_large_batch(longclip_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, None, make_rows(5), per_device_train_batch_size=1)
    assert trainer.evaluate()["eval_short_t2i_r5"] == 1.0


# 6. checkpoints

LOAD = """
import json, sys, torch
from transformers import AutoModel, AutoProcessor, CLIPModel
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
found = {}
for folder in json.loads(sys.argv[1] if len(sys.argv) > 1 else %r):
    inputs = AutoProcessor.from_pretrained(folder).tokenizer("a photo of a dog", return_tensors="pt")
    for name, model in (
        ("ours", AutoModel.from_pretrained(folder, trust_remote_code=True)),
        ("auto", AutoModel.from_pretrained(folder)),
        ("stock", CLIPModel.from_pretrained(folder)),
    ):
        with torch.no_grad():
            out = model.eval().get_text_features(**inputs)
        found[folder, name] = getattr(out, "pooler_output", out), model.state_dict(), type(model).__name__
torch.save(found, %r)
"""


def load_all(folders: list[Path], output: Path) -> dict[tuple[str, str], tuple[torch.Tensor, Named, str]]:
    """What a fresh process without this project finds in `folders`."""
    code = LOAD % (json.dumps([str(folder) for folder in folders]), str(output))
    run_python(code, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(output.parent / "hf")})
    found: dict[tuple[str, str], tuple[torch.Tensor, Named, str]] = torch.load(output, weights_only=False)
    return found


def text_features(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    inputs = AutoProcessor.from_pretrained(folder).tokenizer("a photo of a dog", return_tensors="pt")
    with torch.no_grad():
        return features(model.eval().get_text_features(**inputs))


def test_every_checkpoint_is_a_full_one(longclip_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    trainer = make_trainer(
        longclip_folder, output, make_rows(2 * BATCH), save_strategy="steps", save_steps=1, max_steps=2
    )
    states = {}

    class Snapshot(trainer_runs.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            states[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}

    trainer.add_callback(Snapshot())
    trainer.train()
    trainer.save_model(str(tmp_path / "export"))
    assert last_complete_checkpoint(output) == output / "checkpoint-2"
    folders = [output / "checkpoint-1", output / "checkpoint-2", tmp_path / "export"]
    assert all((folder / COMPLETE).is_file() for folder in folders[:2])
    assert not states[1]["text_projection.weight"].equal(states[2]["text_projection.weight"])
    found = load_all(folders, tmp_path / "found.pt")
    for folder, step in zip(folders, (1, 2, 2), strict=True):
        for name, kind in (("ours", "LongCLIPModel"), ("auto", "CLIPModel"), ("stock", "CLIPModel")):
            text, state, loaded = found[str(folder), name]
            assert loaded == kind
            assert set(state) == set(states[step])
            assert all(state[key].equal(value) for key, value in states[step].items())
            if step == 2:
                assert (text - text_features(trainer.model, longclip_folder)).abs().max() <= 1e-6


# transformers 5 renamed what peft asks for.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_lora(longclip_folder: Path, tmp_path: Path) -> None:
    """Adapters of both towers move and nothing else; every folder is the merged model; runs go on."""
    pytest.importorskip("peft")
    output = tmp_path / "run"
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "adapt": with_adapters, "seed": 3}
    torch.manual_seed(0)
    trainer = make_trainer(longclip_folder, output, make_rows(2 * BATCH), learning_rate=1e-2, **settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not value.equal(before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert moved == adapters
    assert any("text_model" in name for name in moved) and any("vision_model" in name for name in moved)
    expected = text_features(trainer.model, longclip_folder)
    trainer.save_model(str(tmp_path / "export"))
    assert {n: v for n, v in trainer.model.state_dict().items() if "lora_" in n}.keys() == adapters  # still adapted
    saved = [tmp_path / "export", output / "checkpoint-4"]
    assert all((folder / "adapters" / "adapter_config.json").is_file() for folder in saved)
    for (_, name), (text, state, _) in load_all(saved, tmp_path / "found.pt").items():
        assert not [key for key in state if "lora" in key or "base_layer" in key], name
        assert (text - expected).abs().max() <= 1e-5
    shutil.rmtree(output / "checkpoint-4")
    torch.manual_seed(0)
    again = make_trainer(longclip_folder, output, make_rows(2 * BATCH), learning_rate=1e-2, **settings)
    again.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    for name, value in again.model.state_dict().items():
        assert value.equal(trainer.model.state_dict()[name]), name


# 7. precision, checkpointing, compilation


def one_step(folder: Path, output: Path, **settings: Any) -> tuple[Named, LongCLIPTrainer]:
    trainer = make_trainer(folder, output, make_rows(BATCH), max_steps=1, **settings)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps[0] | {"loss": torch.tensor(trainer.state.log_history[0]["loss_long"])}, trainer


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # the name of both majors
@pytest.mark.parametrize("chunk_size", [0, 4])
def test_gradient_checkpointing(longclip_folder: Path, tmp_path: Path, chunk_size: int) -> None:
    expected, _ = one_step(longclip_folder, tmp_path)
    got, trainer = one_step(longclip_folder, tmp_path, gradient_checkpointing=True, cache_chunk_size=chunk_size)
    assert trainer.model.is_gradient_checkpointing
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_bfloat16(longclip_folder: Path, tmp_path: Path, chunk_size: int) -> None:
    """The towers run in bfloat16, features and losses are float32, and the gradient points the same way."""
    expected, _ = one_step(longclip_folder, tmp_path)
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), bf16=True, cache_chunk_size=chunk_size)
    seen = Gradients()
    trainer.add_callback(seen)
    kinds: set[torch.dtype] = set()
    trainer.model.text_model.final_layer_norm.register_forward_pre_hook(lambda _, args: kinds.add(args[0].dtype))
    linear = trainer.model.text_projection
    linear.register_forward_hook(lambda _, args, output: kinds.add(output.dtype))
    trainer.train()
    assert torch.bfloat16 in kinds
    loss, exact = trainer.state.log_history[0]["loss_long"], expected.pop("loss").item()
    assert loss == pytest.approx(exact, rel=2e-2)
    assert loss != pytest.approx(exact, rel=1e-6)
    flat = [torch.cat([step[name].flatten() for name in expected]) for step in (seen.steps[0], expected)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99


@pytest.mark.slow
def test_torch_compile(longclip_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: transformers leaves the backend in the environment, and accelerate reads it there."""
    code = """
import sys, warnings
from pathlib import Path
import torch, trainer_runs
from trainer_runs import make_trainer, make_rows, Gradients, BATCH
warnings.simplefilter("default")  # inductor's own
steps = []
for settings in ({}, {"torch_compile": True, "torch_compile_backend": "inductor"}):
    trainer = make_trainer(Path(%r), Path(%r), make_rows(BATCH), max_steps=1, **settings)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    steps += seen.steps
assert torch._dynamo.utils.counters["frames"]["ok"] > 0
worst = max(((steps[0][n] - steps[1][n]).norm() / steps[0][n].norm().clamp(min=1e-2)).item() for n in steps[0])
print("worst", worst)
assert set(steps[0]) == set(steps[1]) and worst < 1e-3
"""
    env = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    assert "worst" in run_python(code % (str(longclip_folder), str(tmp_path)), env=env)


# 8. guards


def test_a_batch_that_components_reproduce(longclip_folder: Path, tmp_path: Path) -> None:
    message = r"4 images per process span 3 dimensions at most .* silently be off\. Use at least 5 images per process"
    with pytest.raises(ValueError, match=message):
        make_trainer(longclip_folder, tmp_path, make_rows(8), per_device_train_batch_size=4, num_components=3)
    make_trainer(longclip_folder, tmp_path, make_rows(8), per_device_train_batch_size=5, num_components=3)


def test_several_gpus_in_one_process(longclip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setattr(args, "_n_gpu", 2)
    model = LongCLIPModel.from_pretrained(longclip_folder)
    with pytest.raises(ValueError, match=r"One process sees 2 GPUs.*accelerate launch"):
        LongCLIPTrainer(model, args, make_rows(8))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(
    longclip_folder: Path,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
    scope: str,
    bad: float,
) -> None:
    """The rows of the first such batch are named, whatever came after it, and nothing is saved."""
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), components_scope=scope)
    trainer.compute_loss(trainer.model.train(), dict(batch))
    assert trainer.record()["captions_seen"] == BATCH
    spoiled = batch["pixel_values"].clone()
    spoiled[[2, 5]] = bad
    trainer.state.global_step = 1
    loss = trainer.compute_loss(trainer.model, batch | {"pixel_values": spoiled})
    assert not loss.isfinite()
    trainer.state.global_step = 2
    trainer.compute_loss(trainer.model, batch | {"pixel_values": torch.full_like(spoiled, math.nan)})
    named = rf"global batch of {BATCH} at step 2 hold NaN or Inf: image rows \[2, 5\]\. Look at"
    with pytest.raises(TrainingError, match=named):
        trainer.record()
    with pytest.raises(TrainingError, match=named):
        trainer.log({"loss": 1.0})


def test_weights_that_are_not_finite_are_not_saved(longclip_folder: Path, tmp_path: Path) -> None:
    rows = make_rows(BATCH)
    rows[4]["image"] = torch.full((3, 32, 32), torch.nan)
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100, "max_steps": 4}
    trainer = make_trainer(longclip_folder, tmp_path / "run", rows, **settings)
    with pytest.raises(TrainingError, match="at step 1 hold NaN or Inf: image rows"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path / "run") is None


# 8. waiting

SHARE = {"num_components": 0.7}


@pytest.mark.parametrize("case", [*UNCACHED, "share"])
def test_a_step_waits_for_nothing(longclip_folder: Path, tmp_path: Path, case: str) -> None:
    """After the first step, in which captions are looked at: no value leaves the device, but for a share of variance
    the count of components that reaches it. A log is one copy beside the Trainer's loss and norm of the gradient.
    """
    settings = {"max_steps": 5, "logging_steps": 2, "max_grad_norm": 1.0, **UNCACHED.get(case, SHARE)}
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(2 * BATCH), **settings)
    copies = Copies()
    trainer.add_callback(copies)
    trainer.train()
    assert len(copies.within[0]) > 0  # what is looked for is found
    each = 1 if trainer.args.components < 1 else 0
    assert [len(found) for found in copies.within[1:]] == [each] * 4, copies.within
    assert [len(found) for found in copies.after[:4]] == [0, 3, 0, 3], copies.after
    assert sum("figures.py" in place for place in copies.after[1]) == 1


def test_a_collator_of_ones_own_costs_what_it_does_not_give(longclip_folder: Path, tmp_path: Path) -> None:
    """Texts are looked at in every step, and lengths come from the attention mask: the same losses."""
    processor = AutoProcessor.from_pretrained(longclip_folder)
    own = CaptionCollator(processor.tokenizer, processor.image_processor, 248)
    losses = []
    for collator in (None, lambda rows: {k: v for k, v in own(rows).items() if not k.endswith("lengths")}):
        trainer = make_trainer(longclip_folder, tmp_path, make_rows(2 * BATCH), max_steps=3)
        trainer.data_collator = collator or trainer.data_collator
        copies = Copies()
        trainer.add_callback(copies)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(copies.within[2]) > 2


def test_texts_are_looked_at_again_after_training(longclip_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH))
    trainer.train()
    with pytest.raises(ValueError, match="no EOT token"):
        trainer.model.get_text_features(input_ids=torch.ones(1, 5, dtype=torch.long))


def test_batches_of_another_size_are_refused(
    longclip_folder: Path, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH))
    trainer.compute_loss(trainer.model, dict(batch))
    with pytest.raises(TrainingError, match=f"A batch has 5 rows, and those before it had {BATCH}"):
        trainer.compute_loss(trainer.model, {name: value[:5] for name, value in batch.items()})
    trainer.get_train_dataloader()
    with pytest.raises(TrainingError, match=r"lengths have shape \(12,\), for 5 captions"):
        trainer.compute_loss(
            trainer.model,
            {name: value if name == "lengths" else value[:5] for name, value in batch.items()},
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_chunk_size": -1}, "cache_chunk_size must be 0 or more"),
        ({"length_groups": 0}, "length_groups 1 or more"),
        ({"num_components": 2.5}, "whole number, or below 1 a share of variance, got 2.5"),
        ({"logit_scale": 0.0}, "logit_scale is the factor itself"),
        ({"max_logit_scale": -1.0}, "max_logit_scale is the factor itself"),
        ({"remove_unused_columns": True}, "must stay off"),
        ({"strategy": "none"}, "is not a valid Strategy"),
    ],
)
def test_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)
