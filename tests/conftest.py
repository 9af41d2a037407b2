"""What the tests share: small checkpoints made here, and fresh processes to load them in."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import fork_server
import pytest

from examples.random_clip import write_checkpoint
from longclip_hf.conversion.stretch import stretch


def run_python(
    code: str,
    env: Mapping[str, str] | None = None,
    python: str | os.PathLike[str] = sys.executable,
    cwd: Path | None = None,
    fresh: bool = False,
) -> str:
    """Runs `code` in a process of its own, in which warnings are errors, and returns what it printed.

    `cwd` is a folder outside the checkout by default, so that the child has only what is installed. `fresh` is for
    what is about imports themselves: the others are forks of a process that has imported the libraries.
    """
    # peft asks transformers 5 by the old name.
    renamed = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    command = [str(python), "-W", "error", "-W", "ignore::DeprecationWarning", "-W", renamed, "-c", code]
    if fresh or python != sys.executable:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=cwd or "/", env={**os.environ, **(env or {})}, timeout=300
        )
    else:
        done = fork_server.run(command, cwd=cwd or "/", env=env)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock CLIPModel of 77 positions with its processor files. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    write_checkpoint(folder, "tiny", full_vocabulary=False)
    return folder


@pytest.fixture(scope="session")
def longclip_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip_folder`, stretched. Read only."""
    folder = tmp_path_factory.mktemp("longclip") / "tiny-longclip"
    stretch(str(clip_folder), folder)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a shared folder so that a test may change it."""
    import shutil

    return lambda folder: Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))
