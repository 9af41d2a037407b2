"""What every command does around its work: options, signals, one-line errors, exit codes.

Exit codes: 0; 2 for what the user can mend; 130 after Ctrl-C; 143 after SIGTERM.
"""

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modeling_longclip import __version__

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT = 2


class CommandParser(argparse.ArgumentParser):
    """A parser whose options are understood with `-` and with `_`, never by a part of their name, and `--version`.

    The description is the script's docstring, as it stands.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=f"{self.prog} {__version__}")
        self.add_argument("--quiet", action="store_true", help="print errors and what is left out, nothing else")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([spelled_as_known(self, word) for word in words], namespace)


def spelled_as_known(parser: argparse.ArgumentParser, word: str) -> str:
    """`word` of a command line, in `parser`'s spelling if it is an option with `-` for `_` or the other way round."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name in parser._option_string_actions:
        return word
    for spelling in (name[2:].replace("_", "-"), name[2:].replace("-", "_")):
        if f"--{spelling}" in parser._option_string_actions:
            return f"--{spelling}{equals}{value}"
    return word


def guarded(
    work: Callable[[], object],
    interrupted: Callable[[], str] = lambda: "nothing was left behind",
    every_process: Callable[[], bool] = lambda: False,
) -> int:
    """Does a command's work and returns its exit code.

    A terminated command cleans up like an interrupted one. With `LONGCLIP_TRACEBACK=1` in the environment, an error
    keeps its traceback.

    Args:
        work: what the command is for.
        interrupted: says after Ctrl-C what there is.
        every_process: of a command in several processes, whether all are to say what is wrong (data can be wrong for
            one of them) or the first one alone (settings are wrong for all).
    """
    with _terminated_like_interrupted():
        try:
            work()
        except KeyboardInterrupt as stop:
            _say(f"Interrupted; {interrupted()}.")
            return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
        except Exception as error:
            if not is_mendable(error) or os.environ.get("LONGCLIP_TRACEBACK"):
                raise
            complain(one_line(error), every_process())
            return BAD_INPUT
    return 0


def is_mendable(error: BaseException) -> bool:
    """Whether data, settings, a file, a connection or a lack of memory is at fault. Other exceptions are bugs."""
    if isinstance(error, ValueError | OSError | ImportError | MemoryError | RecursionError):
        return True
    # Of libraries that need not be there; without them, nothing raises these.
    foreign = (("datasets.exceptions", "DatasetsError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"))
    for module, name in foreign:
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name)):
            return True
    return isinstance(error, RuntimeError) and _is_lack_of_memory(error)  # torch's, and Python's of threads


def _is_lack_of_memory(error: BaseException) -> bool:
    return any(said in str(error) for said in ("can't allocate memory", "can't start new thread", "std::bad_alloc"))


def one_line(error: BaseException) -> str:
    """What `error` says, on one line; of one in a dataloader worker, without the worker's traceback."""
    text = str(error)
    if text.startswith("Caught "):
        text = re.split(r"\n[\w.]*" + type(error).__name__ + ": ", text)[-1]
    text = " ".join(text.split())
    if isinstance(error, MemoryError) or _is_lack_of_memory(error):
        text = text.rstrip(".") or type(error).__name__
        return f"memory ran out: {text}. Use a smaller batch or model, or raise the limit."
    return text or type(error).__name__


def complain(message: str, every_process: bool = False) -> None:
    """Prints an error, of several processes the first one's alone unless `every_process`."""
    of = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    _say(f"error{of}: {message}", every_process)


def is_first_process() -> bool:
    """Of those that `torchrun` or `accelerate launch` started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def consoles(quiet: bool = False) -> "tuple[Console, Console]":
    """One for results and one for progress. Neither reads `[red]` as markup or `:name:` as an emoji: paths hold such.

    That holds for the cells and titles of tables too; not for a status or a bar of progress, which parse a plain text
    and take a `rich.text.Text` as it is.
    """
    from rich.console import Console

    return (
        Console(markup=False, emoji=False, quiet=quiet),
        Console(markup=False, emoji=False, stderr=True, quiet=quiet),
    )


def print_proofs(console: "Console", proofs: Mapping[str, str]) -> None:
    """Claims about what was written, and their results, as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table("proof", "result", title="Proven on the written files", title_justify="left")
    for claim, result in proofs.items():
        table.add_row(Text(claim), Text(result))
    console.print(table)


def _say(text: str, every_process: bool = False) -> None:
    if every_process or is_first_process():
        print(text, file=sys.stderr, flush=True)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _terminate(*_: Any) -> None:
    raise _Terminated


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends a process of its own like Ctrl-C. One of several dies at once, as without this: it may hang in a
    collective, where no Python runs, and its launcher waits.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    if not alone:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
