"""Choices, by hand."""

import pytest
import torch

from longclip_hf.evaluation.choices import caption_choice, pair_scores


def features(*cosines: float) -> torch.Tensor:
    """Texts of so many cosines with (1, 0)."""
    return torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines], dtype=torch.float64)


def test_pairs() -> None:
    """Four pairs: all right; only the texts; only the images; a tie everywhere."""
    east, north, middle = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    images = torch.stack([
        torch.stack([east, north]), torch.stack([east, north]),
        features(0.9, 0.8).float(), torch.stack([middle, middle]),
    ])  # fmt: skip
    texts = torch.stack([
        torch.stack([east, north]), torch.stack([east, 5 * north]),
        torch.stack([east, middle]), torch.stack([middle, middle]),
    ])  # fmt: skip
    found = pair_scores(images, texts)
    # The third: the first image (cosine 0.9 with east, 0.94 with the middle) takes the wrong text, the second its own.
    # Of the images the first is nearer to east (0.9 against 0.8), the second to the middle (0.99 against 0.94).
    assert found["text_score"].tolist() == [True, True, False, False]
    assert found["image_score"].tolist() == [True, True, True, False]
    assert found["group_score"].tolist() == [True, True, False, False]


def test_texts_right_and_images_wrong() -> None:
    """Cosines of the first image with the texts 0.75 and 0.66, of the second 0.10 and 0.20."""
    images = torch.tensor([[[0.9, 0.8, 0.0], [0.1, 0.2, 1.0]]])
    texts = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    found = {name: bool(score) for name, score in pair_scores(images, texts).items()}
    assert found == {"text_score": True, "image_score": False, "group_score": False}
    turned = {name: bool(score) for name, score in pair_scores(texts, images).items()}
    assert turned == {"text_score": False, "image_score": True, "group_score": False}


@pytest.mark.parametrize(
    ("cosines", "right"), [((0.9, 0.8), True), ((0.8, 0.9), False), ((0.9, 0.9), False), ((0.9, 0.1, 0.95), False)]
)
def test_the_right_caption_is_above_all_others(cosines: tuple[float, ...], right: bool) -> None:
    image = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    assert caption_choice(image, features(*cosines)[None]).tolist() == [right]


def test_equal_texts_tie_whatever_their_place() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1500, 1, 384, generator=generator)
    assert not caption_choice(torch.randn(1500, 384, generator=generator), text.expand(-1, 5, -1)).any()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"\(pairs, 2, projection_dim\), got \(1, 3, 4\)"):
        pair_scores(torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    with pytest.raises(ValueError, match="two captions or more"):
        caption_choice(torch.ones(2, 4), torch.ones(2, 1, 4))
    with pytest.raises(ValueError, match="1 of 2 features hold NaN or Inf, or are zero"):
        caption_choice(torch.ones(1, 4), torch.stack([torch.ones(4), torch.zeros(4)])[None])
