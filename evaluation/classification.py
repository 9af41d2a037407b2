"""Zero-shot classification with an ensemble of templates: pure functions of features."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from longclip_hf.evaluation.retrieval import Ranks, ranks_among


def class_embeddings(text_embeds: torch.Tensor) -> torch.Tensor:
    """One embedding per class: the mean of its normalised embeddings over the templates, normalised again.

    References:
        Radford et al. 2021 (arXiv 2103.00020), section 3.1.4.

    Args:
        text_embeds: of shape `(classes, templates, projection_dim)`; they need not be normalised.

    Returns:
        `torch.FloatTensor` of shape `(classes, projection_dim)`.

    Raises:
        ValueError: for another shape, or features that are not finite or zero.
    """
    if text_embeds.ndim != 3 or not text_embeds.numel():
        raise ValueError(f"Expected the shape (classes, templates, projection_dim), got {tuple(text_embeds.shape)}.")
    lengths = text_embeds.double().norm(dim=-1, keepdim=True)
    bad = (~(lengths.isfinite() & (lengths > 0))).nonzero()[:, :2].tolist()
    if bad:
        raise ValueError(
            f"Text features hold NaN or Inf, or are zero, in {len(bad)} of {lengths.numel()} prompts; the first are "
            f"(class, template) {bad[:5]}."
        )
    return F.normalize((text_embeds.double() / lengths).mean(dim=1), dim=-1).float()


def classification_ranks(
    image_embeds: torch.Tensor, class_embeds: torch.Tensor, labels: torch.Tensor, block: int = 1024
) -> Ranks:
    """The rank of each image's own class by cosine, exact as in `longclip_hf.evaluation.retrieval`.

    A class tied with the right one ranks before it and is counted: two classes of the same name always tie.

    Args:
        image_embeds: of shape `(images, projection_dim)`; they need not be normalised.
        class_embeds: of shape `(classes, projection_dim)`, of `class_embeddings`. A class may have no image.
        labels: integers of shape `(images,)`, rows of `class_embeds`.
        block: images and classes that are compared at a time.

    Returns:
        `Ranks` of the images. `hits(1)` says of each whether it is right, for an interval over images.

    Raises:
        ValueError: for shapes that do not fit, labels outside the classes, features that are not finite or zero.

    Example:
        >>> ranks = classification_ranks(image_embeds, class_embeddings(text_embeds), labels)
        >>> accuracy(ranks), bootstrap_interval(ranks.hits(1))
    """
    return ranks_among(image_embeds, class_embeds, labels, block, names=("images", "classes"))


def accuracy(ranks: Ranks, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The figures of a classification.

    Args:
        ranks: of `classification_ranks`.
        ks: the cut-offs.

    Returns:
        `top1`, `top5` (or as `ks` says) within 0 ... 1; `tied`, how many images have a class tied with a wrong one.
    """
    return {**{f"top{k}": ranks.recall(k) for k in ks}, "tied": float((ranks.tied > 0).sum())}


def mean_per_class_recall(right: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean over classes of the share of a class's images that are right: each class counts once, however large.

    Classes without an image are left out. Where all have equally many images it is the top-1 accuracy.

    References:
        Radford et al. 2021 (arXiv 2103.00020), table 9 ("mean per class").

    Args:
        right: of shape `(images,)`, whether each image is right: `classification_ranks(...).hits(1)`.
        labels: integers of shape `(images,)`, from 0 on.

    Returns:
        Within 0 ... 1.

    Example:
        >>> mean_per_class_recall(torch.tensor([True, True, True, False]), torch.tensor([0, 0, 0, 1]))
        0.5
    """
    labels = labels.to(right.device)
    counts = labels.bincount()
    recall = right.double().new_zeros(len(counts)).index_add_(0, labels, right.double()) / counts
    return recall[counts > 0].mean().item()
