"""Retrieval metrics, worked by hand, against exact integers, and against scikit-learn."""

import pytest
import torch
from conftest import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score
from torch.nn import functional as F

from longclip_hf.evaluation import retrieval
from longclip_hf.evaluation.retrieval import Ranks, ranks_among, retrieval_ranks, summary

IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
CAPTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
IMAGE_OF = torch.tensor([0, 0, 1, 2, 2])


def clustered(images: int, dim: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five captions per image, in no order."""
    generator = torch.Generator().manual_seed(seed)
    image_of = torch.arange(images).repeat(5)[torch.randperm(5 * images, generator=generator)]
    image_embeds = torch.randn(images, dim, generator=generator)
    return (
        image_embeds,
        image_embeds[image_of] + noise * torch.randn(len(image_of), dim, generator=generator),
        image_of,
    )


def by_integers(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_of: torch.Tensor
) -> dict[str, list[list[float]]]:
    """Best, tied and average precision by the definitions, query by query, in integer arithmetic."""
    images, texts = (
        (retrieval._fixed_point(part, "", part.device).double() / retrieval.STEP).long()
        for part in (image_embeds, text_embeds)
    )
    similarity = images @ texts.T
    own = image_of == torch.arange(len(images))[:, None]

    def query(row: torch.Tensor, right: torch.Tensor) -> tuple[int, int, float]:
        values, wrong = sorted(row[right].tolist(), reverse=True), row[~right]
        before = [int((wrong >= value).sum()) for value in values]
        precision = sum(j / (j + n) for j, n in enumerate(before, 1)) / len(before)
        return before[0], int((wrong == values[0]).sum()), precision

    return {
        "i2t": [list(column) for column in zip(*map(query, similarity, own), strict=True)],
        "t2i": [list(column) for column in zip(*map(query, similarity.T, own.T), strict=True)],
    }


def lists(ranks: Ranks) -> list[list[float]]:
    return [ranks.best.tolist(), ranks.tied.tolist(), ranks.average_precision.tolist()]


def assert_exact(
    ranks: dict[str, Ranks], image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_of: torch.Tensor
) -> None:
    for direction, (best, tied, precision) in by_integers(image_embeds, text_embeds, image_of).items():
        assert lists(ranks[direction]) == [best, tied, pytest.approx(precision, rel=1e-12)], direction


def recall_at_k(queries: torch.Tensor, candidates: torch.Tensor, ks: tuple[int, ...] = (1,)) -> dict[int, float]:
    """Row i of the candidates is the right one of query i."""
    ranks = ranks_among(queries, candidates, torch.arange(len(queries)))
    return {k: ranks.recall(k) for k in ks}


class TestByHand:
    """Cosines; brackets mark an image's own captions.

              c0    c1    c2     c3     c4
    image 0  [1.0] [0.0]  0.6    0.8    0.0
    image 1   0.0   1.0  [0.8]   0.6    1.0
    image 2   0.6   0.8   1.0   [0.96] [0.8]
    """

    def test_several_captions_per_image(self) -> None:
        ranks = retrieval_ranks(IMAGES, CAPTIONS, IMAGE_OF)
        # image 0: c0 is first. image 1: c1 and c4 rank before c2. image 2: c2 ranks before c3.
        assert ranks["i2t"].best.tolist() == [0, 2, 1]
        # c0: first. c1: images 1 and 2 before. c2: image 2 before. c3: first. c4: image 1 before.
        assert ranks["t2i"].best.tolist() == [0, 2, 1, 0, 1]
        assert ranks["i2t"].tied.tolist() == [0, 0, 0]
        assert ranks["t2i"].tied.tolist() == [0, 0, 0, 0, 0]
        # image 0: c0 is 1st of 1; before c1 come c0, c2, c3, and c4, which is tied: 2 of 5. image 1: 1 of 3.
        # image 2: before c3 comes c2, 1 of 2; before c4 come c3, c2, and c1, which is tied: 2 of 4.
        assert ranks["i2t"].average_precision.tolist() == pytest.approx([(1 + 2 / 5) / 2, 1 / 3, (1 / 2 + 2 / 4) / 2])
        assert ranks["t2i"].average_precision.tolist() == pytest.approx([1, 1 / 3, 1 / 2, 1, 1 / 2])

    def test_summary(self) -> None:
        ranks = retrieval_ranks(IMAGES, CAPTIONS, IMAGE_OF)
        assert summary(ranks["i2t"], (1, 2, 3)) == pytest.approx(
            {
                "r1": 1 / 3,
                "r2": 2 / 3,
                "r3": 1,
                "map": (0.7 + 1 / 3 + 0.5) / 3,
                "median_rank": 2,
                "mean_rank": 2,
                "tied": 0,
            }
        )
        assert summary(ranks["t2i"], (1, 2)) == pytest.approx(
            {"r1": 2 / 5, "r2": 4 / 5, "map": 10 / 15, "median_rank": 2, "mean_rank": 9 / 5, "tied": 0}
        )
        assert ranks["t2i"].hits(2).tolist() == [True, False, True, True, True]
        assert ranks["t2i"].recall(3) == 1.0

    def test_median_of_an_even_number(self) -> None:
        """Ranks 1 and 3 of c0 and c1, counted from 1: the lower one."""
        assert summary(ranks_among(CAPTIONS[:2], IMAGES, torch.tensor([0, 0])))["median_rank"] == 1.0

    def test_one_to_one(self) -> None:
        """Queries are rows; brackets mark the right one. [1.0] 0.0 0.6 | 0.0 [1.0] 0.8 | 0.8 0.6 [0.96]"""
        queries, candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), IMAGES
        assert recall_at_k(queries, candidates, (1,)) == {1: 1.0}
        # Candidates 0 and 2 change places: query 0 has 0.6 for its own before 0.0 and after 1.0 (rank 1); query 1
        # stays; query 2 has 0.8 for its own, before 0.6 and after 0.96 (rank 1).
        assert recall_at_k(queries, candidates[[2, 1, 0]], (1, 2)) == {1: pytest.approx(1 / 3), 2: 1.0}
        # All moved on by one: query 0's own is 0.0 (rank 2), query 1's 0.8 (rank 1), query 2's 0.8 (rank 1).
        moved = recall_at_k(queries, candidates[[1, 2, 0]], (1, 2, 3))
        assert moved == {1: 0.0, 2: pytest.approx(2 / 3), 3: 1.0}


class TestTies:
    def test_a_model_that_answers_the_same_finds_nothing(self) -> None:
        same = torch.ones(4, 3)
        assert recall_at_k(same, same, (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}
        ranks = retrieval_ranks(same, torch.ones(8, 3), torch.arange(4).repeat(2))
        assert lists(ranks["i2t"]) == [[6] * 4, [6] * 4, [(1 / 7 + 2 / 8) / 2] * 4]
        assert lists(ranks["t2i"]) == [[3] * 8, [3] * 8, [1 / 4] * 8]
        assert summary(ranks["i2t"])["tied"] == 4

    def test_two_equal_candidates(self) -> None:
        """The right one is second for both of their queries."""
        queries, candidates = torch.eye(3)[[0, 0, 1]], torch.eye(3)[[0, 0, 1]]
        assert recall_at_k(queries, candidates, (1, 2)) == {1: pytest.approx(1 / 3), 2: 1.0}

    def test_own_captions_do_not_count_against_their_image(self) -> None:
        """Thrice the same caption, two of them image 0's; for image 1 all are equally wrong."""
        ranks = retrieval_ranks(torch.eye(2), torch.eye(2)[[0, 0, 0]], torch.tensor([0, 0, 1]))
        assert lists(ranks["i2t"]) == [[1, 2], [1, 2], [(1 / 2 + 2 / 3) / 2, 1 / 3]]
        assert lists(ranks["t2i"]) == [[0, 0, 1], [0, 0, 0], [1, 1, 1 / 2]]

    @pytest.mark.parametrize("block", [64, 100, 1024])
    def test_equal_features_tie_wherever_they_stand(self, block: int) -> None:
        """Float32 products of equal rows differ in the last digit by their place in a block, here too."""
        image_embeds, text_embeds, image_of = clustered(301, 768, 3.0)
        image_embeds[7::50], text_embeds[image_of % 50 == 7] = image_embeds[7].clone(), text_embeds[3].clone()
        ranks = retrieval_ranks(image_embeds, text_embeds, image_of, block)
        twins = len(image_embeds[7::50])
        assert ranks["t2i"].tied[image_of % 50 == 7].tolist() == [twins - 1] * 5 * twins
        assert ranks["i2t"].tied[7::50].tolist() == [5 * (twins - 1)] * twins
        assert_exact(ranks, image_embeds, text_embeds, image_of)

    def test_a_difference_in_the_last_digit_is_no_tie(self) -> None:
        """Far below what a product in float32 can tell apart."""
        image_embeds = torch.full((3, 768), 0.5)
        image_embeds[1, 5] += 2**-18
        image_embeds[2, 5] -= 2**-18
        ranks = ranks_among(torch.eye(768)[[5, 5, 5]] + 1e-3, image_embeds, torch.tensor([0, 1, 2]))
        assert ranks.best.tolist() == [1, 0, 2]
        assert ranks.tied.tolist() == [0, 0, 0]


class TestExact:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), dim=st.integers(1, 4), images=st.integers(1, 6), block=st.integers(1, 7))
    def test_any_small_case(self, data: st.DataObject, dim: int, images: int, block: int) -> None:
        """Few directions, so that most of the similarities are tied."""
        row = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim).filter(any)

        def rows(n: int) -> torch.Tensor:
            return torch.tensor(data.draw(st.lists(row, min_size=n, max_size=n)))

        more = data.draw(st.lists(st.integers(0, images - 1), max_size=8))
        image_of = torch.tensor(data.draw(st.permutations([*range(images), *more])))
        case = rows(images).float(), rows(len(image_of)).float(), image_of
        ranks = retrieval_ranks(*case, block=block)
        assert_exact(ranks, *case)

    @pytest.mark.parametrize("noise", [0.0, 4.0, 1e6])
    @pytest.mark.parametrize("block", [33, 1024])
    def test_real_sizes(self, noise: float, block: int) -> None:
        case = clustered(150, 512, noise)
        ranks = retrieval_ranks(*case, block=block)
        assert_exact(ranks, *case)

    @pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-6, 1e-4])
    def test_a_collapsed_model(self, spread: float) -> None:
        """All nearly the same: everything is nearer than float32 can tell."""
        image_embeds, text_embeds, image_of = clustered(60, 256, 1.0)
        case = 1 + spread * image_embeds, 1 + spread * text_embeds, image_of
        ranks = retrieval_ranks(*case, block=50)
        assert_exact(ranks, *case)

    def test_products_in_lower_precision_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """bfloat16 of autocast, like TF32, would decide differently."""
        case = clustered(100, 256, 6.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert retrieval._tolerance(case[0]) == 0
            ranks = retrieval_ranks(*case)
            monkeypatch.setattr(retrieval, "_tolerance", lambda images: 8 * 256**0.5 * 2**-24)
            unnoticed = retrieval_ranks(*case)
        assert_exact(ranks, *case)
        assert not torch.equal(unnoticed["t2i"].best, ranks["t2i"].best)

    def test_float32_is_within_the_tolerance(self) -> None:
        """Random, positive, and made to be adverse: one large component before many small equal ones."""
        generator = torch.Generator().manual_seed(0)
        for dim in (16, 64, 768):
            random, positive = torch.randn(300, dim, generator=generator), torch.rand(300, dim, generator=generator)
            adverse = torch.cat([torch.linspace(0.1, 30, 300)[:, None], torch.ones(300, dim - 1)], dim=1)
            for features in (random, positive, adverse):
                fixed = retrieval._fixed_point(features, "", features.device)
                error = (fixed @ fixed.T - fixed.double() @ fixed.double().T).abs().max()
                assert error < retrieval._tolerance(fixed)

    def test_float64_is_exact(self) -> None:
        """In any order of the sum."""
        fixed = retrieval._fixed_point(
            torch.randn(64, 768, generator=torch.Generator().manual_seed(0)), "", torch.device("cpu")
        )
        shuffled = fixed[:, torch.randperm(768, generator=torch.Generator().manual_seed(1))]
        assert not torch.equal(fixed @ fixed.T, shuffled @ shuffled.T)
        assert torch.equal(fixed.double() @ fixed.double().T, shuffled.double() @ shuffled.double().T)
        integers = (fixed.double() / retrieval.STEP).long()
        assert torch.equal((fixed.double() @ fixed.double().T) / retrieval.STEP**2, (integers @ integers.T).double())


class TestAgainstScikitLearn:
    case = clustered(200, 64, 5.0, seed=1)
    image_of = case[2].numpy()
    similarity = (F.normalize(case[0].double()) @ F.normalize(case[1].double()).T).numpy()
    own = image_of == torch.arange(200).numpy()[:, None]

    @pytest.mark.parametrize("k", [1, 5, 10])
    def test_recall(self, k: int) -> None:
        ranks = retrieval_ranks(*self.case)
        expected = top_k_accuracy_score(self.image_of, self.similarity.T, k=k)
        assert ranks["t2i"].recall(k) == pytest.approx(expected)
        assert 0.05 < expected < 1
        # Any of an image's captions: its best one against all wrong ones, as class 0.
        scores = [[row[own].max(), *row[~own]] for row, own in zip(self.similarity, self.own, strict=True)]
        expected = top_k_accuracy_score([0] * 200, scores, k=k, labels=range(996))
        assert ranks["i2t"].recall(k) == pytest.approx(expected)
        assert 0.05 < expected < 1

    def test_mean_average_precision(self) -> None:
        ranks = retrieval_ranks(*self.case)
        expected = label_ranking_average_precision_score(self.own, self.similarity)
        assert summary(ranks["i2t"])["map"] == pytest.approx(expected)
        expected = label_ranking_average_precision_score(self.own.T, self.similarity.T)
        assert summary(ranks["t2i"])["map"] == pytest.approx(expected)


def test_length_of_a_vector_does_not_matter() -> None:
    scales = torch.tensor([[3.0], [0.1], [7.0]]), torch.tensor([[9.0], [1.0], [0.2], [1e4], [1e-4]])
    scaled = retrieval_ranks(IMAGES * scales[0], CAPTIONS * scales[1], IMAGE_OF)
    for name, part in retrieval_ranks(IMAGES, CAPTIONS, IMAGE_OF).items():
        assert torch.equal(scaled[name].best, part.best)


def test_half_precision_is_not_compared_in_half_precision() -> None:
    queries = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert recall_at_k(queries, queries, (1,)) == {1: 1.0}


def test_features_are_left_as_they_are() -> None:
    images, captions = IMAGES.double() * 3, CAPTIONS.double() * 3
    retrieval_ranks(images, captions, IMAGE_OF)
    assert torch.equal(images, IMAGES.double() * 3)
    assert torch.equal(captions, CAPTIONS.double() * 3)


def test_a_gradient_is_not_kept() -> None:
    images = IMAGES.clone().requires_grad_()
    assert not retrieval_ranks(images, CAPTIONS, IMAGE_OF)["i2t"].average_precision.requires_grad


def test_a_candidate_may_be_right_for_none() -> None:
    """Cosines 1.0, 0.0 and, for the right one, 0.6."""
    assert ranks_among(IMAGES[:1], IMAGES, torch.tensor([2])).best.tolist() == [1]


def test_the_whole_matrix_is_never_held() -> None:
    """It would have 240 MB; the features have 5."""
    grown = run_python(
        """
import resource, torch
from longclip_hf.evaluation.retrieval import retrieval_ranks
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image_of = torch.arange(4000).repeat(4)[:15000]
images, texts = torch.randn(4000, 64), torch.randn(15000, 64)
retrieval_ranks(images[:2000], texts[:2000], torch.arange(2000))
before = peak()
retrieval_ranks(images, texts, image_of)
print(peak() - before)
"""
    )
    assert int(grown) < 40_000


class TestRefusals:
    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"got \(0, 2\) and \(0, 2\)"):
            recall_at_k(torch.ones(0, 2), torch.ones(0, 2))
        with pytest.raises(
            ValueError, match=r"images and captions .* same projection_dim .* got \(3, 2\) and \(5, 3\)"
        ):
            retrieval_ranks(torch.ones(3, 2), torch.ones(5, 3), IMAGE_OF)
        with pytest.raises(ValueError, match=r"at least one row, got \(0, 2\) and \(5, 2\)"):
            retrieval_ranks(torch.ones(0, 2), torch.ones(5, 2), IMAGE_OF)

    @pytest.mark.parametrize(
        ("image_of", "said"),
        [
            (torch.zeros(4, dtype=torch.int64), r"shape \(5,\), got torch.int64 of shape \(4,\)"),
            (torch.zeros(5), r"got torch.float32 of shape \(5,\)"),
            (torch.ones(5, dtype=torch.bool), r"got torch.bool"),
            (
                torch.tensor([0, 3, 1, -1, 2]),
                r"2 of 5 captions point outside the 3 images: rows 1, 3 point at 3, -1\.",
            ),
            (torch.tensor([0, 0, 2, 2, 2]), r"1 of 3 images have no caption, .*: rows 1\."),
        ],
    )
    def test_images_of_captions(self, image_of: torch.Tensor, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            retrieval_ranks(IMAGES, CAPTIONS, image_of)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
    def test_broken_features(self, value: float) -> None:
        broken = CAPTIONS.clone()
        broken[[1, 4]] = value
        with pytest.raises(ValueError, match=r"captions hold NaN or Inf, or are zero, .*: rows 1, 4\."):
            retrieval_ranks(IMAGES, broken, IMAGE_OF)
        with pytest.raises(ValueError, match=r"Features of candidates hold NaN or Inf"):
            recall_at_k(CAPTIONS, broken)
