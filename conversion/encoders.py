"""CLIP's text encoders in a single file: a table of where they stand, one of what they are, and how one is taken out.

A file is recognised by its names and shapes alone. What stands before the names of an encoder, its prefix, may be
anything; the prefixes that image makers' programs write are known by name.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from transformers import CLIPTextConfig

from longclip_hf.conversion import key_map
from longclip_hf.conversion.key_map import shortened
from longclip_hf.errors import ConversionError


class Kind(NamedTuple):
    """A text encoder that image makers use: its name among them, its activation, and where its tokenizer is."""

    name: str
    activation: str
    base: str


HEAD_WIDTH = 64  # of all of them
# By width: what Stable Diffusion, SDXL, SD3, FLUX and ComfyUI compute with, whoever trained it.
KINDS = {
    768: Kind("clip_l", "quick_gelu", "openai/clip-vit-large-patch14"),
    1024: Kind("clip_h", "gelu", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    1280: Kind("clip_g", "gelu", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
}
# What stands before the names of an encoder -> the files that have it so.
PLACES = {
    "": "a file of its own",
    "cond_stage_model.transformer.": "Stable Diffusion 1.x",
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "conditioner.embedders.0.transformer.": "Stable Diffusion XL",
    "conditioner.embedders.1.model.": "Stable Diffusion XL",
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
    "text_encoders.clip_l.transformer.": "Stable Diffusion 3 or FLUX.1",
    "text_encoders.clip_g.transformer.": "Stable Diffusion 3",
    "clip_l.transformer.": "ComfyUI's CLIPSave",
    "clip_h.transformer.": "ComfyUI's CLIPSave",
    "clip_g.transformer.": "ComfyUI's CLIPSave",
    "clip_model.": "a wrapper of a fine-tuned CLIP",
    "module.": "DistributedDataParallel",
}


class Naming(NamedTuple):
    """How tensors are called: by Hugging Face, of a text tower by transformers 5, or by OpenAI and OpenCLIP."""

    name: str
    table: str
    words: str


NAMINGS = (
    Naming("hugging_face", "text_model.embeddings.position_embedding.weight",
           "text_model.embeddings.token_embedding.weight"),
    Naming("flat", "embeddings.position_embedding.weight", "embeddings.token_embedding.weight"),
    Naming("original", "positional_embedding", "token_embedding.weight"),
)  # fmt: skip
# Index buffers, and a mask: CLIP makes them itself.
MADE = ("text_model.embeddings.position_ids", "embeddings.position_ids", "vision_model.embeddings.position_ids",
         "attn_mask")  # fmt: skip


class Encoder(NamedTuple):
    """A text encoder in a file.

    Attributes:
        name: `"clip_l"` and so on by its width, or its prefix where that is none of `KINDS`.
        prefix: what stands before the names of its tensors.
        naming: one of `NAMINGS`, by name.
        text_alone: whether no image tower stands under the prefix.
        width: of its states.
        rows: of its table of positions.
        names: in the file, of its tensors.
    """

    name: str
    prefix: str
    naming: str
    text_alone: bool
    width: int
    rows: int
    names: tuple[str, ...]

    @property
    def place(self) -> str:
        return PLACES.get(self.prefix, "names that begin so")

    @property
    def one_table_is_whole(self) -> bool:
        """Whether one table of more than 77 rows is all of it; in the original's layout a second one belongs to it."""
        return self.naming != "original" or self.prefix.startswith(("cond_stage_model.", "conditioner."))


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> list[Encoder]:
    """The CLIP text encoders in a file, by the names and shapes of its tensors.

    Args:
        shapes: name to shape.
    """
    found: dict[str, Encoder] = {}
    for naming in NAMINGS:
        for name in shapes:
            prefix = name.removesuffix(naming.table)
            words = shapes.get(prefix + naming.words, ())
            if prefix == name or len(words) != 2 or not shapes[name] or prefix.removesuffix("text_model.") in found:
                continue
            if not (prefix == "" or prefix.endswith(".")):  # visual.positional_embedding has no words beside it
                continue
            if naming.name == "original" and prefix.endswith(
                "text."
            ):  # OpenCLIP's custom_text: the image tower beside
                outer = prefix.removesuffix("text.")
                prefix = outer if any(other.startswith(f"{outer}visual.") for other in shapes) else prefix
            names = tuple(other for other in shapes if other.startswith(prefix))
            towers = ("vision_model.", "visual.", "visual_projection.")
            text_alone = not any(other.removeprefix(prefix).startswith(towers) for other in names)
            kind = KINDS.get(words[1])
            called = kind.name if kind else prefix.strip(".") or "the only one"
            found[prefix] = Encoder(called, prefix, naming.name, text_alone, words[1], shapes[name][0], names)
    encoders = [
        # Without those whose prefix goes on where its own ends: a file of its own has them all under "".
        encoder._replace(names=tuple(n for n in encoder.names if not n.startswith(_longer(encoder.prefix, found))))
        for encoder in found.values()
    ]
    counts = [encoder.name for encoder in encoders]
    return [
        encoder._replace(name=encoder.prefix.strip(".")) if counts.count(encoder.name) > 1 else encoder
        for encoder in encoders
    ]


def choose(source: str, encoders: list[Encoder], name: str | None) -> Encoder:
    """The one that is meant.

    Raises:
        ConversionError: if there are several and none is named, or none of that name.
    """
    there = ", ".join(f"{one.name} ({one.prefix or 'no prefix'}, {one.rows} positions)" for one in encoders)
    if name is None and len(encoders) > 1:
        raise ConversionError(f"{source} has {len(encoders)} CLIP text encoders: {there}. Choose one with --encoder.")
    chosen = [one for one in encoders if name in (None, one.name, one.prefix, one.prefix.strip("."))]
    if not chosen:
        raise ConversionError(f"{source} has no text encoder {name}. It has: {there}.")
    return chosen[0]


def original_names(encoder: Encoder, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of an encoder under the original's names, whatever they are called in the file, bit for bit.

    Weights that training has split into lengths and directions (`.r`, `.theta`) are folded to one.

    Args:
        encoder: as recognised.
        tensors: by their names in the file; those of the encoder at least.

    Returns:
        The tensors, and the names of what is no weight or is of no use without the image tower.

    Raises:
        ConversionError: for names that are unknown or missing, or stand there twice.
    """
    plain = {name.removeprefix(encoder.prefix): tensors[name] for name in encoder.names}
    left_out = [name for name in MADE if plain.pop(name, None) is not None]
    if encoder.text_alone and plain.pop("logit_scale", None) is not None:
        left_out.append("logit_scale")
    plain = folded(plain)
    if encoder.naming == "original":
        return _without_text(plain), left_out
    if encoder.naming == "flat":
        parts = ("embeddings.", "encoder.", "final_layer_norm.")
        plain = {f"text_model.{name}" if name.startswith(parts) else name: one for name, one in plain.items()}
    if "text_projection" in plain:  # of ComfyUI's older files, (in, out)
        plain["text_projection.weight"] = plain.pop("text_projection").t()
    return key_map.to_original(plain, encoder.text_alone), left_out


def text_config(source: str, tensors: Mapping[str, torch.Tensor], activation: str | None = None) -> CLIPTextConfig:
    """The configuration of a text tower alone: sizes from the shapes, the activation by its width or as named.

    Args:
        source: what the user named, for errors.
        tensors: under the original's names, with one table of positions.
        activation: `"quick_gelu"` or `"gelu"`; what image makers' programs compute is the default.

    Raises:
        ConversionError: if the shapes leave the activation or the heads open.
    """
    vocab_size, width = tensors["token_embedding.weight"].shape
    if activation is None and width not in KINDS:
        known = ", ".join(f"{width} ({kind.name}: {kind.activation})" for width, kind in KINDS.items())
        raise ConversionError(
            f"{source} does not say its activation, and a text tower of width {width} is none of image makers' "
            f"({known}). Name it with --activation."
        )
    if width % HEAD_WIDTH:
        raise ConversionError(
            f"{source}: a text tower of width {width} does not have heads of {HEAD_WIDTH}, as all of these have."
        )
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    projection = tensors.get("text_projection")
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        projection_dim=width if projection is None else projection.shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=tensors["positional_embedding"].shape[0],
        hidden_act=activation or KINDS[width].activation,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )


def folded(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` with one weight for each pair of `.r`, the lengths of its rows, and `.theta`, their directions.

    Raises:
        ConversionError: if one of a pair is missing, or they do not fit.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith((".r", ".theta"))}
    for stem in dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith((".r", ".theta"))):
        length, direction = tensors.get(f"{stem}.r"), tensors.get(f"{stem}.theta")
        if length is None or direction is None or direction.ndim != 2 or length.shape != (direction.shape[0], 1):
            shapes = [None if part is None else tuple(part.shape) for part in (length, direction)]
            raise ConversionError(
                f"{stem}.r has shape {shapes[0]} and {stem}.theta {shapes[1]}: a weight in lengths and directions is "
                "(rows, 1) and (rows, columns)."
            )
        unit = torch.nn.functional.normalize(direction.float(), dim=1)
        whole[f"{stem}.weight"] = (length.float() * unit).to(direction.dtype)
    return whole


def _without_text(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what OpenCLIP's other classes put around the names."""
    plain = dict(tensors)
    if any(name.startswith("text.") for name in plain):  # OpenCLIP's custom_text
        inside = {name.removeprefix("text.") for name in plain if name.startswith("text.")}
        if both := sorted(inside & plain.keys()):
            raise ConversionError(f"These are there twice, under text. too: {shortened(both)}.")
        plain = {name.removeprefix("text."): tensor for name, tensor in plain.items()}
    if "text_projection" not in plain and "text_projection.weight" in plain:
        # Some of OpenCLIP's are a linear layer, whose weight is (out, in).
        plain["text_projection"] = plain.pop("text_projection.weight").t()
    return plain


def _longer(prefix: str, others: Iterable[str]) -> tuple[str, ...]:
    return tuple(other for other in others if other != prefix and other.startswith(prefix))
