"""What recall both ways costs, beside a plain blocked product with topk and the whole matrix: seconds and memory.

    python -m benchmarks.retrieval_metrics [--sizes 1000 10000 31783] [--threads 2] [--json FILE]
    python -m benchmarks.retrieval_metrics --faiss 200000

Random features of 768 dimensions, five captions per image; every case runs in a process of its own. Seconds are the
best of the repeats, which alternate; the plain ways normalise too, as a user would. Peak memory is the process's
highest resident size less that of an interpreter with torch imported, so it counts the features themselves, which are
given for comparison.

- ours: `longclip_hf.evaluation.retrieval.retrieval_ranks`: ranks, average precision and ties, both ways, exact.
- topk: for each way a product in blocks of 1024 queries with all candidates, and the ten best of each row.
- matrix: the whole matrix once, and the ten best of rows and columns; left out where the matrix is over 4 GB.

With --faiss N: N pairs searched among each other, one caption per image, text to image. It is the way to a million by
a million on a CPU (`pip install "longclip-hf[faiss]"`); on a GPU `retrieval_ranks` itself gets there. An inverted file
compares a query only with candidates of the nearest clusters, so its recall is approximate; the exact one of 10,000
queries is given beside it. These features are clustered, as a trained model's are: noise alone has no neighbourhoods.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DIM, CAPTIONS, K = 768, 5, 10
CHECKED = 10_000  # queries whose exact recall stands beside faiss's
LARGEST_MATRIX = 4e9
Features = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def random_features(images: int) -> Features:
    import torch

    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.randn(images, DIM, generator=generator)
    text_embeds = torch.randn(CAPTIONS * images, DIM, generator=generator)
    return image_embeds, text_embeds, torch.arange(images).repeat_interleave(CAPTIONS)


def ours(image_embeds: "torch.Tensor", text_embeds: "torch.Tensor", image_of: "torch.Tensor") -> tuple[float, float]:
    from longclip_hf.evaluation.retrieval import retrieval_ranks

    ranks = retrieval_ranks(image_embeds, text_embeds, image_of)
    return ranks["i2t"].recall(K), ranks["t2i"].recall(K)


def topk(image_embeds: "torch.Tensor", text_embeds: "torch.Tensor", image_of: "torch.Tensor") -> tuple[float, float]:
    import torch
    from torch.nn import functional as F

    images, texts = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)

    def best(queries: "torch.Tensor", candidates: "torch.Tensor") -> "torch.Tensor":
        return torch.cat([(part @ candidates.T).topk(K, dim=1).indices for part in queries.split(1024)])

    return _recalls(best(images, texts), best(texts, images), image_of)


def matrix(image_embeds: "torch.Tensor", text_embeds: "torch.Tensor", image_of: "torch.Tensor") -> tuple[float, float]:
    from torch.nn import functional as F

    similarity = F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    return _recalls(similarity.topk(K, dim=1).indices, similarity.T.topk(K, dim=1).indices, image_of)


def _recalls(texts: "torch.Tensor", images: "torch.Tensor", image_of: "torch.Tensor") -> tuple[float, float]:
    """From the rows of the ten best texts of each image, and images of each text."""
    import torch

    found_texts = (image_of[texts] == torch.arange(len(texts))[:, None]).any(dim=1)
    found_images = (images == image_of[:, None]).any(dim=1)
    return found_texts.double().mean().item(), found_images.double().mean().item()


WAYS: dict[str, Callable[..., tuple[float, float]]] = {"ours": ours, "topk": topk, "matrix": matrix}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_way(way: str, images: int, threads: int) -> dict[str, float]:
    """In a process of its own."""
    import torch

    torch.set_num_threads(threads)
    start = peak_bytes()
    features = random_features(images)
    began = time.perf_counter()
    i2t, t2i = WAYS[way](*features)
    seconds = time.perf_counter() - began
    nbytes = sum(part.nbytes for part in features)
    return {"seconds": seconds, "peak": peak_bytes() - start, "features": nbytes, "i2t": i2t, "t2i": t2i}


def run_faiss(rows: int, threads: int) -> dict[str, float]:
    """Text to image at K among `rows` pairs, in a process of its own; the exact recall after the peak is taken."""
    import torch
    from torch.nn import functional as F

    try:
        import faiss
    except ImportError as error:
        raise ImportError('This case needs faiss: pip install "longclip-hf[faiss]".') from error
    from longclip_hf.evaluation.retrieval import ranks_among

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    start = peak_bytes()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(rows // 100, 1), DIM, generator=generator)
    of = torch.randint(len(centres), (rows,), generator=generator)
    images = F.normalize(centres[of] + 0.8 * torch.randn(rows, DIM, generator=generator), dim=-1)
    texts = F.normalize(images + 4 * DIM**-0.5 * torch.randn(rows, DIM, generator=generator), dim=-1)

    began = time.perf_counter()
    lists = round(4 * rows**0.5)
    probed = max(lists // 50, 1)
    index = faiss.index_factory(DIM, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(images[torch.randperm(rows, generator=generator)[: 40 * lists]].numpy())
    index.add(images.numpy())
    built = time.perf_counter()
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", probed)
    found = torch.from_numpy(index.search(texts.numpy(), K)[1])
    searched = time.perf_counter()
    right = torch.arange(rows)
    recall = (found == right[:, None]).any(dim=1).double().mean().item()
    peak = peak_bytes() - start
    del index
    exact = ranks_among(texts[:CHECKED], images, right[:CHECKED]).recall(K)
    return {
        "lists": lists, "probed": probed, "build_seconds": built - began,
        "search_seconds": searched - built, "peak": peak, "recall": recall,
        "exact_seconds": time.perf_counter() - searched, "exact_recall": exact,
    }  # fmt: skip


def fresh(call: str, threads: int) -> dict[str, float]:
    """What `call` of this module returns, from a process of its own."""
    code = f"import json; from benchmarks import retrieval_metrics; print(json.dumps(retrieval_metrics.{call}))"
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=env)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(images: int, repeats: int, threads: int) -> dict[str, dict[str, float]]:
    ways = [way for way in WAYS if way != "matrix" or 4 * CAPTIONS * images**2 <= LARGEST_MATRIX]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(fresh(f"run_way({way!r}, {images}, {threads})", threads))
    return {
        way: {**done[0], "seconds": min(run["seconds"] for run in done), "peak": max(run["peak"] for run in done)}
        for way, done in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 10_000, 31_783], help="numbers of images")
    parser.add_argument("--faiss", type=int, metavar="N", help="search N pairs with faiss, instead of the sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()

    rows: list[dict[str, object]] = []
    if options.faiss:
        figures = fresh(f"run_faiss({options.faiss}, {options.threads})", options.threads)
        rows.append({"pairs": options.faiss, **figures})
        print(
            "| pairs | clusters, searched | build s | search s | peak MB above torch | R@10 | exact R@10 of 10,000 | "
            "ours s |"
        )
        print("|---|---|---|---|---|---|---|---|")
        print(
            f"| {options.faiss:,} | {figures['lists']}, {figures['probed']} | {figures['build_seconds']:.1f} | "
            f"{figures['search_seconds']:.1f} | {figures['peak'] / 1e6:,.0f} | {figures['recall']:.4f} | "
            f"{figures['exact_recall']:.4f} | {figures['exact_seconds']:.1f} |"
        )
    else:
        print("| images x captions | way | seconds | to topk | peak MB above torch | features MB | R@10 I2T, T2I |")
        print("|---|---|---|---|---|---|---|")
        for images in options.sizes:
            figures_of = measure(images, options.repeats, options.threads)
            for way, figures in figures_of.items():
                rows.append({"images": images, "way": way, **figures})
                print(
                    f"| {images:,} x {CAPTIONS * images:,} | {way} | {figures['seconds']:.2f} | "
                    f"{figures['seconds'] / figures_of['topk']['seconds']:.2f} | {figures['peak'] / 1e6:,.0f} | "
                    f"{figures['features'] / 1e6:,.0f} | {figures['i2t']:.5f}, {figures['t2i']:.5f} |",
                    flush=True,
                )
    machine = f"{platform.machine()}, {platform.system()} {platform.release()}, {options.threads} threads"
    repeats = "" if options.faiss else f", best of {options.repeats}"
    print(f"\n{date.today()}, {machine}{repeats}")
    if options.json:
        options.json.write_text(json.dumps({"date": str(date.today()), "machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
