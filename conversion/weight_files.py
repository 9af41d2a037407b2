"""The files of a folder that hold a model's weights: one, a variant, or shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longclip_hf.conversion.foreign import refuse_file
from longclip_hf.conversion.tensors import StoredTensor, read_safetensors, read_torch
from longclip_hf.errors import ConversionError
from longclip_hf.files import inside, read_json


def weight_files(source: str, folder: Path, variant: str | None = None) -> list[Path]:
    """The files that hold the weights: one, or shards.

    Raises:
        ConversionError: if there are none, or of another format.
    """
    variants = {file.name.split(".")[1] for file in folder.glob("model.*.safetensors")}
    if variant is not None:
        if variant in variants:
            return [inside(folder, f"model.{variant}.safetensors")]
        there = f" It has {', '.join(sorted(variants))}." if variants else ""
        raise ConversionError(f"{source} holds no model.{variant}.safetensors.{there}")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if inside(folder, name).is_file():
            return [folder / name]
        index = inside(folder, f"{name}.index.json")
        if index.is_file():
            shards = sorted(shards_of(index))
            if missing := [shard for shard in shards if not inside(folder, shard).is_file()]:
                raise ConversionError(f"{source}: {index.name} names shards that are not there: {', '.join(missing)}.")
            return [folder / shard for shard in shards]
    if variants:
        known = ", ".join(sorted(variants))
        raise ConversionError(
            f"{source} holds no model.safetensors, but variants of it: {known}. Choose one with --variant."
        )
    for name in ("flax_model.msgpack", "tf_model.h5"):
        if (folder / name).is_file():
            refuse_file(inside(folder, name))
    raise ConversionError(f"{source} holds no weights: neither model.safetensors nor pytorch_model.bin, nor shards.")


def shards_of(index: Path) -> set[str]:
    """The names of files in an index of shards.

    Raises:
        ConversionError: if it is none, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and _all_text(weight_map) else set()
    if not names:
        raise ConversionError(
            f"{index} is no index of shards: its weight_map is not tensor -> file. Download it again."
        )
    for name in names:
        inside(index.parent, name)
    return names


def _all_text(mapping: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in mapping.values())


def read_weights(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.safetensors` or `.bin` file, still on disk."""
    refuse_file(file)
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
