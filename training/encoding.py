"""Both towers on a batch: captions in groups of similar length, and the gradient cache."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling_longclip.compat import features


class Embeddings(NamedTuple):
    """What a step needs of the model: features of shape `(local_batch, projection_dim)`, not normalised, float32."""

    image: torch.Tensor
    long: torch.Tensor
    short: torch.Tensor | None
    logit_scale: torch.Tensor


Grouping = Callable[[torch.Tensor], tuple[torch.Tensor, list[int]]]  # lengths -> order, sizes: see `length_groups`


def encode(
    model: nn.Module, batch: Mapping[str, torch.Tensor], short: bool, grouping: Grouping, chunk_size: int | None
) -> Embeddings:
    """Runs both towers on a batch of `CaptionCollator`.

    With a `chunk_size` this is the gradient cache (GradCache, arXiv 2101.06983): each chunk is encoded without keeping
    what its backward pass needs, the loss sees the features of the whole batch, and the backward pass encodes chunk by
    chunk once more. Activation checkpointing of whole chunks is exactly that, so features, loss and every gradient
    are those of the uncached step, under DDP and FSDP too.

    Args:
        model: a `LongCLIPModel`, or a peft model around one.
        batch: `pixel_values` and `input_ids`, and with `short` also `short_input_ids`, and their attention masks.
        short: encode the short captions too.
        grouping: makes groups of captions of similar length, each cut to its own longest: `length_groups` of so many.
        chunk_size: rows that are encoded at a time; None for all at once and no cache.
    """
    clip = clip_of(model)
    image = encode_images(clip, batch["pixel_values"], chunk_size)
    long = encode_texts(clip, batch["input_ids"], batch["attention_mask"], grouping, chunk_size)
    short_texts = None
    if short:
        short_ids, short_mask = batch["short_input_ids"], batch["short_attention_mask"]
        positions = batch.get("short_position_ids")
        short_texts = encode_texts(clip, short_ids, short_mask, grouping, chunk_size, positions)
    return Embeddings(image, long, short_texts, clip.logit_scale.float().reshape(()))


def encode_images(clip: nn.Module, pixel_values: torch.Tensor, chunk_size: int | None) -> torch.Tensor:
    """Image features of shape `(batch_size, projection_dim)`; see `encode`."""
    chunks = pixel_values.split(chunk_size or len(pixel_values))
    return torch.cat([_encoded(_image_features, chunk_size, clip, chunk) for chunk in chunks])


def encode_texts(
    clip: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    grouping: Grouping,
    chunk_size: int | None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Text features of shape `(batch_size, projection_dim)`, at 0, 1, 2, ... or at `position_ids`; see `encode`."""
    lengths = attention_mask.sum(dim=1).cpu()
    order, sizes = grouping(lengths)
    longest = [int(part.max()) for part in lengths[order].split(sizes)]
    order = order.to(input_ids.device)
    encoded = []
    for rows, length in zip(order.split(sizes), longest, strict=True):
        # No mask is needed: attention is causal, and padding stands after the EOT.
        texts = [
            part[rows, :length].split(chunk_size or len(rows))
            for part in (input_ids, position_ids)
            if part is not None
        ]
        encoded += [_encoded(_text_features, chunk_size, clip, *chunk) for chunk in zip(*texts, strict=True)]
    return torch.cat(encoded)[order.argsort()]


def _image_features(clip: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    return features(clip.get_image_features(pixel_values=pixel_values)).float()


def _text_features(clip: Any, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    return features(clip.get_text_features(input_ids=input_ids, position_ids=position_ids)).float()


def _encoded(
    encoder: Callable[..., torch.Tensor], chunk_size: int | None, clip: nn.Module, *chunk: torch.Tensor
) -> torch.Tensor:
    if chunk_size is None or not torch.is_grad_enabled():
        return encoder(clip, *chunk)
    encoded: torch.Tensor = checkpoint(encoder, clip, *chunk, use_reentrant=False)
    return encoded


def clip_of(model: nn.Module) -> Any:
    """The `LongCLIPModel`, also where a peft model is around it."""
    outer: Any = model
    return outer.get_base_model() if hasattr(outer, "get_base_model") else outer


@contextmanager
def forward_is(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within it, calling `model`, or DDP or FSDP around it, runs `function`: they act on calls of the model only."""
    before = vars(model).get("forward")  # accelerate's, with autocast
    model.forward = function
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def keep_rows_fixed(clip: Any, keep: int) -> None:
    """Rows 0 ... `keep - 1` of the text's positional table get no gradient; weight decay is the optimizer's matter.

    A hook on the table's output, not on its gradient: it holds wherever the parameter lies, under FSDP and LoRA too.
    """

    def hold(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] < keep)[..., None], output.detach(), output)

    clip.text_model.embeddings.position_embedding.register_forward_hook(hold)


class Original(NamedTuple):
    """What the model made of a batch as it was before training: features like those of `Embeddings`, no gradient."""

    image: torch.Tensor | None
    short: torch.Tensor
    logit_scale: torch.Tensor


def frozen_copy(clip: Any, images: bool) -> Any:
    """The model as it is when training begins: its texts for the bounded strategy, its `images` too to distil them."""
    frozen = copy.deepcopy(clip).eval().requires_grad_(False)
    if not images:
        frozen.vision_model = frozen.visual_projection = None
    return frozen


@torch.no_grad()
def encode_original(
    frozen: Any, batch: Mapping[str, torch.Tensor], grouping: Grouping, chunk_size: int | None
) -> Original:
    """Short captions, where they were before a prefix moved them, and images by a `frozen_copy`; see `encode`."""
    short_ids, short_mask = batch["short_input_ids"], batch["short_attention_mask"]
    image = None if frozen.vision_model is None else encode_images(frozen, batch["pixel_values"], chunk_size)
    short = encode_texts(frozen, short_ids, short_mask, grouping, chunk_size)
    return Original(image, short, frozen.logit_scale.float().reshape(()))
