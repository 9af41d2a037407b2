"""Checkpoints during training: which of them were written whole, whatever killed the run that wrote them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMPLETE = "COMPLETE.json"  # marks a checkpoint as written whole; holds what was counted up to there


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of checkpoints in `output_dir`, complete or not, from the first step to the last."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint was written whole."""
    return (Path(folder) / COMPLETE).is_file()


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint in `output_dir` that was written whole, or None."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if is_complete(folder)), None)


def mark_complete(folder: Path, counts: Mapping[str, Any]) -> None:
    """Marks a checkpoint of which all files are on disk, by `counts`, which go on in a run that takes it up."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    mark = folder / f"{COMPLETE}.partial"
    with mark.open("w", encoding="utf-8") as stream:
        json.dump(counts, stream)
        stream.flush()
        os.fsync(stream.fileno())
    mark.replace(folder / COMPLETE)


def read_counts(folder: str | Path) -> dict[str, Any]:
    """What `mark_complete` was given."""
    counts: dict[str, Any] = json.loads((Path(folder) / COMPLETE).read_text(encoding="utf-8"))
    return counts


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, whole or not, or does nothing where there is none."""
    (folder / COMPLETE).unlink(missing_ok=True)  # first: what is half deleted is not complete
    if folder.is_dir():
        shutil.rmtree(folder)
