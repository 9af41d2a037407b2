"""Sources that a conversion refuses, each with what its error says; and how far properties are searched."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from longclip_hf.conversion.checkpoint import DERIVED_BUFFERS

# The same examples in every run: what a run finds, the next one finds again.
settings.register_profile("conversion", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("conversion")

TABLE = "text_model.embeddings.position_embedding.weight"


class Executes:
    """What a malicious `.bin` holds: reading it makes the folder `executed`."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "executed"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def change_config(folder: Path, **values: Any) -> None:
    """Changes `config.json`; a dictionary changes a part of it."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in values.items():
        config[name] = config.get(name, {}) | value if isinstance(value, Mapping) else value
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Changes `model.safetensors`; None removes a tensor."""
    changed = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder: Path, shards: int, extension: str = "safetensors") -> list[Path]:
    """Splits `model.safetensors` into shards with an index, in either format, and returns them."""
    stem, save = ("model", save_file) if extension == "safetensors" else ("pytorch_model", torch.save)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [folder / f"{stem}-{index + 1:05}-of-{shards:05}.{extension}" for index in range(shards)]
    weight_map = {name: files[index % shards].name for index, name in enumerate(tensors)}
    for file in files:
        save({name: tensors[name] for name in tensors if weight_map[name] == file.name}, file)
    (folder / f"{stem}.{extension}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def in_old_form(folder: Path, form: str) -> None:
    """Makes a checkpoint look as OpenAI's first ones.

    `patch32` has sizes in `text_config` and null in `text_config_dict`; `patch14` has them, without the ids of special
    tokens, in `text_config_dict`, which counts. Both hold the `position_ids` buffers.
    """
    config = json.loads((folder / "config.json").read_text())
    old = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config["projection_dim"]}
    old |= {"initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "torch_dtype": "float32"}
    old |= {"_name_or_path": "clip-vit/", "transformers_version": None}
    rest = {
        "dropout": 0.0,
        "length_penalty": 1.0,
        "num_beams": 1,
        "return_dict": True,
        "top_k": 50,
        "torchscript": False,
    }
    for part in ("text", "vision"):
        sizes = {name: value for name, value in config[f"{part}_config"].items() if not name.endswith("token_id")}
        old[f"{part}_config"] = sizes | rest
        old[f"{part}_config_dict"] = sizes if form == "patch14" else None
    old["text_config"] |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(old))
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    buffers = zip(DERIVED_BUFFERS, (torch.arange(77)[None], torch.arange(patches + 1)[None]), strict=True)
    change_tensors(folder, dict(buffers))


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def _cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def _as_bin(content: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content(folder), folder / "pytorch_model.bin")

    return change


def _lose_a_shard(folder: Path) -> None:
    split(folder, 3)[1].unlink()


def _lose_the_index(folder: Path) -> None:
    split(folder, 2)
    (folder / "model.safetensors.index.json").write_text("{")


BAD_SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "cut config": (_write("config.json", '{"model_type": "cl'), "config.json is no JSON file"),
    "config is a list": (_write("config.json", "[]"), "config.json holds no JSON object, but a list"),
    "siglip": (
        lambda folder: change_config(folder, model_type="siglip"),
        r"is a 'siglip' model|not those of a SiglipModel",
    ),
    "bert": (_write("config.json", '{"model_type": "bert", "hidden_size": 8}'), "is a 'bert' model"),
    "image tower": (
        lambda folder: change_config(folder, model_type="clip_vision_model"),
        "is a 'clip_vision_model' model",
    ),
    "stretched": (
        lambda folder: change_config(folder, text_config={"keep": 20, "max_position_embeddings": 248}),
        "is already a Long-CLIP of 248 positions",
    ),
    "width is a word": (
        lambda folder: change_config(folder, text_config={"hidden_size": "wide"}),
        "config.json (is no valid|describes no)",
    ),
    "heads do not divide": (
        lambda folder: change_config(folder, text_config={"num_attention_heads": 5}),
        "config.json (is no valid|describes no)",
    ),
    "unknown activation": (
        lambda folder: change_config(folder, text_config={"hidden_act": "snake"}),
        "config.json describes no model that can be built: KeyError..snake",
    ),
    "another length": (
        lambda folder: change_config(folder, text_config={"max_position_embeddings": 64}),
        f"config.json names 64 positions and {TABLE} has 77 rows",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no weights: neither model.safetensors nor pytorch_model.bin",
    ),
    "cut weights": (_cut_weights, r"model.safetensors is corrupt or was cut short .* \d+ bytes"),
    "tensor missing": (
        lambda folder: change_tensors(folder, {"logit_scale": None}),
        "config.json: logit_scale is missing",
    ),
    "no table": (lambda folder: change_tensors(folder, {TABLE: None}), f"{TABLE} is missing"),
    "tensor unknown": (
        lambda folder: change_tensors(folder, {"text_model.adapter.weight": torch.zeros(2)}),
        "config.json: text_model.adapter.weight is unknown",
    ),
    "wrong shape": (
        lambda folder: change_tensors(folder, {"text_projection.weight": torch.zeros(24, 31)}),
        r"config.json: text_projection.weight has shape \(24, 31\), not \(24, 32\)",
    ),
    "another depth": (
        lambda folder: change_config(folder, text_config={"num_hidden_layers": 3}),
        "config.json names 3 layers in text_model, and there are tensors of 2",
    ),
    "shard missing": (_lose_a_shard, "index.json names shards that are not there: model-00002-of-00003.safetensors"),
    "index corrupt": (_lose_the_index, "model.safetensors.index.json is no JSON file"),
    "code in .bin": (
        _as_bin(Executes),
        "pytorch_model.bin is no plain state dict, or is corrupt: .* Nothing in it was executed",
    ),
    "nested .bin": (
        _as_bin(lambda _: {"state_dict": {"logit_scale": torch.zeros(())}}),
        r"pytorch_model.bin is no plain state dict \(name -> tensor\)",
    ),
}


@pytest.fixture(params=BAD_SOURCES)
def bad_source(request: pytest.FixtureRequest, clip_folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint that is refused, and a pattern of the error's message."""
    change, message = BAD_SOURCES[request.param]
    folder = tmp_path / "bad-source"
    shutil.copytree(clip_folder, folder)
    change(folder)
    return folder, message


@pytest.fixture
def set_config() -> Callable[..., None]:
    return change_config


@pytest.fixture
def set_tensors() -> Callable[..., None]:
    return change_tensors


@pytest.fixture
def shard() -> Callable[..., list[Path]]:
    return split


@pytest.fixture
def to_old_form() -> Callable[..., None]:
    return in_old_form
