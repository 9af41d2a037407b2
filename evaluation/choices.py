"""Choices between few texts or images that differ in little: pure functions of features.

Chance is 1 in 4 for the text score and the image score of pairs, 1 in 6 for the group score, and 1 in n for one of n
captions. A tie is a wrong choice: a model that answers the same for everything finds nothing.

References:
    Winoground (arXiv 2204.03162), section 3.2; SugarCrepe (arXiv 2306.14610); ARO (arXiv 2210.01936).
"""

import torch
from torch.nn import functional as F


def pair_scores(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two images and two captions, of which the first belongs to the first and the second to the second (Winoground).

    Args:
        image_embeds: of shape `(pairs, 2, projection_dim)`; they need not be normalised.
        text_embeds: of the same shape.

    Returns:
        `torch.BoolTensor` of shape `(pairs,)` each: `text_score`, for both images the own caption is the more similar;
        `image_score`, for both captions the own image is; `group_score`, all of that.

    Raises:
        ValueError: for shapes that do not fit, features that are not finite or zero.
    """
    if image_embeds.shape != text_embeds.shape or image_embeds.ndim != 3 or image_embeds.shape[1] != 2:
        raise ValueError(
            "Expected images and captions of shape (pairs, 2, projection_dim), got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    similarity = _similarities(image_embeds, text_embeds)
    own = similarity.diagonal(dim1=1, dim2=2)
    text = (own[:, 0] > similarity[:, 0, 1]) & (own[:, 1] > similarity[:, 1, 0])
    image = (own[:, 0] > similarity[:, 1, 0]) & (own[:, 1] > similarity[:, 0, 1])
    return {"text_score": text, "image_score": image, "group_score": text & image}


def caption_choice(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """One image and some captions, of which the first is right (SugarCrepe has two, ARO two or five).

    Args:
        image_embeds: of shape `(images, projection_dim)`; they need not be normalised.
        text_embeds: of shape `(images, captions, projection_dim)`.

    Returns:
        `torch.BoolTensor` of shape `(images,)`: the first is more similar than every other.

    Raises:
        ValueError: as `pair_scores`; for fewer than two captions.
    """
    fits = text_embeds.ndim == 3 and image_embeds.shape == (text_embeds.shape[0], text_embeds.shape[2])
    if not fits or text_embeds.shape[1] < 2:
        raise ValueError(
            "Expected images of shape (images, projection_dim) and two captions or more for each, of shape (images, "
            f"captions, projection_dim), got {tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    similarity = _similarities(image_embeds[:, None], text_embeds)[:, 0]
    return similarity[:, 0] > similarity[:, 1:].amax(dim=1)


def _similarities(images: torch.Tensor, texts: torch.Tensor, rows: int = 1024) -> torch.Tensor:
    """Cosines of each row's images and texts, of shape `(rows, images, texts)`. Sums of single products, not a product
    of matrices, which may give equal texts other last digits: they tie."""
    parts = zip(_normalised(images).split(rows), _normalised(texts).split(rows), strict=True)
    return torch.cat([(some[:, :, None] * own[:, None]).sum(dim=-1) for some, own in parts])


def _normalised(features: torch.Tensor) -> torch.Tensor:
    lengths = features.double().norm(dim=-1)
    if bad := int((~(lengths.isfinite() & (lengths > 0))).sum()):
        raise ValueError(f"{bad} of {lengths.numel()} features hold NaN or Inf, or are zero.")
    return F.normalize(features.double(), dim=-1)
