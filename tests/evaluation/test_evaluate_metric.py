"""The metrics as `evaluate.Metric`, imported and loaded from the file without network."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_python

from longclip_hf.evaluation.classification import accuracy, class_embeddings, classification_ranks
from longclip_hf.evaluation.effective_length import effective_length
from longclip_hf.evaluation.evaluate_metric import FEATURES, LongCLIPMetric
from longclip_hf.evaluation.intervals import bootstrap_interval
from longclip_hf.evaluation.retrieval import retrieval_ranks, summary

FILE = Path(__file__).parents[2] / "evaluation" / "evaluate_metric.py"


def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, image_of = torch.randn(30, 8, generator=generator), torch.arange(30).repeat(2)
    return images, images[image_of] + torch.randn(60, 8, generator=generator), image_of


def metric(name: str, folder: Path) -> LongCLIPMetric:
    return LongCLIPMetric(name, cache_dir=str(folder))


def test_retrieval(tmp_path: Path) -> None:
    images, texts, image_of = features()
    results = metric("retrieval", tmp_path).compute(text_embeds=texts, image_of=image_of, image_embeds=images)
    ranks = retrieval_ranks(images, texts, image_of)
    expected = {f"{name}_{key}": value for name, part in ranks.items() for key, value in summary(part).items()}
    for name, groups in (("i2t", None), ("t2i", image_of)):
        for k in (1, 5, 10):
            _, expected[f"{name}_r{k}_low"], expected[f"{name}_r{k}_high"] = bootstrap_interval(
                ranks[name].hits(k), groups
            )
    assert results == pytest.approx(expected)
    assert 0.2 < results["t2i_r1_low"] < results["t2i_r1"] < results["t2i_r1_high"] < 0.8


def test_rows_in_parts_and_options(tmp_path: Path) -> None:
    images, texts, image_of = features()
    parts = metric("retrieval", tmp_path)
    parts.add_batch(text_embeds=texts[:25].numpy(), image_of=image_of[:25].numpy())
    parts.add_batch(text_embeds=texts[25:].tolist(), image_of=image_of[25:].tolist())
    results = parts.compute(image_embeds=images.numpy(), ks=(3,), resamples=100, level=0.5, seed=3)
    hits = retrieval_ranks(images, texts, image_of)["t2i"].hits(3)
    expected = bootstrap_interval(hits, image_of, resamples=100, level=0.5, seed=3)
    assert (results["t2i_r3"], results["t2i_r3_low"], results["t2i_r3_high"]) == pytest.approx(tuple(expected))
    assert "t2i_r1" not in results


def test_classification(tmp_path: Path) -> None:
    images, texts, labels = features()
    templates = torch.stack([images, images.roll(1, dims=1) / 10], dim=1)
    results = metric("classification", tmp_path).compute(image_embeds=texts, labels=labels, text_embeds=templates)
    ranks = classification_ranks(texts, class_embeddings(templates), labels)
    assert {name: results[name] for name in ("top1", "top5", "tied")} == pytest.approx(accuracy(ranks))
    assert (results["top1"], results["top1_low"], results["top1_high"]) == pytest.approx(
        tuple(bootstrap_interval(ranks.hits(1)))
    )


def test_effective_length(tmp_path: Path) -> None:
    lengths = [10, 20, 30]
    hits = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
    groups = torch.tensor([0, 0, 1, 2])
    results = metric("effective_length", tmp_path).compute(hits=hits, image_of=groups, lengths=lengths)
    effective = effective_length(hits.T, lengths, groups).effective
    assert effective is not None
    value, low, high = effective
    assert results == {
        "effective_length": value, "effective_length_low": low, "effective_length_high": high,
        "r1_at_10": 0.25, "r1_at_20": 1, "r1_at_30": 1,
    }  # fmt: skip
    assert value == 20
    flat = metric("effective_length", tmp_path).compute(hits=hits[:, 1:], image_of=groups, lengths=lengths[1:])
    assert flat["effective_length"] is flat["effective_length_low"] is None


def test_errors_come_through(tmp_path: Path) -> None:
    images, texts, image_of = features()
    with pytest.raises(ValueError, match="60 of 60 captions point outside the 30 images"):
        metric("retrieval", tmp_path).compute(text_embeds=texts, image_of=image_of + 30, image_embeds=images)
    with pytest.raises(
        ValueError, match="one of the metrics retrieval, classification, effective_length; got 'recall'"
    ):
        metric("recall", tmp_path)


@pytest.mark.parametrize("name", FEATURES)
def test_description(name: str, tmp_path: Path) -> None:
    said = metric(name, tmp_path).inputs_description
    assert all(column in said for column in FEATURES[name])


def test_loaded_from_the_file_offline(tmp_path: Path) -> None:
    printed = run_python(
        f"""
import json, evaluate, torch
metric = evaluate.load({str(FILE)!r}, "effective_length")
print(json.dumps(metric.compute(hits=[[0, 1], [0, 1]], image_of=[0, 1], lengths=[10, 20])))
""",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert json.loads(printed) == {
        "effective_length": 20, "effective_length_low": 20, "effective_length_high": 20, "r1_at_10": 0, "r1_at_20": 1
    }  # fmt: skip
