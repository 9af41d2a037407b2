"""The curves of a run."""

from pathlib import Path

LEFT_OUT = {"step", "epoch", "total_flos"}


def draw_curves(history: list[dict[str, float]], file: Path) -> None:
    """The logged figures over the steps, one panel each, as a PNG; none without a figure that was logged twice.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: that would set the caller's backend

    names = [name for name in dict.fromkeys(key for entry in history for key in entry) if name not in LEFT_OUT]
    series = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows))
    FigureCanvasAgg(figure)
    for place, (name, points) in enumerate(series.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        axis.plot(*zip(*points, strict=True), marker=".", linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
