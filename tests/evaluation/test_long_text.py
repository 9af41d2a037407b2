"""Figures of long text, by hand."""

import math
import random

import pytest
import torch

from longclip_hf.evaluation.long_text import VARIANTS, changed, growing, himo, monotony, rises

CAPTION = "A dog runs. It is brown! The sun shines"


def test_the_first_sentence_is_dropped_or_moved() -> None:
    captions = [CAPTION, "One sentence only", "St. Mary's is old. It stands.\r\nIt is red."]
    assert changed(captions, "first_dropped") == [
        "It is brown! The sun shines.", "One sentence only", "It stands. It is red.",
    ]  # fmt: skip
    assert changed(captions, "first_moved") == [
        "It is brown! The sun shines. A dog runs.", "One sentence only", "It stands. It is red. St. Mary's is old.",
    ]  # fmt: skip


def test_half_of_the_sentences_are_drawn_in_their_order() -> None:
    pairs = {"A dog runs. It is brown!", "A dog runs. The sun shines.", "It is brown! The sun shines."}
    drawn = changed([CAPTION] * 60, "half_drawn", seed=3)
    assert set(drawn) == pairs
    assert drawn == changed([CAPTION] * 60, "half_drawn", seed=3) != changed([CAPTION] * 60, "half_drawn", seed=4)
    assert len(VARIANTS["half_drawn"](["a", "b", "c", "d"], random.Random(0))) == 2


def test_sentences_are_added() -> None:
    assert growing(CAPTION) == ["A dog runs.", "A dog runs. It is brown!", "A dog runs. It is brown! The sun shines."]
    assert growing("One") == ["One."]


@pytest.mark.parametrize(
    ("similarities", "expected", "share"),
    [
        ([0.1, 0.2, 0.3], 1.0, 1.0),
        ([0.3, 0.1], -1.0, 0.0),
        # places -1, 0, 1; values less their mean -0.1, 0.1, 0: 0.1 / sqrt(2 * 0.02)
        ([0.1, 0.3, 0.2], 0.1 / math.sqrt(2 * 0.02), 0.5),
        # places -1.5 ... 1.5; values less their mean 0.15, 0.05, -0.05, -0.15 in another order: -0.05 / 0.25
        ([0.3, 0.0, 0.1, 0.2], -0.1 / math.sqrt(5 * 0.05), 2 / 3),
        ([0.2, 0.2, 0.2], 0.0, 0.0),
    ],
)
def test_himo_by_hand(similarities: list[float], expected: float, share: float) -> None:
    values = torch.tensor(similarities, dtype=torch.float64)
    assert himo(values) == pytest.approx(expected)
    assert rises(values) == pytest.approx(share)


def test_of_many_captions() -> None:
    """Cosines of 0.6 then 0.8 with the image, and of 1, 0, 0: what a model does not read changes nothing."""
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    texts = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0], [5.0, 0.0], [5.0, 0.0]])
    found, rising = monotony(images, texts, [2, 3])
    # 1, 0, 0 at places -1, 0, 1: -1 / sqrt(2 * 2 / 3)
    assert found.tolist() == pytest.approx([1.0, -math.sqrt(3) / 2])
    assert rising.tolist() == [1.0, 0.0]


def test_of_one_sentence_there_is_nothing_to_say() -> None:
    with pytest.raises(ValueError, match=r"two texts or more, got shape \(1,\)"):
        himo(torch.tensor([0.5]))
