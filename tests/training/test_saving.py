"""Checkpoints that are damaged, come from elsewhere, or find no room."""

import copy
import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import BATCH, make_rows, make_trainer, with_adapters

from longclip_hf.errors import CheckpointError
from longclip_hf.training.checkpoints import check_readable, is_complete, last_complete_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def run(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two steps with a checkpoint of each. Read only."""
    output = tmp_path_factory.mktemp("run")
    make_trainer(longclip_folder, output, make_rows(2 * BATCH), **SAVING).train()
    return output


# transformers 5 renamed what peft asks for.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_adapters_are_merged_layer_by_layer(
    longclip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of peft's own merged model, and never more than one layer of it in memory."""
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), adapt=with_adapters, learning_rate=1e-2)
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    copies: list[int] = []

    def counted(module: Any, deepcopy: Any = copy.deepcopy) -> Any:
        copies.append(sum(parameter.numel() for parameter in module.parameters()))
        return deepcopy(module)

    monkeypatch.setattr("longclip_hf.training.merging.copy", SimpleNamespace(deepcopy=counted))
    trainer.save_model(str(tmp_path / "saved"))
    layers = [module for module in trainer.model.modules() if hasattr(module, "get_base_layer")]
    assert len(copies) == len(layers)
    assert max(copies) < sum(parameter.numel() for parameter in trainer.model.parameters()) / 20
    assert all(tensor.equal(before[name]) for name, tensor in trainer.model.state_dict().items())
    written = load_file(tmp_path / "saved" / "model.safetensors")
    expected = copy.deepcopy(trainer.model).merge_and_unload().state_dict()
    assert written.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in written.items())
    changed = load_file(longclip_folder / "model.safetensors")
    assert any(not tensor.equal(changed[name]) for name, tensor in written.items())


class Program:
    """Unpickled, it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "ran")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"]


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_that_is_a_program_does_not_run(
    name: str, run: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """As torch writes it, and as a plain pickle; torch's advice to allow it is not passed on."""
    folder, trace = copy_of(run) / "checkpoint-1", tmp_path / "trace"
    for write in (torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing))):
        write({"state": Program(trace)}, folder / name)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged, or holds more than tensors.*Delete") as error:
            check_readable(folder)
        assert not trace.exists() and "weights_only" not in str(error.value)


def test_training_args_are_not_unpickled(
    run: Path, copy_of: Callable[[Path], Path], tmp_path: Path, longclip_folder: Path
) -> None:
    output, trace = copy_of(run), tmp_path / "trace"
    (output / "checkpoint-1" / "training_args.bin").write_bytes(pickle.dumps(Program(trace)))
    trainer = make_trainer(longclip_folder, output, make_rows(2 * BATCH), **SAVING)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    assert trainer.state.global_step == 2 and not trace.exists()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *((name, cut, f"{name} is damaged") for name in (*FILES[:3], "model.safetensors", "trainer_state.json")),
        ("COMPLETE.json", cut, "COMPLETE.json is damaged: it holds no JSON object"),
        ("COMPLETE.json", lambda file: file.write_text("{}"), "holds no counts of a run"),
        ("COMPLETE.json", Path.unlink, "not a checkpoint that was written whole"),
        ("trainer_state.json", Path.unlink, "holds no trainer_state.json"),
        (
            "trainer_state.json",
            lambda file: file.write_text('{"global_step": "3"}'),
            "global_step, log_history is not of its kind",
        ),
        ("trainer_state.json", lambda file: file.write_text("[" * 100_000), "trainer_state.json is damaged"),
        ("scheduler.pt", lambda file: torch.save([1], file), "scheduler.pt of .* is not of this run, or damaged"),
        ("optimizer.pt", lambda file: torch.save({"state": {}}, file), "optimizer.pt or .* is not of this run"),
        ("rng_state.pth", lambda file: torch.save({"cpu": 1}, file), "rng_state.pth of .* is not of this run"),
        ("optimizer.pt", lambda file: (file.unlink(), file.symlink_to("/etc/hostname")), "leads out of its folder"),
    ],
)
def test_a_damaged_checkpoint_is_one_error_that_names_the_file(
    name: str,
    damage: Callable[[Path], Any],
    message: str,
    run: Path,
    copy_of: Callable[[Path], Path],
    longclip_folder: Path,
) -> None:
    output = copy_of(run)
    damage(output / "checkpoint-1" / name)
    trainer = make_trainer(longclip_folder, output, make_rows(2 * BATCH), **SAVING)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-1"))


def test_a_full_disk_leaves_no_half_checkpoint(
    longclip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of a file stops the writers of safetensors and of torch as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(2 * BATCH), **SAVING)
    save = trainer.save_model
    sizes = {1: (1 << 30, 1 << 12), 2: (1 << 12, 1 << 30)}  # of the first checkpoint its optimizer does not fit

    def save_with_little_room(*args: Any, **kwargs: Any) -> None:
        before, after = sizes[trainer.state.global_step]
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        save(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))

    monkeypatch.setattr(trainer, "save_model", save_with_little_room)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-1 could not be written: .*begins anew"):
            trainer.train()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not (tmp_path / "checkpoint-1").exists()
        sizes[1] = (1 << 30, 1 << 30)
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written: .*goes on from .*checkpoint-1"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1" and is_complete(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-2").exists()


# A push during training


class Uploads:
    """The Hub, as far as the Trainer calls it: what each commit would hold."""

    def __init__(self) -> None:
        self.commits: list[tuple[str, dict[str, bytes]]] = []

    def upload_folder(self, *, folder_path: str, path_in_repo: str = "", **kwargs: Any) -> Any:
        hidden = "checkpoint-" if not path_in_repo else "nothing"
        files = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        named = {str(file.relative_to(folder_path)): file.read_bytes() for file in files}
        self.commits.append((path_in_repo, {n: v for n, v in named.items() if not n.startswith(hidden)}))

        class Done:
            def is_done(self) -> bool:
                return True

            done = is_done

        return Done()


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Uploads:
    from transformers import Trainer, trainer

    hub = Uploads()
    for name in ("upload_folder", "hf_api"):
        if hasattr(trainer, name):
            value = hub.upload_folder if name == "upload_folder" else (lambda: hub)
            monkeypatch.setattr(trainer, name, value)

    def init_hf_repo(self: Any, *args: Any, **kwargs: Any) -> None:
        self.hub_model_id, self.push_in_progress = "someone/model", None

    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    monkeypatch.setattr(Trainer, "create_model_card", lambda *args, **kwargs: None)
    return hub


CODE = {"modeling_longclip.py", "configuration_longclip.py", "compat.py", "defaults.py"}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_a_push_holds_a_model_that_loads(
    lora: bool, longclip_folder: Path, tmp_path: Path, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During training and at the end: the code that its config names, and with LoRA the merged weights."""
    from safetensors.torch import load as tensors

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = SAVING | {"push_to_hub": True, "hub_always_push": True, "hub_strategy": "checkpoint"}
    settings |= {"adapt": with_adapters} if lora else {}
    trainer = make_trainer(longclip_folder, tmp_path, make_rows(2 * BATCH), **settings)
    trainer.train()
    at_end = len(uploads.commits)
    trainer.save_model()
    trained = [commit for path, commit in uploads.commits if not path]
    assert at_end == 4 and len(uploads.commits) > at_end
    for commit in trained:
        classes = json.loads(commit["config.json"])["auto_map"].values()
        assert {f"{name.partition('.')[0]}.py" for name in classes} <= CODE <= set(commit)
        weights = tensors(commit["model.safetensors"])
        assert not [name for name in weights if "lora" in name] and "tokenizer.json" in commit
    for path, commit in uploads.commits:
        assert not path or "COMPLETE.json" in commit  # one that a run can go on from
    first, last = (tensors(commit["model.safetensors"]) for commit in (trained[0], trained[-1]))
    assert any(not first[name].equal(last[name]) for name in first)
