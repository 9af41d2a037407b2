"""The paper's tables 4 and 5 in this world, and sweeps of keep, ratio and components, over several seeds.

    python -m examples.scenes.ablation --output ablation [--seeds 0 1 2] [--jobs 2] [--only tables]

Every row is a run of conversion/stretch.py, training/train.py and evaluation/run.py with the settings of recipe.yaml
and the ones that its name stands for, on the same pictures and budget; all commands are written down. A run that is
done is not run again, so an interrupted ablation goes on when the same command is given again.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.scenes import CLIP, RECIPE
from longclip_hf.files import write_atomically

if TYPE_CHECKING:
    from longclip_hf.results import Results

TESTS = ("short", "long", "hard")
TEST_ROWS = {"long": 300, "hard": 300}
TRAIN_ROWS = 20_000
STEPS = 60  # of training: fewer than the demo's, as there are 45 runs
COMPONENTS = 16  # as in recipe.yaml
# Column -> benchmark, the last part of its name, and metric.
COLUMNS = {
    "zero-shot": ("Image folder", "top1"),
    "short I2T": ("short", "i2t_r1"),
    "short T2I": ("short", "t2i_r1"),
    "long I2T": ("long", "i2t_r1"),
    "long T2I": ("long", "t2i_r1"),
    "hard I2T": ("hard", "i2t_r1"),
    "hard T2I": ("hard", "t2i_r1"),
}
# Of Student's distribution, 97.5 %, by degrees of freedom.
STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Row:
    """A model of the ablation: what it is called, how its table of positions is made, how it is trained.

    Args:
        stretch: words for conversion/stretch.py; None leaves the base as it is.
        train: words for training/train.py; None leaves the model untrained.
        part: of the ablation, "tables" or "sweeps".
    """

    name: str
    stretch: tuple[str, ...] | None = ()
    train: tuple[str, ...] | None = ()
    part: str = "tables"

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())

    @property
    def start(self) -> str:
        """The folder of the model that training begins with."""
        return "-".join(["stretched", *(word.strip("-") for word in self.stretch or ())])


LINEAR = ("--method", "linear")
LONG_ONLY = ("--strategy", "long-only")
OURS = Row("stretching and PCM")
ORIGINAL = Row("original, 77 tokens", None, None)
STRETCHED = Row("stretched, not trained", (), None)
INTERPOLATED = Row("all rows interpolated, not trained", LINEAR, None)
DIRECT = Row("neither (direct fine-tuning)", LINEAR, LONG_ONLY)
PCM_ONLY = Row("PCM without stretching", LINEAR)
STRETCHING_ONLY = Row("stretching without PCM", (), LONG_ONLY)
UNDISTINGUISHED = Row("undistinguished", (), ("--strategy", "undistinguished"))
MIXED_LENGTH = Row("mixed-length", (), ("--strategy", "mixed-length"))
BOUNDED = Row("bounded", (), ("--strategy", "bounded"))
KEEP = {n: Row(f"keep {n}", ("--keep", str(n)), (), "sweeps") for n in (0, 10, 30)}
RATIO = {n: Row(f"ratio {n}", ("--ratio", str(n)), (), "sweeps") for n in (2, 8)}
COMPONENTS_KEPT = {n: Row(f"{n} components", (), ("--num_components", str(n)), "sweeps") for n in (8, 32, 64)}

TABLES: dict[str, list[tuple[str, Row]]] = {
    "Not trained": [(row.name, row) for row in (ORIGINAL, STRETCHED, INTERPOLATED)],
    "Table 4: knowledge-preserved stretching and primary component matching": [
        (row.name, row) for row in (DIRECT, PCM_ONLY, STRETCHING_ONLY, OURS)
    ],
    "Table 5: strategies to keep the short-text ability, all stretched": [
        *((row.name, row) for row in (UNDISTINGUISHED, MIXED_LENGTH, BOUNDED)),
        ("primary component matching", OURS),
    ],
    "Rows kept as they are": [(f"{n} ({n + 4 * (77 - n)} positions)", KEEP.get(n, OURS)) for n in (0, 10, 20, 30)],
    "Ratio": [(f"{n} ({20 + n * 57} positions)", RATIO.get(n, OURS)) for n in (2, 4, 8)],
    "Components": [(str(n), OURS if n == COMPONENTS else COMPONENTS_KEPT[n]) for n in (8, 16, 32, 64)],
}
ROWS = list(dict.fromkeys(row for rows in TABLES.values() for _, row in rows))
# What the paper claims, as a difference that ought to be above 0: (claim, column, greater, smaller).
CLAIMS = (
    ("Direct fine-tuning loses short-text ability", "zero-shot", ORIGINAL, DIRECT),
    ("", "short T2I", ORIGINAL, DIRECT),
    ("Stretching keeps more of it than interpolating all rows", "zero-shot", STRETCHING_ONLY, DIRECT),
    ("PCM keeps more than training on long captions only", "zero-shot", OURS, STRETCHING_ONLY),
    ("", "short T2I", OURS, STRETCHING_ONLY),
    ("Long retrieval rises above the original", "long I2T", OURS, ORIGINAL),
    ("", "long T2I", OURS, ORIGINAL),
    ("Hard retrieval rises above the original", "hard I2T", OURS, ORIGINAL),
    ("", "hard T2I", OURS, ORIGINAL),
    ("PCM reads long text better than undistinguished", "hard I2T", OURS, UNDISTINGUISHED),
    ("", "hard T2I", OURS, UNDISTINGUISHED),
    ("PCM reads long text better than mixed-length", "hard I2T", OURS, MIXED_LENGTH),
    ("", "hard T2I", OURS, MIXED_LENGTH),
    ("PCM reads long text better than bounded", "hard I2T", OURS, BOUNDED),
    ("", "hard T2I", OURS, BOUNDED),
    ("PCM keeps more short-text ability than mixed-length", "zero-shot", OURS, MIXED_LENGTH),
    ("PCM keeps more short-text ability than bounded", "zero-shot", OURS, BOUNDED),
    ("PCM reads long text no worse than training on long captions only", "long I2T", OURS, STRETCHING_ONLY),
    ("", "long T2I", OURS, STRETCHING_ONLY),
    ("", "hard I2T", OURS, STRETCHING_ONLY),
    ("", "hard T2I", OURS, STRETCHING_ONLY),
)


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


# What was found


def summarise(output: Path, folder: Path, commands: Commands) -> None:
    """Writes tables, claims, plots, figures and commands of all runs that are done to `folder`; prints the tables."""
    from longclip_hf.results import read_results

    found: dict[str, dict[int, Results]] = {}
    for row in ROWS:
        for file in sorted((output / "evaluation").glob(f"{row.slug}-[0-9]*/results.json")):
            found.setdefault(row.name, {})[int(file.parent.name.rpartition("-")[2])] = read_results(file)
    text = f"{markdown(found)}\n{share_kept()}"
    write_atomically(folder / "tables.md", text.encode())
    write_atomically(folder / "figures.json", (json.dumps(figures(found), indent=1) + "\n").encode())
    write_atomically(folder / "commands.sh", (command_lines(commands, found) + "\n").encode())
    draw_curves(found, folder / "effective_length.png")
    draw_sweeps(found, folder / "sweeps.png")
    draw_trade_off(found, folder / "trade_off.png")
    print(text)
    print(f"Wrote {folder}/tables.md, figures.json, commands.sh, effective_length.png, sweeps.png, trade_off.png.")


def values(found: dict[str, dict[int, "Results"]], row: Row, column: str) -> dict[int, float]:
    """A metric in percent, by seed."""
    benchmark, metric = COLUMNS[column]
    return {
        seed: 100 * score.metrics[metric].value
        for seed, results in found.get(row.name, {}).items()
        for score in results.scores
        if Path(score.benchmark).name == benchmark
    }


def effective_lengths(found: dict[str, dict[int, "Results"]], row: Row, benchmark: str) -> list[float]:
    """In tokens, of text to image, in the order of seeds."""
    return [
        score.effective_length.effective["t2i"].value
        for results in found.get(row.name, {}).values()
        for score in results.scores
        if Path(score.benchmark).name == benchmark and score.effective_length is not None
    ]


def difference(more: dict[int, float], less: dict[int, float]) -> tuple[float, float]:
    """The mean of `more - less`, seed by seed, and half its 95 % interval (Student's).

    What is not trained has one value, which is compared with every seed's.
    """
    seeds = max((more, less), key=len)
    pairs = [
        next(iter(more.values())) - less[seed] if len(more) == 1
        else more[seed] - (next(iter(less.values())) if len(less) == 1 else less[seed])
        for seed in seeds
        if (len(more) == 1 or seed in more) and (len(less) == 1 or seed in less)
    ]  # fmt: skip
    if len(pairs) == 1:
        return pairs[0], math.inf
    return statistics.mean(pairs), STUDENT[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))


def markdown(found: dict[str, dict[int, "Results"]]) -> str:
    """Tables with mean and spread over seeds, and the paper's claims."""
    lines = ["Percent: mean ± standard deviation over seeds; effective length in tokens, of text to image."]
    for title, rows in TABLES.items():
        rows = [(label, row) for label, row in rows if row.name in found]
        if not rows:
            continue
        lines += ["", f"### {title}", "", _line("", *COLUMNS, "effective long", "effective hard", "seeds")]
        lines.append("|---|" + "---:|" * (len(COLUMNS) + 3))
        for label, row in rows:
            cells = [_mean(list(values(found, row, column).values())) for column in COLUMNS]
            cells += [_mean(effective_lengths(found, row, benchmark)) for benchmark in ("long", "hard")]
            lines.append(_line(label, *cells, str(len(found[row.name]))))
    lines += [
        "",
        "### What the paper claims",
        "",
        _line("claim", "column", "difference, 95 %", "here"),
        "|---|---|---:|---|",
    ]
    for claim, column, greater, smaller in CLAIMS:
        if greater.name in found and smaller.name in found:
            mean, half = difference(values(found, greater, column), values(found, smaller, column))
            verdict = "holds" if mean > half else "does not hold" if mean < -half else "undecided"
            lines.append(_line(claim or "″", column, f"{mean:+.1f} ± {half:.1f}", verdict))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(numbers: Sequence[float]) -> str:
    if not numbers:
        return "–"
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"


def share_kept() -> str:
    """What 8, 16 ... components carry of the variance of the base's image features, in a batch of the recipe."""
    import torch
    import yaml
    from torch.nn import functional as F
    from transformers import AutoProcessor, CLIPModel

    from examples.scenes.dataset import example
    from longclip_hf.training.components import primary_components
    from modeling_longclip.compat import features

    batch = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["per_device_train_batch_size"]
    images = [example("train", index)["image"] for index in range(batch)]
    pixels = AutoProcessor.from_pretrained(CLIP).image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32)
        image_embeds = F.normalize(features(model.get_image_features(pixel_values=pixels)), dim=-1)
        kept = {n: primary_components(image_embeds, n).variance_kept.item() for n in (4, 8, 16, 32, 64)}
    shares = ", ".join(f"{100 * share:.1f} % by {n}" for n, share in kept.items())
    return f"Variance of the base's image features carried by components, {batch} pictures: {shares}.\n"


def figures(found: dict[str, dict[int, "Results"]]) -> dict[str, Any]:
    """Every number: row -> column -> seed -> percent, the curves of effective length, and what they were made with."""
    rows = {
        row.name: {
            **{column: values(found, row, column) for column in COLUMNS},
            "effective length": {
                benchmark: effective_lengths(found, row, benchmark) for benchmark in ("long", "hard")
            },
            "curves": {benchmark: curve(found, row, benchmark) for benchmark in ("long", "hard")},
        }
        for row in ROWS
        if row.name in found
    }
    last = max((results for seeds in found.values() for results in seeds.values()), key=lambda results: results.date)
    return {"date": last.date, "hardware": last.hardware, "versions": last.versions, "rows": rows}


def curve(found: dict[str, dict[int, "Results"]], row: Row, benchmark: str) -> dict[int, float]:
    """Tokens kept -> recall at 1 of text to image in percent, the mean over seeds."""
    recall: dict[int, list[float]] = {}
    for results in found.get(row.name, {}).values():
        for score in results.scores:
            if Path(score.benchmark).name == benchmark and score.effective_length is not None:
                lengths, at = score.effective_length.lengths, score.effective_length.recall["t2i"]
                for length, value in zip(lengths, at, strict=True):
                    recall.setdefault(length, []).append(100 * value.value)
    return {length: round(statistics.mean(at), 2) for length, at in recall.items()}


def command_lines(commands: Commands, found: dict[str, dict[int, "Results"]]) -> str:
    """The exact commands of all runs, those that prepare first."""
    done = [(row, seed) for row in ROWS for seed in found.get(row.name, {})]
    prepared = dict(
        [commands.write(split) for split in ("train", *TESTS, "classes")]
        + [commands.stretch(row) for row, _ in done if row.stretch is not None]
    )
    runs = [command for row, seed in done for command in commands.of(row, seed)]
    return "\n".join(map(shlex.join, [*prepared.values(), *runs]))


def draw_curves(found: dict[str, dict[int, "Results"]], file: Path) -> None:
    """Recall by tokens kept, of the long and the hard scenes."""

    def draw(axes: Any) -> None:
        for panel, benchmark in zip(axes, ("long", "hard"), strict=True):
            rows = (ORIGINAL, STRETCHED, DIRECT, STRETCHING_ONLY, OURS)
            _draw_curves(panel, found, [(row.name, row) for row in rows], benchmark, f"{benchmark} scenes")

    _draw(draw, 2, file)


def draw_sweeps(found: dict[str, dict[int, "Results"]], file: Path) -> None:
    """Recall by tokens kept, of the long scenes, for every value that was swept."""

    def draw(axes: Any) -> None:
        for panel, (title, rows) in zip(axes, list(TABLES.items())[3:], strict=True):
            _draw_curves(panel, found, [("original", ORIGINAL), *rows], "long", title.lower())

    _draw(draw, 3, file)


def _draw_curves(panel: Any, found: Any, rows: list[tuple[str, Row]], benchmark: str, title: str) -> None:
    from longclip_hf.evaluation.plots import COLOURS, LINES

    for number, (label, row) in enumerate(rows):
        if points := curve(found, row, benchmark):
            style = {"color": COLOURS[number], "linestyle": LINES[number % len(LINES)]}
            panel.plot(list(points), list(points.values()), label=label, **style)
    panel.axvline(77, linestyle=":", color="#444444", linewidth=0.8)
    panel.set(title=title, xlabel="tokens kept", ylabel="text to image R@1, %", xlim=(0, 180))
    panel.legend()


def draw_trade_off(found: dict[str, dict[int, "Results"]], file: Path) -> None:
    """What every row of the tables keeps of the short text's ability, and what it gains of the long text's."""

    def draw(axes: Any) -> None:
        for panel, column in zip(axes, ("zero-shot", "short T2I"), strict=True):
            rows = dict.fromkeys(row for table in list(TABLES.values())[:3] for _, row in table)
            for number, row in enumerate(rows):
                kept, gained = values(found, row, column), values(found, row, "hard T2I")
                if kept:
                    marker, points = "osD^vP*Xhp"[number], (list(kept.values()), list(gained.values()))
                    panel.scatter(*points, s=14, marker=marker, color=f"C{number}", label=row.name)
            panel.set(xlabel=f"{column}, %", ylabel="hard, text to image R@1, %")
        axes[0].legend(fontsize=5.5)

    _draw(draw, 2, file)


def _draw(draw: Callable[[Any], None], panels: int, file: Path) -> None:
    import io

    import matplotlib.style
    from matplotlib.figure import Figure

    from longclip_hf.evaluation.plots import STYLE

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(3.4 * panels, 2.8), layout="constrained", dpi=200)
        draw(figure.subplots(1, panels))
        png = io.BytesIO()
        figure.savefig(png)
    write_atomically(file, png.getvalue())


if __name__ == "__main__":
    sys.exit(main())
