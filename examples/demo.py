"""The main job, offline: make a CLIP of ViT-B/16's size, stretch it, load it both ways, embed photos and captions.

    python -m examples.demo [--output demo-output] [--size ViT-B/16]

The weights are random, so that nothing is downloaded: lengths, truncation, parity and timings are real, similarities
are not. With a connection the same two steps are

    python conversion/stretch.py openai/clip-vit-base-patch16 --output long-clip
    AutoModel.from_pretrained("long-clip", trust_remote_code=True)
"""

import argparse
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.random_clip import SENTENCES, SIZES, write_checkpoint

WANTED_LENGTHS = (10, 40, 77, 120, 248, 400)  # tokens, BOS and EOT included
PHOTO_SIZES = ((1600, 1200), (1200, 1600), (1920, 1080), (1024, 1024))  # pixels


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of both checkpoints")
    parser.add_argument("--size", choices=SIZES, default="ViT-B/16")
    options = parser.parse_args(args)

    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModel, AutoProcessor, CLIPModel
    from transformers.utils import logging

    from conversion.stretch import main as stretch
    from modeling_longclip.compat import features

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        began = time.perf_counter()
        with console.status(f"{what} ..."):
            yield
        seconds[what] = time.perf_counter() - began

    clip, longclip = options.output / "clip", options.output / "longclip"
    shutil.rmtree(clip, ignore_errors=True)
    with timed(f"make a random CLIP {options.size}"):
        write_checkpoint(clip, options.size)
    command = [str(clip), "--output", str(longclip), "--overwrite"]
    console.print(f"[bold]$ python conversion/stretch.py {' '.join(command)}[/]", highlight=False)
    began = time.perf_counter()
    if code := stretch(command):
        return code
    seconds["stretch it"] = time.perf_counter() - began

    with timed("load it with its own code (AutoModel, trust_remote_code=True)"):
        model = AutoModel.from_pretrained(longclip, trust_remote_code=True).eval()
    with timed("load it with stock code (CLIPModel)"):
        stock = CLIPModel.from_pretrained(longclip).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = AutoProcessor.from_pretrained(longclip)
    tokenizer = processor.tokenizer

    captions = [caption_of(tokenizer, length) for length in WANTED_LENGTHS]
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
    limit = tokenizer.model_max_length
    table = Table("caption", "tokens", "lost at 77", f"lost at {limit}", title="Captions", title_justify="left")
    for caption, length in zip(captions, lengths, strict=True):
        lost = [f"{max(0, length - kept)} ({max(0, length - kept) / length:.0%})" for kept in (77, limit)]
        table.add_row(f"{caption[:26]} ...", str(length), *lost)
    console.print(table)
    cut = sum(length > limit for length in lengths)
    console.print(
        f"{sum(length > 77 for length in lengths)} of {len(captions)} captions are longer than 77 tokens. Truncation "
        f"to {limit} was asked for (truncation=True): {cut} caption was cut, its EOT kept.",
        highlight=False,
    )

    images = photos()
    with timed(f"prepare {len(images)} photos and {len(captions)} captions"):
        inputs = processor(text=captions, images=images, padding=True, truncation=True, return_tensors="pt")
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        with timed(f"embed {len(images)} photos"):
            image_embeds = features(model.get_image_features(pixel_values=inputs["pixel_values"]))
        with timed(f"embed {len(captions)} captions, {text['input_ids'].shape[1]} tokens each"):
            text_embeds = features(model.get_text_features(**text))
        difference = (text_embeds - features(stock.get_text_features(**text))).abs().max().item()
        similarity = model(**inputs).logits_per_image
    console.print(
        f"{type(model).__name__} and {type(stock).__name__} agree: largest difference {difference:.1f}. "
        f"image_embeds {tuple(image_embeds.shape)}, text_embeds {tuple(text_embeds.shape)}, "
        f"logits_per_image {tuple(similarity.shape)}.",
        highlight=False,
    )

    timings = Table("step", "seconds", title="Timings", title_justify="left")
    for what, value in seconds.items():
        timings.add_row(what, f"{value:.2f}")
    console.print(timings)
    console.print(f"Wrote {clip}, {longclip}.", highlight=False)
    return 0


def caption_of(tokenizer: Any, length: int) -> str:
    """A caption of about `length` tokens, made of whole words."""
    words = " and then ".join(SENTENCES * 4).split()
    low, high = 1, len(words)
    while low < high:  # the most words that fit
        middle = (low + high + 1) // 2
        fits = len(tokenizer(" ".join(words[:middle]), verbose=False).input_ids) <= length
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join(words[:low])


def photos() -> list[Any]:
    """Images of the sizes that cameras make: colour gradients with noise, the same in every run."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    images = []
    for width, height in PHOTO_SIZES:
        ramp = np.linspace(0, 160, width)[None, :, None] * random.random((1, 1, 3))
        ramp = ramp + np.linspace(0, 60, height)[:, None, None]
        noise = random.integers(0, 32, (height, width, 3))
        images.append(Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8)))
    return images


if __name__ == "__main__":
    sys.exit(main())
