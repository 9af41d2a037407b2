"""Paired tests: values by hand, and that no more is found by chance than is said."""

import math

import pytest
import torch

from longclip_hf.evaluation.significance import holm, sign_flip_p


@pytest.mark.parametrize(
    ("differences", "groups", "expected"),
    [
        ([1, 1, 1, 0], None, 2 / 8),
        ([1, 1, 1, -1], None, 10 / 16),  # |sum| >= 2: all one way, or all but one
        ([1, 1, 1, -1], [0, 0, 1, 1], 2 / 2),  # a group of 2 and one of 0: of one group nothing is known
        ([1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2], 2 / 8),
        ([2, 1, 1], [7, 3, 3], 2 / 4),  # sums 2 and 2
        ([0.5, 0.25, 0.0], None, 2 / 4),
        ([0, 0, 0], None, 1.0),
        ([1, -1], [4, 4], 1.0),
    ],
)
def test_by_hand(differences: list[float], groups: list[int] | None, expected: float) -> None:
    of = None if groups is None else torch.tensor(groups)
    assert sign_flip_p(torch.tensor(differences), of) == expected


def test_drawn_signs_agree_with_the_binomial() -> None:
    """On hits and misses of single queries it is McNemar's test: of 40 that differ, 28 one way."""
    differences = torch.tensor([1.0] * 28 + [-1.0] * 12 + [0.0] * 60)
    exact = 2 * sum(math.comb(40, k) for k in range(28, 41)) / 2**40
    assert sign_flip_p(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact / 9999))
    assert sign_flip_p(differences, flips=999) == sign_flip_p(differences, flips=999)
    assert sign_flip_p(torch.ones(100)) == 1 / 10000


def test_groups_are_flipped_whole() -> None:
    """Of equally good models on families of four, a twentieth is found different; query by query it is far more."""
    generator = torch.Generator().manual_seed(0)
    families = torch.randn(100, 60, 1, generator=generator)
    differences = (families + 0.5 * torch.randn(100, 60, 4, generator=generator)).reshape(100, 240)
    groups = torch.arange(60).repeat_interleave(4)
    whole = sum(sign_flip_p(row, groups, flips=199) <= 0.05 for row in differences) / 100
    single = sum(sign_flip_p(row, flips=199) <= 0.05 for row in differences) / 100
    assert whole <= 0.08 and single > 0.2, (whole, single)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2,\)"):
        sign_flip_p(torch.ones(3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="1 of 2 differences are NaN or Inf"):
        sign_flip_p(torch.tensor([1.0, float("nan")]))
