"""What a conversion starts from: a CLIP in a folder or on the Hub, its configuration, tensors and processor files."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from transformers import CLIPConfig, CLIPTextConfig, PretrainedConfig

from longclip_hf.conversion.hub import fetched
from longclip_hf.conversion.settings import read_settings
from longclip_hf.conversion.tensors import StoredTensor, target_dtype
from longclip_hf.conversion.weight_files import read_weights, weight_files
from longclip_hf.errors import ConversionError, NotCLIPError
from longclip_hf.files import inside, notice
from modeling_longclip import (
    LongCLIPConfig,
    LongCLIPModel,
    LongCLIPTextConfig,
    LongCLIPTextModel,
    LongCLIPTextModelWithProjection,
)
from modeling_longclip.defaults import CLIP_LENGTH

POSITION_TABLE = "text_model.embeddings.position_embedding.weight"
# Index buffers that checkpoints of older versions carry; CLIP makes them itself from the configuration.
DERIVED_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
MOST_LABELS = 10_000
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
PROCESSOR_FILES = [
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
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
    """The licence in the metadata of the card in `folder`, if there is a readable card and it states one.

    Raises:
        FileError: if the card leads out of the folder.
    """
    card = inside(folder, "README.md")
    try:
        stated = ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return stated if isinstance(stated, str) else None


def read_checkpoint(
    source: str,
    revision: str | None = None,
    stretched: bool = False,
    own_length: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Reads everything of a checkpoint but the tensors' values.

    Args:
        source: a folder, or a Hub id, holding a CLIPModel, CLIPTextModel or CLIPTextModelWithProjection in
            safetensors (one file or shards) or `.bin`.
        revision: branch, tag or commit of a Hub id.
        stretched: whether a Long-CLIP is meant too; otherwise it is refused.
        own_length: whether the table's rows count where config.json names another number of positions.
        variant: of the weights, such as `"fp16"` for model.fp16.safetensors.

    Raises:
        ConversionError: if there is no such checkpoint, it is no CLIP with a text tower, or its tensors are not the
            ones that its configuration asks for.
    """
    folder = find_folder(source, revision, variant=variant)
    return read_files(source, folder, weight_files(source, folder, variant), stretched, own_length)


def read_files(
    source: str, folder: Path, files: list[Path], stretched: bool = False, own_length: bool = False
) -> Checkpoint:
    """`read_checkpoint` of a folder whose weights are in `files`: a variant of several, under names of its own."""
    settings = _read_settings(source, folder, stretched)
    tensors = {name: tensor for file in files for name, tensor in read_weights(file).items()}
    if settings["model_type"] == "clip_text_model":
        tensors = {_nested(name): tensor for name, tensor in tensors.items()}
    if POSITION_TABLE in tensors and tensors[POSITION_TABLE].shape:
        _mend_length(source, settings, tensors[POSITION_TABLE].shape[0], own_length)
    config = _build_config(folder / "config.json", settings)
    dropped = [name for name in DERIVED_BUFFERS if tensors.pop(name, None) is not None]
    tensors = _layers_in_use(source, config, tensors)
    checkpoint = Checkpoint(source, folder, config, tensors, dropped)
    check_tensors(checkpoint)
    return checkpoint


def _layers_in_use(source: str, config: PretrainedConfig, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Without the last layers of the text tower that config.json leaves out, as Stable Diffusion 2.1 does with one."""
    text = getattr(config, "text_config", config)
    layers = {name: int(match[1]) for name in tensors if (match := _TEXT_LAYER.match(name))}
    there = max(layers.values(), default=-1) + 1
    if not isinstance(text.num_hidden_layers, int) or not 0 < text.num_hidden_layers < there:
        return tensors
    notice(
        f"config.json of {source} names {text.num_hidden_layers} text layers, and its file holds {there}: the last "
        "are left out, as transformers does."
    )
    return {name: tensor for name, tensor in tensors.items() if layers.get(name, 0) < text.num_hidden_layers}


def find_folder(source: str, revision: str | None = None, weights: bool = True, variant: str | None = None) -> Path:
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
    patterns = ["config.json", "README.md", *PROCESSOR_FILES, "spiece.model", "tokenizer.model"]
    if variant is not None:
        return download(source, revision, [*patterns, f"model.{variant}.safetensors"])
    folder = download(source, revision, patterns + safetensors * weights)
    if weights and not any(folder.glob("model*.safetensors")):
        folder = download(source, revision, patterns + torch_files)
    return folder


def download(source: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot of a Hub id, with its files that match `patterns`. See `longclip_hf.conversion.hub.fetched`."""

    def snapshot(local_files_only: bool) -> str:
        return snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)

    return fetched(source, revision, "model", snapshot)


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


def _read_settings(source: str, folder: Path, stretched: bool) -> dict[str, Any]:
    """The object in `config.json`, of a CLIP or of its text tower alone."""
    file = inside(folder, "config.json")
    if not file.is_file():
        raise ConversionError(f"{source} holds no config.json: a checkpoint in Hugging Face's format is needed.")
    raw = read_settings(folder, "config.json")
    model_type = raw.get("model_type")
    texts = [part for part in (raw, raw.get("text_config")) if isinstance(part, dict)]
    if model_type not in ("clip", "clip_text_model"):
        raise NotCLIPError(
            folder,
            model_type,
            f"{source} is a {model_type!r} model, and Long-CLIP stretches CLIP: model_type 'clip' (CLIPModel) or "
            "'clip_text_model' (CLIPTextModel, CLIPTextModelWithProjection).",
        )
    if not stretched and any("keep" in part for part in texts):
        length = texts[-1].get("max_position_embeddings")
        raise ConversionError(
            f"{source} is already a Long-CLIP of {length} positions. Stretch the CLIP it came from instead: "
            "positions that are interpolated twice stand for nothing that was trained."
        )
    for part in _objects(raw):
        labels = part.get("num_labels")  # for which transformers makes names, one by one
        if isinstance(labels, int) and labels > MOST_LABELS:
            raise ConversionError(f"{file} names {labels} labels, and a CLIP has none. Take num_labels out.")
    return raw


def _mend_length(source: str, settings: dict[str, Any], rows: int, own_length: bool) -> None:
    """Puts the table's own size in `settings` where transformers would read another one in them, and says so.

    Of a `text_config_dict` beside `text_config`, transformers takes all values, and its own defaults for what is not
    in it: the common folders of Long-CLIPs name 248 positions in `text_config` alone, and are read with 77.
    """
    text, legacy = settings.get("text_config", settings), settings.get("text_config_dict")
    if not isinstance(text, dict):
        return
    name = "max_position_embeddings"
    counted = {**text, name: CLIP_LENGTH, **legacy} if isinstance(legacy, dict) else text
    said = counted.get(name, CLIP_LENGTH)
    is_reset = isinstance(legacy, dict) and name not in legacy
    if said == rows or not (own_length or (is_reset and text.get(name) == rows)):
        return
    place = f"a text_config_dict without {name}, which resets it to" if is_reset else name
    notice(f"config.json of {source} has {place} {said}, and its table of positions has {rows} rows: {rows} is taken.")
    for part in (text, legacy):
        if isinstance(part, dict):
            part[name] = rows


def _build_config(file: Path, settings: dict[str, Any]) -> PretrainedConfig:
    try:
        config = (CLIPConfig if settings["model_type"] == "clip" else CLIPTextConfig).from_dict(settings)
        config.to_dict()  # values of some types are met only here
        return config
    except Exception as error:  # of every class: any type stands in a broken file, and only its version checks some
        raise ConversionError(f"{file} is no valid CLIP configuration: {' '.join(str(error).split())}") from error


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """`value` and the objects in it."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _objects(part)


def _nested(name: str) -> str:
    """CLIP's name of a tensor of a text tower that transformers 5 saved: flat, or, by 5.6 to 5.9 and of a tower that
    came out of a whole CLIP, with a nested projection too.
    """
    if name == "text_model.text_projection.weight":
        return "text_projection.weight"
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


def check_tensors(checkpoint: Checkpoint) -> None:
    """Whether the tensors are those that the configuration asks for.

    Raises:
        ConversionError: naming those that are missing, unknown or of another shape.
    """
    rows = checkpoint.tensors[POSITION_TABLE].shape[0] if POSITION_TABLE in checkpoint.tensors else None
    configured = checkpoint.text_config.max_position_embeddings
    if rows is not None and rows != configured:
        raise ConversionError(
            f"{checkpoint.source}: config.json names {configured} positions and {POSITION_TABLE} has {rows} rows. "
            "One of the two is not this checkpoint's. If config.json is wrong: longclip-convert "
            f"{checkpoint.source} --output DIR."
        )
    _check_layers(checkpoint)
    try:
        expected = expected_shapes(checkpoint, long_config(checkpoint, keep=0))
    except Exception as error:  # of every class: the model is built of whatever the file says
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


def _check_layers(checkpoint: Checkpoint) -> None:
    """Whether there are tensors of as many layers as config.json names: a model of a million layers is never built."""
    towers = {"text_model": checkpoint.text_config}
    if checkpoint.has_image_tower:
        towers["vision_model"] = checkpoint.config.vision_config
    for tower, config in towers.items():
        pattern = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
        layers = {int(match[1]) for name in checkpoint.tensors if (match := pattern.match(name))}
        if config.num_hidden_layers != len(layers):
            raise ConversionError(
                f"{checkpoint.source}: config.json names {config.num_hidden_layers} layers in {tower}, and there are "
                f"tensors of {len(layers)}. One of the two is not this checkpoint's."
            )
