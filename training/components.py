"""Primary component extraction (paper section 3.3, eq. 3-6): from fine-grained image features to coarse ones.

    moments = second_moments(features)                          # global scope: the caller sums over the processes
    mean, covariance = mean_and_covariance(moments)
    eigenvalues, eigenvectors = decompose(covariance, mean)     # eq. 3, component decomposition
    num_kept = filter_components(eigenvalues, num_components)   # eq. 4, component filtration
    coarse = reconstruct(features - mean, covariance, eigenvalues, eigenvectors, num_kept) + mean  # eq. 5

`primary_components` is the whole of it (eq. 6). Everything is computed in float64, so that autocast and TF32 do not
reach it and a small gap between two eigenvalues keeps its digits; the result has the features' type, float32 at least.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Scope = Literal["local", "global"]


class PrimaryComponents(NamedTuple):
    """What `primary_components` returns.

    Args:
        features: coarse features, `torch.Tensor` of shape `(batch_size, projection_dim)`, not normalised.
        num_kept: how many components were kept, a scalar; all of them where fewer than asked for carry any variance.
        variance_kept: the share of the variance that they carry, a float32 scalar within 0 ... 1 without gradient; at
            1 nothing was filtered out.
    """

    features: torch.Tensor
    num_kept: torch.Tensor
    variance_kept: torch.Tensor


def primary_components(
    features: torch.Tensor, num_components: int | float, moments: torch.Tensor | None = None, *, check: bool = True
) -> PrimaryComponents:
    """Coarse image features: the projection onto the largest principal components, plus the mean (eq. 6).

    As in the released code the result is not normalised again and the gradient flows through the decomposition, here
    in a form that is finite for every input (see `reconstruct`).

    Args:
        features: L2-normalised image features of this process, of shape `(batch_size, projection_dim)`.
        num_components: how many components are kept (32 in the paper), or, within (0, 1), the share of the variance
            that they must reach.
        moments: `second_moments` of the samples that define the components, of shape
            `(projection_dim + 1, projection_dim + 1)`: the sum over all processes in the global scope. By default they
            are those of `features` (local scope, as released).
        check: refuse features that are not finite, for which a GPU is waited for. Otherwise they make all coarse
            features NaN. With a count of components nothing is waited for then but by `torch.linalg.eigh` itself, with
            a share for the count that reaches it.

    Returns:
        `PrimaryComponents`.

    Raises:
        ValueError: for features that are no matrix of floats or, if they are checked, not finite, naming the rows; for
            moments of another size or, likewise, not finite; for a `num_components` out of range.

    Example:
        >>> features = torch.nn.functional.normalize(torch.randn(256, 512), dim=-1)
        >>> coarse, num_kept, variance_kept = primary_components(features, num_components=32)
    """
    check_shape(features)
    if check:
        check_finite(features)
    exact = _exact(features)
    if moments is None:
        mean = exact.mean(dim=0)
        # A matrix and its transpose have the same best approximation of rank k, transposed: the smaller of Z^T Z and
        # Z Z^T is decomposed.
        transposed = len(exact) < exact.shape[1]
        scale = math.sqrt(len(exact))
        rows = (exact - mean) / scale
        rows = rows.T if transposed else rows
        eigenvalues, eigenvectors = decompose(rows.detach().T @ rows.detach(), mean)
        num_kept = filter_components(eigenvalues, num_components)
        coarse = scale * reconstruct(rows, None, eigenvalues, eigenvectors, num_kept)
        coarse = (coarse.T if transposed else coarse) + mean
    else:
        if moments.shape != (exact.shape[1] + 1,) * 2:
            raise ValueError(
                f"moments of features of shape {tuple(features.shape)} must be of shape "
                f"{(exact.shape[1] + 1,) * 2}, got {tuple(moments.shape)}."
            )
        if check and not moments.isfinite().all():
            raise ValueError(
                "The moments are not finite although this process's features are: another process's features hold NaN "
                "or Inf, and its own error names their rows."
            )
        mean, covariance = mean_and_covariance(moments.to(exact))
        eigenvalues, eigenvectors = decompose(covariance, mean)
        num_kept = filter_components(eigenvalues, num_components)
        coarse = reconstruct(exact - mean, covariance, eigenvalues, eigenvectors, num_kept) + mean
    return PrimaryComponents(
        coarse.to(features.device, torch.promote_types(features.dtype, torch.float32)),
        torch.where(_all_there_is(eigenvalues, num_kept), len(eigenvalues), num_kept),
        variance_kept(eigenvalues, num_kept).to(features.device, torch.float32),
    )


def second_moments(features: torch.Tensor) -> torch.Tensor:
    """Everything that the global covariance needs from one process, in one matrix that adds up over processes.

    With a column of ones beside the features X, the sum of the outer products of the rows is

        [[sum x x^T, sum x],
         [sum x^T,   n    ]].

    Args:
        features: of shape `(batch_size, projection_dim)`.

    Returns:
        `torch.Tensor` of shape `(projection_dim + 1, projection_dim + 1)`, float64, with gradient. NaN and Inf go
        through, so that all processes find out at the same place (`primary_components`) instead of waiting for one.

    Example:
        >>> moments = all_reduce_with_grad(second_moments(features))
        >>> coarse = primary_components(features, 32, moments).features
    """
    exact = _exact(features)
    extended = torch.cat([exact, exact.new_ones(len(exact), 1)], dim=1)
    return extended.T @ extended


def mean_and_covariance(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, of shape `(projection_dim,)`, and the covariance, `(projection_dim, projection_dim)`, of `moments`.

    The covariance is E[x x^T] - E[x] E[x]^T, divided by the number of samples. The subtraction costs digits when the
    mean is large beside the deviations, which float64 has to spare.
    """
    count = moments[-1, -1].detach()
    mean = moments[-1, :-1] / count
    return mean, moments[:-1, :-1] / count - torch.outer(mean, mean)


@torch.no_grad()
def decompose(covariance: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Component decomposition (eq. 3): the attributes as directions, and how much each matters.

    Args:
        covariance: symmetric, of shape `(size, size)`.
        mean: of the features; for the rounding that its subtraction left in the covariance.

    Returns:
        The eigenvalues, of shape `(size,)`, descending, those that are only rounding set to zero, and the eigenvectors
        as columns, of shape `(size, size)`. Both without gradient: `reconstruct` carries it. Of a covariance with NaN
        or Inf they mean nothing, and the features that it came from are to be looked at; LAPACK would fail.
    """
    symmetric = (covariance + covariance.T) / 2
    eigenvalues, eigenvectors = torch.linalg.eigh(symmetric.where(symmetric.isfinite().all(), 0.0))
    rounding = _rounding(eigenvalues) * (covariance.trace() + mean.dot(mean))  # of the mean square of the features
    return eigenvalues.where(eigenvalues > rounding, 0.0).flip(0), eigenvectors.flip(1)


def filter_components(eigenvalues: torch.Tensor, num_components: int | float) -> int:
    """Component filtration (eq. 4): how many of the leading components are kept.

    Args:
        eigenvalues: of shape `(size,)`, descending, those beyond the rank exactly zero, as from `decompose`.
        num_components: a count of 1 or more, or, within (0, 1), the share of the variance: then the smallest count
            that reaches it.

    Returns:
        The count, at most `size`. A share has to be looked up, for which a GPU is waited for. When fewer components
        carry any variance, nothing can be dropped: the projector is the identity, and so is its derivative (see
        `reconstruct`).

    Raises:
        ValueError: for a `num_components` that is neither.
    """
    _check_num_components(num_components)
    if isinstance(num_components, int):
        return min(num_components, len(eigenvalues))
    cumulative = eigenvalues.cumsum(0)
    reached = torch.searchsorted(cumulative, num_components * cumulative[-1]) + 1
    # At most the rank; without any variance, 1, and `reconstruct` keeps everything.
    return max(1, int(torch.minimum(reached, (eigenvalues > 0).sum())))


def reconstruct(
    centred: torch.Tensor,
    covariance: torch.Tensor | None,
    eigenvalues: torch.Tensor,
    eigenvectors: torch.Tensor,
    num_kept: int,
) -> torch.Tensor:
    """Component reconstruction (eq. 5) of centred features, without the mean: Y = Z P with P = V_k V_k^T.

    The gradient with respect to the covariance C is that of the projector P (Daleckii and Krein's formula for a step
    function of the eigenvalues l), which has no term between two kept or between two dropped components:

        dP = sum over kept i, dropped j of (v_i v_i^T dC v_j v_j^T + v_j v_j^T dC v_i v_i^T) / (l_i - l_j).

    It does not depend on the signs of the eigenvectors, nor on the basis of a repeated eigenvalue, and is finite where
    the gradients of `torch.linalg.svd` and `eigh`, which divide by every gap, are not. A gap between kept and dropped
    can still vanish. With singular values s_i = sqrt(n l_i), left vectors u_i, G = dL/dY and g_ij = u_i^T G v_j, the
    part of the pair in dL/dZ is

        (s_i g_ij + s_j g_ji) (s_i u_i v_j^T + s_j u_j v_i^T) / (s_i^2 - s_j^2).

    - s_j = 0 < s_i (rank = `num_kept`): g_ij u_i v_j^T, regular; no special case.
    - s_i = s_j = 0 (rank r < `num_kept`): Y is the best approximation of Z of rank k > r, so a change E of rank 1, and
      with it every partial derivative, gives Z + E exactly: dL/dZ = G. No gradient of C can say so (C carries nothing
      outside the span of Z); P = 1 does. Therefore all components are kept there. This is also what
      holds for n - 1 <= k samples, whose Y is Z everywhere.
    - s_i = s_j > 0 (a tie across the cut): P jumps, there is no derivative. The pair's term is left out, as if the
      split of the tied subspace were held fixed; the others stay. Equal means equal to rounding, size * eps * l_1;
      beyond it the derivative is what it is, and large close to a tie.

    Args:
        centred: of shape `(samples, size)`, the mean subtracted.
        covariance: of shape `(size, size)`, for the gradient's way back. None where it is `centred.T @ centred`: then
            the gradient reaches `centred` directly and costs samples * size * num_kept, not samples * size * size.
        eigenvalues: of shape `(size,)`, and
        eigenvectors: of shape `(size, size)`, both from `decompose`.
        num_kept: from `filter_components`.

    Returns:
        `torch.Tensor` of `centred`'s shape. It can be differentiated once.
    """
    result: torch.Tensor = _Reconstruction.apply(centred, covariance, eigenvalues, eigenvectors, num_kept)
    return torch.where(_all_there_is(eigenvalues, num_kept), centred, result)


def _all_there_is(eigenvalues: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Whether fewer than `num_kept` components carry any variance: a scalar, which nothing waits for."""
    return eigenvalues[num_kept - 1] <= 0


class _Reconstruction(torch.autograd.Function):
    """`reconstruct`, without ever forming P."""

    @staticmethod
    def forward(
        ctx: Any,
        centred: torch.Tensor,
        covariance: torch.Tensor | None,
        eigenvalues: torch.Tensor,
        eigenvectors: torch.Tensor,
        num_kept: int,
    ) -> torch.Tensor:
        kept = eigenvectors[:, :num_kept]
        scores = centred @ kept
        ctx.num_kept = num_kept
        ctx.of_these_rows = covariance is None
        ctx.save_for_backward(centred, scores, eigenvalues, eigenvectors)
        return scores @ kept.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        centred, scores, eigenvalues, eigenvectors = ctx.saved_tensors
        kept, dropped = eigenvectors[:, : ctx.num_kept], eigenvectors[:, ctx.num_kept :]
        grad_scores = grad @ kept
        gaps = eigenvalues[: ctx.num_kept, None] - eigenvalues[None, ctx.num_kept :]
        tied = gaps <= _rounding(eigenvalues) * eigenvalues[0]
        # dL/dP = Z^T G, made symmetric, between kept rows and dropped columns.
        coupling = (scores.T @ grad + grad_scores.T @ centred) / 2 @ dropped
        turn = dropped @ (coupling / gaps.masked_fill(tied, torch.inf)).T
        # dL/dC = V_k turn^T + turn V_k^T, and dL/dZ = 2 Z dL/dC where C = Z^T Z.
        if ctx.of_these_rows:
            grad_centred = (grad_scores + 2 * centred @ turn) @ kept.T + 2 * scores @ turn.T
            return grad_centred, None, None, None, None
        half = turn @ kept.T
        return grad_scores @ kept.T, half + half.T, None, None, None


def variance_kept(eigenvalues: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The share of the variance that the first `num_kept` components carry: a scalar, 1 where there is no variance."""
    total = eigenvalues.sum()
    return torch.where(total > 0, eigenvalues[:num_kept].sum() / total, 1.0).clamp(max=1.0)


def check_components(
    local_batch: int,
    num_components: int | float,
    scope: Scope,
    world_size: int = 1,
    projection_dim: int | None = None,
) -> None:
    """Refuses settings under which primary component matching would silently do nothing.

    n centred samples have rank n - 1 at most, so up to `num_components + 1` of them are reproduced exactly: coarse and
    fine features coincide. The same holds for an embedding of no more than `num_components` numbers.

    Args:
        local_batch: images per process and step; with a gradient cache those of the whole batch, not of a chunk.
        num_components: as in `primary_components`. A share of the variance counts as one component here.
        scope: `"local"`, the covariance of each process's own batch, or `"global"`, that of all of them.
        world_size: the number of processes.
        projection_dim: size of the embedding, where known.

    Raises:
        ValueError: saying why and what to do.
    """
    _check_num_components(num_components)
    if scope not in ("local", "global"):
        raise ValueError(f'scope must be "local" or "global", got {scope!r}.')
    count = num_components if isinstance(num_components, int) else 1
    samples = local_batch if scope == "local" else local_batch * world_size
    if samples <= count + 1:
        where = "per process" if scope == "local" else f"over {world_size} process{'es' if world_size > 1 else ''}"
        remedies = [f"at least {count + 2} images {where}"]
        if samples > 2:
            remedies.append(f"at most {samples - 2} component{'s' if samples > 3 else ''}")
        if scope == "local" and local_batch * world_size > count + 1:
            remedies.append("the global scope")
        raise ValueError(
            f"{samples} images {where} span {max(samples - 1, 0)} dimensions at most once centred, so a projection "
            f"onto {count} primary component{'s' if count > 1 else ''} changes nothing and primary component matching "
            f"would silently be off. Use {' or '.join(remedies)}."
        )
    if projection_dim is not None and count >= projection_dim:
        raise ValueError(
            f"An embedding of {projection_dim} numbers has {projection_dim} components, so keeping {count} changes "
            f"nothing and primary component matching would silently be off. Use fewer than {projection_dim}."
        )


def check_shape(features: torch.Tensor) -> None:
    """Raises ValueError for features that are no `(batch_size, projection_dim)` matrix of floats."""
    if features.ndim != 2 or not features.is_floating_point() or not len(features):
        raise ValueError(
            "features must be of shape (batch_size, projection_dim), floating and not empty, "
            f"got {tuple(features.shape)} {features.dtype}."
        )


def check_finite(features: torch.Tensor) -> None:
    """Raises ValueError for features that hold NaN or Inf, naming the rows. All coarse features would be NaN."""
    finite = features.detach().isfinite().all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        named = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise ValueError(
            f"Image features hold NaN or Inf in {len(rows)} of {len(features)} rows: {named}. Look at these samples, "
            "at the learning rate and, in float16, at the loss scale."
        )


def _check_num_components(num_components: int | float) -> None:
    valid = num_components >= 1 if isinstance(num_components, int) else 0 < num_components < 1
    if not valid or isinstance(num_components, bool) or math.isnan(num_components):
        raise ValueError(
            "num_components must be a count (an integer of 1 or more) or a share of the variance (a float between 0 "
            f"and 1, both excluded), got {num_components!r}."
        )


def _rounding(eigenvalues: torch.Tensor) -> float:
    """How far computed eigenvalues may be off, relative to the size of the matrix's entries."""
    return len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def _exact(features: torch.Tensor) -> torch.Tensor:
    """The features in float64; on the CPU where the device has no float64 (mps)."""
    return features.to("cpu" if features.device.type == "mps" else features.device, torch.float64)
