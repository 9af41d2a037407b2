"""Is a difference chance? Paired tests of two models on the same queries, and their correction where there are many.

References:
    Fisher 1935, "The Design of Experiments", section 21 (the test by signs); Holm 1979, "A simple sequentially
    rejective multiple test procedure".
"""

from collections.abc import Sequence

import torch

EXACT = 13  # groups up to which all signs are tried: 8192


def sign_flip_p(
    differences: torch.Tensor, groups: torch.Tensor | None = None, flips: int = 9999, seed: int = 0
) -> float:
    """How often chance gives a mean difference as large as this one, either way.

    Were both models equally good, each group's sum of differences could as well have the other sign. So signs are
    drawn anew, whole groups at a time, and the p-value is the share of draws, the true signs among them, whose sum is
    at least as far from 0. Up to 13 groups that differ, all signs are tried, and it is exact. On hits or misses of
    single queries it is McNemar's test.

    Args:
        differences: of one model less the other, per query, of shape `(queries,)`.
        groups: integers of shape `(queries,)`, the image or group of each query; by default each is its own.
        flips: draws, so that the smallest p-value is 1 / (flips + 1).
        seed: of the draws.

    Returns:
        Within 0 ... 1; 1 where nothing differs.

    Raises:
        ValueError: for shapes that do not fit, or differences that are not finite.

    Example:
        >>> sign_flip_p(torch.tensor([1.0, 1.0, 1.0, 0.0]))  # of eight signs, two are as far from 0
        0.25
    """
    if differences.ndim != 1 or (groups is not None and groups.shape != differences.shape):
        raise ValueError(
            f"Expected differences and groups of shape (queries,), got {tuple(differences.shape)} and "
            f"{None if groups is None else tuple(groups.shape)}."
        )
    sums = differences.double().cpu()
    if not sums.isfinite().all():
        raise ValueError(f"{int((~sums.isfinite()).sum())} of {len(sums)} differences are NaN or Inf.")
    if groups is not None:
        of = groups.cpu().unique(return_inverse=True)[1]
        sums = torch.zeros(int(of.max()) + 1, dtype=torch.float64).index_add_(0, of, sums)
    sums = sums[sums.abs() > 1e-12]
    if not len(sums):
        return 1.0
    reached = float(sums.sum().abs()) * (1 - 1e-12)  # the same sum in another order is as far
    if len(sums) <= EXACT:
        all_signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * len(sums)).reshape(-1, len(sums)).double()
        return float(((all_signs @ sums).abs() >= reached).double().mean())
    generator = torch.Generator().manual_seed(seed)
    as_far, step = 1, max(1, 4_000_000 // len(sums))
    for start in range(0, flips, step):
        shape = (min(step, flips - start), len(sums))
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).double().mul_(2).sub_(1)
        as_far += int(((signs @ sums).abs() >= reached).sum())
    return as_far / (flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values, corrected for their number.

    If those below 0.05 are called differences, the chance that any of them is none stays below 0.05, whatever the
    tests have to do with each other.

    The k-th smallest of n is multiplied by n - k + 1; none falls below a smaller one's.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(order) - rank)))
        corrected[i] = highest
    return corrected
