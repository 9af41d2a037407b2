"""What a conversion starts from: a CLIP in a folder or on the Hub, its configuration, tensors and processor files."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from longclip_hf.conversion.tensors import StoredTensor, read_safetensors, read_torch, target_dtype
from transformers import CLIPConfig, CLIPTextConfig, PretrainedConfig

from longclip_hf.errors import ConversionError
from modeling_longclip import (
    LongCLIPConfig,
    LongCLIPModel,
    LongCLIPTextConfig,
    LongCLIPTextModel,
    LongCLIPTextModelWithProjection,
)

POSITION_TABLE = "text_model.embeddings.position_embedding.weight"
# Index buffers that checkpoints of older versions carry; CLIP makes them itself from the configuration.
DERIVED_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
PROCESSOR_FILES = [
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
]


@dataclass(frozen=True)
class Checkpoint:
    """A CLIP checkpoint.

    Attributes:
        source: what the user named, a folder or a Hub id.
        folder: where it lies on this machine.
        config: `CLIPConfig`, or `CLIPTextConfig` for a text tower alone, as stock transformers reads it.
        tensors: by CLIP's names (`text_model. ...` also for a text tower alone), still on disk.
        dropped: names of derived buffers in the files that are not carried over.
    """

    source: str
    folder: Path
    config: PretrainedConfig
    tensors: dict[str, StoredTensor]
    dropped: list[str]

    @property
    def text_config(self) -> CLIPTextConfig:
        return getattr(self.config, "text_config", self.config)

    @property
    def has_image_tower(self) -> bool:
        return isinstance(self.config, CLIPConfig)

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors, the floating ones as `dtype` if it is given."""
        return sum(
            math.prod(tensor.shape) * target_dtype(tensor.dtype, dtype).itemsize for tensor in self.tensors.values()
        )

    @property
    def model_class(self) -> type[LongCLIPModel | LongCLIPTextModel | LongCLIPTextModelWithProjection]:
        if self.has_image_tower:
            return LongCLIPModel
        return LongCLIPTextModelWithProjection if "text_projection.weight" in self.tensors else LongCLIPTextModel

    def license(self) -> str | None:
        """The licence that the checkpoint's own card states, if it has a readable card and the card states one."""
        return stated_license(self.folder)


def stated_license(folder: Path) -> str | None:
    """The licence in the metadata of the card in `folder`, if there is a readable card and it states one."""
    card = folder / "README.md"
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
    except (yaml.YAMLError, ValueError):
        return None


def read_checkpoint(source: str, revision: str | None = None, stretched: bool = False) -> Checkpoint:
    """Reads everything of a checkpoint but the tensors' values.

    Args:
        source: a folder, or a Hub id, holding a CLIPModel, CLIPTextModel or CLIPTextModelWithProjection in
            safetensors (one file or shards) or `.bin`.
        revision: branch, tag or commit of a Hub id.
        stretched: whether a Long-CLIP is meant too; otherwise it is refused.

    Raises:
        ConversionError: if there is no such checkpoint, it is no CLIP with a text tower, or its tensors are not the
            ones that its configuration asks for.
    """
    folder = find_folder(source, revision)
    return read_files(source, folder, _weight_files(source, folder), stretched)


def read_files(source: str, folder: Path, files: list[Path], stretched: bool = False) -> Checkpoint:
    """`read_checkpoint` of a folder whose weights are in `files`: a variant of several, under names of its own."""
    config = _read_config(source, folder, stretched)
    tensors = {name: tensor for file in files for name, tensor in _read_weights(file).items()}
    if not isinstance(config, CLIPConfig) and POSITION_TABLE.removeprefix("text_model.") in tensors:
        # A text tower that transformers 5 saved under its flat names.
        tensors = {_nested(name): tensor for name, tensor in tensors.items()}
    dropped = [name for name in DERIVED_BUFFERS if tensors.pop(name, None) is not None]
    checkpoint = Checkpoint(source, folder, config, tensors, dropped)
    _check_tensors(checkpoint)
    return checkpoint


def find_folder(source: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of `source`: itself, or the snapshot of a Hub id with the files that a conversion reads."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"{source} is a folder, and --revision {revision} is for Hub ids. Leave it out.")
        return path
    if path.is_file():
        raise ConversionError(
            f"{source} is a file. Name the folder that holds it, with config.json and the tokenizer."
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConversionError(f"{source}: no such folder.")
    safetensors = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    torch_files = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]
    patterns = ["config.json", "README.md", *PROCESSOR_FILES]
    folder = download(source, revision, patterns + safetensors * weights)
    if weights and not any(folder.glob("model*.safetensors")):
        folder = download(source, revision, patterns + torch_files)
    return folder


def download(source: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot of a Hub id, with its files that match `patterns`."""
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"{source}: no such folder here, and the Hub gave no such model ({reason}). Check the name, the "
            "connection and, for a gated or private model, `hf auth login`; offline, name a folder that holds it."
        ) from error


def long_config(checkpoint: Checkpoint, **stretch: Any) -> LongCLIPConfig | LongCLIPTextConfig:
    """The configuration of the stretched checkpoint; `stretch` goes into the text configuration."""
    text = checkpoint.text_config.to_dict() | stretch
    if not checkpoint.has_image_tower:
        return LongCLIPTextConfig(**text)
    config = checkpoint.config.to_dict()
    # Only the full model's projection is read from the top; the text tower alone reads its own.
    text["projection_dim"] = config["projection_dim"]
    config["vision_config"]["projection_dim"] = config["projection_dim"]
    config["text_config"] = text
    return LongCLIPConfig(**config)


def expected_shapes(checkpoint: Checkpoint, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model of `config` has, without building it in memory."""
    with torch.device("meta"):
        model = checkpoint.model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _read_config(source: str, folder: Path, stretched: bool) -> PretrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ConversionError(f"{source} holds no config.json: a checkpoint in Hugging Face's format is needed.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{file} is no JSON object: {error}.") from error
    if not stretched and ("keep" in raw or "keep" in (raw.get("text_config") or {})):
        length = (raw.get("text_config") or raw).get("max_position_embeddings")
        raise ConversionError(
            f"{source} is already a Long-CLIP of {length} positions. Stretch the CLIP it came from instead: "
            "positions that are interpolated twice stand for nothing that was trained."
        )
    if model_type not in ("clip", "clip_text_model"):
        raise ConversionError(
            f"{source} is a {model_type!r} model, and Long-CLIP stretches CLIP: model_type 'clip' (CLIPModel) or "
            "'clip_text_model' (CLIPTextModel, CLIPTextModelWithProjection)."
        )
    try:
        return (CLIPConfig if model_type == "clip" else CLIPTextConfig).from_dict(raw)
    except (TypeError, ValueError, StrictDataclassError) as error:  # transformers 5 checks the types of the values
        raise ConversionError(f"{file} is no valid CLIP configuration: {' '.join(str(error).split())}") from error


def _weight_files(source: str, folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConversionError(f"{index} is no index of shards: {error!r}. Download it again.") from error
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ConversionError(f"{source}: {index.name} names shards that are not there: {', '.join(missing)}.")
            return [folder / shard for shard in shards]
    raise ConversionError(f"{source} holds no weights: neither model.safetensors nor pytorch_model.bin, nor shards.")


def _read_weights(file: Path) -> dict[str, StoredTensor]:
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def _nested(name: str) -> str:
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


def _check_tensors(checkpoint: Checkpoint) -> None:
    rows = checkpoint.tensors[POSITION_TABLE].shape[0] if POSITION_TABLE in checkpoint.tensors else None
    configured = checkpoint.text_config.max_position_embeddings
    if rows is not None and rows != configured:
        raise ConversionError(
            f"{checkpoint.source}: config.json names {configured} positions and {POSITION_TABLE} has {rows} rows. "
            "One of the two is not this checkpoint's."
        )
    try:
        expected = expected_shapes(checkpoint, long_config(checkpoint, keep=0))
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{checkpoint.source}: config.json describes no model that can be built: {error!r}."
        ) from error
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    complaints = [f"{name} is missing" for name in expected if name not in found]
    complaints += [f"{name} is unknown" for name in found if name not in expected]
    complaints += [
        f"{name} has shape {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if complaints:
        more = f" ... and {len(complaints) - 10} more" if len(complaints) > 10 else ""
        raise ConversionError(
            f"{checkpoint.source}: the tensors are not those of its config.json: {'; '.join(complaints[:10])}{more}."
        )
