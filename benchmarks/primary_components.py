"""Primary components, ours beside `torch.linalg.svd` with its own gradient as in the released code: time and error.

    python -m benchmarks.primary_components [--shapes 2048x768 ...] [--repeats 9] [--device cuda] [--json FILE]

Milliseconds of the coarse features from the features, and of those and the gradient, in float32 features: medians of
runs that alternate, after a warm-up of each. Errors are those of the gradient relative to autograd through eigh in
float64 on the same features. The features have what CLIP's have: unit length, a common direction, and a variance per
component that falls off slowly.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional as F

from longclip_hf.training.components import primary_components

NUM_COMPONENTS = 32
SHAPES = ("2048x768", "1024x768", "256x512")
Coarse = Callable[[torch.Tensor], torch.Tensor]


def ours(features: torch.Tensor) -> torch.Tensor:
    return primary_components(features, NUM_COMPONENTS).features


def by_svd(features: torch.Tensor) -> torch.Tensor:
    mean = features.mean(0)
    components = torch.linalg.svd(features - mean, full_matrices=False)[2][:NUM_COMPONENTS].T
    return (features - mean) @ components @ components.T + mean


def by_eigh(features: torch.Tensor) -> torch.Tensor:
    """The reference, for float64: of the smaller of the two products, which has no null space but the centring's."""
    mean = features.mean(0)
    centred = features - mean
    if len(features) < features.shape[1]:
        components = torch.linalg.eigh(centred @ centred.T)[1][:, -NUM_COMPONENTS:]
        return components @ (components.T @ centred) + mean
    components = torch.linalg.eigh(centred.T @ centred)[1][:, -NUM_COMPONENTS:]
    return centred @ components @ components.T + mean


def image_features(samples: int, dim: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.randn(samples, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.5
    features = deviations + 2 * F.normalize(torch.randn(dim, generator=generator), dim=0)
    return F.normalize(features, dim=-1).to(device)


def gradient(coarse: Coarse, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    features = features.detach().requires_grad_()
    return torch.autograd.grad((coarse(features) * weights.to(features)).sum(), features)[0]


def milliseconds(run: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    result = run()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return (time.perf_counter() - began) * 1e3


def measure(shape: str, repeats: int, device: str) -> dict[str, float | str]:
    samples, dim = map(int, shape.split("x"))
    features = image_features(samples, dim, device)
    weights = torch.randn(samples, dim, generator=torch.Generator().manual_seed(1)).to(device)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "ours_forward": lambda: ours(features),
        "svd_forward": lambda: by_svd(features),
        "ours_both": lambda: gradient(ours, features, weights),
        "svd_both": lambda: gradient(by_svd, features, weights),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            took = milliseconds(run)
            if repeat:  # the first of each is the warm-up
                times[name].append(took)
    expected = gradient(by_eigh, features.double(), weights)
    errors = {
        f"{name}_error": ((gradient(coarse, features, weights) - expected).norm() / expected.norm()).item()
        for name, coarse in (("ours", ours), ("svd", by_svd))
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"shape": shape, **medians, "ratio": medians["svd_both"] / medians["ours_both"], **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="samples x embedding size")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()

    rows = []
    print(
        "| samples x size | ours forward ms | + backward | svd forward ms | + backward | ratio | errors ours | svd |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        row = measure(shape, options.repeats, options.device)
        rows.append(row)
        print(
            f"| {shape} | {row['ours_forward']:.1f} | {row['ours_both']:.1f} | {row['svd_forward']:.1f} | "
            f"{row['svd_both']:.1f} | {row['ratio']:.1f} | {row['ours_error']:.0e} | {row['svd_error']:.0e} |",
            flush=True,
        )
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else platform.machine()
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\n{date.today()}, {machine}, {NUM_COMPONENTS} components, medians of {options.repeats}")
    if options.json:
        options.json.write_text(json.dumps({"date": str(date.today()), "machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
