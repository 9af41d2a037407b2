"""Files and folders: what is read lies where it belongs, what is written appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longclip_hf.errors import FileError

try:
    import fcntl
except ImportError:  # Windows: what a killed run left is then never taken for dead, and stays
    fcntl = None  # type: ignore[assignment]


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must lie in `folder`, links followed, or in the Hub's cache, where snapshots link to.

    Raises:
        FileError: if it leads anywhere else: what is read as a part of a folder, or published with it, lies in it.
    """
    from huggingface_hub import constants

    file = folder / name
    try:
        place = file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        raise FileError(f"{file} leads nowhere: {error}. Replace the link by the file itself.") from error
    homes = (folder.resolve(), Path(constants.HF_HUB_CACHE).resolve())
    if not any(place.is_relative_to(home) for home in homes):
        raise FileError(f"{file} leads out of its folder, to {place}. Replace the link by the file itself.")
    return file


@contextmanager
def new_folder(output: Path, nbytes: int, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, whole; on an error nothing is left of it.

    It stands beside `output` under a hidden name that ends in `.incomplete`, so that a process killed half-way leaves
    nothing that looks finished; the next run for the same `output` removes that, and says so. What it replaces
    (`overwrite`) is removed only after it, and holds the file `marker`.

    Args:
        output: the new folder.
        nbytes: what will be written; the disk must have it free.
        overwrite: replace a folder that is there.
        marker: the file by which a folder is known as one that may be replaced.

    Raises:
        FileError: if `output` exists and is not to be replaced, cannot be written, or `nbytes` do not fit.
    """
    output = output.resolve()  # through a link, so that what is replaced is what it points to
    if output.exists() and not overwrite:
        raise FileError(f"{output} exists already. Name another --output, or replace it with --overwrite.")
    if output.exists() and not output.is_dir():
        raise FileError(f"{output} is a file, and a folder is to be written. Name another --output.")
    if output.exists() and any(output.iterdir()) and not (output / marker).is_file():
        raise FileError(
            f"{output} holds files and no checkpoint (no {marker}): --overwrite replaces checkpoints only. Name "
            "another --output."
        )
    try:
        with _work_folder(output, nbytes) as work:
            yield work
            replaced = None
            if overwrite and output.exists():  # without it, what has appeared meanwhile stays, and the rename fails
                replaced = work.with_suffix(".replaced")
                output.rename(replaced)
            try:
                work.rename(output)
            except BaseException:  # an interrupt too
                if replaced is not None and not output.exists():
                    replaced.rename(output)
                raise
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise FileError(f"{output} could not be written: {error}.") from error


@contextmanager
def new_file(output: Path, nbytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A file to write that becomes `output` at the end, whole; on an error nothing is left of it. See `new_folder`.

    Raises:
        FileError: if `output` exists and is not to be replaced, cannot be written, or `nbytes` do not fit.
    """
    output = output.resolve()
    if output.exists() and not overwrite:
        raise FileError(f"{output} exists already. Name another --output, or replace it with --overwrite.")
    if output.is_dir():
        raise FileError(f"{output} is a folder, and what is written is a file. Name another --output.")
    try:
        with _work_folder(output, nbytes) as work:
            yield work / output.name
            (work / output.name).replace(output)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's, where a disk is full
        raise FileError(f"{output} could not be written: {error}.") from error


@contextmanager
def _work_folder(output: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `output` that is gone at the end, if it was not renamed before."""
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(output)
    free = shutil.disk_usage(output.parent).free
    if free < nbytes:
        raise FileError(
            f"{output.parent} has {free / 1e6:,.0f} MB free and {nbytes / 1e6:,.0f} MB are needed. Make room, or name "
            "an --output on another disk."
        )
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".incomplete", dir=output.parent))
    lock = None
    try:
        lock = _lock(work)  # held while this process lives, however it ends
        work.chmod(0o777 & ~_umask())  # mkdtemp's folders are closed to everybody else
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_left_over(output: Path) -> None:
    """Of runs for the same `output` that were killed: nobody holds the lock of their folder any more."""
    for folder in output.parent.glob(f".{_escaped(output.name)}.*.incomplete"):
        if folder.is_symlink() or not folder.is_dir():
            continue  # nothing that this project writes
        lock = _lock(folder)
        if lock is not None:
            from rich.console import Console

            Console(stderr=True, markup=False).print(
                f"Removed {folder}, left by a run that was killed.", soft_wrap=True
            )
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of `folder`; None where another process holds it, or there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside `path` and renames, so that no reader and no killed process meets half a file.

    The file beside it has a random name and is opened exclusively: no link that waits there is followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".incomplete", dir=path.parent)
    work = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        work.chmod(0o666 & ~_umask())
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, empty where there is no such file.

    Raises:
        FileError: if it holds no JSON object.
    """
    if not file.is_file():
        return {}
    value = load_json(file)
    if not isinstance(value, dict):
        raise FileError(f"{file} holds no JSON object, but a {type(value).__name__}. Download it again.")
    return value


def load_json(file: Path) -> Any:
    """Whatever JSON stands in `file`.

    Raises:
        FileError: if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a list in a list in a list ... is a RecursionError
        raise FileError(f"{file} is no JSON file: {error}. Download it again.") from error


def write_json(file: Path, value: Any) -> None:
    """`value` in `file`, which is not written atomically: it is a part of a new folder."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _escaped(name: str) -> str:
    """For `glob`, which reads brackets as a choice of letters."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
