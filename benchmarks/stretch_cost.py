"""What stretching a checkpoint costs, beside `cp` of the same file: seconds and peak memory, at the real shapes.

    python -m benchmarks.stretch_cost [--sizes ViT-L/14 ...] [--repeats 5] [--json FILE]

Random weights. Every run is a fresh process; runs of `cp` and of the conversion alternate, after a warm-up of each, so
that both find the source in the page cache; both write a new file. Seconds of the conversion are those of `stretch()`,
proofs included, without the start of the interpreter and the imports. Peak memory is the process's highest resident
size less that of an interpreter with torch imported.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from examples.random_clip import SIZES

# Prints seconds, peak resident bytes, and what the conversion says of its parts.
RUN = """
import json, resource, sys, time
import torch, transformers
from transformers import CLIPModel
from longclip_hf.conversion import checkpoint, folder, parity
from longclip_hf.conversion.stretch import stretch
began = time.perf_counter()
report = stretch(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "parts": report.seconds}))
"""
BASELINE = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def fresh(code: str, *args: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, text=True).stdout


def measure(size: str, dtype: str, repeats: int, work: Path) -> dict[str, float | str]:
    """Medians for one size; `work` is on the disk that is measured."""
    source, output, copied = work / "clip", work / "longclip", work / "copy.safetensors"
    subprocess.run(
        [sys.executable, "-m", "examples.random_clip", size, str(source), "--dtype", dtype],
        check=True, capture_output=True,
    )  # fmt: skip
    weights = source / "model.safetensors"
    copies, runs = [], []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(["cp", str(weights), str(copied)], check=True)
        seconds = time.perf_counter() - began
        copied.unlink()
        run = json.loads(fresh(RUN, str(source), str(output)))
        shutil.rmtree(output)
        if repeat:  # the first of each is the warm-up
            copies.append(seconds)
            runs.append(run)
    nbytes = weights.stat().st_size
    shutil.rmtree(source)
    copy, ours = statistics.median(copies), statistics.median(run["seconds"] for run in runs)
    parts = {f"{part}_seconds": statistics.median(run["parts"][part] for run in runs) for part in runs[0]["parts"]}
    peak = max(run["peak"] for run in runs) - float(fresh(BASELINE))
    return {
        "size": size, "dtype": dtype, "megabytes": nbytes / 1e6, "cp_seconds": copy, "stretch_seconds": ours,
        "ratio": statistics.median(run["seconds"] / seconds for run, seconds in zip(runs, copies, strict=True)),
        **parts, "peak_megabytes": peak / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["ViT-B/16", "ViT-L/14"])
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--work", type=Path, help="folder on the disk to measure (default: the system's temporary one)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()

    rows = []
    print("| size | dtype | file MB | cp s | stretch s | ratio | read / write / prove s | peak MB above torch |")
    print("|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            row = measure(size, options.dtype, options.repeats, Path(work))
        rows.append(row)
        parts = " / ".join(f"{row[f'{part}_seconds']:.2f}" for part in ("read", "write", "prove"))
        print(
            f"| {size} | {row['dtype']} | {row['megabytes']:,.0f} | {row['cp_seconds']:.2f} | "
            f"{row['stretch_seconds']:.2f} | {row['ratio']:.2f} | {parts} | {row['peak_megabytes']:,.0f} |",
            flush=True,
        )
    machine = f"{platform.machine()}, {platform.system()} {platform.release()}"
    print(f"\n{date.today()}, {machine}, medians of {options.repeats}")
    if options.json:
        options.json.write_text(json.dumps({"date": str(date.today()), "machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
