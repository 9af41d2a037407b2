"""Files and folders: what is read lies where it belongs, what is written appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longclip_hf.errors import FileError

# Lists in lists in JSON: no settings are that deep, and what walks through deeper ones runs out of stack.
DEEPEST = 100

try:
    import fcntl
except ImportError:  # Windows: what a killed run left is then never taken for dead, and stays
    fcntl = None  # type: ignore[assignment]


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must lie in `folder`, links followed, or in the Hub's cache, where snapshots link to.

    A snapshot in another cache than the one in use has its files in `../../blobs`.

    Raises:
        FileError: if it leads anywhere else: what is read as a part of a folder, or published with it, lies in it.
    """
    from huggingface_hub import constants

    file = folder / name
    try:
        place = file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        raise FileError(f"{file} leads nowhere: {error}. Replace the link by the file itself.") from error
    homes = [folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parents[1] / "blobs")
    if not any(place.is_relative_to(home) for home in homes):
        raise FileError(f"{file} leads out of its folder, to {place}. Replace the link by the file itself.")
    return file


@contextmanager
def new_folder(output: Path, nbytes: int, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, whole; on an error nothing is left of it.

    It stands beside `output` under a hidden name that ends in `.incomplete`, so that a process killed half-way leaves
    nothing that looks finished; the next run for the same `output` removes that, and says so. What it replaces
    (`overwrite`) holds the file `marker`, and is removed only after it; a process killed between the two leaves it
    under a name that ends in `.replaced`, and the next run puts it back.

    Args:
        output: the new folder.
        nbytes: what will be written; the disk must have it free.
        overwrite: replace a folder that is there.
        marker: the file by which a folder is known as one that may be replaced.

    Raises:
        FileError: if `output` exists and is not to be replaced, cannot be written, or `nbytes` do not fit.
    """
    output = output.resolve()  # through a link, so that what is replaced is what it points to
    if output.parent.is_dir():
        _clear_left_over(output)  # first: what is put back is there, and is not replaced unasked
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
            if overwrite and output.exists():  # without it, what has appeared meanwhile stays, and the rename fails
                _replace(output, work)
            else:
                work.rename(output)
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


def _replace(output: Path, work: Path) -> None:
    """`work` in the place of `output`, which is gone at the end, or is there as it was."""
    replaced = work.with_suffix(".replaced")
    lock = _lock(output)  # no other run takes it for left over while this one lives
    try:
        output.rename(replaced)
        try:
            work.rename(output)
        except BaseException:  # an interrupt too
            if not output.exists():
                replaced.rename(output)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def _work_folder(output: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `output` that is gone at the end, if it was not renamed before."""
    output.parent.mkdir(parents=True, exist_ok=True)
    _clear_left_over(output)
    free = shutil.disk_usage(output.parent).free
    if free < nbytes:
        raise FileError(
            f"{output.parent} has {free / 1e6:,.0f} MB free and {nbytes / 1e6:,.0f} MB are needed. Make room, or name "
            "an --output on another disk."
        )
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".new", dir=output.parent))
    lock = None
    try:
        lock = _lock(work)  # held while this process lives, however it ends
        work = work.rename(work.with_suffix(".incomplete"))  # only now, or another run could take it for left over
        work.chmod(0o777 & ~_umask())  # mkdtemp's folders are closed to everybody else
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _clear_left_over(output: Path) -> None:
    """Of runs for the same `output` that were killed: nobody holds the lock of their folders any more.

    What such a run had moved away to replace it is put back, unless it was replaced.
    """
    for suffix in ("replaced", "incomplete"):
        for folder in sorted(output.parent.glob(f".{_escaped(output.name)}.*.{suffix}")):
            if folder.is_symlink() or not folder.is_dir():
                continue  # nothing that this project writes
            lock = _lock(folder)
            if lock is None:
                continue
            try:
                if suffix == "replaced" and not output.exists():
                    folder.rename(output)
                    notice(f"Put {output} back, which a run that was killed had moved to {folder.name}.")
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                    notice(f"Removed {folder}, left by a run that was killed.")
            finally:
                os.close(lock)


def notice(text: str) -> None:
    """Says on stderr what a user should know and need not mend."""
    from rich.console import Console

    Console(stderr=True, markup=False, highlight=False).print(text, soft_wrap=True)


def _lock(place: Path) -> int | None:
    """A descriptor that holds the lock of a folder or file; None where another process holds it, or without locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or somebody else's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """While this lasts, no other process gets into the same for the same folder.

    Raises:
        FileError: if one is in it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(f"Another process writes to {folder}. Wait for its end, or stop it.") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside `path` and renames, so that no reader and no killed process meets half a file.

    The file beside it has a random name and is opened exclusively: no link that waits there is followed. One that a
    killed process left is removed by the next that writes `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{_escaped(path.name)}.????????.incomplete"):
        if not left.is_symlink() and left.is_file() and (lock := _lock(left)) is not None:
            left.unlink(missing_ok=True)
            os.close(lock)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    work = Path(name)
    lock = None
    try:
        with os.fdopen(descriptor, "wb") as stream:
            lock = _lock(work)
            work = work.rename(work.with_suffix(".incomplete"))  # only now, or another process could take it for left
            stream.write(data)
        work.chmod(0o666 & ~_umask())
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


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
        FileError: if it cannot be read, is no JSON, or is nested deeper than any settings are.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a list in a list in a list ... is a RecursionError
        raise FileError(f"{file} is no JSON file: {error}. Download it again.") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [part for parent in level for part in _parts(parent) if isinstance(part, dict | list)]
        if not level:
            return value
    raise FileError(f"{file} is nested more than {DEEPEST} levels deep, which no settings are. Download it again.")


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


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
