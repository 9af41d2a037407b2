"""What is trained and how fast: learning rates of towers and layers, what is frozen, and bounds of the logit scale."""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from longclip_hf.errors import TrainingError
from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.encoding import clip_of, keep_rows_fixed

# Name of a parameter -> its tower. Both towers count layers alike: 0 is the embeddings, the last one the projection.
_TOWERS = {"vision": re.compile(r"^(vision_model\.|visual_projection\.)"), "text": re.compile(r"^text_(model|projec)")}
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_TOP = re.compile(r"projection\.|post_layernorm|final_layer_norm")
_POSITIONS = "text_model.embeddings.position_embedding.weight"


def named_layers(clip: Any) -> Iterator[tuple[str, nn.Parameter, str | None, int]]:
    """Every parameter with its tower and its layer, counted from 0, the embeddings, to `num_hidden_layers + 1`."""
    for name, parameter in clip.named_parameters():
        tower = next((tower for tower, pattern in _TOWERS.items() if pattern.match(name)), None)
        found = _LAYER.search(name)
        layer = int(found[1]) + 1 if found else 0
        if tower and not found and _TOP.search(name):
            layer = depth(clip, tower) + 1
        yield name, parameter, tower, layer


def depth(clip: Any, tower: str) -> int:
    """The number of a tower's layers."""
    layers: int = getattr(clip.config, f"{tower}_config").num_hidden_layers
    return layers


def freeze(model: nn.Module, args: LongCLIPTrainingArguments) -> None:
    """Takes the gradient from a tower's embeddings and lowest layers, or from all of it, and from the kept positions.

    The text's table of positions is frozen only with the whole tower: its stretched rows have yet to learn. The rows
    that the stretch kept stay fixed, or as many as `args.keep` says.

    Raises:
        TrainingError: for more layers or rows than there are, or if nothing is left to train.
    """
    clip = clip_of(model)
    text = clip.config.text_config
    keep = getattr(text, "keep", 0) if args.keep is None else args.keep
    if keep > text.max_position_embeddings:
        raise TrainingError(f"keep is {keep}, and the table of positions has {text.max_position_embeddings} rows.")
    keep_rows_fixed(clip, keep)
    frozen = {"vision": args.frozen_vision_layers, "text": args.frozen_text_layers}
    for tower, count in frozen.items():
        if count is not None and not -1 <= count <= depth(clip, tower):
            raise TrainingError(
                f"frozen_{tower}_layers is {count}, and the tower has {depth(clip, tower)} layers; -1 is all of it."
            )
    if set(frozen.values()) == {-1}:
        raise TrainingError("Both towers are frozen: nothing would be trained but the scale of the logits.")
    for name, parameter, of, layer in named_layers(clip):
        count = frozen.get(str(of))
        if count == -1 or (count is not None and layer <= count and name != _POSITIONS):
            parameter.requires_grad_(False)


def learning_rates(model: nn.Module, args: LongCLIPTrainingArguments) -> dict[nn.Parameter, float]:
    """The highest learning rate of every parameter: its tower's, times `layer_decay` for every layer above it."""
    clip = clip_of(model)
    rates = {}
    for _, parameter, tower, layer in named_layers(clip):
        rate = None if tower is None else getattr(args, f"{tower}_learning_rate")
        rate = args.learning_rate if rate is None else rate
        below = depth(clip, tower) + 1 - layer if tower else 0
        rates[parameter] = rate * args.layer_decay**below
    return rates


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: dict[nn.Parameter, float]) -> None:
    """Divides the groups of a new optimizer by learning rates, the highest first."""
    divided = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rates[parameter], []).append(parameter)
        divided += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer.param_groups[:] = sorted(divided, key=lambda group: -group["lr"])


class HoldLogitScale(TrainerCallback):
    """Holds the logit scale itself in its bounds: a clamp in the loss would leave it no gradient to come back by."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        lowest, highest = (None if b is None else math.log(b) for b in (args.min_logit_scale, args.max_logit_scale))
        if lowest is not None or highest is not None:
            with torch.no_grad():
                clip_of(model).logit_scale.clamp_(lowest, highest)

    on_optimizer_step = on_train_begin
