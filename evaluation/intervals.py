"""Confidence intervals of mean metrics: the percentile bootstrap over queries, clustered by image.

Several captions of one image are hit or missed together, so they are no independent evidence: resampling single
captions would give intervals that are too narrow. What is resampled is the image, with all its captions. For
image-to-text and for classification every query is an image already.

References:
    Efron and Tibshirani 1993, chapter 13 (percentile intervals); Field and Welsh 2007 (the cluster bootstrap).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """A mean over the queries, and the bounds within which it lies in the given share of the resamples."""

    value: float
    low: float
    high: float


def bootstrap_means(
    values: torch.Tensor, groups: torch.Tensor | None = None, resamples: int = 1000, seed: int = 0
) -> torch.Tensor:
    """Means over resampled groups of queries, several metrics at once.

    The draws depend on the groups and the seed alone: two models on the same queries, or two metrics, have the same.

    Args:
        values: numbers or booleans of shape `(queries,)` or `(metrics, queries)`.
        groups: integers of shape `(queries,)`, the image of each query; by default every query stands for itself.
        resamples: how often as many groups as there are get drawn with replacement.
        seed: of the draws.

    Returns:
        `torch.DoubleTensor` of shape `(resamples,)` or `(resamples, metrics)`, on the CPU.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, fewer than two groups or one resample.

    Example:
        >>> bootstrap_means(ranks["t2i"].hits(1), image_of).std()  # the standard error of R@1
    """
    table, of = _checked(values, groups)
    sizes = of.bincount().double()
    sums = torch.zeros(len(sizes), table.numel() // len(of), dtype=torch.float64)
    sums.index_add_(0, of, table.reshape(-1, len(of)).T)
    means = [(times @ sums) / (times @ sizes)[:, None] for times in _draws(len(sizes), resamples, seed)]
    return torch.cat(means).reshape(resamples, *table.shape[:-1])


def bootstrap_medians(
    values: torch.Tensor, groups: torch.Tensor | None = None, resamples: int = 1000, seed: int = 0
) -> torch.Tensor:
    """Medians over the same resamples as `bootstrap_means`; of an even number of queries the lower one.

    Args:
        values: numbers of shape `(queries,)`.
        groups: as in `bootstrap_means`, and so are the rest.

    Returns:
        `torch.DoubleTensor` of shape `(resamples,)`, on the CPU.

    Raises:
        ValueError: as `bootstrap_means`; for more than one metric.
    """
    table, of = _checked(_one_metric(values), groups)
    ascending, order = table.sort()
    of = of[order]
    medians = []
    for times in _draws(int(of.max()) + 1, resamples, seed):
        up_to = times[:, of].cumsum(dim=1)  # how many resampled queries have at most this value
        medians.append(ascending[(2 * up_to >= up_to[:, -1:]).int().argmax(dim=1)])
    return torch.cat(medians)


def bootstrap_class_means(
    values: torch.Tensor, classes: torch.Tensor, resamples: int = 1000, seed: int = 0
) -> torch.Tensor:
    """Means over classes of the means within each, over the same resamples as `bootstrap_means`.

    A class of which no query was drawn is left out of that resample.

    Args:
        values: numbers of shape `(queries,)`.
        classes: integers of shape `(queries,)`, the class of each query.
        resamples: as in `bootstrap_means`, and so is the seed.

    Returns:
        `torch.DoubleTensor` of shape `(resamples,)`, on the CPU.

    Raises:
        ValueError: as `bootstrap_means`; for more than one metric.
    """
    table, of = _checked(_one_metric(values), classes)
    means = []
    for times in _draws(len(of), resamples, seed):
        sums, counts = torch.zeros(2, len(times), int(of.max()) + 1, dtype=torch.float64)
        counts.index_add_(1, of, times)
        sums.index_add_(1, of, times * table)
        means.append((sums / counts.clamp(min=1)).sum(dim=1) / (counts > 0).sum(dim=1))
    return torch.cat(means)


def bootstrap_interval(
    values: torch.Tensor,
    groups: torch.Tensor | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of a metric over the queries with its percentile interval.

    Where every query is a hit, or none is, every resample says the same and the interval has no width: that is no
    certainty about other queries.

    Args:
        values: per query, of shape `(queries,)`: hits, average precision or another number.
        groups: the image of each query, of shape `(queries,)`: `image_of` for text-to-image, None for image-to-text.
        resamples: of the bootstrap.
        level: share of the resamples within the bounds.
        seed: of the bootstrap.

    Returns:
        `Interval`.

    Raises:
        ValueError: as `bootstrap_means`; for a level outside 0 ... 1.

    Example:
        >>> bootstrap_interval(ranks["t2i"].hits(1), image_of)
        Interval(value=0.795, low=0.77, high=0.819)
    """
    means = bootstrap_means(_one_metric(values), groups, resamples, seed)
    low, high = percentiles(means, level)
    return Interval(values.double().mean().item(), low.item(), high.item())


def difference_interval(
    first: torch.Tensor,
    second: torch.Tensor,
    groups: torch.Tensor | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """How much larger the mean of `first` is than that of `second` on the same queries, with its paired interval.

    Pairing takes out what makes a query hard for both; where the interval leaves out 0, the difference is not chance.

    Args:
        first: of one model, per query, of shape `(queries,)`.
        second: of the other, on the same queries in the same order.
        groups: as in `bootstrap_interval`, and so are the rest.

    Returns:
        `Interval` of the difference.

    Raises:
        ValueError: for shapes that differ; as `bootstrap_interval`.
    """
    if first.shape != second.shape:
        raise ValueError(f"Not the same queries: {tuple(first.shape)} values and {tuple(second.shape)}.")
    return bootstrap_interval(first.double() - second.double(), groups, resamples, level, seed)


def percentiles(resampled: torch.Tensor, level: float = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of the middle `level` of the resamples, which are the first axis."""
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval lies between 0 and 1, like 0.95; got {level}.")
    return resampled.quantile((1 - level) / 2, dim=0), resampled.quantile((1 + level) / 2, dim=0)


def _one_metric(values: torch.Tensor) -> torch.Tensor:
    if values.ndim != 1:
        raise ValueError(f"Expected one metric, values of shape (queries,), got {tuple(values.shape)}.")
    return values


def _checked(values: torch.Tensor, groups: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in float64, and the group of each query as a number from 0 on."""
    table = torch.as_tensor(values).double().cpu()
    if table.ndim not in (1, 2) or not table.numel() or (groups is not None and groups.shape != table.shape[-1:]):
        raise ValueError(
            f"Expected values of shape (queries,) or (metrics, queries) and groups of shape (queries,), got "
            f"{tuple(table.shape)} and {None if groups is None else tuple(groups.shape)}."
        )
    if not table.isfinite().all():
        raise ValueError(f"{int((~table.isfinite()).sum())} of {table.numel()} values are NaN or Inf.")
    return table, torch.arange(table.shape[-1]) if groups is None else groups.cpu().unique(return_inverse=True)[1]


def _draws(groups: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """How often each group is in each resample, some resamples at a time: `(at most 64, groups)`."""
    if groups < 2 or resamples < 1:
        raise ValueError(
            f"An interval needs two images (or groups of queries) and one resample at least, got {groups} and "
            f"{resamples}."
        )
    generator = torch.Generator().manual_seed(seed)
    one = torch.ones((), dtype=torch.float64)
    for start in range(0, resamples, 64):  # 16 MB of draws for the 31,783 images of Flickr30k
        shape = (min(64, resamples - start), groups)
        drawn = torch.randint(groups, shape, generator=generator)
        yield torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, one.expand(shape))
