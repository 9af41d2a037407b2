"""Retrieval metrics, worked by hand."""

import pytest
import torch

from evaluation.retrieval import recall_at_k


def test_by_hand() -> None:
    """Cosines, row by row, with the right candidate in brackets; ranks count from 0.

    query 0: [1.0]  0.0   0.6     rank 0
    query 1:  0.0  [1.0]  0.8     rank 0
    query 2:  0.8   0.6  [0.96]   rank 0
    """
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert recall_at_k(queries, candidates, (1,)) == {1: 1.0}
    # Candidates 0 and 2 change places: query 0 has 0.6 for its own before 0.0 and after 1.0 (rank 1); query 1 stays;
    # query 2 has 0.8 for its own, before 0.6 and after 0.96 (rank 1).
    assert recall_at_k(queries, candidates[[2, 1, 0]], (1, 2)) == {1: pytest.approx(1 / 3), 2: 1.0}
    # All moved on by one: query 0's own is 0.0 (rank 2), query 1's 0.8 (rank 1), query 2's 0.8 (rank 1).
    moved = recall_at_k(queries, candidates[[1, 2, 0]], (1, 2, 3))
    assert moved == {1: 0.0, 2: pytest.approx(2 / 3), 3: 1.0}


def test_length_of_a_vector_does_not_matter() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    candidates = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    scaled = recall_at_k(queries * torch.tensor([[3.0], [0.1], [7.0]]), candidates * torch.tensor([[9.0], [1], [0.2]]))
    assert scaled == recall_at_k(queries, candidates)


def test_ties_count_against_the_model() -> None:
    """A model that answers the same for everything finds nothing, not everything: the right one is last of 4."""
    same = torch.ones(4, 3)
    assert recall_at_k(same, same, (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}
    # Two equal candidates: the right one is second for both of their queries.
    queries, candidates = torch.eye(3)[[0, 0, 1]], torch.eye(3)[[0, 0, 1]]
    assert recall_at_k(queries, candidates, (1, 2)) == {1: pytest.approx(1 / 3), 2: 1.0}


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_blocks_change_nothing(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(7, 5, generator=generator) for _ in range(2))
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], candidates[None], dim=-1)
    ranks = [sorted(row.tolist(), reverse=True).index(row[i].item()) for i, row in enumerate(similarity)]
    expected = {k: sum(rank < k for rank in ranks) / 7 for k in (1, 2, 5)}
    assert recall_at_k(queries, candidates, (1, 2, 5), block=block) == pytest.approx(expected)
    assert len(set(expected.values())) == 3


def test_half_precision_is_compared_in_float32() -> None:
    queries = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert recall_at_k(queries, queries, (1,)) == {1: 1.0}


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2, 2\)"):
        recall_at_k(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"got \(0, 2\) and \(0, 2\)"):
        recall_at_k(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(ValueError, match="NaN or Inf"):
        recall_at_k(torch.full((2, 2), torch.nan), torch.ones(2, 2))
