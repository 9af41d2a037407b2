"""Runs of `training/train.py`, killed with SIGKILL and started again with the same command, for `test_train`.

    python killed.py < JSON

Reads `[{"name", "args", "output", "kills": [...]}, ...]`; each run is started once for every kill, and then until it
ends. Writes for each, as JSON, the exit codes and which complete checkpoint was there after each start. A script that
is forked itself (`fork_server`), and forks every run, so that a kill at a point can be set before it starts.

A kill is `[POINT, COUNT]`: at the COUNT-th time that the run comes by the point (`POINTS`); or `["time", SECONDS]`.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from longclip_hf.training import figures, train
from longclip_hf.training.checkpoints import COMPLETE, is_complete, last_complete_checkpoint
from longclip_hf.training.trainer import LongCLIPTrainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, count: int, before: bool = False, when: Callable[..., bool] | None = None) -> None:
    """Kills in the `count`-th call of `owner.name`, behind it or before it begins."""
    original, calls = getattr(owner, name), [0]

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls[0] += when is None or when(*args, **kwargs)
        if before and calls[0] == count:
            kill()
        result = original(*args, **kwargs)
        if calls[0] == count:
            kill()
        return result

    setattr(owner, name, patched)


def within_torch_save(count: int) -> None:
    """Half of the file is on disk."""
    original, calls = torch.save, [0]

    def patched(thing: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        original(thing, file, *args, **kwargs)
        if "checkpoint-" not in str(file):
            return
        calls[0] += 1
        if calls[0] == count:
            path = Path(file)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            kill()

    torch.save = patched


def within_rmtree(count: int) -> None:
    """Half of an older checkpoint is deleted."""
    original, calls = shutil.rmtree, [0]

    def patched(folder: Any, *args: Any, **kwargs: Any) -> None:
        calls[0] += "checkpoint-" in str(folder)
        if calls[0] == count:
            for file in sorted(Path(folder).iterdir())[::2]:
                file.unlink()
            kill()
        original(folder, *args, **kwargs)

    shutil.rmtree = patched


def is_mark(_: Path, target: Path) -> bool:
    return Path(target).name == COMPLETE


def is_export(_: LongCLIPTrainer, folder: str, _internal_call: bool = False) -> bool:
    """Not one of a checkpoint."""
    return not _internal_call


POINTS: dict[str, Callable[[int], None]] = {
    "in a step": lambda count: at(LongCLIPTrainer, "embed", count),
    "weights written": lambda count: at(LongCLIPTrainer, "_save", count),
    "optimizer written": lambda count: at(LongCLIPTrainer, "_save_optimizer_and_scheduler", count),
    "half a file": within_torch_save,
    "before the mark": lambda count: at(Path, "replace", count, before=True, when=is_mark),
    "after the mark": lambda count: at(Path, "replace", count, when=is_mark),
    "half deleted": within_rmtree,
    "before the export": lambda count: at(LongCLIPTrainer, "save_model", count, before=True, when=is_export),
    "after the export": lambda count: at(LongCLIPTrainer, "save_model", count, when=is_export),
}


def attempt(args: list[str], how: tuple[str, float] | None, log: str) -> int:
    """One start in a process of its own; its exit code, or -9."""
    child = os.fork()
    if not child:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = 1
        try:
            if how is not None and how[0] != "time":
                POINTS[how[0]](int(how[1]))
            code = train.main(args)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if how is not None and how[0] == "time":
        end = time.monotonic() + how[1]
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left_behind(output: Path) -> int | None:
    """The step of the checkpoint that the next start will take up, which must load in full."""
    folder = last_complete_checkpoint(output)
    if folder is None:
        return None
    weights = list(folder.glob("*.safetensors"))  # of adapters, too
    assert weights, folder
    for file in weights:
        load_file(file)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(folder / name, weights_only=False)
    json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return int(folder.name.rpartition("-")[2])


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    output = Path(scenario["output"])
    args = [*scenario["args"], "--output_dir", str(output)]
    log = f"{output}.log"
    codes, left = [], []
    for how in [*scenario["kills"], None]:
        codes.append(attempt(args, how, log))
        left.append(left_behind(output))
    incomplete = [folder.name for folder in output.glob("checkpoint-*") if not is_complete(folder)]
    return {"codes": codes, "left": left, "incomplete": incomplete, "log": Path(log).read_text(encoding="utf-8")}


if __name__ == "__main__":
    figures.draw_curves = lambda *_: None  # half of the time of such a run, and no part of what is compared
    results = {scenario["name"]: run(scenario) for scenario in json.load(sys.stdin)}
    print(json.dumps(results))
