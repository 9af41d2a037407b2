"""A step's loss from the features of a batch, on every process: what is encoded, what is compared with what."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from longclip_hf.errors import TrainingError
from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.components import primary_components, second_moments
from longclip_hf.training.encoding import Embeddings, Original, lengths_of
from longclip_hf.training.gathering import Gathered, all_reduce_with_grad, rank, world_size
from longclip_hf.training.losses import (
    LossTerms,
    bounded_loss,
    contrastive_loss,
    distillation_loss,
    long_only_loss,
    mixed_length_rows,
    primary_component_loss,
    undistinguished_loss,
)
from longclip_hf.training.settings import Strategy

WITH_COMPONENTS = (Strategy.PRIMARY_COMPONENT, Strategy.HIMO, Strategy.DEBIAS)


def step_loss(
    args: LongCLIPTrainingArguments, embeddings: Embeddings, original: Original | None = None
) -> tuple[LossTerms, torch.Tensor | None]:
    """The loss of the strategy with what is distilled, and the share of the variance that its components kept.

    Args:
        args: strategy, components, scope, weights and smoothing.
        embeddings: of this process's batch.
        original: what the model made of the batch before training, for the bounded strategy and for distillation.
    """
    unit = embeddings._replace(
        image=F.normalize(embeddings.image, dim=-1),
        long=F.normalize(embeddings.long, dim=-1),
        short=None if embeddings.short is None else F.normalize(embeddings.short, dim=-1),
    )
    gathered = Gathered()
    terms, variance_kept = _strategy_loss(args, embeddings.short, unit, original, gathered)
    if args.distillation:
        assert original is not None and original.image is not None and unit.short is not None
        before = [F.normalize(part, dim=-1) for part in (original.image, original.short)]
        everyone = [gathered[part] for part in (unit.image, unit.short, *before)]
        scale = original.logit_scale.exp()
        distilled = distillation_loss(unit.image, unit.short, before[0], before[1], scale, everyone)
        terms = terms._replace(loss=terms.loss + args.distillation * distilled, distillation=distilled)
    return terms, variance_kept


def _strategy_loss(
    args: LongCLIPTrainingArguments,
    short_features: torch.Tensor | None,
    unit: Embeddings,
    original: Original | None,
    gathered: Gathered,
) -> tuple[LossTerms, torch.Tensor | None]:
    """Of features of length 1; `short_features` are those of the short captions as they came."""
    image, long, scale, weight = unit.image, unit.long, unit.logit_scale.exp(), args.short_loss_weight

    def contrast(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(
            image_embeds,
            text_embeds,
            scale,
            args.label_smoothing_factor,
            all_image_embeds=gathered[image_embeds],
            all_text_embeds=gathered[text_embeds],
            offset=rank() * len(image_embeds),
            hard_negative_margin=args.hard_negative_margin,
        )

    if args.strategy in (Strategy.LONG_ONLY, Strategy.MIXED_LENGTH):
        return long_only_loss(contrast, image, long), None
    second = long if args.strategy == Strategy.HIMO else unit.short
    assert second is not None
    if args.strategy == Strategy.BOUNDED:
        assert original is not None and short_features is not None
        return bounded_loss(contrast, image, long, short_features, original.short, weight), None
    if args.strategy == Strategy.UNDISTINGUISHED:
        return undistinguished_loss(contrast, image, long, second, weight), None
    reduced = second if args.components_of == "text" else image
    if args.components_scope == "local":
        kept = primary_components(reduced, args.components, check=False)
        coarse = kept.features
    else:  # of everybody's features, which are here already, so that the coarse ones need not be gathered
        moments = all_reduce_with_grad(second_moments(reduced))
        kept = primary_components(gathered[reduced], args.components, moments, check=False)
        coarse = kept.features[rank() * len(reduced) :][: len(reduced)]
        gathered[coarse] = kept.features
    pair = (image, coarse) if args.components_of == "text" else (coarse, second)
    return primary_component_loss(contrast, image, pair[0], long, pair[1], weight), kept.variance_kept


def with_mixed_captions(inputs: Mapping[str, Any], share: float, seed: int, step: int, batch: int) -> dict[str, Any]:
    """The batch with some long captions replaced by the short ones, before anything is encoded.

    Which ones follows from the seed, the step, the batch of an accumulated step and the place in the global batch: the
    number of processes does not change it, nor does a resumed run.
    """
    local = len(inputs["input_ids"])
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + batch)
    replaced = mixed_length_rows(local * world_size(), share, generator=generator)
    replaced = replaced[rank() * local : (rank() + 1) * local]
    mixed = dict(inputs)
    mixed["lengths"] = np.where(replaced.numpy(), lengths_of(inputs, "short_"), lengths_of(inputs))
    replaced = replaced.to(inputs["input_ids"].device)
    for key in ("input_ids", "attention_mask"):
        long, short = inputs[key], inputs[f"short_{key}"]
        width = max(long.shape[1], short.shape[1])
        # Whatever the tokenizer pads with: what stands after the EOT counts for nothing.
        long, short = (F.pad(part, (0, width - part.shape[1])) for part in (long, short))
        mixed[key] = torch.where(replaced[:, None], short, long)
    return mixed


def check_batch(inputs: Mapping[str, Any], args: LongCLIPTrainingArguments | None = None) -> None:
    """Refuses a batch of somebody's own collator that lacks what the strategy trains on; without `args`, to evaluate.

    Raises:
        TrainingError: naming what is missing.
    """
    needed = ["pixel_values", "input_ids", "attention_mask"]
    if args is not None and args.needs_short:
        needed += ["short_input_ids", "short_attention_mask"]
    if args is not None and args.draws_sentences:
        needed += ["sentence_ids", "sentence_numbers"]
    missing = [name for name in needed if name not in inputs]
    if missing:
        purpose = f"the strategy {args.strategy} trains on" if args is not None else "evaluation needs"
        raise TrainingError(
            f"The batches lack {', '.join(missing)}, which {purpose}; they hold {', '.join(inputs)}. The collator "
            "must give them, as CaptionCollator does."
        )


def check_collator(collator: Any, args: LongCLIPTrainingArguments, length: int) -> None:
    """Refuses a collator of somebody's own that would leave a setting without effect.

    Raises:
        TrainingError: saying which.
    """
    cut = getattr(collator, "max_length", None)
    if args.train_length is not None and cut != length:
        raise TrainingError(
            f"train_length is {length}, and the data_collator cuts at {cut} tokens: give it that max_length, or leave "
            "it out."
        )
