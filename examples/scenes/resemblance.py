"""What of a model in this world resembles CLIP: the spectrum of its image features, and what it knows.

    python -m examples.scenes.resemblance MODEL

Of real CLIP features 8 / 16 / 32 / 64 components hold 0.26-0.29 / 0.41-0.44 / 0.62-0.64 / 0.85 of the variance in
batches of 128, 32 hold 0.44 in a batch of 1024, and the mean has about three quarters of the squared norm.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from examples.scenes.captions import CLASS_NAMES, TEMPLATES, list_of_flags
from examples.scenes.dataset import example
from examples.scenes.world import draw_scene
from longclip_hf.evaluation.classification import class_embeddings, classification_ranks
from longclip_hf.evaluation.retrieval import retrieval_ranks
from longclip_hf.training.components import decompose
from modeling_longclip.compat import features

COMPONENTS = (4, 8, 16, 32, 64)
BATCHES = (128, 512)
ROWS = 1024


def spectrum(image_embeds: torch.Tensor, batch: int) -> list[float]:
    """The shares of the variance that the first `COMPONENTS` hold, on average over batches.

    Args:
        image_embeds: normalised, of shape `(samples, projection_dim)`.
        batch: samples each.
    """
    shares = []
    for rows in image_embeds.double().split(batch):
        mean = rows.mean(0)
        eigenvalues, _ = decompose((rows - mean).T @ (rows - mean) / len(rows), mean)
        cumulative = eigenvalues.cumsum(0) / eigenvalues.sum()
        shares.append(torch.stack([cumulative[count - 1] for count in COMPONENTS]))
    return [float(share) for share in torch.stack(shares).mean(0)]


@torch.inference_mode()
def measure(model: Any, processor: Any, rows: int = ROWS) -> dict[str, float]:
    """Figures by name, all of them shares.

    Args:
        model: a CLIP in evaluation mode, with its
        processor:
        rows: scenes of "train" for the spectrum; of lists and of main objects half as many.
    """

    def images(split: str, indices: Sequence[int]) -> torch.Tensor:
        parts = []
        for chunk in torch.tensor(indices).split(256):
            pictures = [example(split, int(index))["image"] for index in chunk]
            parts.append(features(model.get_image_features(**processor(images=pictures, return_tensors="pt"))))
        return F.normalize(torch.cat(parts), dim=-1)

    def texts(captions: Sequence[str]) -> torch.Tensor:
        found = processor.tokenizer(list(captions), padding=True, truncation=True, max_length=77, return_tensors="pt")
        return F.normalize(features(model.get_text_features(**found)), dim=-1)

    def found(split: str, indices: Sequence[int], words: Callable[[int], str]) -> dict[str, float]:
        ranks = retrieval_ranks(images(split, indices), texts([words(i) for i in indices]), torch.arange(len(indices)))
        return {way: float(one.hits(1).double().mean()) for way, one in ranks.items()}

    image_embeds = images("train", range(rows))
    figures = {"squared norm of the mean": float(image_embeds.mean(0).square().sum())}
    for batch in BATCHES:
        for count, share in zip(COMPONENTS, spectrum(image_embeds, batch), strict=True):
            figures[f"variance of {batch} by {count}"] = share
    prompts = texts([template.format(name) for name in CLASS_NAMES for template in TEMPLATES])
    classes = class_embeddings(prompts.unflatten(0, (len(CLASS_NAMES), len(TEMPLATES))))
    labels = torch.tensor([example("classes", index)["label"] for index in range(rows // 2)])
    ranks = classification_ranks(images("classes", range(rows // 2)), classes, labels)
    figures["main objects"] = float(ranks.hits(1).double().mean())
    families = range(0, 1000, 20)  # one of each: nothing is shared but the main object

    def listed(split: str, framed: bool) -> Callable[[int], str]:
        return lambda index: list_of_flags(draw_scene(split, index).details, framed)

    for name, indices, framed in (("lists", families, False), ("framed lists", range(400), True)):
        for way, share in found("hard", indices, listed("hard", framed)).items():
            figures[f"{name} {way}"] = share
    for way, share in found("long", range(rows // 2), listed("long", False)).items():
        figures[f"long lists {way}"] = share
    return figures


def main(args: list[str] | None = None) -> int:
    """Prints the figures of a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args(args)
    from transformers import AutoProcessor, CLIPModel

    model = CLIPModel.from_pretrained(options.model, dtype=torch.float32).eval()
    for name, value in measure(model, AutoProcessor.from_pretrained(options.model)).items():
        print(f"{name:28} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
