"""What the ablation found: tables and claims with their intervals, figures as JSON, plots, and every command."""

import json
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.scenes import CLIP, RECIPE
from examples.scenes.ablation_rows import (
    CLAIMS,
    COLUMNS,
    DIRECT,
    ORIGINAL,
    OURS,
    ROWS,
    STRETCHED,
    STRETCHING_ONLY,
    TABLES,
    TESTS,
    Row,
)
from longclip_hf.files import write_atomically

if TYPE_CHECKING:
    from examples.scenes.ablation import Commands
    from longclip_hf.results import Results

# Of Student's distribution, 97.5 %, by degrees of freedom.
STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def summarise(output: Path, folder: Path, commands: "Commands") -> None:
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
    """In tokens, of text to image, in the order of seeds, of those whose R@1 rises."""
    return [
        at.value
        for results in found.get(row.name, {}).values()
        for score in results.scores
        if Path(score.benchmark).name == benchmark and score.effective_length is not None
        if (at := score.effective_length.effective["t2i"]) is not None
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


def command_lines(commands: "Commands", found: dict[str, dict[int, "Results"]]) -> str:
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
    from longclip_hf.evaluation.look import COLOURS, LINES

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

    from longclip_hf.evaluation.look import STYLE

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(3.4 * panels, 2.8), layout="constrained", dpi=200)
        draw(figure.subplots(1, panels))
        png = io.BytesIO()
        figure.savefig(png)
    write_atomically(file, png.getvalue())
