"""One process of `test_gathering`: a training step of every strategy and scope on this process's share of one batch.

    python processes.py STORE RANK WORLD_SIZE OUTPUT

Writes losses and gradients, averaged over the processes by DDP, and what the guards said. Run as a script, because
what is spawned must be importable, which a test is not.
"""

import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from longclip_hf.training.components import primary_components, second_moments
from longclip_hf.training.gathering import (
    all_gather_with_grad,
    all_reduce_with_grad,
    check_equal_rows,
    rank,
    world_size,
)
from longclip_hf.training.losses import (
    LossTerms,
    bounded_loss,
    contrastive_loss,
    long_only_loss,
    mixed_length_rows,
    primary_component_loss,
    undistinguished_loss,
)
from longclip_hf.training.settings import Strategy

BATCH, WIDTH, DIM = 24, 7, 6
CASES = {
    "primary-component-local": (Strategy.PRIMARY_COMPONENT, 3),
    "primary-component-local-share": (Strategy.PRIMARY_COMPONENT, 0.7),
    "primary-component-global": (Strategy.PRIMARY_COMPONENT, 3),
    "primary-component-global-share": (Strategy.PRIMARY_COMPONENT, 0.7),
    "undistinguished": (Strategy.UNDISTINGUISHED, 0),
    "mixed-length": (Strategy.MIXED_LENGTH, 0),
    "bounded": (Strategy.BOUNDED, 0),
    "long-only": (Strategy.LONG_ONLY, 0),
    "himo-local": (Strategy.HIMO, 0.9),
    "himo-global": (Strategy.HIMO, 0.9),
    "margin-undistinguished": (Strategy.UNDISTINGUISHED, 0),
}


class TwoTowers(nn.Module):
    """The least that has an image tower, a text tower and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(WIDTH, DIM)
        self.text = nn.Linear(WIDTH, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor, *texts: torch.Tensor) -> list[torch.Tensor]:
        return [self.vision(images).tanh(), *(self.text(text).tanh() for text in texts), self.logit_scale.exp()]


def step(case: str, model: nn.Module, local: slice, local_scopes: int) -> LossTerms:
    """The loss of the rows `local`; `local_scopes` is into how many parts the local scope divides these rows."""
    strategy, num_components = CASES[case]
    generator = torch.Generator().manual_seed(1)
    images, longs, shorts, originals = (torch.randn(BATCH, size, generator=generator) for size in (*[WIDTH] * 3, DIM))
    replaced = mixed_length_rows(BATCH, 0.3, generator=generator)
    if strategy == Strategy.MIXED_LENGTH:
        longs = torch.where(replaced[:, None], shorts, longs)
    if strategy in (Strategy.MIXED_LENGTH, Strategy.LONG_ONLY, Strategy.HIMO):
        shorts = longs  # encoded, but part of no loss: parameters must not count as unused
    image, long, short, scale = model(images[local], longs[local], shorts[local])
    short_features = short
    image, long, short = (F.normalize(features, dim=-1) for features in (image, long, short))

    def contrast(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(
            image_embeds,
            text_embeds,
            scale,
            0.1,
            all_gather_with_grad(image_embeds),
            all_gather_with_grad(text_embeds),
            rank() * len(image_embeds),
            0.5 if "margin" in case else 0.0,
        )

    if strategy == Strategy.UNDISTINGUISHED:
        return undistinguished_loss(contrast, image, long, short, short_weight=0.5)
    if strategy == Strategy.BOUNDED:
        return bounded_loss(contrast, image, long, short_features, originals[local], short_weight=0.5)
    if strategy not in (Strategy.PRIMARY_COMPONENT, Strategy.HIMO):
        return long_only_loss(contrast, image, long)
    reduced = long if strategy == Strategy.HIMO else image
    if "global" in case:
        coarse = primary_components(reduced, num_components, all_reduce_with_grad(second_moments(reduced))).features
    else:
        coarse = torch.cat([primary_components(part, num_components).features for part in reduced.chunk(local_scopes)])
    if strategy == Strategy.HIMO:
        return primary_component_loss(contrast, image, image, long, coarse, short_weight=0.5)
    return primary_component_loss(contrast, image, coarse, long, short, short_weight=0.5)


def guards() -> dict[str, str]:
    """What every process says of a batch that is uneven, and of one with NaN on the last process only."""
    said = {}
    try:
        check_equal_rows(3 + rank(), torch.device("cpu"))
    except ValueError as error:
        said["uneven"] = str(error)
    features = torch.randn(8, 4)
    if rank() == world_size() - 1:
        features[5, 0] = torch.nan
    moments = all_reduce_with_grad(second_moments(features))
    try:
        primary_components(features, 2, moments)
    except ValueError as error:
        said["not finite"] = str(error)
    return said


def main(store: str, index: int, processes: int, output: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    results: dict[str, dict[str, torch.Tensor]] = {}
    if processes > 1:
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", f"file://{store}", rank=index, world_size=processes, timeout=limit)
    for case in CASES:
        torch.manual_seed(0)
        towers = TwoTowers()
        model = DistributedDataParallel(towers) if processes > 1 else towers
        local = BATCH // processes
        terms = step(case, model, slice(index * local, (index + 1) * local), 2 // processes)
        terms.loss.backward()
        # The mean over processes, as DDP takes it of the gradients.
        results[case] = {"loss": all_reduce_with_grad(terms.loss.detach()) / processes}
        results[case] |= {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    said = guards()
    torch.save((results, said), output)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
