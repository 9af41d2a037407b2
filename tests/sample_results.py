"""Results as three models on three benchmarks could have them: made up, none of the numbers was measured."""

import math

from longclip_hf.results import (
    DIRECTIONS,
    BenchmarkInfo,
    Difference,
    Direction,
    EffectiveLength,
    Model,
    Results,
    Score,
    Value,
)

MODELS = {"openai/clip-vit-base-patch16": 77, "long-clip-vit-base-patch16": 248, "runs/urban/checkpoint-600": 248}
RECALL = {  # image to text R@1, R@5, R@10, text to image R@1, R@5, R@10
    "Urban1k": [
        (0.681, 0.872, 0.928, 0.536, 0.757, 0.831),
        (0.674, 0.869, 0.921, 0.549, 0.771, 0.840),
        (0.789, 0.946, 0.972, 0.795, 0.937, 0.968),
    ],
    "COCO 2017 5k": [
        (0.524, 0.768, 0.847, 0.327, 0.577, 0.682),
        (0.520, 0.766, 0.844, 0.330, 0.580, 0.685),
        (0.576, 0.811, 0.878, 0.404, 0.658, 0.752),
    ],
}
CIFAR = [(0.908, 0.997), (0.908, 0.997), (0.900, 0.995)]
LENGTHS = {"Urban1k": (128.0, 24.0, 1000), "COCO 2017 5k": (13.0, 2.6, 25010)}  # mean, deviation, captions


def interval(value: float, n: int) -> Value:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return Value(value, max(value - half, 0.0), min(value + half, 1.0))


def histogram(mean: float, deviation: float, captions: int) -> list[int]:
    shares = [math.exp(-(((n - mean) / deviation) ** 2) / 2) if n > 3 else 0.0 for n in range(300)]
    counts = [round(share / sum(shares) * captions) for share in shares]
    counts[round(mean)] += captions - sum(counts)
    return counts


def curve(recall: list[float], positions: int, knee: float, n: int) -> EffectiveLength:
    lengths = [5, 10, 15, 20, 30, 40, 50, 60, 77, 100, 125, 150, 200, 248]
    grown = [1 - math.exp(-2 * min(length, positions) / knee) for length in lengths]
    sides: list[tuple[Direction, float]] = [("i2t", recall[0]), ("t2i", recall[3])]
    return EffectiveLength(
        lengths,
        {side: [interval(r1 * g / grown[-1], n) for g in grown] for side, r1 in sides},
        {side: Value(round(knee * 1.5), round(knee * 1.2), round(knee * 1.9)) for side, _ in sides},
    )


def sample_results() -> Results:
    models = [
        Model(name, "57c216476eefef5ab752ec549e440a49ae4ae5f3" if "/clip" in name else None, f"{i}f3a9c0d41b27e65",
              "LongCLIPModel" if positions == 248 else "CLIPModel", positions, "float32")
        for i, (name, positions) in enumerate(MODELS.items())
    ]  # fmt: skip
    benchmarks = [
        BenchmarkInfo(
            "Urban1k", "retrieval", 1000, 1000, None, "9c1e77aa02b4d3f0",
            "1000 images of streets, each with one long caption: the first line of its file.", "unknown",
            "https://github.com/beichenzbc/Long-CLIP", ["2 captions occur twice."], histogram(*LENGTHS["Urban1k"]),
        ),
        BenchmarkInfo(
            "COCO 2017 5k", "retrieval", 5000, 25010, None, "70b1d5c2e9f84a36",
            "The 5000 images of val2017, first 5 captions each. Image to text asks for any of them.", "CC BY 4.0",
            "https://cocodataset.org", [], histogram(*LENGTHS["COCO 2017 5k"]),
        ),
        BenchmarkInfo(
            "CIFAR-10", "classification", 10000, None, 10, "2ab4c6e8f0135791",
            "The 10000 test images, 18 templates.", "unknown", "https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
    ]  # fmt: skip
    scores, differences = [], []
    for info in benchmarks:
        for i, (name, positions) in enumerate(MODELS.items()):
            effective = None
            if info.kind == "retrieval":
                shares = list(RECALL[info.name][i])
                keys = [f"{side}_r{k}" for side in DIRECTIONS for k in (1, 5, 10)]
                metrics = {key: interval(share, info.images) for key, share in zip(keys, shares, strict=True)}
                metrics |= {f"{side}_median_rank": Value(3.0 - i, 1.0, 4.0 - i) for side in DIRECTIONS}
                if info.name == "Urban1k":
                    effective = curve(shares, positions, [16.0, 18.0, 100.0][i], info.images)
            else:
                metrics = {
                    k: interval(share, info.images) for k, share in zip(("top1", "top5"), CIFAR[i], strict=True)
                }
            beyond = sum(info.lengths[positions + 1 :])
            scores.append(Score(name, info.name, metrics, 3 * (i == 1), beyond, 12.5, effective))
            first = scores[-1 - i].metrics
            differences += [
                Difference(
                    name,
                    models[0].name,
                    info.name,
                    key,
                    Value(d, d - 0.012, d + 0.012),
                    0.0001 if abs(d) > 0.012 else 0.5,
                )
                for key, value in metrics.items()
                if i and "rank" not in key and (d := value.value - first[key].value) is not None
            ]
    return Results(
        date="2025-03-01T12:00:00+00:00",
        command="longclip-evaluate openai/clip-vit-base-patch16 long-clip-vit-base-patch16 runs/urban/checkpoint-600",
        versions={"longclip-hf": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0", "python": "3.11.2"},
        hardware="2 CPU cores", models=models, benchmarks=benchmarks, scores=scores, differences=differences,
    )  # fmt: skip
