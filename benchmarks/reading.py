"""Reading images: rows per second from the encoded file to pixel values, beside Pillow alone; and what a bomb costs.

    python -m benchmarks.reading [--seconds 4] [--side 224]

One process, noise that was blurred to compress as photographs do. `Pillow` opens, transposes by EXIF and converts;
`decode` is `decode_image`, `for the target` the same with `target` the side that models see; `+ pixels` adds CLIP's
processor. `change` is what reading for the target changes of those pixels, in levels of 255: its mean and 99 %.
"""

import argparse
import io
import resource
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from transformers import CLIPImageProcessor

from longclip_hf.images import MAX_PIXELS, decode_image
from longclip_hf.training.collator import CaptionCollator

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


def pillow(content: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")


def both(pixels: Callable[[Image.Image], object], decode: Callable[[], Image.Image]) -> object:
    return pixels(decode())


def per_second(call: Callable[[], object], seconds: float) -> float:
    call()
    times = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1 / float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--side", type=int, default=224, help="what the model sees")
    options = parser.parse_args()
    side = options.side
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    pixels = CaptionCollator(tokenizer, processor, 248).pixels

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

    print("| JPEG | Pillow | decode | decode + pixels | for the target | for the target + pixels | change |")
    print("|---|---|---|---|---|---|---|")
    for width, height in SIZES:
        content = photograph(width, height)
        decode = partial(decode_image, content, "a")
        reduced_decode = partial(decode, target=side)
        calls: list[Callable[[], object]] = [
            partial(pillow, content),
            decode,
            partial(both, pixels, decode),
            reduced_decode,
            partial(both, pixels, reduced_decode),
        ]
        rates = " | ".join(f"{per_second(call, options.seconds):,.1f}" for call in calls)
        whole, reduced = pixels(pillow(content)), pixels(reduced_decode())
        levels = (whole - reduced).abs() * 255 * 0.27  # the processor divides by about 0.27
        change = f"{levels.mean():.2f}, {levels.flatten().quantile(0.99):.2f}"
        print(f"| {width} x {height} | {rates} | {change} |", flush=True)


if __name__ == "__main__":
    main()
