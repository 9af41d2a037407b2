"""Results for other programs: CSV with every figure in a row of its own, and LaTeX tables for a paper."""

import csv
import io
from collections.abc import Iterator, Mapping

from longclip_hf.evaluation.tables import Cell, Table, corrected, overview, scores_of, size_of, tables
from longclip_hf.results import METRICS, Difference, Results, Score, Value

COLUMNS = (
    "benchmark", "model", "metric", "value", "low", "high", "reference", "difference", "difference_low",
    "difference_high", "p", "p_corrected",
)  # fmt: skip
_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "≥": r"$\geq$", "–": "--", "\n": " ",
    "<": r"\textless{}", ">": r"\textgreater{}",
})  # fmt: skip


def csv_table(results: Results) -> str:
    """A row for every metric of every model on every benchmark, with the difference to its reference.

    Numbers are those of results.json: shares within 0 ... 1, ranks and tokens. Where there is none, nothing stands.
    The first three columns are a row's key; a model compared with several references has a row for each.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    p_values = corrected(results)
    for info in results.benchmarks:
        for model, score in scores_of(results, info).items():
            for metric, value in _figures(score):
                compared = [
                    [d.reference, *_numbers(d.value), *_p(d, p_values)]
                    for d in results.differences
                    if (d.benchmark, d.model, d.metric) == (info.name, model, metric)
                ]
                for difference in compared or [[""] * 6]:
                    writer.writerow([info.name, model, metric, *_numbers(value), *difference])
    return text.getvalue()


def _figures(score: Score) -> Iterator[tuple[str, Value]]:
    yield from ((metric, score.metrics[metric]) for metric in METRICS if metric in score.metrics)
    if score.effective_length:
        for side, value in sorted(score.effective_length.effective.items()):
            if value is not None:
                yield f"{side}_effective_length", value
    yield "ties", Value(score.ties, None, None)
    yield "captions_cut", Value(score.truncated, None, None)


def _p(difference: Difference, corrected_values: Mapping[tuple[str, str, str, str], float]) -> list[str]:
    d = difference
    values = (d.p, corrected_values.get((d.benchmark, d.reference, d.model, d.metric)))
    return ["" if p is None else f"{p:g}" for p in values]


def _numbers(value: Value) -> list[str]:
    """At most six digits, as in results.json."""
    return ["" if number is None else f"{round(number, 6):g}" for number in (value.value, value.low, value.high)]


def latex_tables(results: Results) -> str:
    """Every table of the report as a `table` of LaTeX; it needs the package booktabs."""
    lines = ["% Needs \\usepackage{booktabs}; intervals are 95 %."]
    if results.scores:
        lines += ["", *_latex("Overview", overview(results))]
    for info in results.benchmarks:
        for table in tables(results, info):
            lines += ["", *_latex(f"{info.name} ({size_of(info)})", table)]
    return "\n".join(lines) + "\n"


def _latex(title: str, table: Table) -> Iterator[str]:
    yield r"\begin{table}"
    yield r"  \centering"
    yield rf"  \caption{{{_escaped(f'{title}. {table.caption}')}}}"
    yield rf"  \begin{{tabular}}{{l{'r' * len(table.columns)}}}"
    yield r"    \toprule"
    yield f"    {' & '.join(['', *map(_escaped, table.columns)])} \\\\"
    yield r"    \midrule"
    for label, cells in table.rows:
        yield f"    {' & '.join([_escaped(label), *map(_cell, cells)])} \\\\"
    yield r"    \bottomrule"
    yield r"  \end{tabular}"
    yield r"\end{table}"


def _cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    text = rf"\textbf{{{text}}}" if cell.strong else text
    return rf"{text} {{\scriptsize {_escaped(cell.interval)}}}" if cell.interval else text


def _escaped(text: str) -> str:
    return text.translate(_ESCAPES)
