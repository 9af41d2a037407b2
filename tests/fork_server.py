"""Processes that need not import torch and transformers anew: forks of one that has, used like `subprocess`.

    done = fork_server.run([sys.executable, "-W", "error", script, "--help"], cwd=tmp_path)

understands `python [-W ACTION]... (-c CODE | -m MODULE | SCRIPT) ARGUMENT...` and returns a `CompletedProcess` with
text. What is forked has imported modules and computed nothing: no threads of OpenMP, no GPU. There are two: one with
the libraries and this project, and one with only those of them that read no variable `HF_...` when they are imported;
the environment of the new process says which it comes from. Warnings that imports give are errors in both.

A fork is no fresh interpreter: what is about imports themselves runs in a true one (`conftest.run_python`, `fresh`).
"""

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

# Nothing here, where it is installed, depends on huggingface_hub, whose settings are read when it is imported.
INDEPENDENT = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "torch.utils.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "numpy",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "scipy.stats",
    "scipy.sparse",
    "scipy.optimize",
    "sklearn.metrics",
    "sympy",
    "requests",
    "httpx2",
    "httpx",
    "aiohttp",
    "rich.console",
    "jinja2",
    "yaml",
    "regex",
    "tokenizers",
    "safetensors.torch",
    "PIL.Image",
    "dill",
    "multiprocess",
    "psutil",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
PROJECT = [
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.processing_clip",
    "transformers.models.auto",
    "transformers.pipelines",
    "transformers.trainer",
    "accelerate",
    "datasets",
    "datasets.packaged_modules.imagefolder.imagefolder",
    "longclip_hf.conversion.stretch",
    "longclip_hf.conversion.publish",
    "longclip_hf.training.train",
    "longclip_hf.training.trainer",
    "longclip_hf.evaluation.run",
    "longclip_hf.evaluation.encoding",
    "longclip_hf.search.embedding",
    "longclip_hf.search.tables",
]
READ_WHEN_IMPORTED = ("HF_", "HUGGING", "TRANSFORMERS_")

# The tests' side


@functools.cache
def variables() -> dict[str, str]:
    """What every process gets that is not told otherwise: no network, one thread, and caches of this session."""
    home = Path(tempfile.mkdtemp(prefix="fork-server-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets")} | {
        "OMP_NUM_THREADS": "1"
    }


@functools.cache
def servers() -> dict[str, socket.socket]:
    """Starts the process that is forked, and the fork of it that imports the project."""
    ours = {name: socket.socketpair() for name in ("libraries", "project")}
    theirs = [pair[1].fileno() for pair in ours.values()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-P", __file__, *map(str, theirs)],
        env=environment, cwd="/", stdin=subprocess.DEVNULL, pass_fds=theirs, start_new_session=True,
    )  # fmt: skip

    def stop() -> None:
        for one, _ in ours.values():
            one.close()
        process.wait(10)

    atexit.register(stop)
    for _, other in ours.values():
        other.close()
    return {name: pair[0] for name, pair in ours.items()}


class Fork:
    """A started process, as of `subprocess.Popen`. Where no file is given, what it prints is kept for later."""

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        input: str = "",
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.args = [os.fspath(word) for word in command]
        assert self.args[0] == sys.executable, f"only this Python is forked, not {self.args[0]}"
        self.returncode: int | None = None
        environment = {**os.environ, **variables(), **(env or {})}
        request = {"command": self.args[1:], "cwd": os.fspath(cwd or Path.cwd()), "env": environment}
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        out = self._out if stdout in (None, subprocess.PIPE) else stdout
        err = out if stderr == subprocess.STDOUT else self._err if stderr in (None, subprocess.PIPE) else stderr
        self._answers, theirs = socket.socketpair()
        named = (name for name in environment if name.startswith(READ_WHEN_IMPORTED))
        asis = {**os.environ, **variables()}
        layer = "project" if all(environment[name] == asis.get(name) for name in named) else "libraries"
        with theirs, tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as given:
            for file, text in ((asked, json.dumps(request)), (given, input)):
                file.write(text)
                file.seek(0)
            files = [asked.fileno(), given.fileno(), out.fileno(), err.fileno(), theirs.fileno()]  # type: ignore[union-attr]
            socket.send_fds(servers()[layer], [b"!"], files)
        self.pid = self._answer(None)

    def _answer(self, timeout: float | None) -> int:
        self._answers.settimeout(timeout)
        try:
            (number,) = array.array("i", self._answers.recv(4))
        except TimeoutError:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, *self.printed()) from None
        return number

    def printed(self) -> tuple[str, str]:
        """So far. Read without a move of the place in the file, which is the process's, too."""
        files = (self._out.fileno(), self._err.fileno())
        out, err = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in files)
        return out, err

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.001)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._answer(timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.printed()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait(10)
        self._answers.close()
        self._out.close()
        self._err.close()


def run(
    command: Sequence[str | os.PathLike[str]], *, timeout: float = 300, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`, which captures what it is not given files for."""
    with Fork(command, **options) as process:
        printed, errors = process.communicate(timeout)
        done = subprocess.CompletedProcess(process.args, process.wait(), printed, errors)
    if check:
        done.check_returncode()
    return done


def ranks(count: int) -> list[dict[str, str]]:
    """What a launcher leaves in the environment of each of `count` processes of one machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(index), "LOCAL_RANK": str(index)} for index in range(count)]


def run_ranks(
    command: Sequence[str | os.PathLike[str]],
    count: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    **options: Any,
) -> list[subprocess.CompletedProcess[str]]:
    """`count` processes of one group, by rank. The first that fails ends the others, as a launcher does it."""
    until = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(Fork(command, env={**(env or {}), **rank}, **options)) for rank in ranks(count)]
        while any(process.poll() is None for process in started) and not any(p.returncode for p in started):
            assert time.monotonic() < until, [process.printed() for process in started]
            time.sleep(0.02)
        for process in started:
            process.kill()
        return [subprocess.CompletedProcess(p.args, p.wait(10), *p.printed()) for p in started]


# The other side


def serve(control: socket.socket) -> list[int]:
    """Forks whenever it is asked to; returns, in the new process only, its files. Ends with the tests."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 5)
        if not message:
            os._exit(0)
        if not os.fork():
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if not (child := os.fork()):
                return files
            watch(child, socket.socket(fileno=files[-1]))
        for file in files:
            os.close(file)


def watch(child: int, answers: socket.socket) -> NoReturn:
    """Tells the child's number and its exit code, and ends it where nobody waits for it any more."""
    answers.sendall(array.array("i", [child]))
    answers.settimeout(0.01)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError):
                answers.sendall(array.array("i", [os.waitstatus_to_exitcode(status)]))
            os._exit(0)
        with contextlib.suppress(TimeoutError):
            answers.recv(1)
            os.kill(child, signal.SIGKILL)


def become(files: list[int], path: list[str]) -> NoReturn:
    """Turns a fork into the process that was asked for, runs it, and ends as Python ends.

    But that modules and objects are not taken apart, which would take a second.
    """
    with os.fdopen(files[0]) as file:
        request = json.load(file)
    for number, file_number in enumerate(files[1:4]):
        os.dup2(file_number, number)
    for file_number in files[1:]:
        os.close(file_number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    command: list[str] = request["command"]
    sys.warnoptions.clear()
    while command[0] == "-W":
        sys.warnoptions.append(command[1])
        del command[:2]
    warnings.resetwarnings()
    warnings.filters[:] = FILTERS  # type: ignore[index]
    warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        execute(command, [*given, *path])
        code: object = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 255)


def execute(command: list[str], path: list[str]) -> None:
    main = types.ModuleType("__main__")
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[:] = [str(Path.cwd()), *path]
        sys.modules.pop(command[1], None)  # as it is not there in a process that begins
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    if command[0] == "-c":
        first, code = "", compile(command[1], "<string>", "exec")
        sys.argv = ["-c", *command[2:]]
    else:
        script = Path(command[0])
        first, code = str(script.resolve().parent), compile(script.read_bytes(), str(script), "exec")
        main.__file__ = str(script)
        sys.argv = command
    sys.path[:] = [first, *path]
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def wait_to_be_forked(controls: list[int]) -> list[int]:
    libraries, project = (socket.socket(fileno=number) for number in controls)
    for name in INDEPENDENT:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    if os.fork():
        project.close()
        return serve(libraries)
    libraries.close()
    for name in PROJECT:
        importlib.import_module(name)
    return serve(project)


if __name__ == "__main__":
    kept, FILTERS = sys.modules["__main__"], [*warnings.filters[2:]]  # those that every Python begins with
    own_path = [*sys.path]
    become(wait_to_be_forked([int(number) for number in sys.argv[1:]]), own_path)
