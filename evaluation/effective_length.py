"""Effective length (paper section 3.1): how many tokens of a caption a model makes use of.

Every caption is truncated to n tokens, and R@1 is plotted against n. The paper reads off where the curve stops
growing; `effective_length` defines that point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from longclip_hf.evaluation.intervals import Interval, bootstrap_means, percentiles


@dataclass(frozen=True)
class LengthCurve:
    """What `effective_length` returns.

    Args:
        lengths: of the grid, in tokens with those of start and end.
        recall: R@1 at each length, within 0 ... 1.
        gain: what longer captions add to it, the mean R@1 over all longer lengths less R@1 at this one; 0 at the last.
        effective: the effective length in tokens and its bounds, all of them in `lengths`. At the last length it says
            only that the curve still grows there.
    """

    lengths: list[int]
    recall: list[Interval]
    gain: list[Interval]
    effective: Interval


def default_lengths(max_length: int, first: int = 10, step: int = 10) -> list[int]:
    """The grid of a model: 10, 20, 30 ... and its own length.

    Args:
        max_length: positions of the model.
        first: the smallest length.
        step: between lengths.

    Returns:
        Increasing lengths, the last of which is `max_length`.

    Raises:
        ValueError: for a model shorter than `first`.

    Example:
        >>> default_lengths(45)
        [10, 20, 30, 40, 45]
    """
    if max_length < first:
        raise ValueError(f"A model of {max_length} positions has no length from {first} on.")
    return [*range(first, max_length, step), max_length]


def effective_length(
    hits: torch.Tensor,
    lengths: Sequence[int],
    groups: torch.Tensor | None = None,
    tolerance: float = 0.01,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> LengthCurve:
    """The smallest length from which longer captions bring, on average, at most one more point of R@1.

    With gain(n) the mean of R@1 over all lengths of the grid beyond n less R@1 at n, it is the smallest n with
    gain(n) <= tolerance; at the last length the gain is 0. Its bounds are the smallest n at which the lower, and the
    upper, bound of gain(n) is within the tolerance: before the one, growth is certain; from the other on, it is ruled
    out. The bounds of gain(n) are those of the bootstrap over images, with the same images at all lengths.

    Why the mean of the longer lengths: their maximum is the luckiest of some twenty noisy values, and R@1 at the last
    length is one noisy value. On simulated curves that stop growing at the fourth of 25 lengths, with 1000 queries of
    which 20 % answer by chance at each length, this definition is off by 0.4 steps of the grid, and one by the maximum
    (or by isotonic regression, whose end is as noisy) by 4 to 7. Why a tolerance and no test of significance: that
    would find larger lengths with more queries, for growth that nobody cares about. A share of the whole growth
    would mean nothing where the curve is flat; a point of R@1 is the unit in which results are compared.

    Args:
        hits: booleans of shape `(lengths, queries)`: whether the query found its own with captions of that length.
        lengths: increasing, in tokens.
        groups: the image of each query, of shape `(queries,)`; see `longclip_hf.evaluation.intervals`.
        tolerance: R@1, within 0 ... 1, that does not count as growth.
        resamples: of the bootstrap.
        level: of the intervals.
        seed: of the bootstrap.

    Returns:
        `LengthCurve`.

    Raises:
        ValueError: for shapes that do not fit, lengths that do not increase, a negative tolerance; as
            `bootstrap_means`.

    Example:
        >>> hits = torch.stack([ranks_at(n)["t2i"].hits(1) for n in lengths])
        >>> effective_length(hits, lengths, groups=image_of).effective
        Interval(value=20, low=20, high=30)
    """
    grid = list(lengths)
    if hits.ndim != 2 or len(hits) != len(grid) or not hits.numel():
        raise ValueError(
            f"Expected hits of shape (lengths, queries) for {len(grid)} lengths, got {tuple(hits.shape)}."
        )
    if any(a >= b for a, b in pairwise(grid)) or tolerance < 0:
        raise ValueError(f"Expected increasing lengths and a tolerance from 0 on, got {grid} and {tolerance}.")
    curve, curves = hits.double().mean(dim=1).cpu(), bootstrap_means(hits, groups, resamples, seed)
    gain, gains = gain_of_longer(curve), gain_of_longer(curves)
    gain_low, gain_high = percentiles(gains, level)
    # A millionth of a point is rounding: 0.91 - 0.9 is within 0.01.
    value, low, high = (
        grid[int((bound <= tolerance + 1e-8).int().argmax())]
        for bound in (gain, torch.minimum(gain_low, gain), torch.maximum(gain_high, gain))
    )
    return LengthCurve(
        lengths=grid,
        recall=_intervals(curve, *percentiles(curves, level)),
        gain=_intervals(gain, gain_low, gain_high),
        effective=Interval(value, low, high),
    )


def gain_of_longer(curves: torch.Tensor) -> torch.Tensor:
    """At each point, the mean of all later ones less its own value; 0 at the last.

    Args:
        curves: of shape `(..., points)`.

    Returns:
        Of the same shape.
    """
    later = curves.shape[-1] - 1 - torch.arange(curves.shape[-1], device=curves.device)
    sums = curves.flip(-1).cumsum(-1).flip(-1) - curves
    return torch.where(later > 0, sums / later.clamp(min=1) - curves, 0.0)


def _intervals(*bounds: torch.Tensor) -> list[Interval]:
    return [Interval(*row) for row in torch.stack(bounds, dim=-1).tolist()]
