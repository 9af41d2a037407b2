"""Tiny files in the layouts that image makers hold, with the true names, and where each is met."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from longclip_hf.conversion.key_map import to_ours
from tests.conversion.straight_line import random_state

State = dict[str, torch.Tensor]


def text_tower(
    width: int = 64, rows: int = 77, vocab_size: int = 759, layers: int = 2, mlp: int = 256, seed: int = 0
) -> State:
    """A random text tower under OpenAI's names, with its projection."""
    sizes = ((width, mlp, layers), (64, 128, 1), (32, 16), width, vocab_size)
    whole = random_state(*sizes, rows=rows, tables=1, seed=seed)
    return {name: tensor for name, tensor in whole.items() if not name.startswith(("visual.", "logit_scale"))}


def hugging_face(tower: Mapping[str, torch.Tensor], projected: bool = True) -> State:
    """The same under Hugging Face's names."""
    ours = to_ours(tower, text_alone=True)
    return {name: tensor for name, tensor in ours.items() if projected or name != "text_projection.weight"}


def prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def flat(state: Mapping[str, torch.Tensor]) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _rest(**extra: torch.Tensor) -> State:
    """Some of what stands beside text encoders in a whole checkpoint."""
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.arange(36.0).view(4, 1, 3, 3),
        "first_stage_model.encoder.conv_in.weight": torch.ones(2, 3, dtype=torch.float16),
        "model_ema.num_updates": torch.tensor(7),
        **extra,
    }


def _t5(prefix: str) -> State:
    return {f"{prefix}encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}


_IDS = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
_SCALE = {"logit_scale": torch.tensor(4.6)}


def _original(tower: State, prefix: str) -> State:
    return prefixed(prefix, tower | _SCALE)


def _split_into_lengths(tower: State) -> State:
    split: State = {}
    for name, tensor in tower.items():
        if name.endswith(("c_fc.weight", "c_proj.weight")):
            stem = name.removesuffix(".weight")
            split[f"{stem}.r"] = tensor.norm(dim=1, keepdim=True)
            split[f"{stem}.theta"] = tensor
        else:
            split[name] = tensor
    return split


class Layout(NamedTuple):
    """A layout: what makes a file of two text towers, where it is met, and which of the towers is meant."""

    make: Callable[[State, State], Any]
    met: str
    extension: str = "safetensors"
    encoder: str | None = None
    projected: bool = True
    second: bool = False


LAYOUTS: dict[str, Layout] = {
    "`text_model.`, `text_projection.weight`": Layout(
        lambda one, _: hugging_face(one) | _IDS, "`clip_l.safetensors`, `clip_g.safetensors` (SD3, ComfyUI)"
    ),
    "`text_model.`": Layout(
        lambda one, _: hugging_face(one, False) | _SCALE, "`clip_l.safetensors` (FLUX)", projected=False
    ),
    "`embeddings.`, `encoder.`, `final_layer_norm.`": Layout(
        lambda one, _: flat(hugging_face(one)), "a text tower saved by transformers 5"
    ),
    "`text_model.`, `text_projection`": Layout(
        lambda one, _: hugging_face(one, False) | {"text_projection": one["text_projection"]},
        "older files of ComfyUI's CLIPSave",
    ),
    "`transformer.resblocks.`": Layout(lambda one, _: one, "a text tower in OpenAI's and OpenCLIP's names"),
    "`cond_stage_model.transformer.text_model.`": Layout(
        lambda one, _: _rest() | prefixed("cond_stage_model.transformer.", hugging_face(one, False) | _IDS),
        "Stable Diffusion 1.x (A1111, ComfyUI)",
        projected=False,
    ),
    "`cond_stage_model.transformer.`": Layout(
        lambda one, _: _rest() | prefixed("cond_stage_model.transformer.", flat(hugging_face(one, False) | _IDS)),
        "Stable Diffusion 1.x, of some mergers",
        projected=False,
    ),
    "`cond_stage_model.model.`": Layout(
        lambda one, _: _rest() | _original(one, "cond_stage_model.model."), "Stable Diffusion 2.x"
    ),
    "`conditioner.embedders.0.transformer.text_model.`": Layout(
        lambda one, two: _rest()
        | prefixed("conditioner.embedders.0.transformer.", hugging_face(one, False) | _IDS)
        | _original(two, "conditioner.embedders.1.model."),
        "SDXL, its first", encoder="conditioner.embedders.0.transformer", projected=False,
    ),
    "`conditioner.embedders.1.model.`": Layout(
        lambda one, two: _rest()
        | prefixed("conditioner.embedders.0.transformer.", hugging_face(one, False) | _IDS)
        | _original(two, "conditioner.embedders.1.model."),
        "SDXL, its second", encoder="conditioner.embedders.1.model", second=True,
    ),
    "`conditioner.embedders.0.model.`": Layout(
        lambda one, _: _rest() | _original(one, "conditioner.embedders.0.model."), "SDXL's refiner"
    ),
    "`text_encoders.clip_l.transformer.text_model.`": Layout(
        lambda one, two: _rest()
        | _t5("text_encoders.t5xxl.transformer.")
        | prefixed("text_encoders.clip_l.", prefixed("transformer.", hugging_face(one)) | _SCALE)
        | prefixed("text_encoders.clip_g.", prefixed("transformer.", hugging_face(two)) | _SCALE),
        "SD3, FLUX, its first", encoder="text_encoders.clip_l.transformer",
    ),
    "`text_encoders.clip_g.transformer.text_model.`": Layout(
        lambda one, two: _rest()
        | _t5("text_encoders.t5xxl.transformer.")
        | prefixed("text_encoders.clip_l.", prefixed("transformer.", hugging_face(one)) | _SCALE)
        | prefixed("text_encoders.clip_g.", prefixed("transformer.", hugging_face(two)) | _SCALE),
        "SD3, its second", encoder="text_encoders.clip_g.transformer", second=True,
    ),
    "`clip_model.text_model.`": Layout(lambda one, _: prefixed("clip_model.", hugging_face(one)), "wrappers"),
    "`module.`": Layout(lambda one, _: {"state_dict": prefixed("module.", one)}, "DistributedDataParallel", "pt"),
    '`{"model": ...}`': Layout(lambda one, _: {"model": one, "epoch": 3}, "training checkpoints", "pt"),
    "`.theta`, `.r`": Layout(
        lambda one, _: _split_into_lengths(one), "fine-tuned with lengths and directions of weights apart (GmP)"
    ),
}  # fmt: skip


WHOLE = tuple(name for name in LAYOUTS if name.startswith(("`cond_stage", "`conditioner", "`text_encoders")))


def rows() -> list[str]:
    """Of the table in docs/conversion.md."""
    classes = {True: "`CLIPTextModelWithProjection`", False: "`CLIPTextModel`"}
    back = {True: "`--into`", False: "`--to comfyui`"}
    return [
        f"| {name} | {layout.met} | {classes[layout.projected]} | {back[name in WHOLE]} |"
        for name, layout in LAYOUTS.items()
    ]
