"""How many operations a training step takes by its arithmetic, and how many a second this machine does at best."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from longclip_hf.training.collator import length_groups
from modeling_longclip import LongCLIPConfig

Batch = dict[str, Any]  # of `CaptionCollator`'s kind


def tower_operations(tower: Any, tokens: int, squares: int) -> float:
    """Of one forward pass; `squares` is the sum of the sequences' squared lengths."""
    width, mlp = tower.hidden_size, tower.intermediate_size
    return float(tower.num_hidden_layers * (tokens * (8 * width**2 + 4 * width * mlp) + 4 * squares * width))


def text_sizes(batch: Batch, groups: int) -> tuple[int, int]:
    """Tokens, padding included, and the sum of squared lengths, as `encode_texts` cuts the captions."""
    tokens = squares = 0
    for name in ("", "short_"):
        lengths = batch[f"{name}lengths"]
        order, sizes = length_groups(lengths, groups)
        for part in np.split(lengths[order], np.cumsum(sizes)[:-1]):
            tokens += len(part) * int(part.max())
            squares += len(part) * int(part.max()) ** 2
    return tokens, squares


def step_operations(config: LongCLIPConfig, batch: Batch, groups: int, passes: int) -> float:
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    count = len(batch["pixel_values"])
    images = tower_operations(vision, count * (patches + 1), count * (patches + 1) ** 2)
    images += 2 * count * patches * vision.hidden_size * 3 * vision.patch_size**2
    return passes * (images + tower_operations(config.text_config, *text_sizes(batch, groups)))


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations per second of one large square product."""
    side = 8192 if device.startswith("cuda") else 2048
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(seconds(lambda: first @ second, device) for _ in range(8))
    return float(2 * side**3 / best)


def seconds(run: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
