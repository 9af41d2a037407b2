"""How far a long run is: on a terminal a bar, elsewhere a line now and then; rows per second and the time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 30  # seconds between lines


@contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Gives `advance(rows)`. What the first call says was there before counts for no speed.

    Args:
        what: what the bar is called.
        total: rows.
        quiet: show nothing.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    shown = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
    task = shown.add_task(escape(what), total=total, speed="")
    done, before = 0, -1
    began = said = time.monotonic()

    def advance(rows: int) -> None:
        nonlocal done, before, began, said
        now = time.monotonic()
        if before < 0:
            before, began, said = rows, now, now
        done += rows
        rate = (done - before) / max(now - began, 1e-9)
        speed = f"{rate:,.1f} rows/s, {_time((total - done) / rate)} left" if rate else ""
        shown.update(task, completed=done, speed=speed)
        if not (quiet or console.is_terminal) and now - said >= EVERY:
            said = now
            console.print(f"{escape(what)}: {done:,} of {total:,} rows, {speed}", soft_wrap=True)

    with shown:
        yield advance


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
