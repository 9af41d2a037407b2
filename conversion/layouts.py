"""Checkpoints that are not in Hugging Face's layout: what their files hold, and the configuration that it makes."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from longclip_hf.conversion import key_map
from longclip_hf.conversion.checkpoint import download
from longclip_hf.conversion.encoders import HEAD_WIDTH, Encoder, choose, original_names, recognise
from longclip_hf.conversion.foreign import refuse_file, refuse_names
from longclip_hf.conversion.open_clip_config import OPEN_CLIP_CONFIG, check_sizes, read_open_clip_config
from longclip_hf.conversion.tensors import StoredTensor, as_stored, load_torch, read_header, read_safetensors
from longclip_hf.errors import ConversionError
from longclip_hf.files import inside
from modeling_longclip.defaults import CLIP_LENGTH

TABLE = "positional_embedding"
TRAINED_TABLE = "positional_embedding_res"  # Long-CLIP's second one: the rows after the kept ones
# What OpenAI's checkpoints hold beside their weights.
_SCALARS = ("input_resolution", "context_length", "vocab_size")
# Heads of OpenCLIP's image towers that are not width / 64 each, by width, layers and patch.
_VISION_HEADS = {
    (1280, 32, 14): 16,  # H
    (1280, 32, 16): 16,
    (1408, 40, 14): 16,  # g
    (1664, 48, 14): 16,  # bigG
    (1792, 56, 14): 16,  # e
}
# Under which a training checkpoint holds the state dict.
_CONTAINERS = ("state_dict", "model", "model_state_dict")


@dataclass(frozen=True)
class Original:
    """A checkpoint in the layout of OpenAI, Long-CLIP or OpenCLIP.

    Attributes:
        source: what the user named.
        file: where it lies on this machine.
        tensors: under the names of `key_map`, and `TRAINED_TABLE` where the file has one; mapped from the file.
        open_clip: `open_clip_config.json` beside the file, if there is one.
        two_tables: whether the file holds both, which only Long-CLIP's do.
        openai: whether the file holds the numbers that OpenAI puts beside its weights.
        left_out: names in the file that are no weights, and are not carried over.
        encoder: where the text tower stands in the file; None where none was recognised.
    """

    source: str
    file: Path
    tensors: dict[str, torch.Tensor]
    open_clip: dict[str, Any] | None
    two_tables: bool
    openai: bool
    left_out: list[str]
    encoder: Encoder | None = None

    @property
    def text_alone(self) -> bool:
        return self.encoder is not None and self.encoder.text_alone


def read_original(
    source: str, file_name: str | None = None, revision: str | None = None, encoder: str | None = None
) -> Original:
    """Reads a state dict: plain, in safetensors, or as a training checkpoint or an image maker's file holds it.

    Args:
        source: a file, or the Hub id or folder that holds `file_name`.
        file_name: the file in it.
        revision: branch, tag or commit of a Hub id.
        encoder: which one, of a file that holds several.

    Raises:
        ConversionError: if there is no such file, or it is no state dict of tensors, or of no CLIP.
    """
    file = _find(source, file_name, revision)
    name = source if file_name is None else f"{source}/{file_name}"
    refuse_file(file)
    left_out: list[str] = []
    if file.suffix == ".safetensors":
        shapes = {name: entry.shape for name, entry in read_header(file)[0].items()}
    else:
        stored, left_out = _unpacked(file, load_torch(file))
        shapes = {name: tensor.shape for name, tensor in stored.items()}
    found = recognise(shapes)
    chosen = choose(name, found, encoder) if found else None
    names = shapes if chosen is None else chosen.names
    refuse_names(name, names)
    if file.suffix == ".safetensors":
        stored = read_safetensors(file, names)
    tensors = {name: stored[name].load() for name in names}
    if chosen is not None:
        try:
            tensors, made = original_names(chosen, tensors)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}") from error
        left_out += made
    scalars = [name for name in _SCALARS if tensors.pop(name, None) is not None]
    open_clip = inside(file.parent, OPEN_CLIP_CONFIG)
    return Original(
        source=name,
        file=file,
        tensors=tensors,
        open_clip=read_open_clip_config(open_clip) if open_clip.is_file() else None,
        two_tables=TRAINED_TABLE in tensors,
        openai=bool(scalars),
        left_out=left_out + scalars,
        encoder=chosen,
    )


def merge_tables(tensors: Mapping[str, torch.Tensor], keep: int) -> dict[str, torch.Tensor]:
    """Long-CLIP's two tables as one: rows below `keep` from the first, the others from the trained one.

    It is a selection by position, not a sum, so one table holds all that the model reads.

    Raises:
        ConversionError: if the tables have different shapes or `keep` is not within their rows.
    """
    merged = dict(tensors)
    trained = merged.pop(TRAINED_TABLE)
    if TABLE not in merged:
        raise ConversionError(f"{TRAINED_TABLE} is there and {TABLE} is missing, which holds the first {keep} rows.")
    frozen = merged[TABLE]
    if frozen.shape != trained.shape:
        raise ConversionError(
            f"{TABLE} has shape {tuple(frozen.shape)} and {TRAINED_TABLE} {tuple(trained.shape)}; they are one table "
            "in two, of equal shapes."
        )
    if frozen.ndim != 2 or not 0 <= keep <= frozen.shape[0]:
        raise ConversionError(
            f"The tables have shape {tuple(frozen.shape)}: not a matrix, or without {keep} rows to keep."
        )
    merged[TABLE] = torch.cat([frozen[:keep], trained[keep:]])
    return merged


def check_dtypes(source: str, tensors: Mapping[str, torch.Tensor], dtype: str | None) -> None:
    """Whether all tensors are floating and of one precision, or one is chosen.

    Raises:
        ConversionError: with what is there.
    """
    whole = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole:
        raise ConversionError(f"{source}: these hold no floating-point numbers: {key_map.shortened(whole)}.")
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    if len(counts) > 1 and dtype is None:
        found = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        raise ConversionError(
            f"{source} mixes precisions ({found} tensors), and a checkpoint has one. Choose it with --dtype; float32 "
            "keeps every value of float16 and bfloat16."
        )


def check_statistics(original: Original, named: str | None) -> None:
    """Whether the mean and standard deviation of the images are known, or named, and not both.

    Those of OpenAI's and of Long-CLIP's are the base model's. OpenCLIP's models were trained with several.

    Raises:
        ConversionError: if they are neither or both.
    """
    is_known = original.two_tables or original.openai or original.open_clip is not None
    if not is_known and named is None:
        raise ConversionError(
            f"{original.source} does not say the mean and standard deviation of its images, and no "
            f"{OPEN_CLIP_CONFIG} is beside it. Name them: --image-statistics openai for OpenAI's weights and most "
            "of OpenCLIP's, inception (0.5, 0.5) or imagenet for those that OpenCLIP lists with them."
        )
    if is_known and named is not None:
        raise ConversionError(
            f"--image-statistics {named}, and the layout or the configuration of {original.source} says them. Leave "
            "it out."
        )


def stretch_settings(length: int, keep: int, two_tables: bool) -> dict[str, Any]:
    """What the configuration of a Long-CLIP says about its stretch: the authors' own, as far as the length shows."""
    return {
        "keep": keep,
        "ratio": max(1, math.ceil((length - keep) / (CLIP_LENGTH - keep))),
        "stretch_method": "knowledge-preserving" if keep else "linear",
        "stretch_arithmetic": "float16" if two_tables else "float32",
    }


def clip_config(original: Original, activation: str | None = None, vision_heads: int | None = None) -> CLIPConfig:
    """CLIP's configuration: sizes from the shapes, the rest from OpenCLIP's, the layout, or the arguments.

    Args:
        original: with one table (`merge_tables`), and names that `key_map.to_ours` has accepted.
        activation: `"quick_gelu"` or `"gelu"`, where nothing else says it.
        vision_heads: heads of the image tower, where nothing else says it.

    Raises:
        ConversionError: if the shapes do not fit together, contradict OpenCLIP's configuration, or leave the
            activation or the heads open.
    """
    tensors = original.tensors
    text = _tower(original, "transformer.resblocks")
    vision = _tower(original, "visual.transformer.resblocks")
    text["max_position_embeddings"], _ = _shape(original, TABLE, 2)
    text["vocab_size"], text["hidden_size"] = _shape(original, "token_embedding.weight", 2)
    vision["hidden_size"], _, vision["patch_size"], _ = _shape(original, "visual.conv1.weight", 4)
    patches = _shape(original, "visual.positional_embedding", 2)[0] - 1
    if math.isqrt(max(patches, 0)) ** 2 != patches or not patches:
        raise ConversionError(
            f"{original.source}: visual.positional_embedding has {patches + 1} rows, not one and a square of patches."
        )
    vision["image_size"] = math.isqrt(patches) * vision["patch_size"]
    projection_dim = _shape(original, "text_projection", 2)[1]

    model_cfg: dict[str, Any] = {}
    if original.open_clip is not None:
        check_sizes(original.source, original.open_clip, text, vision, projection_dim)
        model_cfg = original.open_clip["model_cfg"]
    text["num_attention_heads"] = _text_heads(original, text["hidden_size"], model_cfg)
    vision["num_attention_heads"] = _vision_heads(original, vision, model_cfg, vision_heads)
    text["hidden_act"] = vision["hidden_act"] = _activation(original, model_cfg, activation)
    text["projection_dim"] = vision["projection_dim"] = projection_dim
    # CLIP's tokenizer has them last; CLIP pools at the highest id, which is EOT.
    text |= {"bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)

    with torch.device("meta"):
        expected = key_map.to_original(CLIPModel(config).state_dict())
    complaints = [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if tensors[name].shape != tensor.shape
    ]
    if complaints:
        raise ConversionError(f"{original.source}: the shapes make no CLIP: {key_map.shortened(complaints)}.")
    return config


def _find(source: str, file_name: str | None, revision: str | None) -> Path:
    path = Path(source).expanduser()
    local = path.exists() or source.startswith((".", "/", "~"))
    if local and revision is not None:
        raise ConversionError(f"{source} is on this machine, and --revision {revision} is for Hub ids. Leave it out.")
    if file_name is None:
        if path.is_dir():
            raise ConversionError(
                f"{source} is a folder. Name the file in it to convert it, or a layout with --to to convert it back."
            )
        if not path.is_file():
            raise ConversionError(f"{source}: no such file. In a Hub repository, name the file too: ID FILE.")
        return path
    folder = path if local else download(source, revision, [file_name, OPEN_CLIP_CONFIG, "README.md"])
    if not inside(folder, file_name).is_file():
        raise ConversionError(f"{source} holds no file {file_name}.")
    return folder / file_name


def _unpacked(file: Path, content: Any) -> tuple[dict[str, StoredTensor], list[str]]:
    """The state dict in what a training wrote, and the names of what is beside it."""
    left_out: list[str] = []
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            left_out += [f"{name} (training state)" for name in content if name != key]
            content = content[key]
    return as_stored(file, content), left_out


def _shape(original: Original, name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(original.tensors[name].shape)
    if len(shape) != dimensions:
        raise ConversionError(f"{original.source}: {name} has shape {shape}, and {dimensions} dimensions are needed.")
    return shape


def _tower(original: Original, blocks: str) -> dict[str, Any]:
    names = [name.removeprefix(f"{blocks}.") for name in original.tensors if name.startswith(f"{blocks}.")]
    return {
        "num_hidden_layers": len({name.split(".")[0] for name in names}),
        "intermediate_size": _shape(original, f"{blocks}.0.mlp.c_fc.weight", 2)[0],
    }


def _text_heads(original: Original, width: int, model_cfg: Mapping[str, Any]) -> int:
    heads = (model_cfg.get("text_cfg") or {}).get("heads") or width / HEAD_WIDTH
    return _dividing(original, "text", width, heads)


def _vision_heads(
    original: Original, vision: Mapping[str, Any], model_cfg: Mapping[str, Any], named: int | None
) -> int:
    width = vision["hidden_size"]
    if model_cfg:
        head_width = (model_cfg.get("vision_cfg") or {}).get("head_width") or HEAD_WIDTH
        heads = _dividing(original, "image", width, width / head_width)
        if named not in (None, heads):
            raise ConversionError(f"--vision-heads {named}, and {OPEN_CLIP_CONFIG} says {heads}. Leave it out.")
        return heads
    if named is not None:
        return _dividing(original, "image", width, named)
    known = _VISION_HEADS.get((width, vision["num_hidden_layers"], vision["patch_size"]))
    other = [heads for (known_width, _, _), heads in _VISION_HEADS.items() if known_width == width]
    if other and (known is None or original.two_tables):
        raise ConversionError(
            f"{original.source}: an image tower of width {width} has {other[0]} heads in OpenCLIP's models and "
            f"{width // HEAD_WIDTH} by OpenAI's rule of width / {HEAD_WIDTH}. Say which with --vision-heads."
        )
    return known or _dividing(original, "image", width, width / HEAD_WIDTH)


def _dividing(original: Original, tower: str, width: int, heads: float) -> int:
    if heads < 1 or heads != int(heads) or width % int(heads):
        remedy = "--vision-heads" if tower == "image" else f"an {OPEN_CLIP_CONFIG} beside the file"
        raise ConversionError(
            f"{original.source}: the {tower} tower of width {width} cannot have {heads:g} heads (width / "
            f"{HEAD_WIDTH} where nothing else is said). Name their number by {remedy}."
        )
    return int(heads)


def _activation(original: Original, model_cfg: Mapping[str, Any], named: str | None) -> str:
    known = None
    if model_cfg:
        known = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    elif original.two_tables or original.openai:
        known = "quick_gelu"
    if known is None and named is None:
        raise ConversionError(
            f"{original.source} does not say its activation, and no {OPEN_CLIP_CONFIG} is beside it. Name it: "
            "--activation quick_gelu for OpenAI's weights and for OpenCLIP's models named -quickgelu, --activation "
            "gelu for the other models of OpenCLIP."
        )
    if named is not None and known not in (None, named):
        raise ConversionError(f"--activation {named}, and {original.source} has {known}. Leave it out.")
    return known or str(named)
