"""Zero-shot classification, worked by hand."""

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch.nn import functional as F

from longclip_hf.evaluation.classification import (
    accuracy,
    class_embeddings,
    classification_ranks,
    mean_per_class_recall,
)
from longclip_hf.evaluation.retrieval import Ranks
from longclip_hf.evaluation.scores import differences, measure_classification
from longclip_hf.results import Value


def test_class_embeddings_by_hand() -> None:
    """Class 0: (1, 0) and (0, 1), of lengths 10 and 1: the mean is (0.5, 0.5). Class 1: (0.6, 0.8) twice."""
    text_embeds = torch.tensor([[[10.0, 0.0], [0.0, 1.0]], [[3.0, 4.0], [0.6, 0.8]]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]])
    torch.testing.assert_close(class_embeddings(text_embeds), expected)


def test_accuracy_by_hand() -> None:
    """Cosines, with the right class in brackets; classes 0 and 2 have the same name.

    image 0: [1.0]  0.0   1.0   tied: second
    image 1:  0.0  [1.0]  0.0   first
    image 2:  0.8   0.6  [0.8]  tied: second
    image 3:  0.6  [0.8]  0.6   first
    image 4:  0.8  [0.6]  0.8   third
    """
    class_embeds = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    images = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.8, 0.6], [0.6, 0.8], [4.0, 3.0]])
    ranks = classification_ranks(images, class_embeds, torch.tensor([0, 1, 2, 1, 1]))
    assert ranks.best.tolist() == [1, 0, 1, 0, 2]
    assert ranks.tied.tolist() == [1, 0, 1, 0, 0]
    assert ranks.hits(1).tolist() == [False, True, False, True, False]
    assert accuracy(ranks, (1, 2, 5)) == {"top1": 2 / 5, "top2": 4 / 5, "top5": 1.0, "tied": 2.0}


def test_mean_per_class_recall_by_hand() -> None:
    """Class 0: 3 of 4, class 2: 0 of 1, class 3: 1 of 2; class 1 has no image. (3/4 + 0 + 1/2) / 3; 4/7 are right."""
    right = torch.tensor([True, True, True, False, False, True, False])
    labels = torch.tensor([0, 0, 0, 0, 2, 3, 3])
    assert mean_per_class_recall(right, labels) == pytest.approx(5 / 12)
    order = torch.tensor([6, 0, 4, 2, 5, 1, 3])
    assert mean_per_class_recall(right[order], labels[order]) == pytest.approx(5 / 12)
    assert mean_per_class_recall(torch.tensor([True, False]), torch.tensor([0, 1])) == 0.5


def test_its_interval_and_differences() -> None:
    """It stays within 0 ... 1 where all are right, and pairs models image by image."""
    labels, none = torch.tensor([0, 0, 0, 0, 2, 3, 3]), torch.zeros(7, dtype=torch.long)
    first = measure_classification(Ranks(none, none, 1 / (none + 1.0)), labels)
    assert first.values["mean_per_class_recall"] == Value(1, 1, 1)
    best = torch.tensor([0, 0, 0, 1, 1, 0, 1])
    second = measure_classification(Ranks(best, none, 1 / (best + 1.0)), labels)
    value = second.values["mean_per_class_recall"]
    assert value.value == pytest.approx(5 / 12)
    found = {d.metric: d.value for d in differences("second", second, "first", first, "x")}
    assert found["mean_per_class_recall"].value == pytest.approx(5 / 12 - 1)
    assert value.low is not None and found["mean_per_class_recall"].low == pytest.approx(value.low - 1)


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_against_scikit_learn(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    class_embeds = class_embeddings(torch.randn(50, 3, 32, generator=generator))
    labels = torch.randint(40, (500,), generator=generator)  # ten classes have no image
    images = class_embeds[labels] + 0.3 * torch.randn(500, 32, generator=generator)
    figures = accuracy(classification_ranks(images, class_embeds, labels, block))
    scores = F.normalize(images.double()) @ class_embeds.double().T
    for k in (1, 5):
        expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=range(50))
        assert figures[f"top{k}"] == pytest.approx(expected)
        assert 0.2 < expected < 1
    assert figures["tied"] == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(classes, templates, projection_dim\), got \(2, 3\)"):
        class_embeddings(torch.ones(2, 3))
    text_embeds = torch.ones(2, 3, 4)
    text_embeds[0, 2], text_embeds[1, 0, 3] = 0, torch.nan
    with pytest.raises(
        ValueError, match=r"in 2 of 6 prompts; the first are \(class, template\) \[\[0, 2\], \[1, 0\]\]"
    ):
        class_embeddings(text_embeds)
    with pytest.raises(ValueError, match=r"1 of 2 images point outside the 3 classes: rows 1 point at 3\."):
        classification_ranks(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"Features of classes hold NaN or Inf, or are zero, .*: rows 0, 1, 2\."):
        classification_ranks(torch.ones(2, 4), torch.zeros(3, 4), torch.tensor([0, 2]))
