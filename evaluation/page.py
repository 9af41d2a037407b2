"""The results as one HTML page that needs nothing else: tables, plots, and the hardest misses as pictures."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from longclip_hf.evaluation.misses import Misses
from longclip_hf.evaluation.plots import colour, plots
from longclip_hf.evaluation.tables import (
    definitions,
    failures_of,
    made_with,
    notes_of,
    overview,
    runs_of,
    size_of,
    tables,
)
from longclip_hf.files import write_atomically
from longclip_hf.results import DIRECTIONS, BenchmarkInfo, Results


def write_page(results: Results, misses: Iterable[Misses], path: Path, limit: int = 6) -> None:
    """Writes the page. It loads nothing and runs no script; captions are shown as the text that they are.

    Args:
        results: what was measured.
        misses: in any order.
        path: the file to write.
        limit: misses shown of each model, benchmark and direction, the hardest. The page says of how many.

    Raises:
        ValueError: for a miss that is none, or of a model and benchmark that `results` have no score of.
        ImportError: without matplotlib.
    """
    groups = _checked(results, misses, limit)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.tests["picture"] = lambda item: isinstance(item, bytes)
    html = environment.get_template("page.html.jinja").render(
        results=results,
        groups=groups,
        plots={info.name: _plots(results, info) for info in results.benchmarks},
        overview=overview(results) if results.scores else None,
        asked=partial(_asked, results),
        definitions=definitions(results),
        failures=failures_of(results),
        colour=partial(colour, results),
        tables=partial(tables, results),
        size_of=size_of,
        notes_of=notes_of,
        runs=[(run, made_with(results, run)) for run in runs_of(results)],
    )
    write_atomically(path, html.encode())


@dataclass(frozen=True)
class _Figure:
    title: str
    description: str
    alt: str
    width: int  # in pixels of a screen: larger than in a paper
    light: bytes
    dark: bytes


def _plots(results: Results, info: BenchmarkInfo) -> list[_Figure]:
    """Of one benchmark, for readers on light and on dark ground."""
    own = replace(results, benchmarks=[info])
    both = zip(plots(own, "light"), plots(own, "dark"), strict=True)
    return [
        _Figure(
            a.title, a.description, f"{a.title}. {a.facts}", round(150 * a.figure.get_figwidth()), a.svg(), b.svg()
        )
        for a, b in both
    ]


def _checked(results: Results, misses: Iterable[Misses], limit: int) -> dict[str, list[Misses]]:
    """By benchmark, models and directions in the order of `results`, the hardest of each."""
    scores = {(score.benchmark, score.model) for score in results.scores}
    groups: dict[str, list[Misses]] = {info.name: [] for info in results.benchmarks}
    for group in misses:
        of = f"{group.model!r} on {group.benchmark!r}"
        if (group.benchmark, group.model) not in scores:
            raise ValueError(f"Misses are of {of}, and the results have no such score.")
        if hits := [miss.rank for miss in group.shown if miss.rank < 2]:
            raise ValueError(f"A miss of {of} has rank {hits[0]}: that is a hit.")
        if group.shown:
            hardest = sorted(group.shown, key=lambda miss: -miss.rank)[:limit]
            groups[group.benchmark].append(replace(group, shown=hardest))
    order = [model.name for model in results.models]
    for listed in groups.values():
        listed.sort(key=lambda group: (order.index(group.model), list(DIRECTIONS).index(group.direction)))
    return {name: listed for name, listed in groups.items() if listed}


def _asked(results: Results, group: Misses) -> str:
    """Which way was asked, in words."""
    kinds = {info.name: info.kind for info in results.benchmarks}
    return "Image to class" if kinds[group.benchmark] == "classification" else DIRECTIONS[group.direction]


def _data_uri(data: bytes) -> Markup:
    kind = "svg+xml" if data.lstrip().startswith(b"<?xml") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
