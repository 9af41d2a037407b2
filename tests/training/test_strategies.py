"""Every strategy and setting of the loss against a straight line of NumPy in float64, and runs of them that go on."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from trainer_runs import BATCH, arguments, make_rows, make_trainer

from longclip_hf.errors import TrainingError
from longclip_hf.training.encoding import Embeddings, Original
from longclip_hf.training.losses import contrastive_loss
from longclip_hf.training.settings import Strategy
from longclip_hf.training.step import step_loss
from modeling_longclip import LongCLIPModel

Array = NDArray[np.float64]
N, DIM = 10, 8


# The straight line: loops and definitions, and nothing of the project


def itc(images: Array, texts: Array, scale: float, smoothing: float, margin: float) -> float:
    """Cross-entropies both ways of `scale * (v u^T + margin * G)`, pair by pair."""
    n, total = len(images), 0.0
    cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in texts] for a in texts]
    for i in range(n):
        rows = [scale * (images[i] @ texts[j] + margin * (i != j) * cosines[i][j]) for j in range(n)]
        columns = [scale * (images[j] @ texts[i] + margin * (i != j) * cosines[j][i]) for j in range(n)]
        for logits in (rows, columns):
            largest = max(logits)
            log_sum = largest + np.log(sum(np.exp(logit - largest) for logit in logits))
            target = [(1 - smoothing) * (i == j) + smoothing / n for j in range(n)]
            total += sum(share * (log_sum - logit) for share, logit in zip(target, logits, strict=True))
    return total / (2 * n)


def components(features: Array, kept: float) -> Array:
    """By singular values: the least number that reaches a share of the variance, or a count."""
    mean = features.mean(axis=0)
    left, values, right = np.linalg.svd(features - mean, full_matrices=False)
    shares = np.cumsum(values**2) / np.sum(values**2)
    count = int(kept) if kept >= 1 else next(k for k, share in enumerate(shares, 1) if share >= kept)
    return np.asarray((left[:, :count] * values[:count]) @ right[:count] + mean)


def straight_line(features: dict[str, Array], settings: dict[str, Any]) -> float:
    image, long, short = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (features[k] for k in ("image", "long", "short"))
    )
    scale, kept = float(np.exp(features["scale"])), settings.get("num_components", 3)

    def pair(images: Array, texts: Array) -> float:
        return itc(images, texts, scale, 0.1, settings.get("hard_negative_margin", 0.0))

    strategy, weight = settings["strategy"], settings.get("short_loss_weight", 1.0)
    first = pair(image, long)
    if strategy == "long-only":
        return first
    if strategy == "undistinguished":
        return first + weight * pair(image, short)
    other = long if strategy == "himo" else short
    if settings.get("components_of", "text" if strategy == "himo" else "image") == "text":
        return first + weight * pair(image, components(other, kept))
    return first + weight * pair(components(image, kept), other)


LOSSES = [
    {"strategy": "himo", "num_components": 0.9},
    {"strategy": "himo", "num_components": 0.9, "components_scope": "global", "short_loss_weight": 0.3},
    {"strategy": "himo", "num_components": 4, "components_of": "image"},
    {"strategy": "primary-component", "num_components": 0.6},
    {"strategy": "primary-component", "num_components": 3, "components_of": "text"},
    *({"strategy": name, "hard_negative_margin": 0.5} for name in ("primary-component", "undistinguished", "himo")),
    {"strategy": "long-only", "hard_negative_margin": 0.25},
]


@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_strategy_is_its_formula(settings: dict[str, Any], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    image, long, short = (torch.randn(N, DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    scale = torch.tensor(2.0, dtype=torch.float64)
    args = arguments(tmp_path, label_smoothing_factor=0.1, **settings)
    terms, variance_kept = step_loss(args, Embeddings(image, long, short, scale))
    named = {"image": image.numpy(), "long": long.numpy(), "short": short.numpy(), "scale": scale.numpy()}
    assert terms.loss.item() == pytest.approx(straight_line(named, settings), rel=1e-12)
    assert (variance_kept is None) == (settings["strategy"] in ("long-only", "undistinguished"))


def test_components_of_the_text_carry_their_gradient(tmp_path: Path) -> None:
    """HiMo's released gather carries none. By differences of the straight line along one direction."""
    settings = {"strategy": "himo", "num_components": 4}
    generator = torch.Generator().manual_seed(1)
    image, long, along = (torch.randn(N, DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    long.requires_grad_()
    scale = torch.tensor(1.0, dtype=torch.float64)
    step_loss(arguments(tmp_path, label_smoothing_factor=0.1, **settings), Embeddings(image, long, None, scale))[
        0
    ].loss.backward()

    def at(step: float) -> float:
        moved = (long.detach() + step * along).numpy()
        return straight_line({"image": image.numpy(), "long": moved, "short": moved, "scale": scale.numpy()}, settings)

    assert long.grad is not None
    assert (long.grad * along).sum().item() == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6)


def test_the_margin_has_no_gradient_of_its_own() -> None:
    """That of logits to which constants were added, of gathered negatives from an offset on."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(8, 5, generator=generator, dtype=torch.float64)) for _ in range(2))
    for embeds in (images, texts):
        embeds.requires_grad_()
    own = slice(4, 7)
    got = contrastive_loss(images[own], texts[own], 10.0, 0.1, images, texts, 4, hard_negative_margin=0.5)
    constant = 0.5 * (texts @ texts.T).detach()
    constant.fill_diagonal_(0)
    logits = 10 * (images @ texts.T + constant)
    targets = torch.arange(4, 7)
    expected = sum(F.cross_entropy(part[own], targets, label_smoothing=0.1) for part in (logits, logits.T)) / 2
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for one, two in zip(*(torch.autograd.grad(loss, (images, texts)) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def divergence(now: Array, before: Array) -> float:
    """KL(before || now) of the softmax of every row, on average."""
    total = 0.0
    for logits, original in zip(now, before, strict=True):
        q, p = (np.exp(row) / np.exp(row).sum() for row in (logits, original))
        total += sum(p * np.log(p / q))
    return total / len(now)


@pytest.mark.parametrize("strategy", ["long-only", "himo", "mixed-length", "debias", "bounded", "undistinguished"])
def test_distillation_is_its_formula(strategy: str, tmp_path: Path) -> None:
    """Beside any strategy, at the original's scale, with no gradient for the scale in training."""
    generator = torch.Generator().manual_seed(2)
    image, long, short, image0, short0 = (
        torch.randn(N, DIM, dtype=torch.float64, generator=generator) for _ in range(5)
    )
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    embeddings = Embeddings(image, long, short, scale)
    original = Original(image0, short0, torch.tensor(1.5, dtype=torch.float64))
    settings = {"strategy": strategy, "label_smoothing_factor": 0.1}
    alone, _ = step_loss(arguments(tmp_path, **settings), embeddings, original)
    both, _ = step_loss(arguments(tmp_path, distillation=0.7, **settings), embeddings, original)
    v, t, v0, t0 = (F.normalize(part, dim=1).numpy() for part in (image, short, image0, short0))
    now, before = np.exp(1.5) * v @ t.T, np.exp(1.5) * v0 @ t0.T
    expected = (divergence(now, before) + divergence(now.T, before.T)) / 2
    assert both.distillation is not None and both.distillation.item() == pytest.approx(expected, rel=1e-12)
    assert both.loss.item() == pytest.approx(alone.loss.item() + 0.7 * expected, rel=1e-12)
    assert not both.distillation.requires_grad
    unchanged = original._replace(image=image, short=short)
    nothing, _ = step_loss(arguments(tmp_path, distillation=0.7, **settings), embeddings, unchanged)
    assert nothing.distillation is not None and abs(nothing.distillation.item()) < 1e-14


def test_the_original_is_not_moved(longclip_folder: Path, tmp_path: Path) -> None:
    """It has the scale, the texts and the images of before; the bounded strategy's has no image tower."""
    rows = make_rows(BATCH)
    trainer = make_trainer(longclip_folder, tmp_path, rows, strategy="debias", distillation=1.0, logit_scale=50.0)
    before = {name: value.clone() for name, value in LongCLIPModel.from_pretrained(longclip_folder).named_parameters()}
    trainer.train()
    for name, value in trainer._original.named_parameters():
        assert value.equal(before[name]) and not value.requires_grad, name
    logged = [entry["loss_distillation"] for entry in trainer.state.log_history if "loss_distillation" in entry]
    # The first step's texts are moved by their prefix, the original's are not.
    assert len(logged) == 2 and all(value > 0 for value in logged)
    bounded = make_trainer(longclip_folder, tmp_path, rows, strategy="bounded")
    assert not [name for name, _ in bounded._original.named_parameters() if "vision" in name or "visual" in name]


# Runs

RUNS: list[dict[str, Any]] = [
    {"strategy": "himo", "num_components": 0.9, "hard_negative_margin": 0.25, "keep": 0, "train_length": 40},
    {"strategy": "debias", "sentence_dropout": 0.3, "distillation": 2.0, "logit_scale": 30.0},
]


@pytest.mark.parametrize("settings", RUNS, ids=lambda settings: settings["strategy"])
def test_a_run_that_goes_on_ends_bit_equal(settings: dict[str, Any], longclip_folder: Path, tmp_path: Path) -> None:
    """Batches of one row less than half of an epoch, so that steps and batches do not fall together."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        **settings,
    }
    rows = make_rows(2 * BATCH + 1)
    trainer = make_trainer(longclip_folder, tmp_path, rows, **settings)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = make_trainer(longclip_folder, tmp_path, rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    before, after = trainer.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.report() == again.report()


TABLE = "text_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize("keep", [0, 7, None])
def test_rows_that_stay(keep: int | None, longclip_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), keep=keep, max_steps=1)
    before = dict(trainer.model.named_parameters())[TABLE].detach().clone()
    trainer.train()
    moved = (dict(trainer.model.named_parameters())[TABLE] != before).any(dim=1)
    stays = 20 if keep is None else keep
    assert not moved[:stays].any() and moved[stays:30].all()


def test_captions_cut_for_training(longclip_folder: Path, tmp_path: Path) -> None:
    """What is cut is counted and said, and rows beyond are not trained."""
    rows = make_rows(BATCH, longest=200)
    trainer = make_trainer(longclip_folder, tmp_path, rows, train_length=77, max_steps=1)
    lengths = [len(trainer.processing_class.tokenizer(row["caption"], verbose=False)["input_ids"]) for row in rows]
    before = dict(trainer.model.named_parameters())[TABLE].detach().clone()
    trainer.train()
    moved = (dict(trainer.model.named_parameters())[TABLE] != before).any(dim=1)
    assert moved[20:77].all() and not moved[77:].any()
    cut = sum(length > 77 for length in lengths)
    assert cut and f"Long captions cut at 77 tokens (train_length): {cut}." in trainer.report()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": -1}, "keep must be 0 or more rows, got -1"),
        ({"keep": 249}, "keep is 249, and the table of positions has 248 rows"),
        ({"train_length": 2}, "3 or more, got 2"),
        ({"train_length": 249}, "train_length is 249, and the model reads 248 tokens"),
        ({"hard_negative_margin": -0.1}, r"hard_negative_margin must be 0 or more, got -0\.1"),
        ({"distillation": -1.0}, r"distillation must be 0 or more, got -1\.0"),
        ({"sentence_dropout": 1.0}, "sentence_dropout must be at least 0 and below 1"),
        ({"strategy": "himo", "drop_first_sentence": True}, "himo has no short captions, so that none are made"),
        ({"strategy": "mixed-length", "short_prefix": "tokens"}, "mixed-length encodes no short captions"),
        ({"strategy": "debias", "num_components": 11}, "12 images per process span 11 dimensions"),
        ({"strategy": "himo", "num_components": 11}, "12 images per process span 11 dimensions"),
    ],
)
def test_settings_that_are_refused(
    settings: dict[str, Any], message: str, longclip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(longclip_folder, tmp_path, make_rows(BATCH), **settings)


def test_a_collator_that_cuts_elsewhere(longclip_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH))
    message = "train_length is 77, and the data_collator cuts at 248 tokens"
    with pytest.raises(TrainingError, match=message):
        type(trainer)(
            model=trainer.model, args=arguments(tmp_path, train_length=77), data_collator=trainer.data_collator
        )


def test_debias_is_primary_component_matching_of_drawn_captions(tmp_path: Path) -> None:
    """Its four parts are on, and each can be switched off; other strategies can have them."""
    debias = arguments(tmp_path, strategy="debias")
    assert debias.drop_first_sentence and debias.sample_sentences and debias.shuffle_sentences
    assert debias.short_prefix == "tokens" and debias.components_of == "image"
    parts = {"drop_first_sentence": False, "sample_sentences": False, "shuffle_sentences": False}
    assert not arguments(tmp_path, strategy="debias", short_prefix="none", **parts).draws_short
    for strategy in ("undistinguished", "primary-component", "bounded"):
        assert not arguments(tmp_path, strategy=strategy).draws_short
        assert arguments(tmp_path, strategy=strategy, shuffle_sentences=True, short_prefix="positions").draws_short


def test_strategies_are_their_names() -> None:
    assert Strategy("primary-component") is Strategy.PRIMARY_COMPONENT
    assert [str(strategy) for strategy in Strategy] == [
        "primary-component", "undistinguished", "mixed-length", "bounded", "long-only", "himo", "debias",
    ]  # fmt: skip
