"""What every command of this folder does around its work: signals, errors, exit codes."""

import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT = 2  # exit code for an error that the user can mend


def guarded(
    work: "Callable[[Console, Console], None]", interrupted: Callable[[], str] = lambda: "nothing was left behind"
) -> int:
    """Does a command's work and returns its exit code: 0, 2 for an error that the user can mend, 130 after Ctrl-C.

    A terminated command cleans up like an interrupted one, and exits with 143.

    Args:
        work: gets a console for results and one for progress and errors.
        interrupted: says after Ctrl-C what there is.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    from rich.console import Console
    from rich.markup import escape

    from conversion.tensors import ConversionError

    # Without markup: brackets in a path are brackets.
    console, errors = Console(markup=False), Console(stderr=True)
    try:
        work(console, errors)
    except ConversionError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return BAD_INPUT
    except KeyboardInterrupt:
        errors.print(f"Interrupted; {interrupted()}.", markup=False)
        return 128 + signal.SIGINT
    return 0


def print_proofs(console: "Console", proofs: Mapping[str, str]) -> None:
    """Claims about what was written, and their results, as a table."""
    from rich.table import Table

    table = Table("proof", "result", title="Proven on the written files", title_justify="left")
    for claim, result in proofs.items():
        table.add_row(claim, result)
    console.print(table)
