"""Ranks -> what a report shows: metrics with intervals, the curve of lengths, differences between models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from longclip_hf.evaluation.classification import mean_per_class_recall
from longclip_hf.evaluation.effective_length import LengthCurve, effective_length
from longclip_hf.evaluation.intervals import (
    Interval,
    bootstrap_class_means,
    bootstrap_means,
    bootstrap_medians,
    percentiles,
)
from longclip_hf.evaluation.retrieval import Ranks
from longclip_hf.evaluation.significance import sign_flip_p
from longclip_hf.results import Difference, Direction, EffectiveLength, Value, is_rank

PER_CLASS = "mean_per_class_recall"
KS = {"retrieval": (1, 5, 10), "classification": (1, 5)}


@dataclass(frozen=True)
class Measured:
    """The metrics of one model on one benchmark, query by query, so that models can be compared in pairs.

    Args:
        queries: metric -> its value at each query, of shape `(queries,)`.
        groups: metric -> the image of each query, or its group; None where every query is an image of its own.
        values: metric -> mean or median, with its interval.
        ties: queries whose right answer ties with a wrong one.
        labels: of a classification, the class of each image.
    """

    queries: Mapping[str, torch.Tensor]
    groups: Mapping[str, torch.Tensor | None]
    values: Mapping[str, Value]
    ties: int
    labels: torch.Tensor | None = None


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: so many resamples, from this seed."""

    resamples: int = 1000
    seed: int = 0


def measure_retrieval(
    ranks: Mapping[Direction, Ranks],
    image_of: torch.Tensor,
    bootstrap: Bootstrap = Bootstrap(),
    group_of: torch.Tensor | None = None,
) -> Measured:
    """Recall, mean average precision and ranks, both ways.

    Args:
        ranks: of `retrieval_ranks`.
        image_of: the image of each caption, of shape `(captions,)`.
        bootstrap: of the intervals; what is resampled are images, with their captions, or groups of them.
        group_of: the group of each image, of shape `(images,)`, where images are alike.
    """
    alike = clusters(image_of, group_of)
    queries: dict[str, torch.Tensor] = {}
    groups: dict[str, torch.Tensor | None] = {}
    for direction, found in ranks.items():
        rank = found.best.double().cpu() + 1
        theirs = {f"{direction}_r{k}": found.hits(k).double().cpu() for k in KS["retrieval"]}
        theirs[f"{direction}_map"] = found.average_precision.cpu()
        theirs[f"{direction}_median_rank"] = theirs[f"{direction}_mean_rank"] = rank
        queries |= theirs
        groups |= dict.fromkeys(theirs, alike[direction])
    return _measured(queries, groups, sum(int((found.tied > 0).sum()) for found in ranks.values()), bootstrap)


def measure_sentences(
    hits: Mapping[Direction, Mapping[str, torch.Tensor]],
    himo: tuple[torch.Tensor, torch.Tensor],
    captions: torch.Tensor,
    image_of: torch.Tensor,
    bootstrap: Bootstrap = Bootstrap(),
    group_of: torch.Tensor | None = None,
) -> Measured:
    """What `longclip_hf.evaluation.long_text` says of a model's captions.

    Args:
        hits: for each direction and each of its `VARIANTS`, whether each query found its own.
        himo: HiMo@K and the share of rises, of shape `(captions of two sentences or more,)`.
        captions: which those are.
        image_of: the image of each caption.
        bootstrap: of the intervals.
        group_of: the group of each image, where images are alike.
    """
    alike = clusters(image_of, group_of)
    queries = {
        f"{side}_r1_{variant}": found.double().cpu() for side, own in hits.items() for variant, found in own.items()
    }
    groups: dict[str, torch.Tensor | None] = {
        metric: alike["i2t" if metric.startswith("i2t") else "t2i"] for metric in queries
    }
    of_captions = alike["t2i"]
    assert of_captions is not None
    queries |= {"himo": himo[0], "himo_rises": himo[1]}
    groups["himo"] = groups["himo_rises"] = of_captions[captions]
    return _measured(queries, groups, 0, bootstrap)


def measure_choices(right: Mapping[str, torch.Tensor], bootstrap: Bootstrap = Bootstrap()) -> Measured:
    """What `longclip_hf.evaluation.choices` says of a model: each row is evidence of its own.

    Args:
        right: metric -> booleans of shape `(rows,)`.
        bootstrap: of the intervals.
    """
    queries = {metric: found.double().cpu() for metric, found in right.items()}
    return _measured(queries, dict.fromkeys(queries), 0, bootstrap)


def both(first: Measured, second: Measured) -> Measured:
    """The metrics of both."""
    return Measured(
        {**first.queries, **second.queries}, {**first.groups, **second.groups}, {**first.values, **second.values},
        first.ties + second.ties, first.labels,
    )  # fmt: skip


def measure_classification(ranks: Ranks, labels: torch.Tensor, bootstrap: Bootstrap = Bootstrap()) -> Measured:
    """Top-1 and top-5 accuracy and mean per-class recall, from the ranks of `classification_ranks`.

    Args:
        ranks: of each image's own class.
        labels: of the images, of shape `(images,)`.
        bootstrap: of the intervals.
    """
    queries = {f"top{k}": ranks.hits(k).double().cpu() for k in KS["classification"]}
    queries[PER_CLASS] = queries["top1"]
    return _measured(queries, dict.fromkeys(queries), int((ranks.tied > 0).sum()), bootstrap, labels.cpu())


def _measured(
    queries: Mapping[str, torch.Tensor],
    groups: Mapping[str, torch.Tensor | None],
    ties: int,
    bootstrap: Bootstrap,
    labels: torch.Tensor | None = None,
) -> Measured:
    values = {
        metric: _statistic(metric, per_query, groups[metric], labels, bootstrap)
        for metric, per_query in queries.items()
    }
    return Measured(queries, groups, values, ties, labels)


def _statistic(
    metric: str,
    per_query: torch.Tensor,
    groups: torch.Tensor | None,
    labels: torch.Tensor | None,
    bootstrap: Bootstrap,
) -> Value:
    """The metric over all queries, with its interval; of one query, or the captions of one image, it has none."""
    how = bootstrap.resamples, bootstrap.seed
    one = len(per_query if groups is None else groups.unique()) < 2
    if metric == PER_CLASS:
        assert labels is not None
        value = mean_per_class_recall(per_query, labels)
        resampled = None if one else bootstrap_class_means(per_query, labels, *how)
    elif metric.endswith("median_rank"):
        value = per_query.quantile(0.5, interpolation="lower").item()
        resampled = None if one else bootstrap_medians(per_query, groups, *how)
    else:
        value = per_query.mean().item()
        resampled = None if one else bootstrap_means(per_query, groups, *how)
    if resampled is None:
        return Value(value, None, None)
    low, high = (bound.item() for bound in percentiles(resampled))
    return Value(value, min(low, value), max(high, value))


def clusters(image_of: torch.Tensor, group_of: torch.Tensor | None = None) -> dict[Direction, torch.Tensor | None]:
    """What is resampled together: for each query its image, or its image's group; None where each is its own."""
    if group_of is None:
        return {"i2t": None, "t2i": image_of}
    return {"i2t": group_of, "t2i": group_of[image_of]}


def measure_lengths(
    hits: Mapping[Direction, torch.Tensor],
    lengths: Sequence[int],
    image_of: torch.Tensor,
    bootstrap: Bootstrap = Bootstrap(),
    group_of: torch.Tensor | None = None,
) -> EffectiveLength:
    """R@1 as a function of the tokens kept, and where it stops growing (paper section 3.1).

    Args:
        hits: for each direction, booleans of shape `(lengths, queries)`.
        lengths: tokens kept, ascending.
        image_of: the image of each caption.
        bootstrap: of the intervals.
        group_of: the group of each image, where images are alike.
    """
    alike = clusters(image_of, group_of)
    curves: dict[Direction, LengthCurve] = {
        direction: effective_length(
            found,
            lengths,
            alike[direction],
            resamples=bootstrap.resamples,
            seed=bootstrap.seed,
        )
        for direction, found in hits.items()
    }
    return EffectiveLength(
        lengths=list(lengths),
        recall={direction: [_value(point) for point in curve.recall] for direction, curve in curves.items()},
        effective={
            direction: None if curve.effective is None else _value(curve.effective)
            for direction, curve in curves.items()
        },
    )


def _value(interval: Interval) -> Value:
    return Value(*(float(number) for number in interval))


def differences(
    model: str,
    found: Measured,
    reference: str,
    compared: Measured,
    benchmark: str,
    bootstrap: Bootstrap = Bootstrap(),
) -> list[Difference]:
    """`model` minus `reference` on the same queries, with paired intervals and tests: every metric of both but ranks.

    Pairing takes out what makes a query hard for both.
    """
    listed = []
    for metric, per_query in found.queries.items():
        if not is_rank(metric) and metric in compared.queries:
            apart, groups = per_query - compared.queries[metric], found.groups[metric]
            value = _statistic(metric, apart, groups, found.labels, bootstrap)
            weighted = apart
            if metric == PER_CLASS and found.labels is not None:  # an image of a small class counts for more
                weighted = apart / found.labels.bincount()[found.labels]
            p = None if value.low is None else sign_flip_p(weighted, groups, seed=bootstrap.seed)
            listed.append(Difference(model, reference, benchmark, metric, value, p))
    return listed


def hardest(ranks: Ranks, count: int, among: torch.Tensor | None = None) -> list[int]:
    """The queries that were missed by most, the worst first; `among`: booleans, which may be among them."""
    best = ranks.best if among is None else ranks.best.where(among.to(ranks.best.device), 0)
    worst = best.argsort(descending=True, stable=True)[:count]
    return [int(query) for query in worst if best[query] > 0]


def most_similar(query: torch.Tensor, candidates: torch.Tensor, count: int) -> list[int]:
    """The rows of the candidates nearest by cosine, the nearest first; `query` of shape `(projection_dim,)`."""
    similarity = F.normalize(candidates.double(), dim=-1) @ F.normalize(query.double(), dim=-1)
    return [int(row) for row in similarity.topk(min(count, len(candidates))).indices]
