"""Retrieval metrics: pure functions of features, exact to the last bit and in bounded memory.

A rank is decided by comparing similarities, and products in float32 of equal features differ in their last digit from
block to block: a tie would be won or lost by chance. So every feature is normalised in float64 and rounded to float32
and to a multiple of 2^-26 (an error of 1e-8 in a cosine). The cosine of two such features is a sum of multiples of
2^-52 that stays below 2, which float64 adds in any order without rounding. Similarities are therefore exact, and ranks
and ties the same for every block size, number of threads and device.

Only what is close is computed in float64. The bulk is a product in float32: where it differs from the similarity of
the right candidate by more than float32 can err, it decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

STEP = 2.0**-26


@dataclass(frozen=True, eq=False)
class Ranks:
    """What a ranking of candidates gave for each query.

    A candidate tied with a right one ranks before it: a model that answers the same for everything finds nothing.

    Args:
        best: `torch.LongTensor` of shape `(queries,)`, how many wrong candidates rank before the best right one.
        tied: `torch.LongTensor` of shape `(queries,)`, how many of those have exactly the similarity of the right one.
        average_precision: `torch.DoubleTensor` of shape `(queries,)`, within 0 ... 1: over the right candidates, the
            mean share of right ones among all that rank up to it. With one right candidate it is 1 / (best + 1).
    """

    best: torch.Tensor
    tied: torch.Tensor
    average_precision: torch.Tensor

    def hits(self, k: int) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(queries,)`: a right candidate is among the first k."""
        return self.best < k

    def recall(self, k: int) -> float:
        """The share of queries with a right candidate among the first k."""
        return self.hits(k).double().mean().item()


def retrieval_ranks(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_of: torch.Tensor, block: int = 1024
) -> dict[Literal["i2t", "t2i"], Ranks]:
    """Ranks both ways by cosine, with one or several captions per image, in one pass over blocks of the similarities.

    Image-to-text asks for any of the image's captions, text-to-image for the caption's own image. Memory beside the
    features is a float32 copy of them and a few blocks; on Apple's GPUs, which have no float64, it is computed on the
    CPU.

    Args:
        image_embeds: of shape `(images, projection_dim)`; they need not be normalised.
        text_embeds: of shape `(captions, projection_dim)`, in any order.
        image_of: integers of shape `(captions,)`, the row of each caption's image.
        block: images and captions that are compared at a time.

    Returns:
        `{"i2t": Ranks of the images among all captions, "t2i": Ranks of the captions among all images}`.

    Raises:
        ValueError: for shapes that do not fit, an image without a caption, a caption whose image does not exist,
            features that are not finite or zero.

    Example:
        >>> ranks = retrieval_ranks(image_embeds, text_embeds, image_of)
        >>> ranks["t2i"].recall(1)
    """
    images, texts, image_of = _prepare(image_embeds, text_embeds, image_of, ("images", "captions"))
    captions = image_of.bincount(minlength=len(images))
    if not captions.all():
        without = (captions == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(without)} of {len(images)} images have no caption, so nothing is right for them: rows "
            f"{_first(without)}. Leave them out, or add their captions."
        )
    similarity, (text_above, text_tied), (above, tied) = _count_before(images, texts, image_of, block, both=True)

    # Among an image's captions the most similar one has the fewest wrong ones before it.
    before = above + tied
    top = torch.full((len(images),), -torch.inf, dtype=similarity.dtype, device=similarity.device)
    best = similarity == top.scatter_reduce(0, image_of, similarity, "amax")[image_of]
    image_best, image_tied = torch.zeros_like(captions), torch.zeros_like(captions)
    image_best[image_of[best]], image_tied[image_of[best]] = before[best], tied[best]

    # The j-th of an image's captions has j - 1 right ones before it, besides the wrong ones.
    order = before.argsort(stable=True)
    order = order[image_of[order].argsort(stable=True)]
    j = 1 + torch.arange(len(order), device=order.device) - (captions.cumsum(0) - captions)[image_of[order]]
    precision = torch.zeros_like(top).index_add_(0, image_of[order], j.double() / (j + before[order])) / captions
    return {"i2t": Ranks(image_best, image_tied, precision), "t2i": _one_right(text_above, text_tied)}


def ranks_among(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    right: torch.Tensor,
    block: int = 1024,
    names: tuple[str, str] = ("queries", "candidates"),
) -> Ranks:
    """Ranks by cosine where each query has one right candidate.

    Args:
        queries: of shape `(queries, projection_dim)`; they need not be normalised.
        candidates: of shape `(candidates, projection_dim)`; one may be right for several queries or for none.
        right: integers of shape `(queries,)`, the row of each query's right candidate.
        block: queries and candidates that are compared at a time.
        names: of queries and candidates in errors.

    Returns:
        `Ranks`.

    Raises:
        ValueError: as `retrieval_ranks`.
    """
    candidates, queries, right = _prepare(candidates, queries, right, names[::-1])
    return _one_right(*_count_before(candidates, queries, right, block, both=False)[1])


def summary(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The figures of one direction.

    Args:
        ranks: of one direction.
        ks: the cut-offs.

    Returns:
        `r1`, `r5`, `r10` (or as `ks` says) and `map` within 0 ... 1; `median_rank` and `mean_rank` of the best right
        candidate, counted from 1, the lower of two medians; `tied`, the number of queries whose best right candidate
        ties with a wrong one.
    """
    rank = ranks.best.double() + 1
    return {
        **{f"r{k}": ranks.recall(k) for k in ks},
        "map": ranks.average_precision.mean().item(),
        "median_rank": rank.quantile(0.5, interpolation="lower").item(),
        "mean_rank": rank.mean().item(),
        "tied": float((ranks.tied > 0).sum()),
    }


def _one_right(above: torch.Tensor, tied: torch.Tensor) -> Ranks:
    return Ranks(above + tied, tied, 1 / (above + tied + 1).double())


def _first(rows: list[int], most: int = 10) -> str:
    return ", ".join(map(str, rows[:most])) + (" ..." if len(rows) > most else "")


def _prepare(
    images: torch.Tensor, texts: torch.Tensor, image_of: torch.Tensor, names: tuple[str, str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checked and in fixed point, all on one device. `names` are those of `images` and `texts` in errors."""
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or not len(images) * len(texts):
        raise ValueError(
            f"Expected {names[0]} and {names[1]} of shape (rows, projection_dim) with the same projection_dim and at "
            f"least one row, got {tuple(images.shape)} and {tuple(texts.shape)}."
        )
    device = images.device if images.device.type != "mps" else torch.device("cpu")
    if image_of.shape != (len(texts),) or image_of.is_floating_point() or image_of.dtype == torch.bool:
        raise ValueError(
            f"Expected the row of the right one of {names[0]} for each of the {len(texts)} {names[1]}: integers of "
            f"shape ({len(texts)},), got {image_of.dtype} of shape {tuple(image_of.shape)}."
        )
    image_of = image_of.to(device, torch.int64)
    outside = ((image_of < 0) | (image_of >= len(images))).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"{len(outside)} of {len(texts)} {names[1]} point outside the {len(images)} {names[0]}: rows "
            f"{_first(outside)} point at {_first(image_of[outside].tolist())}."
        )
    return _fixed_point(images, names[0], device), _fixed_point(texts, names[1], device), image_of


def _fixed_point(features: torch.Tensor, name: str, device: torch.device, rows: int = 4096) -> torch.Tensor:
    """Normalised in float64 and rounded to float32 and to multiples of `STEP`."""
    fixed = torch.empty(features.shape, dtype=torch.float32, device=device)
    for start in range(0, len(features), rows):
        part = features[start : start + rows].detach().to(device).double()
        lengths = torch.linalg.vector_norm(part, dim=1)
        bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten() + start
        if len(bad):
            raise ValueError(
                f"Features of {name} hold NaN or Inf, or are zero, and a rank among them means nothing: rows "
                f"{_first(bad.tolist())}. Look at these samples, at the weights, and at float16's range of 65504."
            )
        fixed[start : start + rows] = (part / (lengths[:, None] * STEP)).round_().mul_(STEP)
    return fixed


def _dots(
    left: torch.Tensor, right: torch.Tensor, i: torch.Tensor, j: torch.Tensor, pairs: int = 1024
) -> torch.Tensor:
    """Exact similarities of `left[i]` and `right[j]`, pair by pair."""
    dots = torch.empty(len(i), dtype=torch.float64, device=left.device)  # many small results would fragment the heap
    for start in range(0, len(i), pairs):
        here = slice(start, start + pairs)
        dots[here] = (left[i[here]].double() * right[j[here]].double()).sum(dim=1)
    return dots


def _tolerance(images: torch.Tensor) -> float:
    """How far a similarity in float32 may be from the exact one; 0 where products are not float32's (TF32, autocast).

    Adding d products errs by d * 2^-24 at the very most, and in fact by something that grows with the root of d
    (Higham and Mary 2019, doi:10.1137/18M1226312): at most sqrt(d) * 2^-24 for random features, about
    four times that for the most adverse ones we could make.
    """
    one = torch.eye(256, device=images.device)
    last_digit = one * (1 + 2.0**-23)
    if not torch.equal(last_digit @ one, last_digit):
        return 0.0
    return 8 * images.shape[1] ** 0.5 * 2.0**-24


@dataclass(frozen=True, eq=False)
class _Block:
    """The similarities of some rows and some columns, in float32, or exact where the tolerance is 0."""

    left: torch.Tensor
    right: torch.Tensor
    similarity: torch.Tensor
    tolerance: float

    @classmethod
    def of(cls, left: torch.Tensor, right: torch.Tensor, tolerance: float) -> "_Block":
        similarity = left @ right.T if tolerance else left.double() @ right.double().T
        return cls(left, right, similarity, tolerance)

    @property
    def T(self) -> "_Block":
        return _Block(self.right, self.left, self.similarity.T, self.tolerance)

    def before(self, threshold: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """How many columns are above the exact `threshold` of each of `rows` (by default all), and tied with it.

        Shape `(2, rows)`.
        """
        similarity = self.similarity if rows is None else self.similarity.index_select(0, rows)
        # As numbers, not booleans: on a CPU comparing and counting is four times as fast.
        not_below, above = torch.empty_like(similarity), torch.empty_like(similarity)
        torch.ge(similarity, (threshold - self.tolerance).to(similarity.dtype)[:, None], out=not_below)
        torch.gt(similarity, (threshold + self.tolerance).to(similarity.dtype)[:, None], out=above)
        num_not_below, num_above = not_below.sum(dim=1).long(), above.sum(dim=1).long()
        if not self.tolerance:
            return torch.stack([num_above, num_not_below - num_above])
        unsure = (num_not_below > num_above).nonzero().flatten()
        i, j = not_below.sub_(above).bool()[unsure].nonzero(as_tuple=True)
        i = unsure[i]
        difference = self.exact(i if rows is None else rows[i], j) - threshold[i]
        decided = [
            i[difference > 0].bincount(minlength=len(similarity)),
            i[difference == 0].bincount(minlength=len(similarity)),
        ]
        return torch.stack([num_above + decided[0], decided[1]])

    def exact(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        if 40 * len(i) < self.similarity.numel():
            return _dots(self.left, self.right, i, j)
        # A model that answers the same for everything: all pairs together are then cheaper.
        return (self.left.double() @ self.right.double().T)[i, j]


def _count_before(
    images: torch.Tensor, texts: torch.Tensor, image_of: torch.Tensor, block: int, both: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each text and its own image: their similarity, and the wrong candidates above it and tied with it.

    Returns:
        The exact similarities of shape `(texts,)`; above and tied among all images, of shape `(2, texts)`; and, where
        `both` is set, above and tied among the texts of other images, of the same shape.
    """
    tolerance = _tolerance(images)
    own = _dots(images, texts, image_of, torch.arange(len(texts), device=texts.device))
    among_images, among_texts = torch.zeros(2, 2, len(texts), dtype=torch.int64, device=texts.device)
    by_image = image_of.argsort(stable=True)
    ends = [0, *image_of.bincount(minlength=len(images)).cumsum(0).tolist()]
    for row, rows in zip(range(0, len(images), block), images.split(block), strict=True):
        theirs = by_image[ends[row] : ends[row + len(rows)]]
        for column, columns in zip(range(0, len(texts), block), texts.split(block), strict=True):
            here = slice(column, column + len(columns))
            part = _Block.of(rows, columns, tolerance)
            inside = theirs[(theirs >= here.start) & (theirs < here.stop)]
            part.similarity[image_of[inside] - row, inside - column] = -torch.inf  # what is right is not before itself
            among_images[:, here] += part.T.before(own[here])
            for some in theirs.split(block) if both else ():
                among_texts[:, some] += part.before(own[some], image_of[some] - row)
    return own, among_images, among_texts
