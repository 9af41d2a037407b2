"""The contrastive loss and the strategies, against numbers worked by hand and against one another."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longclip_hf.training.components import primary_components
from longclip_hf.training.losses import (
    LossTerms,
    bounded_loss,
    contrastive_loss,
    long_only_loss,
    mixed_length_rows,
    primary_component_loss,
    undistinguished_loss,
)

quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def embeds(count: int, n: int = 12, d: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=-1).requires_grad_()
        for _ in range(count)
    ]


def test_contrastive_by_hand() -> None:
    """Two orthogonal images whose texts are the same vectors, logits [[s, 0], [0, s]]: log(1 + exp(-s)) each way."""
    eye = torch.eye(2, dtype=torch.float64)
    assert contrastive_loss(eye, eye, math.log(3)).item() == pytest.approx(math.log(4 / 3))
    # Swapped texts: every target has logit 0 and the other one log 3.
    assert contrastive_loss(eye, eye.flip(0), math.log(3)).item() == pytest.approx(math.log(4))
    # Smoothing 0.1 over two candidates: 0.95 of the target and 0.05 of the other.
    expected = 0.95 * math.log(4 / 3) + 0.05 * math.log(4)
    assert contrastive_loss(eye, eye, math.log(3), label_smoothing=0.1).item() == pytest.approx(expected)


def test_the_two_directions_count_alike() -> None:
    """Both texts are the first image's: text-to-image and image-to-text differ, and the mean is symmetric.

    Logits with s = log 3 are [[s, s], [0, 0]]: rows give log 2 twice, columns -log(3/4) and -log(1/4).
    """
    images = torch.eye(2, dtype=torch.float64)
    texts = images[[0, 0]]
    expected = (math.log(2) + (math.log(4 / 3) + math.log(4)) / 2) / 2
    assert contrastive_loss(images, texts, math.log(3)).item() == pytest.approx(expected)
    assert contrastive_loss(texts, images, math.log(3)).item() == pytest.approx(expected)


@quick
@given(seed=seeds, n=st.integers(1, 10), smoothing=st.sampled_from([0.0, 0.1]))
def test_properties_of_the_contrastive_loss(seed: int, n: int, smoothing: float) -> None:
    """Not negative; log n without information; permuting the pairs and swapping the modalities change nothing."""
    images, texts = embeds(2, n=n, seed=seed)
    loss = contrastive_loss(images, texts, 10.0, smoothing).item()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert loss >= -1e-12
    assert contrastive_loss(images, texts, 0.0, smoothing).item() == pytest.approx(math.log(n), abs=1e-12)
    assert contrastive_loss(images[order], texts[order], 10.0, smoothing).item() == pytest.approx(loss)
    assert contrastive_loss(texts, images, 10.0, smoothing).item() == pytest.approx(loss)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_mean_over_processes_is_the_loss_of_the_whole(processes: int) -> None:
    """In value and in gradient, with local logits only."""
    images, texts = embeds(2)
    whole = contrastive_loss(images, texts, 20.0, 0.1)
    expected = torch.autograd.grad(whole, (images, texts))
    local = len(images) // processes
    parts = [
        contrastive_loss(images[o : o + local], texts[o : o + local], 20.0, 0.1, images, texts, o)
        for o in range(0, len(images), local)
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    for got, of_whole in zip(torch.autograd.grad(mean, (images, texts)), expected, strict=True):
        torch.testing.assert_close(got, of_whole, rtol=1e-10, atol=1e-14)


def test_gradcheck() -> None:
    images, texts = embeds(2, n=4, d=3)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, label_smoothing=0.1), (images, texts, scale))


def test_logits_are_float32_under_autocast() -> None:
    images, texts = (e.detach().bfloat16() for e in embeds(2))
    expected = contrastive_loss(images.float(), texts.float(), 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(images, texts, 100.0)
    assert loss.dtype == torch.float32
    assert loss.equal(expected)


def test_shapes_that_do_not_fit() -> None:
    images, texts = embeds(2)
    with pytest.raises(ValueError, match=r"equal shapes, got \(12, 8\) images and \(11, 8\) texts of this process"):
        contrastive_loss(images, texts[1:], 1.0)
    with pytest.raises(ValueError, match=r"\(12, 8\) and \(6, 8\) of all"):
        contrastive_loss(images[:6], texts[:6], 1.0, all_image_embeds=images)
    for offset in (-1, 7):
        with pytest.raises(ValueError, match=rf"6 rows from row {offset} on do not lie within the 12 gathered ones"):
            contrastive_loss(images[:6], texts[:6], 1.0, 0.0, images, texts, offset)


contrast = partial(contrastive_loss, logit_scale=20.0, label_smoothing=0.1)


def check(terms: LossTerms, long: torch.Tensor, short: torch.Tensor, weight: float) -> None:
    assert terms.short is not None
    assert terms.long.equal(long)
    assert terms.short.equal(short)
    assert terms.loss.item() == pytest.approx((long + weight * short).item(), rel=1e-14)


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.0])
def test_primary_component(weight: float) -> None:
    images, longs, shorts = embeds(3)
    coarse = primary_components(images, 3).features
    terms = primary_component_loss(contrast, images, coarse, longs, shorts, short_weight=weight)
    check(terms, contrast(images, longs), contrast(coarse, shorts), weight)
    (grad,) = torch.autograd.grad(terms.loss, images)
    assert grad.isfinite().all()


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_undistinguished_is_every_component_kept(weight: float) -> None:
    images, longs, shorts = embeds(3)
    terms = undistinguished_loss(contrast, images, longs, shorts, short_weight=weight)
    check(terms, contrast(images, longs), contrast(images, shorts), weight)
    coarse = primary_components(images, 8).features
    matched = primary_component_loss(contrast, images, coarse, longs, shorts, short_weight=weight)
    torch.testing.assert_close(matched.loss, terms.loss, rtol=1e-12, atol=0)
    for got, expected in zip(
        torch.autograd.grad(matched.loss, (images, longs, shorts)),
        torch.autograd.grad(terms.loss, (images, longs, shorts)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_mixed_length_rows() -> None:
    def rows(n: int, share: float, seed: int = 7) -> torch.Tensor:
        return mixed_length_rows(n, share, generator=torch.Generator().manual_seed(seed))

    drawn = mixed_length_rows(10_000, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.bool
    assert drawn.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert rows(64, 0.5).equal(rows(64, 0.5))
    assert not rows(64, 0.5).equal(rows(64, 0.5, seed=8))
    assert not rows(64, 0.0).any()
    assert rows(64, 1.0).all()
    with pytest.raises(ValueError, match=r"share must be within 0 ... 1, got 10"):
        rows(64, 10)


def test_bounded_by_hand() -> None:
    """SmoothL1 of differences 0.5 and 3: 0.5^2 / 2 and 3 - 1/2, mean 1.3125. The original gets no gradient."""
    images, longs = embeds(2, n=2, d=2)
    original = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    current = (original + torch.tensor([[0.5, -3.0], [-0.5, 3.0]])).detach().requires_grad_()
    terms = bounded_loss(contrast, images, longs, current, original, short_weight=2.0)
    check(terms, contrast(images, longs), torch.tensor(1.3125, dtype=torch.float64), 2.0)
    terms.loss.backward()
    assert original.grad is None
    # weight 2, mean over 4 numbers: half of the clipped difference
    torch.testing.assert_close(current.grad, torch.tensor([[0.25, -0.5], [-0.25, 0.5]], dtype=torch.float64))


def test_long_only() -> None:
    images, longs = embeds(2)
    assert long_only_loss(contrast, images, longs).loss.equal(contrast(images, longs))
    assert long_only_loss(contrast, images, longs).short is None
