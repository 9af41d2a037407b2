"""One table of names: a CLIP in the layout of OpenAI, Long-CLIP and OpenCLIP, and the same in Hugging Face's.

The table is read in both directions. Nothing is left over on either side: a tensor without a place is an error.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from longclip_hf.errors import ConversionError


@dataclass(frozen=True)
class Rule:
    """Where one tensor of the original layout stands in Hugging Face's; `*` is the number of a layer.

    Attributes:
        original: its name in the original layout.
        ours: its name in Hugging Face's, or several: equal parts of its rows, in this order.
        transposed: whether it is `(in, out)` there, and `(out, in)` here as in `nn.Linear`.
        half: whether the authors' loader holds it in float16, also on a CPU.
    """

    original: str
    ours: tuple[str, ...]
    transposed: bool = False
    half: bool = False


def _block(original: str, ours: str) -> Iterator[Rule]:
    """A layer of either tower."""
    original, ours = f"{original}.resblocks.*", f"{ours}.encoder.layers.*"
    for kind in ("weight", "bias"):
        yield Rule(f"{original}.ln_1.{kind}", (f"{ours}.layer_norm1.{kind}",))
        in_proj = tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield Rule(f"{original}.attn.in_proj_{kind}", in_proj, half=True)
        yield Rule(f"{original}.attn.out_proj.{kind}", (f"{ours}.self_attn.out_proj.{kind}",), half=True)
        yield Rule(f"{original}.ln_2.{kind}", (f"{ours}.layer_norm2.{kind}",))
        yield Rule(f"{original}.mlp.c_fc.{kind}", (f"{ours}.mlp.fc1.{kind}",), half=True)
        yield Rule(f"{original}.mlp.c_proj.{kind}", (f"{ours}.mlp.fc2.{kind}",), half=True)


TABLE = (
    Rule("logit_scale", ("logit_scale",)),
    Rule("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
    Rule("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
    *_block("transformer", "text_model"),
    Rule("ln_final.weight", ("text_model.final_layer_norm.weight",)),
    Rule("ln_final.bias", ("text_model.final_layer_norm.bias",)),
    Rule("text_projection", ("text_projection.weight",), transposed=True, half=True),
    Rule("visual.class_embedding", ("vision_model.embeddings.class_embedding",)),
    Rule("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",), half=True),
    Rule("visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
    Rule("visual.ln_pre.weight", ("vision_model.pre_layrnorm.weight",)),  # Hugging Face's spelling
    Rule("visual.ln_pre.bias", ("vision_model.pre_layrnorm.bias",)),
    *_block("visual.transformer", "vision_model"),
    Rule("visual.ln_post.weight", ("vision_model.post_layernorm.weight",)),
    Rule("visual.ln_post.bias", ("vision_model.post_layernorm.bias",)),
    Rule("visual.proj", ("visual_projection.weight",), transposed=True, half=True),
)
_BY_ORIGINAL = {rule.original: rule for rule in TABLE}
_BY_OURS = {name: rule for rule in TABLE for name in rule.ours}
# Of a text tower alone, with its projection or without.
_PROJECTION = "text_projection"
_TEXT = tuple(rule for rule in TABLE if rule.ours[0].startswith(("text_model.", _PROJECTION)))
_LAYER = re.compile(r"(?<=\.)(0|[1-9]\d*)(?=\.)")


def to_ours(tensors: Mapping[str, torch.Tensor], text_alone: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of the original layout under Hugging Face's names, in its shapes, with the same bits.

    Args:
        tensors: both towers, with one table of text positions.
        text_alone: they are a text tower alone, with its projection or without.

    Returns:
        New tensors or views of the given ones.

    Raises:
        ConversionError: naming the tensors that are unknown or missing, or one whose shape the rule does not fit.
    """
    check_names(tensors, text_alone)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        pattern, layer = _split(name)
        rule = _BY_ORIGINAL[pattern]
        count = len(rule.ours)
        if count == 1:
            renamed[_join(rule.ours[0], layer)] = _turned(name, tensor, rule)
            continue
        if tensor.ndim == 0 or not tensor.shape[0] or tensor.shape[0] % count:
            raise ConversionError(f"{name} has shape {tuple(tensor.shape)}, not {count} equal parts of rows.")
        parts = tensor.chunk(count)
        renamed |= {_join(part, layer): value for part, value in zip(rule.ours, parts, strict=True)}
    return renamed


def to_original(tensors: Mapping[str, torch.Tensor], text_alone: bool = False) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`: the tensors of Hugging Face's layout under the original's names.

    Raises:
        ConversionError: naming the tensors that are unknown or missing, or one whose shape the rule does not fit.
    """
    _check_names(tensors, {name: rule for rule in _rules(tensors, text_alone) for name in rule.ours}, text_alone)
    renamed = {}
    for name in tensors:
        pattern, layer = _split(name)
        rule = _BY_OURS[pattern]
        if pattern != rule.ours[0]:
            continue  # it came with the first part
        parts = [tensors[_join(part, layer)] for part in rule.ours]
        if len({part.shape for part in parts}) > 1 or (len(parts) > 1 and parts[0].ndim == 0):
            shapes = ", ".join(
                f"{_join(part, layer)} {tuple(tensors[_join(part, layer)].shape)}" for part in rule.ours
            )
            raise ConversionError(f"These stand in one tensor of the original, and are not of one shape: {shapes}.")
        renamed[_join(rule.original, layer)] = torch.cat(parts) if len(parts) > 1 else _turned(name, parts[0], rule)
    return renamed


def round_as_released(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the authors' loader makes of `tensors` (names of the original layout), in their own dtypes.

    It copies weights of convolutions, linear layers and attention, and both projections, into float16 modules, on a
    CPU too, and casts to float32 afterwards. Embeddings, tables of positions and layer norms keep their precision.
    """

    def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        rule = _BY_ORIGINAL.get(_split(name)[0])
        return tensor.half().to(tensor.dtype) if rule is not None and rule.half else tensor

    return {name: rounded(name, tensor) for name, tensor in tensors.items()}


def check_names(names: Iterable[str], text_alone: bool = False) -> None:
    """Whether `names` are those of a CLIP in the original layout, or its text tower, with one table of text positions.

    Raises:
        ConversionError: naming those that are unknown or missing.
    """
    names = set(names)
    _check_names(names, {rule.original: rule for rule in _rules(names, text_alone)}, text_alone)


def _rules(names: Iterable[str], text_alone: bool) -> tuple[Rule, ...]:
    if not text_alone:
        return TABLE
    projected = any(name.startswith(_PROJECTION) for name in names)
    return tuple(rule for rule in _TEXT if projected or rule.original != _PROJECTION)


def _check_names(names: Iterable[str], rules: Mapping[str, Rule], text_alone: bool) -> None:
    found = set(names)
    layers: dict[str, set[str]] = {}  # the part of a name before the number -> the numbers
    for name in found:
        pattern, layer = _split(name)
        if layer is not None and pattern in rules:
            layers.setdefault(pattern.split("*")[0], set()).add(layer)
    expected = set()
    for pattern in rules:
        numbers = layers.get(pattern.split("*")[0], set())
        counted = {str(number) for number in range(max(len(numbers), 1))}
        expected |= {_join(pattern, number) for number in numbers | counted} if "*" in pattern else {pattern}
    complaints = [f"{name} is unknown" for name in sorted(found - expected)]
    complaints += [f"{name} is missing" for name in sorted(expected - found)]
    if complaints:
        what = "text tower of a CLIP" if text_alone else "CLIP with a ViT"
        raise ConversionError(f"No {what} in this layout: {shortened(complaints)}.")


def shortened(complaints: list[str]) -> str:
    """The first ten, and how many more there are."""
    return "; ".join(complaints[:10]) + (f" ... and {len(complaints) - 10} more" if len(complaints) > 10 else "")


def _split(name: str) -> tuple[str, str | None]:
    """A name with `*` for the number of its layer, and that number."""
    match = _LAYER.search(name)
    return (name, None) if match is None else (f"{name[: match.start()]}*{name[match.end() :]}", match[1])


def _join(pattern: str, layer: str | None) -> str:
    return pattern if layer is None else pattern.replace("*", layer)


def _turned(name: str, tensor: torch.Tensor, rule: Rule) -> torch.Tensor:
    if not rule.transposed:
        return tensor
    if tensor.ndim != 2:
        raise ConversionError(f"{name} has shape {tuple(tensor.shape)}; a projection is a matrix.")
    return tensor.t().contiguous()
