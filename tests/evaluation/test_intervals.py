"""The bootstrap, worked by hand where few resamples are possible, and by its coverage."""

import pytest
import torch

from longclip_hf.evaluation.intervals import (
    bootstrap_class_means,
    bootstrap_interval,
    bootstrap_means,
    bootstrap_medians,
    difference_interval,
    percentiles,
)


class TestByHand:
    def test_two_queries(self) -> None:
        """Drawn with replacement, a miss and a hit give 0, 1/2, 1/2, 1 with equal chances."""
        means = bootstrap_means(torch.tensor([False, True]), resamples=4000)
        values, counts = means.unique(return_counts=True)
        assert values.tolist() == [0, 0.5, 1]
        assert (counts / 4000).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
        assert bootstrap_interval(torch.tensor([0, 1])) == (0.5, 0.0, 1.0)

    def test_classes(self) -> None:
        """Of a hit of class 0 and a miss of class 1: both hits 1, both misses 0, one of each 1/2."""
        means = bootstrap_class_means(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), resamples=4000)
        values, counts = means.unique(return_counts=True)
        assert values.tolist() == [0, 0.5, 1]
        assert (counts / 4000).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
        # Two hits of class 0, a miss of class 1: it is drawn never (8/27), always (1/27), or beside class 0.
        means = bootstrap_class_means(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 4]), resamples=4000)
        values, counts = means.unique(return_counts=True)
        assert values.tolist() == [0, 0.5, 1]
        assert (counts / 4000).tolist() == pytest.approx([1 / 27, 18 / 27, 8 / 27], abs=0.03)

    def test_groups_of_different_sizes(self) -> None:
        """Image 9 has one caption, a miss; image 4 has three, all hits: 0/2, 3/4, 3/4, 6/6."""
        hits, groups = torch.tensor([True, False, True, True]), torch.tensor([4, 9, 4, 4])
        values, counts = bootstrap_means(hits, groups, resamples=4000).unique(return_counts=True)
        assert values.tolist() == [0, 0.75, 1]
        assert (counts / 4000).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
        assert bootstrap_interval(hits, groups).value == 0.75

    def test_percentiles(self) -> None:
        """The interval holds the level's share of the resamples."""
        values = torch.randn(50, generator=torch.Generator().manual_seed(0))
        means = bootstrap_means(values).sort().values
        interval = bootstrap_interval(values, level=0.9)
        assert means[49] <= interval.low <= means[50]
        assert means[949] <= interval.high <= means[950]
        assert interval.value == pytest.approx(values.double().mean().item(), rel=1e-12)


class TestMedians:
    def test_by_hand(self) -> None:
        """Ranks 1 and 9 of two images: 1, 1 | 1, 9 | 9, 9, of which the lower medians are 1, 1 and 9."""
        values, counts = bootstrap_medians(torch.tensor([9, 1]), resamples=4000).unique(return_counts=True)
        assert values.tolist() == [1, 9]
        assert (counts / 4000).tolist() == pytest.approx([0.75, 0.25], abs=0.03)

    def test_groups(self) -> None:
        """Image 0 has ranks 5 and 1, image 1 has 2, 3 and 4: medians 1 (twice image 0), 3 (both) and 3."""
        ranks, groups = torch.tensor([5, 2, 3, 1, 4]), torch.tensor([0, 1, 1, 0, 1])
        values, counts = bootstrap_medians(ranks, groups, resamples=4000).unique(return_counts=True)
        assert values.tolist() == [1, 3]
        assert (counts / 4000).tolist() == pytest.approx([0.25, 0.75], abs=0.03)

    def test_the_draws_of_the_means(self) -> None:
        """Of numbers 0 and 1 the median says which are the more."""
        hits, groups = torch.rand(90, generator=torch.Generator().manual_seed(0)) < 0.5, torch.arange(90) // 2
        means, medians = bootstrap_means(hits, groups), bootstrap_medians(hits, groups)
        assert torch.equal(medians, (means > 0.5).double())
        assert percentiles(medians) == (0, 1)


def test_captions_that_say_the_same_are_no_further_evidence() -> None:
    """Five equal captions per image give the interval of one; taken as independent, a much narrower one."""
    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.6
    image_of = torch.arange(200).repeat_interleave(5)
    one = bootstrap_interval(hits)
    assert bootstrap_interval(hits[image_of], image_of) == pytest.approx(one, rel=1e-12)
    independent = bootstrap_interval(hits[image_of])
    assert (one.high - one.low) / (independent.high - independent.low) == pytest.approx(5**0.5, rel=0.1)


def test_standard_error_of_a_share() -> None:
    """sqrt(p (1 - p) / n)."""
    hits = torch.arange(1000) < 700
    assert bootstrap_means(hits, resamples=5000).std().item() == pytest.approx((0.7 * 0.3 / 1000) ** 0.5, rel=0.05)


def test_coverage() -> None:
    """Of 400 samples of 100 images with 4 captions each, 95 % of the clustered intervals hold the truth."""
    generator = torch.Generator().manual_seed(0)
    image_of = torch.arange(100).repeat_interleave(4)
    clustered = independent = 0
    for _ in range(400):
        ease = torch.rand(100, generator=generator)  # how easy the image is: the truth is a half
        hits = torch.rand(400, generator=generator) < ease[image_of]
        _, low, high = bootstrap_interval(hits, image_of, resamples=300)
        clustered += low <= 0.5 <= high
        _, low, high = bootstrap_interval(hits, resamples=300)
        independent += low <= 0.5 <= high
    assert 0.92 <= clustered / 400 <= 0.975
    assert independent / 400 < 0.9


class TestDifferences:
    def test_pairing_takes_out_what_is_common(self) -> None:
        """The second model misses 20 of the 500 hits of the first, and finds nothing else."""
        first = torch.arange(1000) < 500
        second = torch.arange(1000) < 480
        paired = difference_interval(first, second)
        assert paired.value == pytest.approx(0.02)
        # sqrt(0.02 * 0.98 / 1000) = 0.0044 each way, times 1.96
        assert (paired.low, paired.high) == pytest.approx((0.0113, 0.0287), abs=0.002)
        # Apart, each is uncertain by 0.031: the intervals overlap.
        assert bootstrap_interval(second).high > bootstrap_interval(first).low

    def test_the_same_model(self) -> None:
        hits = torch.arange(30) < 7
        assert difference_interval(hits, hits) == (0, 0, 0)

    def test_the_same_draws_for_both(self) -> None:
        values = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
        groups = torch.arange(40) // 3
        means = bootstrap_means(values, groups)
        assert torch.equal(means[:, 1], bootstrap_means(values[1], groups))
        expected = (means[:, 0] - means[:, 1]).quantile(0.025).item()
        assert difference_interval(values[0], values[1], groups).low == pytest.approx(expected, abs=1e-7)


def test_seed_decides() -> None:
    values, groups = torch.rand(40, generator=torch.Generator().manual_seed(0)), torch.arange(40) // 2
    state = torch.get_rng_state()
    first = bootstrap_means(values, groups, resamples=130)
    torch.manual_seed(1)
    assert torch.equal(first, bootstrap_means(values, groups, resamples=130))
    assert not torch.equal(first, bootstrap_means(values, groups, resamples=130, seed=1))
    assert first.shape == (130,)
    torch.set_rng_state(state)


def test_order_of_queries_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    values, groups = torch.rand(60, generator=generator), torch.randint(20, (60,), generator=generator)
    order = torch.randperm(60, generator=generator)
    expected = bootstrap_interval(values, groups)
    assert bootstrap_interval(values[order], groups[order]) == pytest.approx(expected, rel=1e-12)


def test_refusals() -> None:
    hits = torch.ones(4)
    with pytest.raises(ValueError, match=r"got \(4,\) and \(3,\)"):
        bootstrap_means(hits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(0,\) and None"):
        bootstrap_means(torch.ones(0))
    with pytest.raises(ValueError, match=r"two images .* got 1 and 1000"):
        bootstrap_interval(hits, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"two images .* got 4 and 0"):
        bootstrap_means(hits, resamples=0)
    with pytest.raises(ValueError, match=r"between 0 and 1, like 0\.95; got 95"):
        bootstrap_interval(hits, level=95)
    with pytest.raises(ValueError, match="1 of 4 values are NaN or Inf"):
        bootstrap_means(torch.tensor([0, 1, torch.nan, 1]))
    with pytest.raises(ValueError, match=r"one metric, .* got \(2, 4\)"):
        bootstrap_interval(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"one metric, .* got \(2, 4\)"):
        bootstrap_medians(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"Not the same queries: \(4,\) values and \(3,\)"):
        difference_interval(hits, hits[:3])


def test_intervals_of_families_cover_what_they_say() -> None:
    """2000 benchmarks of 100 families of four items that are alike, where the true share of hits is 0.6.

    Resampled item by item, a 95 % interval holds the truth in 82 of 100; family by family, in 94 to 95.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2000, 100, 4)
    family = (torch.rand(2000, 100, 1, generator=generator) < 0.6).expand(shape)
    own = torch.rand(shape, generator=generator) < 0.6
    alike = torch.rand(shape, generator=generator) < 0.616  # two items of a family correlate by 0.38
    hits = torch.where(alike, family, own).reshape(2000, 400)
    covered = {}
    for name, groups in (("items", None), ("families", torch.arange(100).repeat_interleave(4))):
        low, high = percentiles(bootstrap_means(hits, groups, resamples=500))
        covered[name] = float(((low <= 0.6) & (high >= 0.6)).double().mean())
    assert 0.80 < covered["items"] < 0.84 and 0.935 < covered["families"] < 0.96, covered
