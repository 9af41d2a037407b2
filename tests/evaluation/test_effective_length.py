"""Effective length: the definition on curves worked by hand, and its robustness to noise."""

import pytest
import torch

from longclip_hf.evaluation.effective_length import default_lengths, effective_length, gain_of_longer
from longclip_hf.evaluation.intervals import bootstrap_interval

LENGTHS = [10, 20, 30, 40, 50, 60]


def test_default_lengths() -> None:
    assert default_lengths(77) == [10, 20, 30, 40, 50, 60, 70, 77]
    assert default_lengths(40) == [10, 20, 30, 40]
    assert default_lengths(10) == [10]
    grid = default_lengths(248)
    assert (len(grid), grid[-3:]) == (25, [230, 240, 248])
    with pytest.raises(ValueError, match="A model of 8 positions has no length from 10 on"):
        default_lengths(8)


def test_gain_by_hand() -> None:
    """At 0.5: (0.7 + 0.9 + 0.8) / 3 - 0.5; at 0.7: 0.85 - 0.7; at 0.9: 0.8 - 0.9."""
    curves = torch.tensor([[0.5, 0.7, 0.9, 0.8], [0.4, 0.4, 0.4, 0.4]])
    torch.testing.assert_close(gain_of_longer(curves), torch.tensor([[0.3, 0.15, -0.1, 0], [0, 0, 0, 0]]))
    assert gain_of_longer(torch.tensor([0.5])).tolist() == [0]


def hits_of(curve: list[int], queries: int = 1000) -> torch.Tensor:
    """So many of the queries find their own at each length, the same ones first."""
    return torch.arange(queries) < torch.tensor(curve)[:, None]


def test_a_curve_like_that_of_the_paper() -> None:
    """Slow growth "once the input length surpasses 20 tokens": 0.53, 0.17 and 0.12 points a token."""
    grid = default_lengths(77)
    result = effective_length(hits_of([300, 460, 490, 510, 520, 525, 530, 536]), grid)
    assert result.effective is not None and result.effective.value == 20
    assert 20 <= result.effective.low <= 20 <= result.effective.high <= 30


class TestWhereGrowthBecomesSlow:
    """Lengths are 10 ... 60, so the mean distances to longer ones are 30, 25, 20, 15 and 10 tokens."""

    @pytest.mark.parametrize(
        ("curve", "expected"),
        [
            ([300, 500, 600, 605, 600, 610], 30),  # gains 283, 104, 4: paces 9.4, 4.2, 0.2
            ([300, 550, 590, 605, 600, 610], 20),  # gains 291, 51: paces 9.7, 2.05
            ([500, 504, 508, 512, 516, 520], 60),  # evenly to the end, at whatever height
            ([100, 200, 300, 400, 500, 600], 60),
            ([100, 110, 130, 190, 300, 600], 60),  # ever faster
            ([500, 600, 500, 500, 500, 500], 20),  # one lucky length: paces 0.67, then below 0
            ([500, 800, 700, 600, 500, 400], 20),  # grows, then declines
            ([400, 500, 500, 500, 600, 600], 50),  # a rest on the way: paces 4.7, 2, 3.3, 6.7, 0
        ],
    )
    def test_by_hand(self, curve: list[int], expected: int) -> None:
        result = effective_length(hits_of(curve), LENGTHS, resamples=100)
        assert [recall.value for recall in result.recall] == pytest.approx([count / 1000 for count in curve])
        assert result.effective is not None and result.effective.value == expected
        assert result.effective.low <= expected <= result.effective.high

    @pytest.mark.parametrize(
        "curve",
        [
            [500] * 6,  # never rises
            [600, 500, 400, 300, 200, 100],
            [2] * 6,  # at chance
            [2, 1, 3, 2, 2, 3],
            [0] * 6,
            [500, 501, 500, 501, 500, 500],  # by less than is certain
        ],
    )
    def test_a_curve_that_does_not_rise_has_none(self, curve: list[int]) -> None:
        assert effective_length(hits_of(curve), LENGTHS, resamples=200).effective is None

    @pytest.mark.parametrize(("slow", "expected"), [(1, 10), (0.7, 20), (0.3, 30), (0.0, 40)])
    def test_slow(self, slow: float, expected: int) -> None:
        hits = hits_of([700, 850, 990, 1000, 1000, 1000])  # paces 8.93, 4.5 (0.50), 0.5 (0.06), 0
        found = effective_length(hits, LENGTHS, slow=slow, resamples=100).effective
        assert found is not None and found.value == expected

    def test_one_length(self) -> None:
        assert effective_length(torch.tensor([[True, False]]), [10]).effective is None


class TestIntervals:
    def test_bounds_are_where_the_bounds_of_the_pace_are_slow(self) -> None:
        """20 of 1000 queries need 30 tokens: 0.02 +- 1.96 sqrt(0.02 * 0.98 / 1000) = 0.011 ... 0.029 is gained beyond
        20, 0.8 thousandths a token, where the whole curve has 0.096 / 30 = 3.2 and slow is 1.1: slow for certain.
        With 60 queries that need 30 tokens it is 2.4 and 1.2 +- 0.3: faster for certain."""
        slow = effective_length(hits_of([500, 580, 600, 600, 600, 600]), LENGTHS)
        assert slow.gain[1] == pytest.approx((0.02, 0.0113, 0.0287), abs=0.002)
        assert slow.effective is not None and (slow.effective.value, slow.effective.low) == (20, 20)
        fast = effective_length(hits_of([500, 540, 600, 600, 600, 600]), LENGTHS)
        assert fast.effective == (30, 30, 30)
        few = effective_length(hits_of([50, 57, 60, 60, 60, 60], 100), LENGTHS)
        assert few.effective == (30, 20, 30)

    def test_recall_has_the_interval_of_every_recall(self) -> None:
        hits = hits_of([40, 60, 70, 70, 70, 70], 100)
        groups = torch.arange(100) // 4
        result = effective_length(hits, LENGTHS, groups)
        assert list(result.recall) == [pytest.approx(bootstrap_interval(row, groups), abs=1e-12) for row in hits]

    def test_captions_are_resampled_by_image(self) -> None:
        """Five captions that say the same are one."""
        hits = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.3, 0.9, 6)[:, None]
        alone, image_of = effective_length(hits, LENGTHS), torch.arange(50).repeat_interleave(5)
        five = effective_length(hits[:, image_of], LENGTHS, image_of)
        assert five.effective == alone.effective is not None
        torch.testing.assert_close(torch.tensor(five.gain), torch.tensor(alone.gain))

    def test_seed_decides(self) -> None:
        hits = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) < 0.5
        assert effective_length(hits, LENGTHS) == effective_length(hits, LENGTHS)
        assert effective_length(hits, LENGTHS) != effective_length(hits, LENGTHS, seed=1)


def test_noise() -> None:
    """R@1 grows from 0.3 to 0.6 at the fourth length and stays. At every length 20 % of the 1000 queries answer by
    chance. By the largest later value, in place of the mean, the length would be far too large."""
    lengths = default_lengths(248)
    truth = torch.tensor([min(0.3 + 0.1 * place, 0.6) for place in range(len(lengths))])[:, None]
    generator = torch.Generator().manual_seed(0)
    ours, naive, held = [], [], 0
    for _ in range(40):
        chance = torch.rand(len(lengths), 1000, generator=generator) < 0.2
        ease = torch.where(
            chance, torch.rand(len(lengths), 1000, generator=generator), torch.rand(1000, generator=generator)
        )
        hits = ease < truth
        effective = effective_length(hits, lengths, resamples=200).effective
        assert effective is not None
        curve = hits.double().mean(dim=1)
        ours.append(effective.value)
        naive.append(lengths[int((curve >= curve.flip(0).cummax(0).values.flip(0) - 0.01).int().argmax())])
        held += effective.low <= 40 <= effective.high
    assert sum(ours) / 40 == pytest.approx(40, abs=5)
    assert sum(naive) / 40 > 60
    assert held >= 38


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hits": torch.ones(5, 4)}, r"for 6 lengths, got \(5, 4\)"),
        ({"hits": torch.ones(6, 0)}, r"for 6 lengths, got \(6, 0\)"),
        ({"lengths": [10, 20, 20, 30, 40, 50]}, r"increasing lengths .* got \[10, 20, 20"),
        ({"slow": -0.1}, r"share within 0 \.\.\. 1, .* and -0\.1"),
        ({"groups": torch.zeros(4, dtype=torch.int64)}, "two images"),
        ({"level": 1}, "between 0 and 1"),
    ],
)
def test_refusals(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        effective_length(**{"hits": torch.ones(6, 4), "lengths": LENGTHS, **change})
