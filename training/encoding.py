"""Both towers on a batch: captions in groups of similar length, and the gradient cache."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longclip_hf.errors import TrainingError
from longclip_hf.training.pixels import normalised
from modeling_longclip.compat import features


class Embeddings(NamedTuple):
    """What a step needs of the model: features of shape `(local_batch, projection_dim)`, not normalised, float32."""

    image: torch.Tensor
    long: torch.Tensor
    short: torch.Tensor | None
    logit_scale: torch.Tensor


Grouping = Callable[[np.ndarray], tuple[np.ndarray, list[int]]]  # lengths -> order, sizes: see `length_groups`


def encode(
    model: nn.Module, batch: Mapping[str, Any], short: bool, grouping: Grouping, chunk_size: int | None
) -> Embeddings:
    """Runs both towers on a batch of `CaptionCollator`.

    With a `chunk_size` this is the gradient cache (GradCache, arXiv 2101.06983): each chunk is encoded without keeping
    what its backward pass needs, the loss sees the features of the whole batch, and the backward pass encodes chunk by
    chunk once more. Activation checkpointing of whole chunks is exactly that, so features, loss and every gradient
    are those of the uncached step, under DDP and FSDP too.

    Args:
        model: a `LongCLIPModel`, or a peft model around one.
        batch: `pixel_values` (with `pixel_levels`, where they are bytes) and `input_ids`, and with `short` also
            `short_input_ids`, and their lengths or attention masks; see `lengths_of`.
        short: encode the short captions too.
        grouping: makes groups of captions of similar length, each cut to its own longest: `length_groups` of so many.
        chunk_size: rows that are encoded at a time; None for all at once and no cache.
    """
    clip = clip_of(model)
    image = encode_images(clip, batch, chunk_size)
    long = encode_texts(clip, batch["input_ids"], lengths_of(batch), grouping, chunk_size)
    short_texts = None
    if short:
        ids, positions = batch["short_input_ids"], batch.get("short_position_ids")
        short_texts = encode_texts(clip, ids, lengths_of(batch, "short_"), grouping, chunk_size, positions)
    return Embeddings(image, long, short_texts, clip.logit_scale.float().reshape(()))


def encode_images(clip: nn.Module, batch: Mapping[str, Any], chunk_size: int | None) -> torch.Tensor:
    """Image features of shape `(batch_size, projection_dim)`; see `encode`."""
    pixels, levels = batch["pixel_values"], batch.get("pixel_levels")
    chunks = pixels.split(chunk_size or len(pixels))
    return torch.cat([_encoded(_image_features, chunk_size, clip, chunk, levels) for chunk in chunks])


def lengths_of(batch: Mapping[str, Any], prefix: str = "") -> np.ndarray:
    """Tokens of every caption, of shape `(batch_size,)`, on the CPU.

    From the collator. Where one of somebody's own gives none, from the attention mask, for which a GPU is waited for.

    Raises:
        TrainingError: if there is not one for each caption.
    """
    rows = len(batch[f"{prefix}input_ids"])
    lengths = batch.get(f"{prefix}lengths")
    if lengths is None:
        lengths = batch[f"{prefix}attention_mask"].sum(dim=1).cpu()
    lengths = np.asarray(lengths)
    if lengths.shape != (rows,):
        raise TrainingError(
            f"The batch's {prefix}lengths have shape {lengths.shape}, for {rows} captions. Whatever divides or joins "
            "batches must do the same to them, or leave them out (dispatch_batches does neither)."
        )
    return lengths


def encode_texts(
    clip: nn.Module,
    input_ids: torch.Tensor,
    lengths: np.ndarray,
    grouping: Grouping,
    chunk_size: int | None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Text features of shape `(batch_size, projection_dim)`, of captions of so many tokens each, at 0, 1, 2, ... or at
    `position_ids`; see `encode`.
    """
    order, sizes = grouping(lengths)
    longest = np.maximum.reduceat(lengths[order], np.cumsum([0, *sizes[:-1]])).tolist()
    there, back = (torch.from_numpy(part).to(input_ids.device) for part in (order, np.argsort(order)))
    encoded = []
    for rows, length in zip(there.split(sizes), longest, strict=True):
        # No mask is needed: attention is causal, and padding stands after the EOT.
        texts = [
            part[rows, :length].split(chunk_size or len(rows))
            for part in (input_ids, position_ids)
            if part is not None
        ]
        encoded += [_encoded(_text_features, chunk_size, clip, *chunk) for chunk in zip(*texts, strict=True)]
    return torch.cat(encoded)[back]


def encode_cut_texts(
    model: nn.Module, batch: Mapping[str, Any], whole: torch.Tensor, cuts: Sequence[int], grouping: Grouping,
    chunk_size: int | None,
) -> torch.Tensor:  # fmt: skip
    """What the long captions would be, cut at each of `cuts` tokens, those of start and end included.

    Args:
        model, batch, grouping, chunk_size: see `encode`.
        whole: features of the whole captions, of shape `(batch_size, projection_dim)`.
        cuts: increasing.

    Returns:
        Of shape `(batch_size, len(cuts), projection_dim)`.
    """
    clip, input_ids, lengths = clip_of(model), batch["input_ids"], lengths_of(batch)
    ends = input_ids.gather(1, torch.from_numpy(lengths)[:, None].to(input_ids.device) - 1)
    features = []
    for cut in cuts:
        longer = torch.from_numpy(lengths > cut).to(input_ids.device)
        ids = input_ids[:, :cut].clone()
        ids[:, -1:] = torch.where(longer[:, None], ends, ids[:, -1:])
        texts = encode_texts(clip, ids, np.minimum(lengths, cut), grouping, chunk_size) if longer.any() else whole
        features.append(texts)
    return torch.stack(features, dim=1)


def _image_features(clip: Any, pixel_values: torch.Tensor, levels: torch.Tensor | None) -> torch.Tensor:
    pixel_values = normalised(pixel_values, levels)
    return features(clip.get_image_features(pixel_values=pixel_values)).float()


def _text_features(clip: Any, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    return features(clip.get_text_features(input_ids=input_ids, position_ids=position_ids)).float()


def _encoded(
    encoder: Callable[..., torch.Tensor], chunk_size: int | None, clip: nn.Module, *chunk: torch.Tensor | None
) -> torch.Tensor:
    if chunk_size is None or not torch.is_grad_enabled():
        return encoder(clip, *chunk)
    encoded: torch.Tensor = checkpoint(encoder, clip, *chunk, use_reentrant=False)
    return encoded


def check_eot(model: nn.Module, check: bool) -> None:
    """Whether text towers look for an EOT in every text, for which a GPU is waited for."""
    module: Any
    for module in model.modules():
        if hasattr(module, "checks_eot"):
            module.checks_eot = check


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
def encode_original(frozen: Any, batch: Mapping[str, Any], grouping: Grouping, chunk_size: int | None) -> Original:
    """Short captions, where they were before a prefix moved them, and images by a `frozen_copy`; see `encode`."""
    image = None if frozen.vision_model is None else encode_images(frozen, batch, chunk_size)
    short = encode_texts(frozen, batch["short_input_ids"], lengths_of(batch, "short_"), grouping, chunk_size)
    return Original(image, short, frozen.logit_scale.float().reshape(()))
