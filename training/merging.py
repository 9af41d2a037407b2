"""A model with adapters in it, saved as the plain model that it computes."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from longclip_hf.training.encoding import clip_of
from longclip_hf.weights import write_in_turn
from modeling_longclip import LongCLIPModel

_INNER = "base_layer."  # of an adapted layer, the layer that there was


class _Part(NamedTuple):
    """A tensor of the plain model."""

    name: str
    tensor: torch.Tensor  # before adapters are merged into it
    layer: Any  # the adapted layer that it belongs to, or None
    name_in_layer: str


def save_merged(adapted: Any, folder: Path) -> None:
    """Writes the plain model to `folder`, as `save_pretrained` of one does.

    Adapters are merged layer by layer, each into a copy of that layer alone: no second model is in memory, and the one
    in training stays as it is. (Merged in place and taken out again, its weights would not be the same.)

    Args:
        adapted: peft's, around a `LongCLIPModel`.
        folder: where `config.json`, `model.safetensors` and the code go.
    """
    parts = list(_parts(adapted))
    with torch.device("meta"):
        plain = LongCLIPModel(clip_of(adapted).config)
    plain.save_pretrained(folder, state_dict={parts[0].name: parts[0].tensor})  # all but the weights
    layout = {part.name: (part.tensor.dtype, part.tensor.shape) for part in parts}
    write_in_turn(folder / "model.safetensors", layout, _merged(parts))


def _parts(adapted: Any) -> Iterator[_Part]:
    base: nn.Module = clip_of(adapted)
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_base_layer")}
    trained_whole = f".modules_to_save.{adapted.active_adapter}."
    for key, tensor in base.state_dict().items():
        owner = next((name for name in layers if key.startswith(f"{name}.")), None)
        if owner is None:
            if ".original_module." not in key:
                yield _Part(key.replace(trained_whole, "."), tensor, None, "")
        elif (inner := key.removeprefix(f"{owner}.")).startswith(_INNER):
            inner = inner.removeprefix(_INNER)
            yield _Part(f"{owner}.{inner}", tensor, layers[owner], inner)


def _merged(parts: list[_Part]) -> Iterator[torch.Tensor]:
    """The tensors of `parts`, in which those of a layer stand together."""
    current, merged = None, {}
    for part in parts:
        if part.layer is None:
            yield part.tensor
            continue
        if part.layer is not current:
            current, alone = part.layer, copy.deepcopy(part.layer)
            alone.merge()
            merged = alone.get_base_layer().state_dict()
        yield merged[part.name_in_layer]
