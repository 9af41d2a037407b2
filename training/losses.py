"""The losses: the contrastive one, primary component matching, the strategies of the paper's table 5 and later ones.

Pure functions of embeddings. A strategy takes its contrastive term as `contrast`, a function of image and text
embeddings, in which the caller has bound scale, smoothing and, under several processes, the gathering:

    def contrast(image_embeds, text_embeds):
        return contrastive_loss(
            image_embeds, text_embeds, model.logit_scale.exp(), 0.1,
            all_gather_with_grad(image_embeds), all_gather_with_grad(text_embeds), rank() * len(image_embeds),
        )

Every loss is a mean over the rows of one process, and all processes have equally many: the mean over processes is the
loss of the whole batch in one process, and so is its gradient.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

Contrast = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LossTerms(NamedTuple):
    """A strategy's loss and what it is made of; all scalars.

    Args:
        loss: what to differentiate, `long + short_weight * short`, and what `distillation_loss` adds.
        long: the contrastive loss of images and long (or mixed) captions.
        short: the second term before weighting, of the short captions or of HiMo's components; None without one.
        distillation: `distillation_loss` before weighting; None without it.
    """

    loss: torch.Tensor
    long: torch.Tensor
    short: torch.Tensor | None = None
    distillation: torch.Tensor | None = None


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    label_smoothing: float = 0.0,
    all_image_embeds: torch.Tensor | None = None,
    all_text_embeds: torch.Tensor | None = None,
    offset: int = 0,
    hard_negative_margin: float = 0.0,
) -> torch.Tensor:
    """The image-text contrastive loss, the mean of the cross-entropies image-to-text and text-to-image.

    Under several processes each compares its own rows with everybody's: logits of shape `(local, global)`, never
    `(global, global)`. They are computed in float32 at least, outside autocast: multiplied by 100, the rounding of
    bfloat16 would be as large as the differences that decide a retrieval.

    With a margin, negatives whose captions resemble the pair's own caption weigh more:

        logits = logit_scale * (images @ texts.T + margin * G),  G = cosines of the texts, 0 for the pair itself,

    without gradient through G, which is computed anew at every step.

    References:
        Radford et al. 2021 (arXiv 2103.00020), figure 3; label smoothing of 0.1 as in Long-CLIP's released code. The
        margin: "HN margin" (2026), with 0.5 for tests of the training's own domain and 0.25 for others.

    Args:
        image_embeds: this process's, of shape `(local, projection_dim)`; L2-normalised, or the coarse features of
            `primary_components` as they are.
        text_embeds: this process's, of the same shape, L2-normalised; row i belongs to image i.
        logit_scale: factor of the similarities, `model.logit_scale.exp()`.
        label_smoothing: the share of the target that is spread over all candidates.
        all_image_embeds: those of all processes in the order of ranks, of shape `(global, projection_dim)`, gathered
            with gradient. By default there is one process.
        all_text_embeds: likewise.
        offset: the row of the gathered embeddings at which this process's begin.
        hard_negative_margin: 0 for none.

    Returns:
        A scalar, the mean over this process's rows.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> loss = contrastive_loss(image_embeds, text_embeds, model.logit_scale.exp(), label_smoothing=0.1)
    """
    all_image_embeds = image_embeds if all_image_embeds is None else all_image_embeds
    all_text_embeds = text_embeds if all_text_embeds is None else all_text_embeds
    local = len(image_embeds)
    if image_embeds.shape != text_embeds.shape or all_image_embeds.shape != all_text_embeds.shape:
        raise ValueError(
            "Every image has one text: expected equal shapes, got "
            f"{tuple(image_embeds.shape)} images and {tuple(text_embeds.shape)} texts of this process, "
            f"{tuple(all_image_embeds.shape)} and {tuple(all_text_embeds.shape)} of all."
        )
    if not 0 <= offset <= len(all_image_embeds) - local:
        raise ValueError(
            f"{local} rows from row {offset} on do not lie within the {len(all_image_embeds)} gathered ones."
        )
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts, all_images, all_texts = (
            embeds.to(_at_least_float32(embeds))
            for embeds in (image_embeds, text_embeds, all_image_embeds, all_text_embeds)
        )
        targets = torch.arange(offset, offset + local, device=images.device)
        of_images, of_texts = images @ all_texts.T, texts @ all_images.T
        if hard_negative_margin:
            # Symmetric: the same block of texts x texts stands beside both.
            margin = hard_negative_margin * text_similarity(texts, all_texts, targets)
            of_images, of_texts = of_images + margin, of_texts + margin
        image_to_text = F.cross_entropy(logit_scale * of_images, targets, label_smoothing=label_smoothing)
        text_to_image = F.cross_entropy(logit_scale * of_texts, targets, label_smoothing=label_smoothing)
    return (image_to_text + text_to_image) / 2


@torch.no_grad()
def text_similarity(texts: torch.Tensor, all_texts: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Cosines of this process's texts with everybody's, of shape `(local, global)`; 0 at each text's `own` column."""
    similarity = F.normalize(texts, dim=-1) @ F.normalize(all_texts, dim=-1).T
    return similarity.scatter_(1, own[:, None], 0.0)


def primary_component_loss(
    contrast: Contrast,
    image_embeds: torch.Tensor,
    coarse_image_embeds: torch.Tensor,
    long_text_embeds: torch.Tensor,
    short_text_embeds: torch.Tensor,
    short_weight: float = 1.0,
) -> LossTerms:
    """Primary component matching: fine features meet the long captions, coarse features the short ones.

    HiMo-CLIP reduces the text instead and needs no short captions: whole images meet the long captions, and once more
    their components, `primary_component_loss(contrast, images, images, long, primary_components(long, 0.9).features)`.

    References:
        Long-CLIP (arXiv 2403.15378), section 3.3. HiMo-CLIP (AAAI 2026); its released code gathers features without
        gradient, `all_gather_with_grad` with it.

    Args:
        contrast: see the module.
        image_embeds: L2-normalised, of shape `(local, projection_dim)`, as all that follow.
        coarse_image_embeds: `primary_components(image_embeds, ...).features`, not normalised again.
        long_text_embeds: L2-normalised.
        short_text_embeds: L2-normalised.
        short_weight: weight of the short term; 1.0 in the released code, 0.1 before May 2024.

    Returns:
        `LossTerms`.

    Example:
        >>> contrast = functools.partial(contrastive_loss, logit_scale=100.0, label_smoothing=0.1)
        >>> coarse = primary_components(image_embeds, num_components=32).features
        >>> loss, long, short = primary_component_loss(contrast, image_embeds, coarse, long_embeds, short_embeds)
    """
    long = contrast(image_embeds, long_text_embeds)
    short = contrast(coarse_image_embeds, short_text_embeds)
    return LossTerms(long + short_weight * short, long, short)


def undistinguished_loss(
    contrast: Contrast,
    image_embeds: torch.Tensor,
    long_text_embeds: torch.Tensor,
    short_text_embeds: torch.Tensor,
    short_weight: float = 1.0,
) -> LossTerms:
    """The same image features meet both captions: primary component matching with every component kept.

    References:
        Long-CLIP, section 4.4, "Undistinguished Image Feature".

    Args:
        contrast: see the module.
        image_embeds: L2-normalised, of shape `(local, projection_dim)`, as all that follow.
        long_text_embeds: L2-normalised.
        short_text_embeds: L2-normalised.
        short_weight: weight of the short term.

    Returns:
        `LossTerms`.

    Example:
        >>> loss, long, short = undistinguished_loss(contrast, image_embeds, long_embeds, short_embeds)
    """
    return primary_component_loss(
        contrast, image_embeds, image_embeds, long_text_embeds, short_text_embeds, short_weight
    )


def mixed_length_rows(batch_size: int, share: float = 0.1, *, generator: torch.Generator) -> torch.Tensor:
    """Which captions of a batch give way to their short ones, each with probability `share`.

    The captions are replaced before they are encoded; the mixed batch then has `long_only_loss`.

    References:
        Long-CLIP, section 4.4, "Mixed-length Text".

    Args:
        batch_size: under several processes that of all together: with the same generator state on every process each
            takes its own slice of the result, and the split does not change which rows are chosen.
        share: within 0 ... 1; the paper replaces 10 %.
        generator: what determines the result, on its own device.

    Returns:
        `torch.BoolTensor` of shape `(batch_size,)`.

    Raises:
        ValueError: for a share out of range.

    Example:
        >>> replaced = mixed_length_rows(len(long), generator=torch.Generator().manual_seed(step))
        >>> captions = [s if r else l for l, s, r in zip(long, short, replaced.tolist())]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be within 0 ... 1, got {share}.")
    return torch.rand(batch_size, generator=generator, device=generator.device) < share


def bounded_loss(
    contrast: Contrast,
    image_embeds: torch.Tensor,
    long_text_embeds: torch.Tensor,
    short_text_features: torch.Tensor,
    original_short_text_features: torch.Tensor,
    short_weight: float = 1.0,
) -> LossTerms:
    """Short captions may not move far from where the original encoder had them.

    References:
        Long-CLIP, section 4.4, "Bounded Text Encoder". Neither the weight nor whether the features are normalised is
        said there.

    Args:
        contrast: see the module.
        image_embeds: L2-normalised, of shape `(local, projection_dim)`.
        long_text_embeds: likewise.
        short_text_features: of the encoder in training, of the same shape.
        original_short_text_features: of the frozen original encoder, for the same captions; without gradient.
        short_weight: weight of the SmoothL1 term, which is the mean over all numbers.

    Returns:
        `LossTerms`.

    Example:
        >>> loss, long, drift = bounded_loss(contrast, image_embeds, long_embeds, short_features, original_features)
    """
    long = contrast(image_embeds, long_text_embeds)
    short = F.smooth_l1_loss(short_text_features, original_short_text_features.detach())
    return LossTerms(long + short_weight * short, long, short)


def long_only_loss(contrast: Contrast, image_embeds: torch.Tensor, long_text_embeds: torch.Tensor) -> LossTerms:
    """Direct fine-tuning on long captions, the paper's baseline; or on a mixture, see `mixed_length_rows`.

    Two baselines bear this name, of one loss and two tables of positions. The paper's interpolates every row ("linear
    interpolation + fine-tuning with only long captions", its authors in issue 104), with ratio 3 to 231 rows
    (`stretch.py --method linear`). That issue removed the short loss from the released code, whose
    first 20 rows are kept, and reports scores far above the paper's table 4.

    References:
        Long-CLIP, section 4.4 and table 4; github.com/beichenzbc/Long-CLIP/issues/104.

    Args:
        contrast: see the module.
        image_embeds: L2-normalised, of shape `(local, projection_dim)`.
        long_text_embeds: likewise.

    Returns:
        `LossTerms` without a short term.

    Example:
        >>> loss = long_only_loss(contrast, image_embeds, long_embeds).loss
    """
    long = contrast(image_embeds, long_text_embeds)
    return LossTerms(long, long)


def distillation_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    original_image_embeds: torch.Tensor,
    original_text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    everyone: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """How far the similarities of images and short captions have come from the original's, in both directions.

    The Kullback-Leibler divergence of the softmax over a batch's texts for every image, and over its images for every
    text, both at the original's scale: that of the model in training could follow neither.

    References:
        ZSCL (arXiv 2303.06628), "feature space": distillation of an image's similarities to texts, and of a text's to
        images, from the initial model; there on a reference data set, here on the batch.

    Args:
        image_embeds: L2-normalised, of shape `(local, projection_dim)`, as all that follow.
        text_embeds: of the short captions.
        original_image_embeds: of the model as it was before training; without gradient.
        original_text_embeds: likewise, of the same captions.
        logit_scale: the original's.
        everyone: these four of all processes, of shape `(global, projection_dim)`. By default there is one process.

    Returns:
        A scalar, the mean over this process's rows and both directions; 0 where nothing has changed.

    Example:
        >>> loss = distillation_loss(image_embeds, short_embeds, original_images, original_shorts, 100.0)
    """
    own = (image_embeds, text_embeds, original_image_embeds.detach(), original_text_embeds.detach())
    everyone = own if everyone is None else everyone
    with torch.autocast(image_embeds.device.type, enabled=False):
        image, text, original_image, original_text = (part.to(_at_least_float32(part)) for part in own)
        images, texts, original_images, original_texts = (part.to(_at_least_float32(part)) for part in everyone)
        now = (image @ texts.T, text @ images.T)
        before = (original_image @ original_texts.T, original_text @ original_images.T)
        divergences = [
            F.kl_div(
                (logit_scale * found).log_softmax(-1),
                (logit_scale * wanted).log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
            for found, wanted in zip(now, before, strict=True)
        ]
    return (divergences[0] + divergences[1]) / 2


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
