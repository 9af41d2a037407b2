"""Checkpoints during training: which of them were written whole, what they record, and whether they can be read.

A folder may come from anywhere. What a run reads of one is checked before it is used, and runs no code: pickles are
read by torch's restricted unpickler alone, and `training_args.bin` not at all.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import safe_globals

from longclip_hf.errors import CheckpointError, FileError
from longclip_hf.files import inside, load_json

COMPLETE = "COMPLETE.json"  # marks a checkpoint as written whole; holds what was counted up to there, and the settings
PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin")
REMEDY = "Delete that checkpoint's folder: the same command goes on from the one before it, or begins anew."
# Of what `TrainerState` holds, that which decides how a run goes on.
STATE = {
    "epoch": (int, float),
    "global_step": (int,),
    "max_steps": (int,),
    "num_train_epochs": (int,),
    "num_input_tokens_seen": (int,),
    "total_flos": (int, float),
    "log_history": (list,),
    "stateful_callbacks": (dict,),
    "train_batch_size": (int, type(None)),
    "best_metric": (int, float, type(None)),
    "best_global_step": (int, type(None)),
    "best_model_checkpoint": (str, type(None)),
}


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


def mark_complete(folder: Path, record: Mapping[str, Any]) -> None:
    """Marks a checkpoint of which all files are on disk, by `record`, which a run that takes it up reads."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    mark = folder / f"{COMPLETE}.partial"
    with mark.open("w", encoding="utf-8") as stream:
        json.dump(record, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    mark.replace(folder / COMPLETE)


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `mark_complete` was given.

    Raises:
        CheckpointError: if it is not there, or is no record.
    """
    file = Path(folder) / COMPLETE
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint that was written whole: it holds no {COMPLETE}.")
    record = _json(file)
    counts = [record.get("truncated"), record.get("captions_seen"), *_list(record.get("bad_rows"))]
    shapes = isinstance(record.get("settings", {}), dict) and isinstance(record.get("changes", []), list)
    if not shapes or not all(type(count) is int for count in counts):
        raise CheckpointError(f"{file} is damaged: it holds no counts of a run. {REMEDY}")
    return record


def check_readable(folder: str | Path) -> None:
    """Reads of a checkpoint what its run will read, values of tensors aside, and runs no code of it.

    Raises:
        CheckpointError: naming the file that is damaged, not what it should be, or leads out of the folder.
    """
    folder = Path(folder)
    state = folder / "trainer_state.json"
    if not state.is_file():
        raise CheckpointError(f"{folder} holds no trainer_state.json, so a run cannot go on from it. {REMEDY}")
    for pattern in (state.name, "config.json", *PICKLES, "*.safetensors", "adapters/*"):
        for file in sorted(folder.glob(pattern)):
            try:
                inside(folder, str(file.relative_to(folder)))
            except FileError as error:
                raise CheckpointError(str(error)) from error
    values = _json(state)
    wrong = [name for name, kinds in STATE.items() if name in values and type(values[name]) not in kinds]
    wrong += [] if all(isinstance(entry, dict) for entry in _list(values.get("log_history"))) else ["log_history"]
    if wrong or "global_step" not in values:
        raise CheckpointError(
            f"{state} is damaged: {', '.join(wrong) or 'global_step'} is not of its kind, or missing. {REMEDY}"
        )
    for pattern in PICKLES:
        for file in sorted(folder.glob(pattern)):
            _check_pickle(file)
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). {REMEDY}") from error


def _check_pickle(file: Path) -> None:
    """torch's own message would advise `weights_only=False`, which runs whatever code the file names."""
    try:
        with safe_globals():
            torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of zipfile, pickle, torch: whatever a damaged file brings about
        raise CheckpointError(
            f"{file} is damaged, or holds more than tensors and numbers, which would run as a program when it is read "
            f"({type(error).__name__}). {REMEDY}"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    with suppress(FileError):
        values = load_json(file)
        if isinstance(values, dict):
            return values
    raise CheckpointError(f"{file} is damaged: it holds no JSON object. {REMEDY}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, whole or not, or does nothing where there is none."""
    (folder / COMPLETE).unlink(missing_ok=True)  # first: what is half deleted is not complete
    if folder.is_dir():
        shutil.rmtree(folder)
