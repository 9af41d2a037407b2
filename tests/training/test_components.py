"""Primary components: worked by hand, against float64 autograd, and where autograd's own answer is NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longclip_hf.training.components import (
    check_components,
    check_finite,
    decompose,
    filter_components,
    mean_and_covariance,
    primary_components,
    reconstruct,
    second_moments,
    variance_kept,
)

# Named so that a failure says which matrix it was; sizes stay small because the properties do not depend on them.
quick = settings(max_examples=40, deadline=None, derandomize=True)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)


def gaussian(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unit(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(gaussian(n, d, seed, torch.float64), dim=-1).to(dtype)


def of_rank(n: int, d: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Features whose centred rank is `rank` exactly."""
    left = gaussian(n, rank, seed)
    return (left - left.mean(0)) @ gaussian(rank, d, seed + 1) + gaussian(1, d, seed + 2)


def gradient(features: torch.Tensor, num_components: int | float, weights: torch.Tensor) -> torch.Tensor:
    features = features.detach().requires_grad_()
    coarse = primary_components(features, num_components).features
    return torch.autograd.grad((coarse * weights.to(coarse)).sum(), features)[0]


def by_svd(features: torch.Tensor, num_components: int) -> torch.Tensor:
    """As in the released code: the singular value decomposition, differentiated by autograd."""
    mean = features.mean(0)
    components = torch.linalg.svd(features - mean, full_matrices=False)[2].T[:, :num_components]
    return (features - mean) @ components @ components.T + mean


def by_eigh(features: torch.Tensor, num_components: int) -> torch.Tensor:
    """Autograd through eigh of the covariance in float64, or of the Gram matrix, where that is the smaller one."""
    mean = features.double().mean(0)
    centred = features.double() - mean
    if len(features) < features.shape[1]:
        components = torch.linalg.eigh(centred @ centred.T)[1][:, -num_components:]
        return components @ components.T @ centred + mean
    components = torch.linalg.eigh(centred.T @ centred)[1][:, -num_components:]
    return centred @ components @ components.T + mean


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


# The steps of eq. 3-6


def test_by_hand() -> None:
    """Four points of a rectangle around (1, 1): the long side is kept, the short one is flattened to the mean."""
    features = torch.tensor([[4.0, 2.0], [4.0, 0.0], [-2.0, 2.0], [-2.0, 0.0]])
    mean, covariance = mean_and_covariance(second_moments(features))
    assert mean.tolist() == [1, 1]
    assert covariance.tolist() == [[9, 0], [0, 1]]
    eigenvalues, eigenvectors = decompose(covariance, mean)
    assert eigenvalues.tolist() == [9, 1]
    assert eigenvectors.abs().tolist() == [[1, 0], [0, 1]]
    coarse, num_kept, share = primary_components(features, 1)
    assert num_kept == 1
    assert share.item() == pytest.approx(0.9)
    torch.testing.assert_close(coarse, torch.tensor([[4.0, 1.0], [4.0, 1.0], [-2.0, 1.0], [-2.0, 1.0]]))


def test_gradient_by_hand() -> None:
    """The same rectangle, L = the second coordinate of the first point.

    C = diag(9, 1). G has a single 1, at point 0, coordinate 1. The direct part G P is zero: only coordinate 0 is kept.
    dL/dP = Z^T G has 3 at (0, 1), made symmetric 1.5; over the gap 8: dL/dC = 3/16 off the diagonal. Through
    C = Z^T Z / 4 it reaches Z as Z dL/dC / 2 = 3/32 (z_1, z_0), whose column means are zero. The mean gives 1/4 in
    coordinate 1 to every point.
    """
    features = torch.tensor([[4.0, 2.0], [4.0, 0.0], [-2.0, 2.0], [-2.0, 0.0]], dtype=torch.float64)
    weights = torch.zeros(4, 2)
    weights[0, 1] = 1
    swapped = torch.tensor([[1.0, 3.0], [-1.0, 3.0], [1.0, -3.0], [-1.0, -3.0]], dtype=torch.float64)
    expected = 3 / 32 * swapped + torch.tensor([0.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(gradient(features, 1, weights), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("num_components", "expected"),
    [(1, 1), (2, 2), (4, 4), (5, 5), (6, 6), (99, 6), (0.49, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.999, 4)],
)
def test_filtration(num_components: int | float, expected: int) -> None:
    """Shares 0.5, 0.3, 0.15, 0.05, 0, 0. Beyond the rank, 4, it is for `reconstruct` to keep everything."""
    eigenvalues = torch.tensor([10.0, 6, 3, 1, 0, 0], dtype=torch.float64)
    assert filter_components(eigenvalues, num_components) == expected


@pytest.mark.parametrize("num_components", [0, -1, 0.0, 1.0, 32.0, -0.5, math.nan, True, False])
def test_filtration_refuses(num_components: int | float) -> None:
    with pytest.raises(ValueError, match=r"num_components must be a count .* got "):
        primary_components(unit(8, 4), num_components)
    with pytest.raises(ValueError, match=r"num_components must be a count .* got "):
        check_components(128, num_components, "local")


@pytest.mark.parametrize(("n", "error"), [(34, 0.13), (64, 0.58), (128, 0.75)])
def test_what_32_components_leave_out(n: int, error: float) -> None:
    """Gaussian features of 512 numbers; the smaller the batch, the less primary component matching does."""
    features = gaussian(n, 512)
    coarse, _, share = primary_components(features, 32)
    left_out = ((features - coarse).norm() / (features - features.mean(0)).norm()).item()
    assert left_out == pytest.approx(error, abs=0.01)
    assert math.sqrt(1 - share.item()) == pytest.approx(left_out, abs=1e-5)


@pytest.mark.parametrize("n", [2, 17, 33])
def test_up_to_33_samples_the_32_components_are_all(n: int) -> None:
    features, weights = unit(n, 64), gaussian(n, 64, 1)
    coarse, _, share = primary_components(features, 32)
    torch.testing.assert_close(coarse, features, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient(features, 32, weights), weights, rtol=0, atol=1e-13)
    assert share == 1


# Properties


@quick
@given(n=st.integers(2, 24), d=sizes, k=sizes, seed=seeds)
def test_projection(n: int, d: int, k: int, seed: int) -> None:
    """P is symmetric, idempotent and of rank k; the rest is orthogonal to it."""
    features = gaussian(n, d, seed)
    mean, covariance = mean_and_covariance(second_moments(features))
    eigenvalues, eigenvectors = decompose(covariance, mean)
    num_kept = filter_components(eigenvalues, k)
    assert num_kept == min(k, d)
    projector = reconstruct(torch.eye(d, dtype=torch.float64), covariance, eigenvalues, eigenvectors, num_kept)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(projector, projector.T, **close)
    torch.testing.assert_close(projector @ projector, projector, **close)
    assert round(projector.trace().item(), 9) == (k if k <= min(n - 1, d) else d)
    assert variance_kept(eigenvalues, num_kept).item() == pytest.approx(
        ((features - mean) @ projector).square().sum().item() / (features - mean).square().sum().item(), abs=1e-9
    )


@quick
@given(n=st.integers(2, 24), d=sizes, k=sizes, seed=seeds)
def test_coarse_features(n: int, d: int, k: int, seed: int) -> None:
    """Idempotent; the identity from the rank on; the same for permuted rows and, rotated, for rotated features."""
    features = unit(n, d, seed)
    coarse, _, share = primary_components(features, k)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(primary_components(coarse, k).features, coarse, **close)
    torch.testing.assert_close(coarse.mean(0), features.mean(0), **close)
    if k >= min(n - 1, d):
        torch.testing.assert_close(coarse, features, **close)
        assert share == 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(primary_components(features[order], k).features, coarse[order], **close)
    rotation = torch.linalg.qr(gaussian(d, d, seed)).Q
    torch.testing.assert_close(primary_components(features @ rotation, k).features, coarse @ rotation, **close)


@quick
@given(n=st.integers(2, 24), d=sizes, seed=seeds, share=st.floats(0.01, 0.99))
def test_variance_kept(n: int, d: int, seed: int, share: float) -> None:
    features = unit(n, d, seed)
    shares = [primary_components(features, k).variance_kept.item() for k in range(1, d + 2)]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] == 1
    _, num_kept, kept = primary_components(features, share)
    assert kept >= share - 1e-6
    assert num_kept == 1 or shares[num_kept - 2] < share + 1e-6


@quick
@given(n=st.integers(3, 24), d=st.integers(2, 12), seed=seeds)
def test_signs_and_bases_of_the_eigenvectors_do_not_matter(n: int, d: int, seed: int) -> None:
    """Another implementation of eigh may answer otherwise; neither the value nor the gradient may change."""
    k = d // 2
    features = gaussian(n, d, seed)
    centred, weights = features - features.mean(0), gaussian(n, d, seed + 1)
    eigenvalues, eigenvectors = decompose(centred.T @ centred, features.mean(0))
    eigenvalues[:k] = eigenvalues[0]  # a tie among the kept ...
    eigenvalues[k:] = eigenvalues[0] / 3  # ... and one among the dropped
    covariance = (eigenvectors * eigenvalues) @ eigenvectors.T
    rotation = torch.block_diag(*(torch.linalg.qr(gaussian(m, m, seed)).Q for m in (k, d - k)))
    results = []
    for basis in (eigenvectors, -eigenvectors, eigenvectors @ rotation):
        centred, covariance = centred.detach().requires_grad_(), covariance.detach().requires_grad_()
        coarse = reconstruct(centred, covariance, eigenvalues, basis, k)
        results.append([coarse, *torch.autograd.grad((coarse * weights).sum(), (centred, covariance))])
    for got in results[1:]:
        for tensor, expected in zip(got, results[0], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-10)


@quick
@given(
    n=st.integers(1, 10), d=st.integers(1, 10), rank=st.integers(0, 10), k=sizes, seed=seeds, repeats=st.integers(1, 3)
)
def test_the_gradient_is_finite_for_any_rank(n: int, d: int, rank: int, k: int, seed: int, repeats: int) -> None:
    features = (of_rank(n, d, rank, seed) if rank else gaussian(1, d, seed).expand(n, d)).repeat(repeats, 1)
    assert gradient(features, k, gaussian(n * repeats, d, seed)).isfinite().all()


# The gradient


@pytest.mark.parametrize(("n", "d", "k"), [(12, 5, 2), (12, 5, 4), (5, 12, 2), (6, 6, 3), (4, 7, 3)])
def test_gradcheck(n: int, d: int, k: int) -> None:
    """More samples than numbers, fewer, as many; k equal to the rank."""
    features = unit(n, d).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: primary_components(x, k).features, features)
    assert torch.autograd.gradcheck(lambda x: primary_components(x, k, second_moments(x)).features, features)
    assert torch.autograd.gradcheck(lambda x: primary_components(x, 0.6).features, features)


def test_gradcheck_of_the_projector() -> None:
    """With respect to a covariance that is not that of the projected features (as in the global scope)."""

    def projected(centred: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        covariance = root.T @ root
        return reconstruct(centred, covariance, *decompose(covariance, root.mean(0)), 3)

    assert torch.autograd.gradcheck(projected, (gaussian(4, 6).requires_grad_(), gaussian(9, 6, 1).requires_grad_()))


@pytest.mark.parametrize(
    ("n", "d", "rank", "k"), [(9, 6, 2, 4), (6, 9, 2, 4), (12, 6, 3, 3), (5, 9, 3, 3), (8, 5, 0, 2)]
)
def test_gradcheck_where_the_rank_is_below_or_equal_to_k(n: int, d: int, rank: int, k: int) -> None:
    """Below k every partial derivative is that of the identity, and the gradient says so; at k it is regular."""
    features = (of_rank(n, d, rank) if rank else gaussian(1, d).repeat(n, 1)).requires_grad_()
    weights = gaussian(n, d, 3)
    assert torch.autograd.gradcheck(lambda x: primary_components(x, k).features, features)
    assert torch.autograd.gradcheck(lambda x: primary_components(x, k, second_moments(x)).features, features)
    if rank < k:
        torch.testing.assert_close(gradient(features, k, weights), weights)


@pytest.mark.parametrize("duplicated", [False, True])
def test_gradcheck_with_ties_among_the_kept_and_among_the_dropped(duplicated: bool) -> None:
    """Covariance diag(4, 4, 4, 1, 1, 0): where eigh's and svd's own gradients are NaN, the truth is finite."""
    cross = torch.diag(torch.tensor([2.0, 2, 2, 1, 1, 0], dtype=torch.float64))
    features = torch.cat([cross, -cross]).repeat(2 if duplicated else 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: primary_components(x, 3).features, features)
    assert torch.autograd.gradcheck(lambda x: primary_components(x, 5).features, features)
    (through_svd,) = torch.autograd.grad(by_svd(features, 3).square().sum(), features)
    assert not through_svd.isfinite().all()


def test_a_tie_across_the_cut() -> None:
    """diag(4, 4, 1) cut after the first: which of the two tied directions is kept is arbitrary, the gradient finite.

    The pair's own term is left out and the rest is what it is without the other tied direction.
    """
    cross = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    centred = torch.cat([cross, -cross])
    covariance = (centred.T @ centred / len(centred)).requires_grad_()
    eigenvalues, eigenvectors = decompose(covariance, torch.zeros(3, dtype=torch.float64))
    weights = gaussian(6, 3)
    grads = []
    for directions in ([0, 1, 2], [0, 2]):
        coarse = reconstruct(centred, covariance, eigenvalues[directions], eigenvectors[:, directions], 1)
        grads += torch.autograd.grad((coarse * weights).sum(), covariance)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-14)
    for scoped in (gradient(centred, 1, weights), gradient(centred.T, 1, weights.T)):
        assert 0 < scoped.abs().max() < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(128, 128, 32), (256, 64, 32), (64, 256, 32), (2048, 96, 32)])
def test_agrees_with_float64_autograd(n: int, d: int, k: int, dtype: torch.dtype) -> None:
    """To 1e-6 relative with float32 features, to 1e-9 with float64 ones. (The issue asks for 1e-4.)"""
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    features, weights = unit(n, d, dtype=dtype), gaussian(n, d, 1)
    reference = features.double().requires_grad_()
    expected = by_eigh(reference, k)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), reference)
    coarse = primary_components(features, k).features
    got = gradient(features, k, weights)
    assert coarse.dtype == got.dtype == dtype
    assert relative(coarse, expected) < tolerance
    assert relative(got, expected_gradient) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["each image twice", "unused numbers", "one image"])
def test_finite_where_svd_gives_nan(case: str, dtype: torch.dtype) -> None:
    """Batch = embedding size = 128, where users of the released code report NaN."""
    features = {
        "each image twice": lambda: unit(64, 128, dtype=dtype).repeat(2, 1),
        "unused numbers": lambda: F.pad(unit(128, 64, dtype=dtype), (0, 64)),
        "one image": lambda: unit(1, 128, dtype=dtype).repeat(128, 1),
    }[case]()
    weights = gaussian(128, 128, 1, dtype)
    features.requires_grad_()
    (through_svd,) = torch.autograd.grad((by_svd(features, 32) * weights).sum(), features)
    assert through_svd.isnan().any()
    got = gradient(features, 32, weights)
    assert got.isfinite().all()
    # The true derivative along a direction, by central differences of the function itself in float64.
    direction = gaussian(128, 128, 2)
    if case == "one image":  # any change moves the rank from 0 to 127: only changes of few ranks have a derivative
        direction = gaussian(128, 8, 2) @ gaussian(8, 128, 3)
    along = [primary_components(features.detach().double() + h * direction, 32).features for h in (1e-6, -1e-6)]
    slope = ((along[0] - along[1]) * weights.double()).sum() / 2e-6
    assert (got.double() * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_differentiable_once() -> None:
    features = unit(8, 4).requires_grad_()
    (first,) = torch.autograd.grad(
        primary_components(features, 2).features.square().sum(), features, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype: torch.dtype) -> None:
    """Also under autocast: the coarse features of half-precision features are those of the same numbers in float32."""
    features, weights = unit(64, 32, dtype=dtype), gaussian(64, 32, 1, torch.float32)
    expected, expected_gradient = (
        primary_components(features.float(), 8).features,
        gradient(features.float(), 8, weights),
    )
    with torch.autocast("cpu", torch.bfloat16):
        coarse, got = primary_components(features, 8).features, gradient(features, 8, weights)
        through_moments = primary_components(features, 8, second_moments(features)).features
    assert coarse.dtype == torch.float32
    assert coarse.equal(expected)
    assert got.equal(expected_gradient.to(dtype))
    torch.testing.assert_close(through_moments, expected)


# Scopes


@pytest.mark.parametrize("num_components", [5, 0.7])
@pytest.mark.parametrize(("n", "d"), [(24, 16), (12, 16)])
def test_global_scope_equals_the_whole_batch(n: int, d: int, num_components: int | float) -> None:
    """A batch split over three processes, whose moments are added up: same coarse features, same gradient."""
    whole, weights = unit(n, d).requires_grad_(), gaussian(n, d, 1)
    expected = primary_components(whole, num_components)
    (expected_gradient,) = torch.autograd.grad((expected.features * weights).sum(), whole)

    parts = whole.detach().requires_grad_()
    moments = sum(second_moments(part) for part in parts.split([5, 3, n - 8]))
    assert isinstance(moments, torch.Tensor)
    split = [primary_components(part, num_components, moments) for part in parts.split([5, 3, n - 8])]
    coarse = torch.cat([part.features for part in split])
    (got,) = torch.autograd.grad((coarse * weights).sum(), parts)
    assert relative(coarse, expected.features) < 1e-12
    assert relative(got, expected_gradient) < 1e-10
    assert {int(part.num_kept) for part in split} == {int(expected.num_kept)}
    assert split[0].variance_kept.item() == pytest.approx(expected.variance_kept.item(), abs=1e-6)


def test_scopes_differ() -> None:
    whole = unit(24, 16)
    local = torch.cat([primary_components(part, 5).features for part in whole.chunk(2)])
    assert relative(local, primary_components(whole, 5).features) > 0.1


# Guards


def test_batches_on_which_nothing_would_happen() -> None:
    check_components(34, 32, "local")
    check_components(8, 32, "global", world_size=5)
    check_components(3, 0.9, "local")
    check_components(64, 32, "local", projection_dim=33)
    with pytest.raises(ValueError) as error:
        check_components(33, 32, "local", world_size=2)
    assert str(error.value) == (
        "33 images per process span 32 dimensions at most once centred, so a projection onto 32 primary components "
        "changes nothing and primary component matching would silently be off. Use at least 34 images per process or "
        "at most 31 components or the global scope."
    )
    with pytest.raises(
        ValueError, match=r"^32 images over 2 processes .* at least 34 images over 2 processes or at most 30"
    ):
        check_components(16, 32, "global", world_size=2)
    with pytest.raises(ValueError, match=r"Use at least 3 images per process\.$"):
        check_components(2, 0.9, "local")
    with pytest.raises(ValueError, match=r"An embedding of 32 numbers .* Use fewer than 32\."):
        check_components(128, 32, "local", projection_dim=32)
    with pytest.raises(ValueError, match=r'scope must be "local" or "global", got "everywhere"|\'everywhere\''):
        check_components(128, 32, "everywhere")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_named(value: float) -> None:
    features = unit(8, 4)
    features[2, 1] = features[5, 3] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in 2 of 8 rows: 2, 5\."):
        primary_components(features, 2)
    with pytest.raises(ValueError, match=r"in 12 of 12 rows: 0, 1, 2, 3, 4, 5, 6, 7 and 4 more\."):
        check_finite(torch.full((12, 2), value))
    # Global scope: the others learn of it at the same place, not by waiting.
    with pytest.raises(ValueError, match="another process's features"):
        primary_components(unit(8, 4), 2, second_moments(features) + second_moments(unit(8, 4)))


@pytest.mark.parametrize("features", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.int64)])
def test_features_of_another_kind_are_refused(features: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"must be of shape \(batch_size, projection_dim\), floating and not empty, got"
    ):
        primary_components(features, 2)


def test_moments_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be of shape \(5, 5\), got \(4, 4\)"):
        primary_components(unit(8, 4), 2, second_moments(unit(8, 3)))
