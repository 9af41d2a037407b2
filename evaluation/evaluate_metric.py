"""The metrics as a local `evaluate.Metric`, with a configuration for each.

    LongCLIPMetric("retrieval").compute(text_embeds=..., image_of=..., image_embeds=...)
    LongCLIPMetric("classification").compute(image_embeds=..., labels=..., text_embeds=...)
    LongCLIPMetric("effective_length").compute(hits=..., image_of=..., lengths=...)

or, from a checkout and without network, `evaluate.load("evaluation/evaluate_metric.py", "retrieval")`. Rows may also
come in parts, by `add_batch`. `evaluate` keeps them in an Arrow file and gives them back as lists: for features of
large benchmarks call the functions of `longclip_hf.evaluation.retrieval`, `.classification` and `.effective_length`
themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch

from longclip_hf.evaluation.classification import (
    accuracy,
    class_embeddings,
    classification_ranks,
    mean_per_class_recall,
)
from longclip_hf.evaluation.effective_length import effective_length
from longclip_hf.evaluation.intervals import bootstrap_interval
from longclip_hf.evaluation.retrieval import Ranks, retrieval_ranks, summary

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError('The metrics need `evaluate`: pip install "longclip-hf[evaluate]".') from error

EMBEDS = datasets.Sequence(datasets.Value("float32"))
FEATURES = {
    "retrieval": {"text_embeds": EMBEDS, "image_of": datasets.Value("int64")},
    "classification": {"image_embeds": EMBEDS, "labels": datasets.Value("int64")},
    "effective_length": {"hits": datasets.Sequence(datasets.Value("bool")), "image_of": datasets.Value("int64")},
}
INPUTS = """
Args:
    retrieval, a row per caption: text_embeds and image_of, its image's row in the argument image_embeds.
    classification, a row per image: image_embeds and labels, its class's row in the argument text_embeds,
        which has the shape (classes, templates, projection_dim).
    effective_length, a row per query: hits, one for each of the argument lengths, and image_of, its image.
    ks (retrieval and classification): the cut-offs.
    slow (effective_length): the share of the whole curve's pace that counts as slow.
    resamples, level, seed: of the bootstrap.

Returns:
    dict: for retrieval the figures of evaluation.retrieval.summary, after i2t_ and t2i_; for classification those of
    evaluation.classification.accuracy and mean_per_class_recall; effective_length in tokens (None where R@1 does not
    rise) and r1_at_10 ...; bounds end in _low and _high.
"""


class LongCLIPMetric(evaluate.Metric):
    """See the module.

    Args:
        config_name: "retrieval", "classification" or "effective_length".

    Raises:
        ValueError: for another name.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in FEATURES:
            raise ValueError(f"Choose one of the metrics {', '.join(FEATURES)}; got {self.config_name!r}.")
        return evaluate.MetricInfo(
            description="Recall both ways, zero-shot accuracy and effective length of long-text CLIP models.",
            citation="Zhang et al. 2024, Long-CLIP: Unlocking the Long-Text Capability of CLIP, arXiv 2403.15378",
            inputs_description=INPUTS,
            features=datasets.Features(FEATURES[self.config_name]),
        )

    def _compute(self, **inputs: Any) -> dict[str, Any]:
        return getattr(self, f"_{self.config_name}")(**inputs)

    def _retrieval(
        self, text_embeds: Any, image_of: Any, image_embeds: Any, ks: Sequence[int] = (1, 5, 10), **bootstrap: Any
    ) -> dict[str, float]:
        images = torch.as_tensor(image_of)
        ranks = retrieval_ranks(torch.as_tensor(image_embeds), torch.tensor(text_embeds), images)
        results: dict[str, float] = {}
        for direction, part in ranks.items():
            groups = images if direction == "t2i" else None
            figures = {**summary(part, ks), **_bounds("r", part, ks, groups, bootstrap)}
            results |= {f"{direction}_{name}": value for name, value in figures.items()}
        return results

    def _classification(
        self, image_embeds: Any, labels: Any, text_embeds: Any, ks: Sequence[int] = (1, 5), **bootstrap: Any
    ) -> dict[str, float]:
        ranks = classification_ranks(
            torch.tensor(image_embeds), class_embeddings(torch.as_tensor(text_embeds)), torch.as_tensor(labels)
        )
        per_class = mean_per_class_recall(ranks.hits(1), torch.as_tensor(labels))
        figures = {**accuracy(ranks, ks), "mean_per_class_recall": per_class}
        return {**figures, **_bounds("top", ranks, ks, None, bootstrap)}

    def _effective_length(self, hits: Any, image_of: Any, lengths: Sequence[int], **options: Any) -> dict[str, Any]:
        curve = effective_length(torch.tensor(hits).T, lengths, torch.as_tensor(image_of), **options)
        value, low, high = curve.effective or (None, None, None)
        return {
            "effective_length": value,
            "effective_length_low": low,
            "effective_length_high": high,
            **{f"r1_at_{length}": recall.value for length, recall in zip(curve.lengths, curve.recall, strict=True)},
        }


def _bounds(
    name: str, ranks: Ranks, ks: Sequence[int], groups: torch.Tensor | None, bootstrap: dict[str, Any]
) -> dict[str, float]:
    intervals = {f"{name}{k}": bootstrap_interval(ranks.hits(k), groups, **bootstrap) for k in ks}
    return {f"{key}_{end}": getattr(interval, end) for key, interval in intervals.items() for end in ("low", "high")}
