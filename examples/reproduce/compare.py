"""Our figures beside the published ones, benchmark by benchmark, with the protocol of each.

    python -m examples.reproduce.compare evaluation-results/results.json [--backbone B/16]

`published.csv` holds the figures of the Long-CLIP paper (tables 1 to 5) and of its successors, in percent, as their
papers print them. Some measure by other protocols, as their lines say: only figures of one protocol can be compared.
Of benchmarks that nobody published, and published ones that results.json has not, nothing is shown but their names.
"""

import csv
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from longclip_hf.command import CommandParser, guarded
from longclip_hf.results import METRICS, Results, read_results

PUBLISHED = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Published:
    """A line of published.csv."""

    backbone: str  # "B/16" or "L/14"
    benchmark: str  # as evaluation/run.py calls it; "urban-200" has no name there
    model: str
    metric: str  # a key of METRICS
    percent: float
    protocol: str


def read_published(file: Path = PUBLISHED) -> list[Published]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [(row.pop("percent"), row) for row in csv.DictReader(lines)]
    return [Published(percent=float(percent), **others) for percent, others in rows]


def compare(results: Results, published: Iterable[Published]) -> str:
    """Tables in Markdown, one for each benchmark of `results` that has published figures."""
    from longclip_hf.evaluation.benchmarks import BENCHMARKS

    titles = {name: benchmark.title for name, benchmark in BENCHMARKS.items()}
    of_benchmark: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for line in published:
        of_model = of_benchmark.setdefault(titles.get(line.benchmark, line.benchmark), {}).setdefault(
            (line.model, line.protocol), {}
        )
        of_model[line.metric] = line.percent
    tables, unknown = [], []
    for info in results.benchmarks:
        if info.name not in of_benchmark:
            unknown.append(info.name)
            continue
        theirs = of_benchmark.pop(info.name)
        ours = {score.model: score.metrics for score in results.scores if score.benchmark == info.name}
        metrics = [metric for metric in METRICS if any(metric in figures for figures in theirs.values())]
        lines = [f"## {info.name}", "", f"| | {' | '.join(METRICS[m] for m in metrics)} | protocol |"]
        lines.append(f"|---|{'---:|' * len(metrics)}---|")
        for model, values in ours.items():
            cells = [f"**{100 * values[m].value:.1f}**" if m in values else "" for m in metrics]
            lines.append(f"| **{model}**, measured here | {' | '.join(cells)} | {info.definition} |")
        for (model, protocol), figures in theirs.items():
            cells = [f"{figures[m]:.1f}" if m in figures else "" for m in metrics]
            lines.append(f"| {model} | {' | '.join(cells)} | {protocol} |")
        tables.append("\n".join(lines))
    said = []
    if unknown:
        said.append(f"Not published, as far as published.csv knows: {', '.join(unknown)}.")
    if of_benchmark:
        said.append(f"Published and not measured here: {', '.join(of_benchmark)}.")
    return "\n\n".join([*tables, *said]) + "\n"


def main(args: list[str] | None = None) -> int:
    """Prints the tables."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="results.json")
    parser.add_argument("--backbone", choices=("B/16", "L/14"), default="B/16", help="%(default)s")
    options = parser.parse_args(args)

    def work() -> None:
        published = [line for line in read_published() if line.backbone == options.backbone]
        print(compare(read_results(options.results), published), end="")

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
