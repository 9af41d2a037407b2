"""Exit codes, one-line errors, signals, and options in both spellings."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from rich.table import Table

from longclip_hf.command import CommandParser, consoles, guarded, is_mendable, one_line, print_proofs
from longclip_hf.errors import ConversionError, ImageError, LongCLIPError
from modeling_longclip import __version__


def parser() -> CommandParser:
    made = CommandParser(prog="longclip-try", description="Tries.")
    made.add_argument("--push-to-hub")
    made.add_argument("--batch_size", type=int)
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["--push-to-hub", "a-b_c", "--batch_size", "3"],
        ["--push_to_hub", "a-b_c", "--batch-size", "3"],
        ["--push_to_hub=a-b_c", "--batch-size=3"],
    ],
)
def test_options_are_understood_in_both_spellings(words: list[str]) -> None:
    """And their values stay as they are."""
    options = parser().parse_args(words)
    assert (options.push_to_hub, options.batch_size) == ("a-b_c", 3)


@pytest.mark.parametrize("words", [["--push", "x"], ["--batch_siz", "3"], ["--batch--size", "3"]])
def test_parts_and_misspellings_of_options_are_refused(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args(["--version"])
    assert capsys.readouterr().out == f"longclip-try {__version__}\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConversionError("no\n  such   folder"), "error: no such folder"),
        (OSError(28, "No space left on device", "/x/y"), "error: [Errno 28] No space left on device: '/x/y'"),
        (ImportError('pip install "longclip-hf[train]"'), 'error: pip install "longclip-hf[train]"'),
        (RecursionError("maximum recursion depth exceeded"), "error: maximum recursion depth exceeded"),
        (ValueError(), "error: ValueError"),
        (
            MemoryError(),
            "error: memory ran out: MemoryError. Use a smaller batch or model, or raise the limit.",
        ),
        (
            RuntimeError("can't start new thread"),  # under `ulimit -v` or `-u`
            "error: memory ran out: can't start new thread. Use a smaller batch or model, or raise the limit.",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you asked for 9 bytes."),
            "error: memory ran out: [enforce fail] DefaultCPUAllocator: can't allocate memory: you asked for 9 bytes. "
            "Use a smaller batch or model, or raise the limit.",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(error: Exception, said: str, capsys: Any) -> None:
    def work() -> None:
        raise error

    assert guarded(work) == 2
    assert capsys.readouterr() == ("", said + "\n")


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), RuntimeError("x"), AssertionError("x")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        guarded(work)


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCLIP_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)

    def work() -> None:
        raise ConversionError("x")

    with pytest.raises(ConversionError):
        guarded(work)


def test_one_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def work() -> None:
        raise LongCLIPError("wrong")

    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        for every_process in (False, True):
            monkeypatch.setenv("RANK", rank)
            assert guarded(work, every_process=lambda each=every_process: each) == 2
            said.append(capsys.readouterr().err)
    assert said == ["error (process 0): wrong\n", "error (process 0): wrong\n", "", "error (process 1): wrong\n"]


def test_interrupted(capsys: Any) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    assert guarded(work, lambda: "half is done") == 130
    assert capsys.readouterr() == ("", "Interrupted; half is done.\n")


def test_terminated_it_cleans_up() -> None:
    code = """
import signal, sys, time
from longclip_hf.command import guarded
def work():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)
before = signal.getsignal(signal.SIGTERM)
code = guarded(work)
assert signal.getsignal(signal.SIGTERM) == before
sys.exit(code)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"working\n"
        os.kill(child.pid, signal.SIGTERM)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (143, b"cleaned\n", b"Interrupted; nothing was left behind.\n")


def test_an_error_of_a_dataloader_worker_loses_its_traceback() -> None:
    caught = ConversionError(
        "Caught ConversionError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nlongclip_hf.errors.ConversionError: Row 3\n  is bad'
    )
    assert one_line(caught) == "Row 3 is bad"


def test_connections_are_mendable() -> None:
    """Of whichever library this version of huggingface_hub connects with: requests' errors are OSErrors."""
    from huggingface_hub.errors import HfHubHTTPError

    connection = HfHubHTTPError.__mro__[1]
    assert connection.__module__.split(".")[0] in ("requests", "httpx", "httpx2")
    error = connection.__new__(connection)
    Exception.__init__(error, "the server did not answer")
    assert is_mendable(error)


def test_names_are_not_markup(capsys: Any) -> None:
    console, errors = consoles()
    print_proofs(console, {"[red]kept[/] rows [/x]": "rows [0] ... [19]"})
    table = Table("[/a]", title="[/b]", title_justify="left")
    table.add_row("[red]a path[/] :smile:")
    console.print(table)
    errors.print("[/] in a path :smile:")
    out, err = capsys.readouterr()
    assert "[red]kept[/] rows [/x]" in out and "rows [0] ... [19]" in out and err == "[/] in a path :smile:\n"
    assert "│ [red]a path[/] :smile: │" in out and "[/a]" in out and "[/b]" in out


def test_quiet(capsys: Any) -> None:
    console, errors = consoles(quiet=True)
    print_proofs(console, {"a": "b"})
    errors.print("c")
    assert capsys.readouterr() == ("", "")


def test_errors_of_images_come_out_of_other_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("missing", "photo.jpg is missing")))
    assert (type(error), error.cause, str(error)) == (ImageError, "missing", "photo.jpg is missing")
