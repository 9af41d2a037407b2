"""Groups of images that are alike, and differences with their tests."""

import pytest
import torch

from longclip_hf.evaluation.retrieval import Ranks
from longclip_hf.evaluation.scores import Bootstrap, Measured, differences, measure_lengths, measure_retrieval
from longclip_hf.evaluation.significance import sign_flip_p

QUICK = Bootstrap(200, 0)


def ranks_of(best: list[int]) -> Ranks:
    rank = torch.tensor(best)
    return Ranks(rank, torch.zeros_like(rank), 1 / (rank + 1.0).double())


def test_groups_of_images_are_resampled_as_a_whole() -> None:
    """Four images with two captions each, in two groups, of which one is found and one is not."""
    image_of = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    ranks = {"i2t": ranks_of([0, 0, 9, 9]), "t2i": ranks_of([0] * 4 + [9] * 4)}
    single = measure_retrieval(ranks, image_of, QUICK)
    group_of = torch.tensor([5, 5, 7, 7])
    grouped = measure_retrieval(ranks, image_of, QUICK, group_of)
    for metric in ("i2t_r1", "t2i_r1"):
        assert single.values[metric].value == grouped.values[metric].value == 0.5
        # Of two groups, a resample has none, one or both of the found: 0, 1/2 or 1.
        assert (grouped.values[metric].low, grouped.values[metric].high) == (0, 1)
    assert grouped.groups["t2i_r1"].tolist() == [5, 5, 5, 5, 7, 7, 7, 7]
    low = [
        single.values["i2t_r1"].low,
        measure_retrieval(ranks, image_of, QUICK, torch.arange(4)).values["i2t_r1"].low,
    ]
    assert low[0] == low[1]
    one = measure_retrieval(ranks, image_of, QUICK, torch.zeros(4, dtype=torch.long))
    assert one.values["i2t_r1"].low is None
    hits = {way: torch.stack([found.hits(1), found.hits(10)]) for way, found in ranks.items()}
    curve = measure_lengths(hits, [10, 20], image_of, QUICK, group_of)
    assert (curve.recall["t2i"][0].low, curve.recall["t2i"][0].high) == (0, 1)


def test_differences_are_tested_in_pairs_and_by_groups() -> None:
    hits = torch.tensor([1.0, 1, 1, 1, 1, 0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    model = Measured(
        {"t2i_r1": hits, "t2i_r5": hits, "t2i_mean_rank": hits}, {"t2i_r1": groups, "t2i_r5": None}, {}, 0
    )
    reference = Measured({"t2i_r1": torch.zeros(6), "t2i_mean_rank": hits}, {}, {}, 0)
    (found,) = differences("tuned", model, "clip", reference, "photos", QUICK)  # of shares that both have
    assert (found.model, found.reference, found.metric) == ("tuned", "clip", "t2i_r1")
    assert found.value.value == pytest.approx(5 / 6)
    assert found.p == 2 / 4  # sums of 3 and 2, as far from 0 with the same signs only


def test_of_classes_the_small_ones_count_for_more() -> None:
    """Mean per-class recall: three images of a class gained, the one of another lost: 1 - 1 = 0."""
    labels = torch.tensor([0, 0, 0, 1])
    right, wrong = torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.0, 0, 0, 1])
    name = "mean_per_class_recall"
    model, reference = (Measured({name: of}, {name: None}, {}, 0, labels) for of in (right, wrong))
    (found,) = differences("tuned", model, "clip", reference, "photos", QUICK)
    assert found.value.value == 0
    assert found.p == sign_flip_p(torch.tensor([1 / 3, 1 / 3, 1 / 3, -1])) == 1
