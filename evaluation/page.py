"""The results as one HTML page that needs nothing else: tables, plots, and the hardest misses as pictures."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from longclip_hf.evaluation.plots import colour, plots
from longclip_hf.evaluation.tables import definitions, failures_of, made_with, notes_of, runs_of, size_of, tables
from longclip_hf.files import write_atomically
from longclip_hf.results import DIRECTIONS, BenchmarkInfo, Direction, Results

if TYPE_CHECKING:
    from PIL.Image import Image

Item = str | bytes  # a caption (or the name of a class), or a picture from `thumbnail`


@dataclass(frozen=True)
class Miss:
    """A query whose right answer is not the most similar one."""

    model: str
    benchmark: str
    direction: Direction  # "i2t" for classification too: its answers are the names of classes
    rank: int  # of the best placed right answer, from 1
    query: Item
    expected: list[Item]  # every right answer
    returned: list[Item]  # the most similar ones, best first


@dataclass(frozen=True)
class MissGroup:
    """What the page shows of a model's misses in one direction."""

    model: str
    direction: str
    shown: list[Miss]  # the hardest first
    total: int


def thumbnail(image: "Image", side: int = 224) -> bytes:
    """A JPEG no larger than `side` pixels either way; `image` is in mode RGB and stays as it is."""
    small = image.copy()
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=80)
    return data.getvalue()


def write_page(results: Results, misses: Iterable[Miss], path: Path, limit: int = 6) -> None:
    """Writes the page. It loads nothing and runs no script; captions are shown as the text that they are.

    Args:
        results: what was measured.
        misses: in any order; the page shows the hardest.
        path: the file to write.
        limit: misses shown of each model, benchmark and direction. The page says of how many.

    Raises:
        ValueError: for a miss that is none, or of a model and benchmark that `results` have no score of.
        ImportError: without matplotlib.
    """
    groups = _groups(results, list(misses), limit)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["width"] = _width
    environment.tests["picture"] = lambda item: isinstance(item, bytes)
    html = environment.get_template("page.html.jinja").render(
        results=results,
        groups=groups,
        plots={info.name: plots(replace(results, benchmarks=[info])) for info in results.benchmarks},
        definitions=definitions(results),
        failures=failures_of(results),
        colour=partial(colour, results),
        tables=partial(tables, results),
        size_of=size_of,
        notes_of=notes_of,
        runs=[(run, made_with(results, run)) for run in runs_of(results)],
    )
    write_atomically(path, html.encode())


def _groups(results: Results, misses: list[Miss], limit: int) -> dict[str, list[MissGroup]]:
    """By benchmark, in the order of `results`."""
    scores = {(score.benchmark, score.model): score for score in results.scores}
    for miss in misses:
        if (miss.benchmark, miss.model) not in scores:
            raise ValueError(f"A miss is of {miss.model!r} on {miss.benchmark!r}, and the results have no such score.")
        if miss.rank < 2:
            raise ValueError(f"A miss of {miss.model!r} on {miss.benchmark!r} has rank {miss.rank}: that is a hit.")
    groups: dict[str, list[MissGroup]] = {}
    for info in results.benchmarks:
        for model in results.models:
            for direction, name in DIRECTIONS.items():
                own = [m for m in misses if (m.benchmark, m.model, m.direction) == (info.name, model.name, direction)]
                if own:
                    shown = sorted(own, key=lambda miss: -miss.rank)[:limit]
                    metric = f"{direction}_r1" if info.kind == "retrieval" else "top1"
                    r1 = scores[info.name, model.name].metrics[metric].value
                    total = round((1 - r1) * _queries(info, direction))
                    name = name if info.kind == "retrieval" else "Image to class"
                    groups.setdefault(info.name, []).append(MissGroup(model.name, name, shown, total))
    return groups


def _queries(info: BenchmarkInfo, direction: Direction) -> int:
    return info.captions if direction == "t2i" and info.captions else info.images


def _data_uri(data: bytes) -> Markup:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def _width(png: bytes) -> int:
    """Of a plot on a screen, in pixels: larger than in a paper, and sharp on a dense screen."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return image.width // 2
