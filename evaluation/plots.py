"""Results as plots, at the size of a paper's column."""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from longclip_hf.evaluation.look import (
    COLOURS,
    DPI,
    HATCHES,
    LINES,
    MARKERS,
    Ground,
    behind,
    drawable,
    ink,
    mark_colour,
    style,
)
from longclip_hf.evaluation.tables import percent, scores_of, size_of
from longclip_hf.results import (
    DIRECTIONS,
    METRICS,
    BenchmarkInfo,
    Direction,
    EffectiveLength,
    Results,
    Score,
    Value,
    is_share,
)
from modeling_longclip.defaults import CLIP_LENGTH, KEEP, LENGTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MARKS = (KEEP, CLIP_LENGTH, LENGTH)

COLUMN = 3.4  # inches: one column of a paper

ABREAST = 2  # panels


@dataclass(frozen=True)
class Plot:
    """A plot that is drawn, and can be written."""

    name: str
    title: str
    description: str  # what is shown
    facts: str  # the numbers, for those who cannot see it
    figure: "Figure"
    ground: Ground

    def png(self) -> bytes:
        """On its ground, for a screen and for Markdown."""
        return self._saved(format="png", dpi=DPI)

    def svg(self) -> bytes:
        """Without a ground, for a page and for a paper. Letters are drawn: it looks the same wherever it is shown."""
        return self._saved(format="svg", transparent=True, metadata={"Date": None})

    def _saved(self, **options: Any) -> bytes:
        data = io.BytesIO()
        with style(self.ground):
            self.figure.savefig(data, **options)
        return data.getvalue()


def colour(results: Results, name: str) -> str:
    """A model's colour in every plot."""
    return COLOURS[_place(results, name) % len(COLOURS)]


def plots(results: Results, ground: Ground = "light") -> list[Plot]:
    """The plots that there is data for, one column of a paper wide for each benchmark.

    Args:
        results: what is drawn.
        ground: what it will stand on.

    Raises:
        ImportError: without matplotlib.
    """
    made = []
    lost = _undrawable(results)
    curved = [b for b in results.benchmarks if any(s.effective_length for s in scores_of(results, b).values())]
    if curved:
        made.append(_plot_effective_length(results, curved, ground))
    scored = [b for b in results.benchmarks if any(_bars(s) for s in scores_of(results, b).values())]
    if scored:
        made.append(_plot_recall(results, scored, ground))
    counted = [b for b in results.benchmarks if sum(b.lengths)]
    if counted:
        made.append(_plot_lengths(results, counted, ground))
    return [replace(plot, facts=f"{plot.facts} {lost}".strip()) for plot in made]


def _plot_effective_length(results: Results, benchmarks: Sequence[BenchmarkInfo], ground: Ground) -> Plot:
    handles: dict[str, Any] = {}
    facts = []
    with style(ground):
        figure, grid = _grid(len(benchmarks), rows=len(DIRECTIONS), height=1.55)
        for info, axes in zip(benchmarks, grid, strict=True):
            _head(axes[0], _panel(results, info), size_of(info), MARKS)
            for (side, direction), axis in zip(DIRECTIONS.items(), axes, strict=True):
                for name, score in scores_of(results, info).items():
                    curve = score.effective_length
                    if curve and side in curve.recall:
                        handles[name] = _draw_curve(axis, curve, side, _line(results, name))
                        facts.append(f"{info.name}, {direction.lower()}, {name}: {_told(curve, side)}")
                axis.set_ylabel(f"{direction.lower()}\nR@1 (%)")
                axis.set_ylim(bottom=0)
                axis.set_xlim(left=0)
                _mark(axis, MARKS)
                axis.tick_params(labelbottom=axis is axes[-1])
            axes[-1].set_xlabel("tokens kept (markers: effective length)")
        _legend(figure, {_label(results, name): handle for name, handle in handles.items()}, len(benchmarks))
    description = (
        "R@1 when only so many tokens of each caption are kept; markers show the effective lengths, where R@1 rises; "
        "95 % intervals."
    )
    return Plot("effective_length", "Effective length", description, f"{'; '.join(facts)}.", figure, ground)


def _draw_curve(axis: "Axes", curve: EffectiveLength, side: Direction, line: dict[str, Any]) -> Any:
    """The curve with its intervals; on it, a marker and a bar for the effective length and its interval."""
    values = curve.recall[side]
    (drawn,) = axis.plot(curve.lengths, [100 * v.value for v in values], markevery=[], **line)
    low, high = zip(*map(_ends, values), strict=True)
    axis.fill_between(curve.lengths, low, high, color=line["color"], alpha=0.15, linewidth=0)
    at = curve.effective[side]
    if at is None:
        return drawn
    height = 100 * _interpolate(at.value, curve.lengths, [v.value for v in values])
    if at.low is not None and at.high is not None:
        axis.hlines(height, at.low, at.high, color=line["color"], linewidth=2.5, alpha=0.6)
    axis.plot(at.value, height, color=line["color"], marker=line["marker"], markeredgecolor=behind(), zorder=3)
    return drawn


def _plot_recall(results: Results, benchmarks: Sequence[BenchmarkInfo], ground: Ground) -> Plot:
    handles: dict[str, Any] = {}
    facts = []
    with style(ground):
        figure, grid = _grid(len(benchmarks), rows=1, height=1.9)
        for info, (axis,) in zip(benchmarks, grid, strict=True):
            _head(axis, _panel(results, info), size_of(info))
            scores = scores_of(results, info)
            groups = [metric for metric in METRICS if any(metric in _bars(score) for score in scores.values())]
            # A gap between the directions.
            places = {metric: i + 0.4 * (metric.startswith("t2i")) for i, metric in enumerate(groups)}
            width = 0.8 / len(scores)
            for i, (name, score) in enumerate(scores.items()):
                told = ", ".join(f"{METRICS[m]} {100 * v.value:.1f}" for m, v in _bars(score).items())
                facts.append(f"{info.name}, {name}: {told} %")
                for metric, value in _bars(score).items():
                    x = places[metric] + (i - (len(scores) - 1) / 2) * width
                    handles[name] = axis.bar(x, 100 * value.value, width * 0.92, **_fill(results, name))
                    axis.vlines(x, *_ends(value), color=ink(), linewidth=0.8)
            axis.set_xticks(list(places.values()), [_bar_label(metric) for metric in groups])
            axis.tick_params(axis="x", length=0)
            axis.set_ylim(0, 100)
            axis.set_ylabel("recall (%)" if info.kind == "retrieval" else "accuracy (%)")
            middle = sum(places.values()) / len(places)
            half = max(1.8, max(places.values()) - middle + 0.6)  # no fat bars where there are few
            axis.set_xlim(middle - half, middle + half)
            for side, direction in DIRECTIONS.items():
                at = [place for metric, place in places.items() if metric.startswith(side)]
                if at:
                    axis.annotate(direction.lower(), ((at[0] + at[-1]) / 2, 0), (0, -15), textcoords="offset points",
                                  ha="center", va="top", annotation_clip=False)  # fmt: skip
        _legend(figure, {_label(results, name): handle for name, handle in handles.items()}, len(benchmarks))
    description = "The shares of the table, with their 95 % intervals."
    return Plot("recall", "Recall and accuracy", description, f"{'; '.join(facts)}.", figure, ground)


def _plot_lengths(results: Results, benchmarks: Sequence[BenchmarkInfo], ground: Ground) -> Plot:
    facts = []
    marks = (CLIP_LENGTH, LENGTH)
    with style(ground):
        figure, grid = _grid(len(benchmarks), rows=1, height=1.7)
        for info, (axis,) in zip(benchmarks, grid, strict=True):
            longest = max(n for n, count in enumerate(info.lengths) if count)
            step = next(m * 10**e for e in itertools.count() for m in (1, 2, 5) if m * 10**e * 60 >= longest)
            starts = range(0, longest + 1, step)
            counts = [sum(info.lengths[start : start + step]) for start in starts]
            axis.bar(starts, counts, step, align="edge", color=COLOURS[1], edgecolor=COLOURS[1], linewidth=0.3)
            axis.set_xlim(0, max(longest + step, LENGTH) * 1.02)
            axis.set_xlabel("tokens, start and end of text included")
            axis.set_ylabel("captions" if step == 1 else f"captions per {step} tokens")
            shares = [sum(info.lengths[mark + 1 :]) / sum(info.lengths) for mark in marks]
            beyond = ", ".join(f"{percent(share)} beyond {mark}" for share, mark in zip(shares, marks, strict=True))
            _head(axis, _panel(results, info), f"n = {sum(info.lengths):,}: {beyond}", marks)
            _mark(axis, marks)
            facts.append(f"{info.name}: {beyond}")
    description = "How many captions have how many tokens, and the share beyond each limit."
    return Plot("lengths", "Length of the captions", description, f"{'; '.join(facts)}.", figure, ground)


def _grid(panels: int, rows: int, height: float) -> "tuple[Figure, list[list[Axes]]]":
    """A figure, and the axes from top to bottom of each panel; panels stand two abreast."""
    from matplotlib.figure import Figure  # not pyplot: that would set the caller's backend

    across = min(panels, ABREAST)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(COLUMN * across, (height * rows + 0.45) * down), layout="constrained")
    axes = figure.subplots(down * rows, across, squeeze=False)
    grid = [[axes[i // across * rows + row, i % across] for row in range(rows)] for i in range(down * across)]
    for axis in (axis for panel in grid[panels:] for axis in panel):
        axis.remove()
    return figure, grid[:panels]


def _line(results: Results, name: str) -> dict[str, Any]:
    """How a model's curve is drawn: in its colour of all plots; no two of 28 models share colour and dashes."""
    i = _place(results, name)
    return {
        "color": colour(results, name),
        "linestyle": LINES[i % len(LINES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def _fill(results: Results, name: str) -> dict[str, Any]:
    i = _place(results, name)
    return {"color": colour(results, name), "hatch": HATCHES[i // len(COLOURS) % len(HATCHES)]}


def _place(results: Results, name: str) -> int:
    return [model.name for model in results.models].index(name)


def _legend(figure: "Figure", handles: dict[str, Any], panels: int) -> None:
    """Above the panels, where it covers no data."""
    widest = 0.5 + 0.055 * max(map(len, handles))  # inches
    columns = max(1, int(COLUMN * min(panels, ABREAST) / widest))
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(handles) / columns))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)


def _head(axis: "Axes", title: str, subtitle: str, marks: Sequence[int] = ()) -> None:
    """Title, subtitle, and the labels of the marks, each on its line above the axes."""
    lift = 9 if marks else 0
    axis.set_title(title, pad=13 + lift)
    axis.annotate(subtitle, (0, 1), (0, 4 + lift), xycoords="axes fraction", textcoords="offset points", fontsize=7)
    for mark in marks:
        axis.annotate(str(mark), (mark, 1), (0, 2), xycoords=axis.get_xaxis_transform(), textcoords="offset points",
                      ha="center", color=mark_colour(), fontsize=7)  # fmt: skip


def _mark(axis: "Axes", places: Sequence[int]) -> None:
    for place in places:
        axis.axvline(place, color=mark_colour(), linewidth=0.7, linestyle=(0, (2, 2)), zorder=1.5)


def _label(results: Results, name: str) -> str:
    """A model's name as it can be drawn; where letters are lost, with its place among the models."""
    return _named(name, f"model {_place(results, name) + 1}")


def _panel(results: Results, info: BenchmarkInfo) -> str:
    return _named(info.name, f"benchmark {results.benchmarks.index(info) + 1}")


def _named(name: str, place: str) -> str:
    drawn = drawable(name)
    if drawn == " ".join(name.split()):
        return name
    return f"{drawn} ({place})" if drawn else place


def _undrawable(results: Results) -> str:
    """Which names stand for others that no font here has letters for."""
    names = [(model.name, _label(results, model.name)) for model in results.models]
    names += [(info.name, _panel(results, info)) for info in results.benchmarks]
    return " ".join(f"{label} is {name}." for name, label in names if label != name)


def _told(curve: EffectiveLength, side: Direction) -> str:
    """A curve in words."""
    at, values = curve.effective[side], curve.recall[side]
    ends = (
        f"{100 * value.value:.1f} % at {n}"
        for value, n in ((values[0], curve.lengths[0]), (values[-1], curve.lengths[-1]))
    )
    return f"{' and '.join(ends)} tokens, effective length {'none' if at is None else f'{at.value:.0f}'}"


def _bars(score: Score) -> dict[str, Value]:
    """What is comparable on one axis: recalls and accuracies."""
    shares = {metric: value for metric, value in score.metrics.items() if is_share(metric)}
    return {metric: value for metric, value in shares.items() if metric[-1].isdigit()}


def _ends(value: Value) -> tuple[float, float]:
    """Of the interval in percent; where there is none, both are the value."""
    low, high = (value.value if end is None else end for end in (value.low, value.high))
    return 100 * low, 100 * high


def _bar_label(metric: str) -> str:
    return METRICS[metric].rpartition(", ")[2].removesuffix(" accuracy")


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=False), strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[0] if x < xs[0] else ys[-1]
