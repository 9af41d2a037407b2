"""Reading images: rows per second from the encoded file to what a batch holds, beside Pillow; and what a bomb costs.

    python -m benchmarks.reading [--seconds 4] [--side 224]

One process, noise that was blurred to compress as photographs do. `Pillow, crop` opens, transposes by EXIF, converts
and cuts the middle out, with no check and no scaling; `processor` is `decode_image` and CLIP's image processor, as it
was before `Pixels`; `ours` is `decode_image` and `Pixels`; `for the target` the same with `target` the side that
models see. Calls alternate. `change` is what each of the last two changes of the processor's pixels, in levels of 255:
the mean, and that of one in a hundred.
"""

import argparse
import io
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from transformers import CLIPImageProcessor

from longclip_hf.images import MAX_PIXELS, decode_image
from longclip_hf.training.pixels import Pixels

SIZES = ((224, 224), (640, 480), (2000, 1500), (6000, 4000))


def photograph(width: int, height: int) -> bytes:
    """A JPEG of noise at three scales."""
    rng = np.random.default_rng(0)
    scales = [rng.integers(0, 256, (height // k + 1, width // k + 1, 3), dtype=np.uint8) for k in (1, 8, 64)]
    layers = [np.asarray(Image.fromarray(scale).resize((width, height), Image.Resampling.BICUBIC)) for scale in scales]
    mixed = sum(layer.astype(np.float32) * share for layer, share in zip(layers, (0.2, 0.3, 0.5), strict=True))
    image = Image.fromarray(np.asarray(mixed).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def pillow_crop(content: bytes, side: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    left, top = ((size - side) // 2 for size in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def rates(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Calls per second, of medians; each kind is called in turn, so that what else runs on the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds * len(calls) or len(times[next(iter(calls))]) < 4:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1 / float(np.median(taken[1:])) for name, taken in times.items()}


def bytes_of(processor: Any, image: Image.Image) -> torch.Tensor:
    made = processor(images=image, return_tensors="pt", do_rescale=False, do_normalize=False)
    pixels: torch.Tensor = made["pixel_values"][0]
    return pixels


def ways(content: bytes, side: int, processor: Any, pixels: Pixels) -> dict[str, Callable[[], object]]:
    return {
        "pillow": lambda: pillow_crop(content, side),
        "processor": lambda: processor(images=decode_image(content, "a"), return_tensors="pt"),
        "ours": lambda: pixels(decode_image(content, "a")),
        "target": lambda: pixels(decode_image(content, "a", target=side)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--side", type=int, default=224, help="what the model sees")
    options = parser.parse_args()
    side = options.side
    torch.set_num_threads(1)
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pixels = Pixels(processor)

    file = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 9000, 9000)).save(file, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    pixels(decode_image(file.getvalue(), "bomb"))
    seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(
        f"A PNG of {len(file.getvalue()):,} bytes and {MAX_PIXELS // 9000 * 9000:,} pixels: {seconds:.1f} s, "
        f"{peak:,.0f} MB above the peak before.\n"
    )

    print("| JPEG | Pillow, crop | processor | ours | for the target | ours / processor | Pillow / ours | change |")
    print("|---|---|---|---|---|---|---|---|")
    for width, height in SIZES:
        content = photograph(width, height)
        found = rates(ways(content, side, processor, pixels), options.seconds)
        exact = bytes_of(processor, decode_image(content, "a")).float()
        changes = []
        for target in (None, side):
            change = (pixels(decode_image(content, "a", target=target)).float() - exact).abs()
            changes.append(f"{change.mean():.3f}, {change.flatten().quantile(0.99):.0f}")
        columns = [f"{rate:,.1f}" for rate in found.values()]
        columns += [f"{found['ours'] / found['processor']:.1f}", f"{found['pillow'] / found['ours']:.2f}"]
        print(f"| {width} x {height} | {' | '.join(columns)} | {'; '.join(changes)} |", flush=True)


if __name__ == "__main__":
    main()
