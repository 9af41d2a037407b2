"""`SavingTrainer`: transformers' `Trainer` with checkpoints that are whole or not there, and full models each."""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from longclip_hf.errors import CheckpointError, TrainingError
from longclip_hf.training.checkpoints import (
    COMPLETE,
    REMEDY,
    checkpoints,
    delete_checkpoint,
    last_complete_checkpoint,
    mark_complete,
)
from longclip_hf.training.encoding import clip_of
from longclip_hf.training.merging import save_merged
from modeling_longclip import LongCLIPModel
from modeling_longclip.compat import complete_processor

ADAPTERS = "adapters"  # the folder of a checkpoint that holds LoRA's adapters; the checkpoint itself is merged
OF_WRITING = ("inline_container", "iostream", "Writer")  # what torch's errors name when a file cannot be written
# Of a checkpoint, what belongs to the run and not to the model.
OF_THE_RUN = {"trainer_state.json", "training_args.bin", COMPLETE}


class SavingTrainer(Trainer):
    """Writes every checkpoint as a folder that `AutoModel` loads, and reads it again, under DDP, FSDP and LoRA."""

    def record(self) -> dict[str, Any]:
        """What a checkpoint records beside the Trainer's own state; called on every process."""
        return {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's own, marked when all of it is on disk, and only then are older ones deleted.

        One that was cut off by a kill has no mark and is not taken up; there is always one that has it.
        """
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        record = self.record()
        if self.is_world_process_zero():
            delete_checkpoint(folder)  # left by a kill, or by an earlier run that came further
        self.accelerator.wait_for_everyone()
        # Older ones are deleted and this one is pushed when it is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        push, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            with self._room_for(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
        self.accelerator.wait_for_everyone()  # each process wrote its own state of the random numbers
        if self.is_world_process_zero():
            with self._room_for(folder):
                mark_complete(folder, record)
            best = Path(self.state.best_model_checkpoint or folder)
            for older in checkpoints(run)[: -limit if limit else 0]:
                if older not in (folder, best):
                    delete_checkpoint(older)
        if push:
            self._push_from_checkpoint(str(folder))

    @contextmanager
    def _room_for(self, folder: Path) -> Iterator[None]:
        """A full disk is one clear error, and half a checkpoint does not go on filling it."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch's writer raises RuntimeError, of which there are others.
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in OF_WRITING):
                raise
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            last = last_complete_checkpoint(folder.parent)
            raise CheckpointError(
                f"{folder} could not be written: {str(error).splitlines()[0]}. Make room: the same command "
                + (f"goes on from {last}." if last else "begins anew; there is no earlier checkpoint.")
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a full folder that `AutoModel` loads, also with LoRA: the adapters are merged into the weights.

        Adapters alone are written beside it, to its folder `adapters`: training goes on from them.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not self.is_fsdp_enabled and not has_adapters(self.model):
            super().save_model(str(folder), _internal_call=True)
        else:
            self._save_whole(folder)
        if self.args.should_save and (folder / "tokenizer.json").is_file():
            complete_processor(folder)  # with the files that transformers 5 leaves out
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_whole(self, folder: Path) -> None:
        if self.is_fsdp_enabled:
            tensors = self.accelerator.get_state_dict(self.model)  # by all processes
            if not self.args.should_save:
                return
            tensors["logit_scale"] = tensors["logit_scale"].reshape(())
            # FSDP2 changes the class of a model, and with it the code that is saved.
            with torch.device("meta"):
                bare = LongCLIPModel(clip_of(self.model).config)
            bare.save_pretrained(folder, state_dict=tensors)
        elif self.args.should_save:
            adapted: Any = self.accelerator.unwrap_model(self.model)
            adapted.save_pretrained(folder / ADAPTERS)
            save_merged(adapted, folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The Trainer's own, which would leave the model's code and files of its processor behind."""
        if self.is_world_process_zero():
            for file in Path(checkpoint_folder).iterdir():
                if file.suffix in (".py", ".json", ".txt") and file.name not in OF_THE_RUN:
                    shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer's own; of a checkpoint with adapters it would load the merged weights."""
        folder = Path(resume_from_checkpoint)
        with _of_this_run(folder, "the weights"):
            super()._load_from_checkpoint(str(folder / ADAPTERS if has_adapters(self.model) else folder), model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _of_this_run(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _of_this_run(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _of_this_run(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """The Trainer's own, from adapters where there are some."""
        best = self.state.best_model_checkpoint
        if best is not None and has_adapters(self.model):
            self.state.best_model_checkpoint = str(Path(best) / ADAPTERS)
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best


@contextmanager
def _of_this_run(folder: str | Path | None, what: str) -> Iterator[None]:
    """What can be read, and still is of another model, or lacks a part."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        if "allocate" in str(error) or "out of memory" in str(error):  # `auto_find_batch_size` waits for it
            raise
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CheckpointError(f"{what} of {folder} is not of this run, or damaged ({said}). {REMEDY}") from error


def has_adapters(model: nn.Module) -> bool:
    """Whether it is peft's."""
    return hasattr(model, "merge_and_unload")


def refuse_what_fsdp_cannot_save(trainer: Trainer, keeps_copy: bool) -> None:
    """Not every setting lets one process write the whole model, or every process copy it."""
    if has_adapters(trainer.model):
        raise TrainingError(
            "Adapters of LoRA are not merged under FSDP: train them with DDP, they need little memory."
        )
    if keeps_copy and trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise TrainingError(
            "The model of before training is copied by every process, and FSDP gave its weights to one alone. In "
            "the launcher's file: fsdp_cpu_ram_efficient_loading: false."
        )
    kind = trainer.accelerator.state.fsdp_plugin.state_dict_type.name
    if kind != "FULL_STATE_DICT":
        raise TrainingError(
            f"FSDP's state_dict_type is {kind}, which writes no folder that AutoModel loads. In the launcher's file: "
            "fsdp_state_dict_type: FULL_STATE_DICT."
        )
