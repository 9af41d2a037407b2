"""Effective length (paper section 3.1): how many tokens of a caption a model makes use of.

Every caption is truncated to n tokens, and R@1 is plotted against n. "Once the input length surpasses 20 tokens, the
R@1 of CLIP exhibits slow growth", whereas that of Long-CLIP "continues to improve": the paper reads off where growth
becomes slow, and `effective_length` says what slow is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from longclip_hf.evaluation.intervals import Interval, bootstrap_means, percentiles

_ROUNDING = 1e-10  # of a share, per token


@dataclass(frozen=True)
class LengthCurve:
    """What `effective_length` returns.

    Args:
        lengths: of the grid, in tokens with those of start and end.
        recall: R@1 at each length, within 0 ... 1.
        gain: what longer captions add to it, the mean R@1 over all longer lengths less R@1 at this one; 0 at the last.
            At the first it is the rise of the curve.
        effective: the effective length in tokens and its bounds, all of them in `lengths`. At the last length it says
            only that the curve still grows there. None where the curve does not rise.
    """

    lengths: list[int]
    recall: list[Interval]
    gain: list[Interval]
    effective: Interval | None


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
    slow: float = 0.35,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> LengthCurve:
    """The smallest length beyond which R@1 grows slowly, measured by the rise of the whole curve.

    gain(n) is the mean of R@1 over all lengths of the grid beyond n less R@1 at n, and pace(n) is that per token: over
    the mean distance of those lengths from n. pace(first) is that of the whole curve. The effective length is the
    smallest n with pace(n) <= slow * pace(first); at the last length nothing is left to grow. Hence a curve that rises
    evenly is effective to its end, whatever its height, and one that never rises beyond its first length, as at
    chance, has no effective length: the lower bound of its gain(first) is not above 0.

    Its bounds are the smallest n at which the lower, and the upper, bound of pace(n) - slow * pace(first) is not above
    0: before the one, growth is certainly faster; from the other on, certainly slow. Those bounds are the bootstrap's
    over images, with the same images at all lengths.

    A curve like CLIP's in the paper, with R@1 of 30, 46, 49, 51, 52, 52.5, 53 and 53.6 % at 10, 20, 30 ... 70 and 77
    tokens, has the paces 0.53, 0.17, 0.12 ... points a token, so 1, 0.32, 0.22 ... of the whole curve's: 20 tokens,
    as the paper says of it.

    Why the mean of the longer lengths: their maximum is the luckiest of some twenty noisy values, and R@1 at the last
    length is one noisy value. Why no share of the rise alone: of a curve that rises evenly it would always be the same
    part, and no growth to the end. Why no test of significance: that would find larger lengths with more queries. A
    length depends on the longest one that was tried, so compare models on one grid, and look at the curves.

    Args:
        hits: booleans of shape `(lengths, queries)`: whether the query found its own with captions of that length.
        lengths: increasing, in tokens.
        groups: the image of each query, of shape `(queries,)`; see `longclip_hf.evaluation.intervals`.
        slow: the share of the whole curve's pace, within 0 ... 1, that counts as slow growth.
        resamples: of the bootstrap.
        level: of the intervals.
        seed: of the bootstrap.

    Returns:
        `LengthCurve`.

    Raises:
        ValueError: for shapes that do not fit, lengths that do not increase, a share outside 0 ... 1; as
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
    if any(a >= b for a, b in pairwise(grid)) or not 0 <= slow <= 1:
        raise ValueError(f"Expected increasing lengths and a share within 0 ... 1, got {grid} and {slow}.")
    curve, curves = hits.double().mean(dim=1).cpu(), bootstrap_means(hits, groups, resamples, seed)
    gain, gains = gain_of_longer(curve), gain_of_longer(curves)
    gain_low, gain_high = percentiles(gains, level)
    excess, excesses = (_pace(of, grid) - slow * _pace(of, grid)[..., :1] for of in (gain, gains))
    low, high = percentiles(excesses, level)
    effective = None
    if len(grid) > 1 and gain_low[0] > _ROUNDING:
        # At the last length both bounds are those of nothing.
        low[-1] = high[-1] = excess[-1] = 0
        bounds = excess, torch.minimum(low, excess), torch.maximum(high, excess)
        effective = Interval(*(grid[int((bound <= _ROUNDING).int().argmax())] for bound in bounds))
    return LengthCurve(
        lengths=grid,
        recall=_intervals(curve, *percentiles(curves, level)),
        gain=_intervals(gain, gain_low, gain_high),
        effective=effective,
    )


def _pace(gain: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The gain of longer captions per token, of the same shape; 0 at the last length."""
    distance = gain_of_longer(torch.tensor(lengths, dtype=gain.dtype))
    return torch.where(distance > 0, gain / distance.clamp(min=1), 0.0)


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
