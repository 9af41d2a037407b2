"""Results as tables: of words for the page, and as Markdown whose source reads well too."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from longclip_hf.evaluation.significance import holm
from longclip_hf.results import (
    DIRECTIONS,
    METRICS,
    BenchmarkInfo,
    Direction,
    EffectiveLength,
    Results,
    Run,
    Score,
    Value,
    is_rank,
    is_share,
)

DEFINITIONS = {
    "R@k": "the share of queries, in percent, whose right answer is among the k most similar by cosine. Image to text "
    "counts a hit when any caption of the image is among them; text to image asks for the caption's own image.",
    "Rank": "the place of the best placed right answer; 1 is the best.",
    "mAP": "over the places of all right answers of a query, the mean of the precision there; averaged over queries.",
    "Ties": "queries whose right answer is exactly as similar as a wrong one, which counts as ranked before it.",
    "Top-k": "the share of images whose class is among the k most similar. A class is the mean of its templates' "
    "normalised features.",
    "Mean per-class recall": "the share of a class's images whose class is the most similar, averaged over classes.",
    "Effective length": "every caption is cut to n tokens, the end of text kept; the smallest n beyond which R@1 "
    "grows slowly: by at most 0.35 of the pace per token of the whole curve. ≥ where it grows up to the last n, – "
    "where it does not rise. It is one number of a curve: look at the curve.",
    "Sentences": "R@1 again, of captions without their first sentence (often the summary), with it at the end, and of "
    "half of their sentences, drawn once, in their order; captions of one sentence stay as they are.",
    "HiMo@K": "how a caption's similarity to its image goes with its sentences: Pearson's correlation of 1, 2 ... K "
    "with the cosines of the first sentence, the first two ... all K; the mean over captions of two sentences or "
    "more, within −1 ... 1. And the share of sentences, from the second on, with which the cosine rises.",
    "Choices": "of pairs of images and captions: text score, both images are nearer to their own caption than to the "
    "other's (chance is 25 %); image score, both captions to their own image (25 %); group score, both (17 %). Of one "
    "image and n captions: the right one is nearer than every other (1 in n). A tie is wrong.",
    "Captions cut": "captions with more tokens than the model reads, start and end of text included; it saw their "
    "beginnings only.",
    "Intervals": "in brackets, 95 %, by bootstrap over images with their captions, or over groups of images where the "
    "source has a column of them; one image, or one group, has none.",
}


CHANCE = 0.05  # that any difference is bold where there is none

# What the overview shows of a benchmark.
HEADLINES = {
    "retrieval": {"i2t_r1": "image to text R@1", "t2i_r1": "text to image R@1"},
    "classification": {"top1": "top-1"},
    "choice": {
        "text_score": "text score",
        "image_score": "image score",
        "group_score": "group score",
        "choice": "right caption",
    },
}


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    columns: list[str]  # models; of the overview, benchmarks
    rows: list[tuple[str, list[Cell]]]


def markdown_table(results: Results) -> str:
    """All results as Markdown whose source reads well too: a section for each benchmark, its models side by side."""
    lines = ["# Evaluation", ""]
    columns = ("", "Class", "Positions", "Type", "Revision", "Weights")
    lines += _markdown_rows(
        columns,
        [
            (_code(m.name), m.model_class, str(m.positions), m.dtype, (m.revision or "–")[:12], m.fingerprint[:12])
            for m in results.models
        ],
    )
    if results.scores:
        table = overview(results)
        rows = [[_code(name), *map(_overview_cell, cells)] for name, cells in table.rows]
        lines += ["", f"{table.caption}:", "", *_markdown_rows(("", *table.columns), rows)]
    for info in results.benchmarks:
        lines += ["", f"## {info.name}", "", f"{info.kind.capitalize()}, {size_of(info)}.", ""]
        for table in tables(results, info):
            rows = [[label, *map(_markdown_cell, cells)] for label, cells in table.rows]
            lines += [f"{table.caption}:", "", *_markdown_rows(("", *map(_code, table.columns)), rows), ""]
        lines += [f"- {text}" for text in notes_of(info)]
    if results.failures:
        lines += ["", "## Not evaluated", "", *(f"- {text}" for text in failures_of(results))]
    lines += ["", "## Definitions", "", *(f"- **{name}**: {text}" for name, text in definitions(results).items())]
    for run in runs_of(results):
        lines += ["", f"{run.date}, {made_with(results, run)}. Command:", "", f"    {run.command}"]
    return "\n".join(lines) + "\n"


def size_of(info: BenchmarkInfo) -> str:
    texts = f"{info.captions:,} captions" if info.captions else f"{info.classes} classes"
    return f"{info.images:,} images{f' in {info.groups:,} groups' if info.groups else ''}, {texts}"


def definitions(results: Results) -> dict[str, str]:
    """What the words of the report mean, and how many differences were tested."""
    tests = sum(difference.p is not None for difference in results.differences)
    untested = len(results.differences) - tests
    if not results.differences:
        return DEFINITIONS
    text = (
        "a difference is bold, and has a * in the overview, where chance is an unlikely cause: by a paired test (the "
        f"signs of the queries' differences are flipped, groups as a whole) p < {CHANCE} after Holm's correction for "
        f"all {tests} differences of this report."
    )
    return {**DEFINITIONS, "Tests": text + (f" {untested} were not tested." if untested else "")}


def corrected(results: Results) -> dict[tuple[str, str, str, str], float]:
    """(benchmark, reference, model, metric) -> the p-value of the difference, corrected for the number of tests."""
    tested = [(d, d.p) for d in results.differences if d.p is not None]
    values = holm([p for _, p in tested])
    keys = [(d.benchmark, d.reference, d.model, d.metric) for d, _ in tested]
    return dict(zip(keys, values, strict=True))


def notes_of(info: BenchmarkInfo) -> list[str]:
    """What a reader must know of a benchmark: definition, notes, where the data come from."""
    source = f"Data: {info.home}, licence {info.licence}, fingerprint {info.fingerprint[:12]}."
    return [info.definition, *info.notes, source]


def failures_of(results: Results) -> list[str]:
    """What could not be evaluated, and why."""
    return [f"{f.model} on {f.benchmark or 'all benchmarks'}: {f.error}" for f in results.failures]


def runs_of(results: Results) -> list[Run]:
    """Those whose figures these are, the latest first."""
    return [Run(results.date, results.command, results.versions, results.hardware), *results.earlier[::-1]]


def made_with(results: Results, run: Run) -> str:
    prepared = [
        *(["captions cleaned (--clean_captions)"] if results.clean_captions else []),
        *(["special tokens read as words"] if results.neutralise_special_tokens else []),
    ]
    versions = [f"{name} {version}" for name, version in run.versions.items()]
    return ", ".join([*versions, run.hardware, *prepared])


def overview(results: Results) -> Table:
    """Models by benchmarks, a row for each model: R@1 or accuracy, the best of each column strong, and beside it the
    difference to the first model, with a `*` where its test says that it is no chance."""
    reference, p_values = results.models[0].name, corrected(results)
    differences = {(d.benchmark, d.model, d.metric): d.value for d in results.differences if d.reference == reference}
    columns: list[str] = []
    cells: dict[str, list[Cell]] = {model.name: [] for model in results.models}
    for info in results.benchmarks:
        scores = scores_of(results, info)
        for metric, label in HEADLINES[info.kind].items():
            if info.kind == "choice" and not any(metric in score.metrics for score in scores.values()):
                continue  # of pairs, or of captions alone
            number = _number(metric)
            shown = {name: number(s.metrics[metric].value) for name, s in scores.items() if metric in s.metrics}
            best = max(shown.values(), key=float) if len(shown) > 1 else None
            columns.append(f"{info.name}, {label}")
            for name, row in cells.items():
                difference = differences.get((info.name, name, metric))
                star = "*" if p_values.get((info.name, reference, name, metric), 1) < CHANCE else ""
                apart = "" if difference is None else f"({_number(metric, '+')(difference.value)}{star})"
                row.append(Cell(shown.get(name, "–"), apart, best is not None and shown.get(name) == best))
    caption = f"Percent, the best in bold; in parentheses the difference to {reference}, with * where it is no chance"
    return Table(caption, columns, list(cells.items()))


def tables(results: Results, info: BenchmarkInfo) -> list[Table]:
    """The scores of a benchmark, and for each reference the differences to it."""
    scores = scores_of(results, info)
    names = list(scores)
    rows = [
        (METRICS[metric], [_value(score.metrics.get(metric), _number(metric)) for score in scores.values()])
        for metric in METRICS
        if any(metric in score.metrics for score in scores.values())
    ]
    for side, direction in DIRECTIONS.items():
        curves = [score.effective_length for score in scores.values()]
        if any(curve and side in curve.effective for curve in curves):
            rows.append((f"{direction}, effective length (tokens)", [_effective(curve, side) for curve in curves]))
    if info.captions or any(score.truncated for score in scores.values()):
        rows.append(("Captions cut", [Cell(_cut(score.truncated, info)) for score in scores.values()]))
    if any(score.ties for score in scores.values()):
        rows.append(("Ties", [Cell(f"{score.ties:,}") for score in scores.values()]))
    found = [Table("Scores, percent [95 % interval]", names, rows)]

    differences = [d for d in results.differences if d.benchmark == info.name]
    p_values = corrected(results)
    for reference in dict.fromkeys(d.reference for d in differences):
        values = {(d.metric, d.model): d.value for d in differences if d.reference == reference}
        others = [name for name in names if any(name == model for _, model in values)]
        rows = [
            (
                METRICS[metric],
                [
                    _value(
                        values.get((metric, name)),
                        _number(metric, "+"),
                        p_values.get((info.name, reference, name, metric), 1) < CHANCE,
                    )
                    for name in others
                ],
            )
            for metric in METRICS
            if any(metric == key for key, _ in values)
        ]
        found.append(Table(f"Differences to {reference}, percentage points [95 % interval]", others, rows))
    return [table for table in found if table.columns]


def scores_of(results: Results, info: BenchmarkInfo) -> dict[str, Score]:
    """Of a benchmark, by model, in the models' order."""
    scores = {score.model: score for score in results.scores if score.benchmark == info.name}
    return {model.name: scores[model.name] for model in results.models if model.name in scores}


def _number(metric: str, sign: str = "") -> Callable[[float], str]:
    if not is_share(metric) and not is_rank(metric):  # a correlation
        return lambda value: f"{value:{sign}.2f}".replace("-", "−")
    scale = 100 if is_share(metric) else 1
    return lambda value: f"{scale * value:{sign},.1f}".replace("-", "−")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _effective(curve: EffectiveLength | None, side: Direction) -> Cell:
    if curve is None or side not in curve.effective:
        return Cell("–")
    at = curve.effective[side]
    if at is None:
        return Cell("–")
    still_growing = at.value == curve.lengths[-1]
    return Cell(f"{'≥ ' * still_growing}{at.value:.0f}", interval(at, "{:.0f}".format))


def _value(value: Value | None, number: Callable[[float], str], strong: bool = False) -> Cell:
    return Cell("–") if value is None else Cell(number(value.value), interval(value, number), strong)


def interval(value: Value, number: Callable[[float], str]) -> str:
    """As `[low, high]`; empty where there is none."""
    return "" if value.low is None or value.high is None else f"[{number(value.low)}, {number(value.high)}]"


def _cut(truncated: int, info: BenchmarkInfo) -> str:
    return f"{truncated:,} ({percent(truncated / info.captions)})" if info.captions else f"{truncated:,}"


def _code(name: str) -> str:
    return f"`{name}`"


def _markdown_cell(cell: Cell) -> str:
    text = f"{cell.text} {cell.interval}".strip()
    return f"**{text}**" if cell.strong else text


def _overview_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.strong else cell.text
    return f"{text} {cell.interval}".strip().replace("*)", "\\*)")


def _markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table whose columns are aligned in the source too."""
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells
    ]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return [lines[0], rule, *lines[1:]]
