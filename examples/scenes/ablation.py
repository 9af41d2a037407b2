"""The paper's tables 4 and 5 in this world, and sweeps of keep, ratio and components, over several seeds.

    python -m examples.scenes.ablation --output ablation [--seeds 0 1 2] [--jobs 2] [--only tables]

Every row is a run of conversion/stretch.py, training/train.py and evaluation/run.py with the settings of recipe.yaml
and the ones that its name stands for, on the same pictures and budget; all commands are written down. A run that is
done is not run again, so an interrupted ablation goes on when the same command is given again.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from examples.scenes import CLIP, RECIPE
from examples.scenes.ablation_rows import ROWS, TESTS, Row
from examples.scenes.ablation_summary import summarise

if TYPE_CHECKING:
    pass

TEST_ROWS = {"long": 300, "hard": 300}
TRAIN_ROWS = 20_000
STEPS = 60  # of training: fewer than the demo's, as there are 45 runs


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("ablation-output"), metavar="DIR", help="%(default)s")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of training, %(default)s"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time, %(default)s"
    )
    parser.add_argument("--only", choices=("tables", "sweeps"), help="default: both")
    parser.add_argument(
        "--summary", type=Path, metavar="DIR", help="of table, plots, figures; default: OUTPUT/summary"
    )
    parser.add_argument("train", nargs="*", metavar="-- WORDS", help="for training/train.py, of every row")
    options = parser.parse_args(args)
    commands = Commands(options.output, options.jobs, tuple(options.train), options.seeds[0])
    try:
        runs = [
            (row, seed)
            for seed in options.seeds
            for row in ROWS
            if row.part == (options.only or row.part) and (row.train is not None or seed == options.seeds[0])
        ]
        commands.prepare({row for row, _ in runs})
        commands.train_and_evaluate(runs)
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(error.cmd)} ended with exit code {error.returncode}; see its log.", file=sys.stderr)
        return 2
    summarise(options.output, options.summary or options.output / "summary", commands)
    return 0


class Commands:
    """Runs commands, or says what they would be.

    Args:
        output: the folder of data, models and logs.
        jobs: how many run at a time, each with its share of the cores.
        train: further words for training/train.py.
        curves_of: the seed whose curves of effective length are measured: they cost more than all the rest.
    """

    def __init__(self, output: Path, jobs: int, train: tuple[str, ...] = (), curves_of: int = 0) -> None:
        self.output, self.jobs, self.further, self.curves_of = output, jobs, train, curves_of

    def prepare(self, rows: Iterable[Row]) -> None:
        """Writes the data, and the models that training begins with."""
        needed = [self.write(split) for split in ("train", *TESTS, "classes")]
        needed += [self.stretch(row) for row in rows if row.stretch is not None]
        for folder, command in dict(needed).items():
            if not folder.exists():
                self._run(command, folder.name)

    def train_and_evaluate(self, runs: Sequence[tuple[Row, int]]) -> None:
        from rich.console import Console
        from rich.progress import Progress

        missing = [run for run in runs if not self.results(*run).is_file()]
        with Progress(console=Console(stderr=True)) as progress, ThreadPoolExecutor(self.jobs) as pool:
            task = progress.add_task("ablation", total=len(missing))

            def one(run: tuple[Row, int]) -> None:
                row, seed = run
                for command in self.of(row, seed):
                    self._run(command, f"{row.slug}-{seed}")
                progress.advance(task)
                progress.console.print(f"{row.name}, seed {seed}", highlight=False)

            running = [pool.submit(one, run) for run in missing]
            try:
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def write(self, split: str) -> tuple[Path, list[str]]:
        folder = self.output / "data" / split
        count = {"train": TRAIN_ROWS, **TEST_ROWS}.get(split)
        words = ["--split", split, "--output", str(folder), *(["--count", str(count)] if count else [])]
        return folder, ["python", "-m", "examples.scenes.write", *words]

    def stretch(self, row: Row) -> tuple[Path, list[str]]:
        folder = self.output / "models" / row.start
        words = [str(CLIP), "--output", str(folder), "--dtype", "float32", *(row.stretch or ())]
        return folder, ["python", "conversion/stretch.py", *words]

    def model(self, row: Row, seed: int) -> Path:
        """The folder that is evaluated."""
        if row.train is not None:
            return self.output / "runs" / f"{row.slug}-{seed}"
        return self.output / "models" / row.start if row.stretch is not None else CLIP

    def results(self, row: Row, seed: int) -> Path:
        return self.output / "evaluation" / f"{row.slug}-{seed}" / "results.json"

    def of(self, row: Row, seed: int) -> list[list[str]]:
        """The commands of a run, after those that prepare it."""
        model, data = self.model(row, seed), self.output / "data"
        commands = []
        if row.train is not None:
            words = ["--recipe", str(RECIPE), "--model", str(self.output / "models" / row.start)]
            words += ["--data", str(data / "train"), "--output_dir", str(model), "--seed", str(seed)]
            words += [
                "--max_steps",
                str(STEPS),
                "--save_strategy",
                "no",
                "--disable_tqdm",
                "True",
                *row.train,
                *self.further,
            ]
            commands.append(["python", "training/train.py", *words])
        words = [str(model), "--output", str(self.results(row, seed).parent)]
        words += ["--benchmark", *(str(data / split) for split in TESTS), "imagefolder"]
        words += ["--data", str(data / "classes"), "--templates", str(data / "classes" / "templates.txt")]
        words += ["--no_effective_length"] if seed != self.curves_of else []
        commands.append(["python", "evaluation/run.py", *words])
        return commands

    def _run(self, command: list[str], name: str) -> None:
        logs = self.output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with (logs / f"{name}.txt").open("a", encoding="utf-8") as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            arguments = [sys.executable, *command[1:]]
            subprocess.run(arguments, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)


if __name__ == "__main__":
    sys.exit(main())
