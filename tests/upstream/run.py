"""Runs transformers' own common tests against stock CLIP and against ours, and compares test by test.

    python tests/upstream/run.py [--source FOLDER] [--show]

The rule: no test that stock CLIP passes may fail, be skipped or be missing for our classes.  The tests come from the
source distribution of the installed release, which is downloaded once into `.upstream/`.  Needs pytest and
parameterized beside what the library itself needs; Pillow for the test of the image pipeline.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".upstream"

# How many tests of a class stock CLIP has to pass: a little below what it passes on 4.57, the release with the fewest.
# Without a floor, a release whose tests all skip would look like success.
FLOOR = {
    "TextModelTest": 60,
    "TextModelWithProjectionTest": 60,
    "ModelTest": 60,
    "TextConfigTest": 10,
    "ConfigTest": 10,
}
TIME_LIMIT = 1800  # seconds; a run takes well below one minute

Outcomes = Mapping[str, Mapping[str, Any]]


def fetch(version: str) -> Path:
    """The folder `tests` of the source distribution, downloaded if it is not there yet."""
    place = CACHE / f"transformers-{version}"
    if (place / "tests").is_dir():
        return place / "tests"
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", str(folder), f"transformers=={version}"], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as distribution:
            members = [member for member in distribution if member.name.split("/")[1:2] == ["tests"]]
            distribution.extractall(folder / "unpacked", members, filter="data")
        (tests,) = (folder / "unpacked").glob("*/tests")
        # Renamed into place at the end, such that a run which is cut off leaves nothing half unpacked.
        shutil.rmtree(place, ignore_errors=True)
        tests.parent.rename(place)
    return place / "tests"


def start(family: str, source: Path, folder: Path) -> subprocess.Popen[str]:
    """Starts pytest for one family; it writes `FAMILY.json` into `folder`."""
    # A root folder and settings of its own: neither this project's settings nor its conftest files have a say.
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    command += ["-p", "plugin", "-p", "no:cacheprovider", "--noconftest", "--disable-warnings", "-q", "--tb=short"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / f"{family}-hub"),  # nothing that lies in a cache by chance takes part
        "RUN_SLOW": "1",  # not slow for models this small
        "RUN_PIPELINE_TESTS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # the same tests everywhere; those for accelerators skip
        "OMP_NUM_THREADS": "1",
        families.VARIABLE: family,
        "LONGCLIP_UPSTREAM_SOURCE": str(source),
        "LONGCLIP_UPSTREAM_OUTCOMES": str(folder / f"{family}.json"),
    }
    with (folder / f"{family}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, str(HERE / "clip_common.py")],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def run(source: Path) -> dict[str, Outcomes]:
    """Runs both families at once, each in one process, and returns how each test ended."""
    with tempfile.TemporaryDirectory(prefix="longclip-upstream-") as name:
        folder = Path(name)
        processes = {family: start(family, source, folder) for family in families.NAMES}
        try:
            codes = {family: process.wait(TIME_LIMIT) for family, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
        for family, code in codes.items():
            # 0: all passed, 1: some failed; with anything else there is nothing to compare.
            if code not in (0, 1) or not (folder / f"{family}.json").exists():
                print((folder / f"{family}.log").read_text(encoding="utf-8")[-6000:])
                sys.exit(f"pytest ended with {code} for {family}.")
        return {
            family: json.loads((folder / f"{family}.json").read_text(encoding="utf-8")) for family in families.NAMES
        }


def compare(stock: Outcomes, ours: Outcomes, *, show: bool) -> bool:
    """Prints the table and every difference; whether the rule holds."""
    absent = {"outcome": "missing", "reason": "no such test"}
    rows = {name: (stock.get(name, absent), ours.get(name, absent)) for name in [*stock, *(ours.keys() - stock)]}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, outcomes in rows.items():
        group = counts[name.partition("::")[0]]
        for family, outcome in zip(families.NAMES, outcomes, strict=True):
            group[f"{family} {outcome['outcome']}"] += 1
        if outcomes[0]["outcome"] == "passed":
            group["compared"] += 1
            group["lost"] += outcomes[1]["outcome"] != "passed"
        group["skipped in both"] += all(outcome["outcome"] == "skipped" for outcome in outcomes)

    outcomes_shown = ("passed", "failed", "skipped")
    print(f"{'':29}{'stock CLIP':^24}{'ours':^24}")
    print(f"{'':29}{''.join(f'{outcome:>8}' for outcome in outcomes_shown * 2)}{'compared':>10}{'lost':>6}")
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    for label, group in [*counts.items(), ("total", total)]:
        numbers = [group[f"{family} {outcome}"] for family in families.NAMES for outcome in outcomes_shown]
        print(f"{label:29}{''.join(f'{n:8}' for n in numbers)}{group['compared']:10}{group['lost']:6}")
    print(f"skipped in both, hence not compared: {total['skipped in both']}")

    lost = {n: our for n, (theirs, our) in rows.items() if theirs["outcome"] == "passed" != our["outcome"]}
    for title, chosen in (
        ("Stock CLIP passes, ours does not", lost),
        (
            "Stock CLIP fails as well, hence not compared",
            {n: t for n, (t, _) in rows.items() if t["outcome"] == "failed"},
        ),
        (
            "Stock CLIP skips and ours fails, hence not compared",
            {n: o for n, (t, o) in rows.items() if (t["outcome"], o["outcome"]) == ("skipped", "failed")},
        ),
    ):
        if chosen:
            print(f"\n{title}:")
        for name, outcome in chosen.items():
            print(f"  {name} {outcome['outcome']}: {outcome['reason']}")
            if show and "text" in outcome:
                print("".join(f"    | {line}\n" for line in outcome["text"].splitlines()))

    few = {name: floor for name, floor in FLOOR.items() if counts[name]["compared"] < floor}
    for name, floor in few.items():
        print(f"\n{name}: {counts[name]['compared']} tests compared, expected at least {floor}.")
    return not lost and not few


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, help="an unpacked source distribution of the installed release, instead of a download"
    )
    parser.add_argument("--show", action="store_true", help="also print the tracebacks of the tests that differ")
    arguments = parser.parse_args()

    version = importlib.metadata.version("transformers")
    source = arguments.source.resolve() / "tests" if arguments.source else fetch(version)
    if not (source / "test_modeling_common.py").is_file():
        parser.error(f"no test_modeling_common.py in {source}")
    print(f"transformers {version}, torch {importlib.metadata.version('torch')}")
    outcomes = run(source)
    holds = compare(*(outcomes[family] for family in families.NAMES), show=arguments.show)
    print("\nThe rule holds." if holds else "\nThe rule is broken.")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
