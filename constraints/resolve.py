"""Resolves the releases that the tests run on: every `NAME.in` here, with setup.cfg, to `NAME.txt`.

    make constraints

The newest that fit each other; of `*-oldest.in`, the lower bounds of what setup.cfg names. Nothing is installed. torch
and what its CUDA builds ask for are left out: the Makefile's TORCH says which torch, and where from.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = ("dev", "train", "evaluate", "diffusion", "export", "docs", "search")  # those of tox.ini
TORCHS_OWN = re.compile(r"(torch|triton|cuda-[\w-]+|nvidia-[\w-]+)==")
PINNED = re.compile(r"[a-z0-9-]+==[\w.!+]+")


def resolve(source: Path) -> list[str]:
    """The pinned releases, `name==version` each."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--no-emit-index-url",
    ]
    command += ["--python-version", "3.11"]  # the oldest supported: newer ones take these releases too
    command += ["--resolution", "lowest-direct" if source.stem.endswith("-oldest") else "highest"]
    command += [f"--extra={extra}" for extra in EXTRAS]
    asked = f"{os.environ['TORCH']}\n{source.read_text(encoding='utf-8')}"
    done = subprocess.run(
        [*command, "--constraint", "-", str(HERE.parent / "setup.cfg")],
        input=asked, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{source.name}: nothing fits; what was asked is above")
    lines = [line for line in done.stdout.splitlines() if not TORCHS_OWN.match(line)]
    if strange := [line for line in lines if not PINNED.fullmatch(line)]:
        sys.exit(f"{source.name}: not name==version: {strange}")
    return lines


if __name__ == "__main__":
    for source in sorted(HERE.glob("*.in")):
        lines = resolve(source)
        source.with_suffix(".txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{source.with_suffix('.txt').name}: {len(lines)} releases")
