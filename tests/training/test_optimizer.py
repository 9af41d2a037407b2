"""Learning rates of towers and layers, frozen parts, and bounds of the logit scale."""

from pathlib import Path

import pytest
import torch
from trainer_runs import BATCH, arguments, make_rows, make_trainer

from longclip_hf.errors import TrainingError
from longclip_hf.training.optimizer import named_layers

POSITIONS = "text_model.embeddings.position_embedding.weight"


def test_towers_and_layers(longclip_folder: Path, tmp_path: Path) -> None:
    """Every parameter but the scale of the logits is of a tower, and its layers are counted from the embeddings."""
    clip = make_trainer(longclip_folder, tmp_path, make_rows(BATCH)).model
    found = {name: (tower, layer) for name, _, tower, layer in named_layers(clip)}
    assert {name for name, (tower, _) in found.items() if tower is None} == {"logit_scale"}
    top = {tower: getattr(clip.config, f"{tower}_config").num_hidden_layers + 1 for tower in ("vision", "text")}
    expected = {
        POSITIONS: ("text", 0),
        "text_model.encoder.layers.0.mlp.fc1.weight": ("text", 1),
        "text_model.final_layer_norm.bias": ("text", top["text"]),
        "text_projection.weight": ("text", top["text"]),
        "vision_model.embeddings.class_embedding": ("vision", 0),
        "vision_model.pre_layrnorm.weight": ("vision", 0),
        "vision_model.encoder.layers.1.layer_norm1.weight": ("vision", 2),
        "vision_model.post_layernorm.weight": ("vision", top["vision"]),
        "visual_projection.weight": ("vision", top["vision"]),
    }
    assert {name: found[name] for name in expected} == expected


def test_learning_rates(longclip_folder: Path, tmp_path: Path) -> None:
    """By hand, and in one step of SGD without a warm-up: every parameter moves by its own rate times its gradient."""
    from trainer_runs import Gradients

    settings = {"vision_learning_rate": 1e-3, "text_learning_rate": 4e-3, "layer_decay": 0.5, "learning_rate": 2e-3}
    settings |= {"optim": "sgd", "max_steps": 1, "lr_scheduler_type": "constant"}
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), **settings)
    clip, seen = trainer.model, Gradients()
    trainer.add_callback(seen)
    before = {name: value.detach().clone() for name, value in clip.named_parameters()}
    trainer.train()
    for name, parameter, tower, layer in named_layers(clip):
        rate = 2e-3
        if tower is not None:
            top = getattr(clip.config, f"{tower}_config").num_hidden_layers + 1
            rate = {"vision": 1e-3, "text": 4e-3}[tower] * 0.5 ** (top - layer)
        expected = before[name] - rate * seen.steps[0][name]
        assert torch.allclose(parameter, expected, rtol=1e-5, atol=1e-8), name
    groups = trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(before)
    assert {group["weight_decay"] for group in groups} == {0.0} and groups[0]["lr"] == 4e-3


@pytest.mark.parametrize(("settings", "tower", "layers"), [
    ({"frozen_vision_layers": -1}, "vision", 99),
    ({"frozen_text_layers": -1}, "text", 99),
    ({"frozen_vision_layers": 1}, "vision", 1),
    ({"frozen_text_layers": 1, "cache_chunk_size": 4}, "text", 1),
    ({"frozen_text_layers": 0}, "text", 0),
])  # fmt: skip
def test_what_is_frozen_stays(
    settings: dict[str, int], tower: str, layers: int, longclip_folder: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(2 * BATCH), weight_decay=0.5, **settings)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value, of, layer in named_layers(trainer.model):
        stays = of == tower and layer <= layers and (name != POSITIONS or layers == 99)
        assert value.equal(before[name]) == stays, name


def test_settings_that_do_not_fit(longclip_folder: Path, tmp_path: Path) -> None:
    rows = make_rows(BATCH)
    with pytest.raises(TrainingError, match="frozen_text_layers is 99, and the tower has"):
        make_trainer(longclip_folder, tmp_path, rows, frozen_text_layers=99)
    with pytest.raises(TrainingError, match="Both towers are frozen"):
        make_trainer(longclip_folder, tmp_path, rows, frozen_text_layers=-1, frozen_vision_layers=-1)
    for settings, message in (
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"min_logit_scale": -1.0}, "min_logit_scale is the factor itself"),
        ({"min_logit_scale": 9.0, "max_logit_scale": 2.0}, "min_logit_scale 9.0 lies above max_logit_scale 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **settings)


def test_the_logit_scale_is_held_from_below(longclip_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), logit_scale=5.0, min_logit_scale=20.0)
    trainer.train()
    logged = [entry["logit_scale"] for entry in trainer.state.log_history if "logit_scale" in entry]
    assert logged[0] == pytest.approx(20.0, rel=1e-6) and min(logged) >= 19.999
