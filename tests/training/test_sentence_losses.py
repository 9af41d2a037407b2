"""The loss modules in sentence-transformers' own trainer, and their numbers beside the functions they are made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from trainer_runs import make_rows

from longclip_hf import (
    BoundedLoss,
    HiMoLoss,
    LongOnlyLoss,
    PrimaryComponentLoss,
    UndistinguishedLoss,
    contrastive_loss,
    primary_components,
)
from longclip_hf.errors import TrainingError

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="5.4")

BATCH = 6
ROWS = make_rows(BATCH)
# transformers 4 says that the processor of a checkpoint is a slow one.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def model(longclip_folder: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(longclip_folder), device="cpu")


def columns() -> list[list[Any]]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for _ in range(BATCH)]
    return [images, [row["caption"] for row in ROWS], [row["short_caption"] for row in ROWS]]


def preprocessed(model: Any, count: int = 3) -> list[dict[str, torch.Tensor]]:
    prepare = getattr(model, "preprocess", None) or model.tokenize
    return [dict(prepare(column)) for column in columns()[:count]]


def by_hand(model: Any, kind: str) -> torch.Tensor:
    image, long, short = (model(batch)["sentence_embedding"] for batch in preprocessed(model))
    features = short
    image, long, short = (F.normalize(part, dim=1) for part in (image, long, short))

    def itc(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(one, other, 50.0, 0.1)

    def coarse(part: torch.Tensor) -> torch.Tensor:
        return primary_components(part, 2).features

    return (
        itc(image, long)
        + {
            "long": lambda: torch.zeros(()),
            "undistinguished": lambda: 0.5 * itc(image, short),
            "primary": lambda: 0.5 * itc(coarse(image), short),
            "himo": lambda: 0.5 * itc(image, coarse(long)),
            "bounded": lambda: 0.5 * F.smooth_l1_loss(features, torch.zeros_like(features)),
        }[kind]()
    )


OPTIONS = {"scale": 50.0, "label_smoothing": 0.1}
MADE = {
    "primary": lambda model: PrimaryComponentLoss(model, 2, short_weight=0.5, **OPTIONS),
    "himo": lambda model: HiMoLoss(model, 2, "global", short_weight=0.5, **OPTIONS),
    "undistinguished": lambda model: UndistinguishedLoss(model, 0.5, **OPTIONS),
    "bounded": lambda model: BoundedLoss(model, 0.5, **OPTIONS),
    "long": lambda model: LongOnlyLoss(model, **OPTIONS, gather_across_devices=False),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_loss_is_what_its_parts_are(model: Any, kind: str) -> None:
    model.eval()
    loss = MADE[kind](model)
    if kind == "bounded":  # against features of nothing, or the term would be 0
        for parameter in loss.original.parameters():
            parameter.zero_()
    found = loss(preprocessed(model, len(loss.columns)), None)
    assert found.item() == pytest.approx(by_hand(model, kind).item(), rel=1e-5)
    found.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("vision" in name for name in moved) and any("text" in name for name in moved)


@pytest.mark.parametrize("kind", ["primary", "himo"])
def test_training_with_it_in_the_librarys_trainer(model: Any, kind: str, tmp_path: Path) -> None:
    """Eight steps on one batch make its loss smaller, and the result is a checkpoint of that library again."""
    datasets = pytest.importorskip("datasets")
    loss = MADE[kind](model)
    names = ("image", "caption", "short_caption")[: len(loss.columns)]
    dataset = datasets.Dataset.from_dict(dict(zip(names, columns(), strict=False)))
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=BATCH, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = sentence_transformers.SentenceTransformerTrainer(model, args, dataset, loss=loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    captions = columns()[1]
    assert torch.allclose(torch.tensor(again.encode(captions)), torch.tensor(model.encode(captions)), atol=1e-5)


def test_columns_and_settings(model: Any) -> None:
    loss = PrimaryComponentLoss(model, 0.9, "global", short_weight=0.1)
    assert loss.get_config_dict() == {
        "scale": 100.0, "label_smoothing": 0.0, "gather_across_devices": True, "num_components": 0.9,
        "components_scope": "global", "short_weight": 0.1,
    }  # fmt: skip
    with pytest.raises(
        TrainingError, match=r"takes 3 columns, an image, a long caption, a short caption, and .* has 2"
    ):
        loss(preprocessed(model, 2), None)
    with pytest.raises(TrainingError, match="components_scope must be local or global"):
        PrimaryComponentLoss(model, components_scope="both")
