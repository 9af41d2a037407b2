"""`open_clip_config.json`, in which OpenCLIP says what its tensors do not: read, compared, written."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPConfig

from longclip_hf.conversion.conversions import IMAGE_STATISTICS
from longclip_hf.conversion.key_map import shortened
from longclip_hf.errors import ConversionError
from longclip_hf.files import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
# Settings of OpenCLIP that are CLIP's own, and one that counts in training only. Others make another model.
_CLIPS_OWN = (
    ("pool_type", "tok"),
    ("pool_type", "argmax"),
    ("pos_embed_type", "learnable"),
    ("proj_type", "linear"),
)
_TRAINING_ONLY = ("patch_dropout", "init_logit_scale")
_READ = {
    "model_cfg": ("embed_dim", "quick_gelu", "custom_text", "vision_cfg", "text_cfg"),
    "vision_cfg": ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"),
    "text_cfg": ("context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio"),
}
_INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers, which Hugging Face writes


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_three_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(number) in (int, float) for number in value)


# What is computed with, or looked up. The sizes are compared with the tensors, whatever stands there.
_TYPES: tuple[tuple[str, str, tuple[Callable[[Any], bool], str]], ...] = (
    ("model_cfg", "quick_gelu", (lambda value: isinstance(value, bool), "true or false")),
    ("vision_cfg", "head_width", (_is_count, "a count")),
    ("text_cfg", "heads", (_is_count, "a count")),
    ("preprocess_cfg", "mean", (_is_three_numbers, "three numbers")),
    ("preprocess_cfg", "std", (_is_three_numbers, "three numbers")),
    ("preprocess_cfg", "interpolation", (_is_text, "a text")),
    ("preprocess_cfg", "resize_mode", (_is_text, "a text")),
)


def read_open_clip_config(file: Path) -> dict[str, Any]:
    """`open_clip_config.json`, with what is read of it in its types.

    Raises:
        ConversionError: for a file that is not OpenCLIP's, or a setting of another type.
    """
    value = read_json(file)
    model_cfg = value.get("model_cfg")
    parts = [model_cfg]
    if isinstance(model_cfg, dict):
        parts += [model_cfg.get("vision_cfg"), model_cfg.get("text_cfg")]
    if not model_cfg or not all(isinstance(part, dict) for part in parts):
        raise ConversionError(f"{file} has no model_cfg with vision_cfg and text_cfg: it is not OpenCLIP's.")
    found = {"model_cfg": model_cfg, "vision_cfg": parts[1], "text_cfg": parts[2]}
    found["preprocess_cfg"] = value.get("preprocess_cfg") or {}
    if not isinstance(found["preprocess_cfg"], dict):
        raise ConversionError(f"{file}: preprocess_cfg is {found['preprocess_cfg']!r:.80}, expected an object.")
    for part, name, (is_right, expected) in _TYPES:
        if found[part].get(name) is not None and not is_right(found[part][name]):
            raise ConversionError(f"{file}: {part}.{name} is {found[part][name]!r:.80}, expected {expected}.")
    return value


def check_sizes(
    source: str,
    open_clip: Mapping[str, Any],
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    projection_dim: int,
) -> None:
    """Whether OpenCLIP's `model_cfg` says what the tensors of `source` say, and nothing that CLIP does not have.

    Raises:
        ConversionError: with what it says otherwise.
    """
    model_cfg = open_clip["model_cfg"]
    parts = {"model_cfg": model_cfg} | {name: model_cfg.get(name) or {} for name in ("vision_cfg", "text_cfg")}
    foreign = [
        f"{part}.{name} = {value!r}"
        for part, settings in parts.items()
        for name, value in settings.items()
        if value and name not in (*_READ[part], *_TRAINING_ONLY) and (name, value) not in _CLIPS_OWN
    ]
    if foreign:
        raise ConversionError(f"{OPEN_CLIP_CONFIG} asks for what CLIP has not: {shortened(foreign)}.")
    found = {
        "model_cfg": {"embed_dim": projection_dim},
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
        },
    }
    different = [
        f"{part}.{name} = {parts[part][name]}, and the tensors say {value}"
        for part, values in found.items()
        for name, value in values.items()
        if name in parts[part] and parts[part][name] not in (value, [value, value])
    ]
    if different:
        raise ConversionError(f"{OPEN_CLIP_CONFIG} is not that of {source}: {shortened(different)}.")


def image_settings(
    base: Mapping[str, Any], side: int, open_clip: Mapping[str, Any] | None, statistics: str | None = None
) -> dict[str, Any]:
    """`preprocessor_config.json` of a tower for images of `side` pixels.

    Args:
        base: that of the base model, whose mean, std and resampling count where nothing else says them.
        side: in pixels, of the square that the image tower sees.
        open_clip: OpenCLIP's configuration, if there is one. Where it says nothing, OpenCLIP's own defaults count:
            OpenAI's mean and std, and bicubic.
        statistics: a name among `IMAGE_STATISTICS`, of mean and std where there is no such configuration.

    Raises:
        ConversionError: for preprocessing that CLIP's image processor has not.
    """
    theirs = dict((open_clip or {}).get("preprocess_cfg") or {})
    named = statistics or ("openai" if open_clip is not None else None)
    if named is not None:
        defaults = dict(zip(("mean", "std"), map(list, IMAGE_STATISTICS[named]), strict=True))
        theirs = defaults | {name: value for name, value in theirs.items() if value is not None}
    if open_clip is not None:
        theirs.setdefault("interpolation", "bicubic")
    resize = theirs.get("resize_mode") or "shortest"
    square = {"height": side, "width": side}
    sizes = {
        "shortest": {"size": {"shortest_edge": side}, "do_center_crop": True},
        "squash": {"size": square, "do_center_crop": False},
    }
    if resize not in sizes:
        raise ConversionError(f"{OPEN_CLIP_CONFIG} resizes by {resize!r}; known are {', '.join(sizes)}.")
    settings = dict(base) | sizes[resize] | {"crop_size": square}
    for name, ours in (("mean", "image_mean"), ("std", "image_std")):
        if theirs.get(name) is not None:
            settings[ours] = theirs[name]
    if theirs.get("interpolation") is not None:
        if theirs["interpolation"] not in _INTERPOLATIONS:
            raise ConversionError(
                f"{OPEN_CLIP_CONFIG} resizes by {theirs['interpolation']!r}; known are {', '.join(_INTERPOLATIONS)}."
            )
        settings["resample"] = _INTERPOLATIONS[theirs["interpolation"]]
    return settings


def open_clip_config(config: CLIPConfig, images: Mapping[str, Any]) -> dict[str, Any]:
    """`open_clip_config.json` of a CLIP that Hugging Face's configurations describe; the inverse of `clip_config`.

    Raises:
        ConversionError: if the two towers have different activations, or one that OpenCLIP has not, or `images`
            (`preprocessor_config.json`) are not complete.
    """
    text, vision = config.text_config, config.vision_config
    activations = {text.hidden_act, vision.hidden_act}
    if len(activations) > 1 or not activations <= {"quick_gelu", "gelu"}:
        raise ConversionError(f"OpenCLIP has quick_gelu or gelu in both towers, not {', '.join(sorted(activations))}.")
    missing = {"image_mean", "image_std", "resample", "size"} - images.keys()
    names = {number: name for name, number in _INTERPOLATIONS.items()}
    if missing or type(images["resample"]) is not int or images["resample"] not in names:
        raise ConversionError(f"preprocessor_config.json lacks {', '.join(sorted(missing)) or 'a known resampling'}.")
    for name in ("image_mean", "image_std"):
        if not _is_three_numbers(images[name]):
            raise ConversionError(f"preprocessor_config.json: {name} is {images[name]!r:.80}, expected three numbers.")
    squashed = isinstance(images["size"], Mapping) and "shortest_edge" not in images["size"]
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": activations == {"quick_gelu"},
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "mlp_ratio": _ratio(vision),
                "patch_size": vision.patch_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": _ratio(text),
            },
        },
        "preprocess_cfg": {
            "mean": images["image_mean"],
            "std": images["image_std"],
            "interpolation": names[images["resample"]],
            "resize_mode": "squash" if squashed else "shortest",
        },
    }


def _ratio(tower: Any) -> float:
    """`mlp_ratio`, rounded up to where OpenCLIP's `int(width * mlp_ratio)` is the right width."""
    exact = tower.intermediate_size / tower.hidden_size
    return exact if int(tower.hidden_size * exact) == tower.intermediate_size else math.ceil(exact * 1e4) / 1e4
