"""Retrieval metrics: pure functions of features."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def recall_at_k(
    queries: torch.Tensor, candidates: torch.Tensor, ks: Sequence[int] = (1, 5, 10), block: int = 1024
) -> dict[int, float]:
    """The share of queries whose own candidate is among the k most similar by cosine.

    A tie counts against the model: candidates as similar as the right one rank before it. The similarities are
    computed in blocks of rows, never as a whole.

    Args:
        queries: of shape `(rows, projection_dim)`; they need not be normalised.
        candidates: of the same shape; row i belongs to query i.
        ks: the cut-offs.
        block: queries compared at a time.

    Returns:
        Recall within 0 ... 1 for each k.

    Raises:
        ValueError: for shapes that differ, no rows, or features that are not finite.
    """
    if queries.shape != candidates.shape or queries.ndim != 2 or not len(queries):
        raise ValueError(
            f"Every query has one candidate: expected two equal shapes (rows, projection_dim), got "
            f"{tuple(queries.shape)} and {tuple(candidates.shape)}."
        )
    if not (queries.isfinite().all() and candidates.isfinite().all()):
        raise ValueError("Features hold NaN or Inf; a rank among them means nothing.")
    queries, candidates = F.normalize(queries.float(), dim=-1), F.normalize(candidates.float(), dim=-1)
    ranks = []
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ candidates.T
        rows = torch.arange(len(similarity), device=similarity.device)
        right = similarity[rows, rows + start]
        ranks.append((similarity >= right[:, None]).sum(dim=1) - 1)  # itself is not before it
    rank = torch.cat(ranks)
    return {k: (rank < k).float().mean().item() for k in ks}
