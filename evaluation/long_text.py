"""What long text calls for: does a model lean on the first sentence, does every sentence bring it nearer to the image?

Pure functions: texts to texts, similarities to figures.

References:
    DeBias-CLIP (arXiv 2602.22419) for the first sentence; HiMo-CLIP (arXiv 2511.06653) and its code,
    eval/text_mono/get_himo.py, for HiMo@K.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from longclip_hf.sentences import sentences

_ENDS = ("!", "?", "…", "。", "！", "？")


def joined(parts: Sequence[str]) -> str:
    """Sentences as one text, each with the full stop that `longclip_hf.sentences.sentences` took from it."""
    return " ".join(part if part.endswith(_ENDS) else f"{part}." for part in parts)


def first_dropped(parts: Sequence[str], rng: random.Random) -> list[str]:
    """All sentences but the first, which in long captions is the summary; of one sentence, it."""
    return list(parts[1:] or parts)


def first_moved(parts: Sequence[str], rng: random.Random) -> list[str]:
    """The first sentence at the end."""
    return [*parts[1:], *parts[:1]]


def half_drawn(parts: Sequence[str], rng: random.Random) -> list[str]:
    """Half of the sentences (of an odd number one more), drawn without replacement, in their order."""
    return [parts[place] for place in sorted(rng.sample(range(len(parts)), (len(parts) + 1) // 2))]


VARIANTS: dict[str, Callable[[Sequence[str], random.Random], list[str]]] = {
    "first_dropped": first_dropped,
    "first_moved": first_moved,
    "half_drawn": half_drawn,
}


def changed(captions: Sequence[str], variant: str, seed: int = 0) -> list[str]:
    """The captions with their sentences changed; those of one sentence stay as they are, to the letter.

    Args:
        captions: of any number of sentences.
        variant: one of `VARIANTS`.
        seed: of what is drawn, with the caption's place: equal seeds give equal texts.

    Example:
        >>> changed(["A dog runs. It is brown. The sun shines."], "first_moved")
        ['It is brown. The sun shines. A dog runs.']
    """
    change = VARIANTS[variant]
    texts = []
    for row, caption in enumerate(captions):
        parts = sentences(caption)
        texts.append(joined(change(parts, random.Random(f"{seed} {row}"))) if len(parts) > 1 else caption)
    return texts


def growing(caption: str) -> list[str]:
    """The caption's first sentence, its first two, and so on to all of them."""
    parts = sentences(caption)
    return [joined(parts[: count + 1]) for count in range(len(parts))]


def himo(similarities: torch.Tensor) -> float:
    """HiMo@K of one caption: how its similarity to the image goes with the number of sentences, K at the end.

    Pearson's correlation of 1, 2 ... K with the similarities, so that 1 is a straight rise and -1 a straight fall; 0
    where nothing changes. Of two sentences it is 1 or -1.

    Args:
        similarities: cosines with the image of the first sentence, the first two ... all, of shape `(K,)`.

    Raises:
        ValueError: for fewer than two.

    Example:
        >>> himo(torch.tensor([0.1, 0.2, 0.3]))
        1.0
    """
    if similarities.ndim != 1 or len(similarities) < 2:
        raise ValueError(f"Expected the similarities of two texts or more, got shape {tuple(similarities.shape)}.")
    values = similarities.double()
    if (values == values[0]).all():
        return 0.0
    places = torch.arange(len(values), dtype=torch.float64)
    along, apart = places - places.mean(), values - values.mean()
    return float(((along * apart).sum() / (along.norm() * apart.norm())).clamp(-1, 1))


def rises(similarities: torch.Tensor) -> float:
    """The share of sentences, from the second on, with which the similarity rises, within 0 ... 1.

    Example:
        >>> rises(torch.tensor([0.1, 0.3, 0.2]))
        0.5
    """
    return float((similarities[1:] > similarities[:-1]).double().mean())


def monotony(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`himo` and `rises` of many captions.

    Args:
        image_embeds: each caption's image, of shape `(captions, projection_dim)`; they need not be normalised.
        text_embeds: of the texts of `growing`, caption after caption, of shape `(sum(sizes), projection_dim)`.
        sizes: sentences of each caption, two or more.

    Returns:
        Two `torch.DoubleTensor` of shape `(captions,)`.
    """
    texts = F.normalize(text_embeds.double(), dim=-1).split(list(sizes))
    images = F.normalize(image_embeds.double(), dim=-1)
    # Sums of single products: those of equal features, where a model reads no further, are equal.
    similarities = [(own * image).sum(dim=1) for own, image in zip(texts, images, strict=True)]
    found = torch.tensor([[of(row) for row in similarities] for of in (himo, rises)], dtype=torch.float64)
    return found[0], found[1]
