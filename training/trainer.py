"""`LongCLIPTrainer`: transformers' `Trainer` with the losses of Long-CLIP.

A step, in the order of the code: encode (`encoding`), gather with gradient (`gathering`), one of the `losses`; the
last two in `step`. Checkpoints are `saving`'s, what is logged and counted is `figures`'.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from longclip_hf.errors import TrainingError
from longclip_hf.evaluation.effective_length import default_lengths
from longclip_hf.training.arguments import BEST_METRIC, LongCLIPTrainingArguments
from longclip_hf.training.checkpoints import check_readable, last_complete_checkpoint, read_record
from longclip_hf.training.collator import CaptionCollator, even_groups, length_groups
from longclip_hf.training.components import check_components
from longclip_hf.training.drawing import Place, with_drawn_captions, with_prefix
from longclip_hf.training.encoding import (
    Embeddings,
    Original,
    check_eot,
    clip_of,
    encode,
    encode_cut_texts,
    encode_original,
    forward_is,
    frozen_copy,
)
from longclip_hf.training.figures import Figures, curves, retrieval_metrics
from longclip_hf.training.gathering import check_processes, world_size
from longclip_hf.training.optimizer import HoldLogitScale, freeze, learning_rates, set_learning_rates
from longclip_hf.training.retrieved import examples, log_examples
from longclip_hf.training.run_settings import changes_since, describe_model, describe_run
from longclip_hf.training.sampling import DistinctSampler, SayEpoch, short_captions
from longclip_hf.training.saving import SavingTrainer, refuse_what_fsdp_cannot_save
from longclip_hf.training.settings import Strategy
from longclip_hf.training.step import (
    WITH_COMPONENTS,
    check_batch,
    check_collator,
    step_loss,
    with_mixed_captions,
)
from longclip_hf.training.streams import CaptionStream

logger = logging.getLogger(__name__)


class LongCLIPTrainer(SavingTrainer):
    """Fine-tunes a `LongCLIPModel` on images with a long and a short caption (paper section 3.3).

    Args:
        model: a `LongCLIPModel` in full, or in a peft model with adapters on it. None with a `model_init`.
        args: `LongCLIPTrainingArguments`.
        train_dataset: a `datasets.Dataset` or `IterableDataset`, or a torch dataset, of rows that the collator takes:
            for `CaptionCollator` an image, its caption and, if there is one, a short caption.
        eval_dataset: held-out rows, or a dict of such; evaluation is retrieval among all of them.
        processing_class: the checkpoint's processor; it is saved with every checkpoint.
        data_collator: `CaptionCollator` of the processor by default.
        **kwargs: everything else that [`~transformers.Trainer`] takes.

    Raises:
        TrainingError: for settings under which something else would be trained than they say, or nothing.
    """

    loss_is_scaled_for_ga = False  # a mean over the batch: the Trainer divides it by the accumulation steps

    def __init__(
        self,
        model: nn.Module | None = None,
        args: LongCLIPTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LongCLIPTrainingArguments):
            raise TrainingError(
                f"args must be LongCLIPTrainingArguments, which know the strategies, got {type(args).__name__}."
            )
        if args.n_gpu > 1:
            raise TrainingError(
                f"One process sees {args.n_gpu} GPUs, and this trainer takes one. Start a process for each with "
                "accelerate launch, or name one with CUDA_VISIBLE_DEVICES."
            )
        if data_collator is None and processing_class is None:
            raise TrainingError("Without a data_collator, the processing_class is needed: the model's CLIPProcessor.")
        own_metrics = kwargs.get("compute_metrics")
        several = isinstance(eval_dataset, dict)
        if args.metric_for_best_model == BEST_METRIC and (own_metrics is not None or several):
            example = f", such as eval_{next(iter(eval_dataset))}_{BEST_METRIC}" if several else ""
            raise TrainingError(
                "load_best_model_at_end: say with metric_for_best_model by which figure, as evaluation names "
                f"it{example}."
            )
        self.args = args
        self.compiled: dict[str, Any] | None = None
        if args.torch_compile:
            # The towers, not the whole step, as accelerate would do it: grouping and gathering are Python.
            self.compiled = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, "no", None
        if model is not None:
            self._prepare_model(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        clip = clip_of(self.model)
        self.caption_length = args.caption_length(clip.config.text_config.max_position_embeddings)
        self.cuts = default_lengths(self.caption_length) if args.eval_effective_length else []
        self.compute_metrics = own_metrics or functools.partial(retrieval_metrics, cuts=self.cuts)
        if data_collator is None:
            parts = processing_class.tokenizer, processing_class.image_processor
            self.data_collator = CaptionCollator(*parts, self.caption_length, sentences=args.draws_sentences)
        check_collator(self.data_collator, args, self.caption_length)
        if self.is_fsdp_enabled:
            refuse_what_fsdp_cannot_save(self, keeps_copy=self._original is not None)
            clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))  # FSDP2 divides no scalars
        self.model_accepts_loss_kwargs = False
        self.figures = Figures(lambda tensor: self.accelerator.reduce(tensor, "sum"))
        self._settings: dict[str, Any] = {}  # of the run, and how they were changed on the way
        self._changes: list[dict[str, Any]] = []
        self._batch_of_step = (-1, 0)  # a step, and which of its accumulated batches is at hand
        self.add_callback(HoldLogitScale())
        self.add_callback(SayEpoch())
        check_processes(self.accelerator.num_processes)
        if train_dataset is not None:
            self._check_rows()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """See [`~transformers.Trainer.call_model_init`]."""
        model: nn.Module = super().call_model_init(trial)
        self._prepare_model(model)
        return model

    def _prepare_model(self, model: nn.Module) -> None:
        clip, args = clip_of(model), self.args
        # Those of process 0: under FSDP the others may get their weights from it, later.
        self._model_settings = broadcast_object_list([describe_model(model)])[0]
        takes_copy = args.strategy == Strategy.BOUNDED or args.distillation > 0
        self._original = frozen_copy(clip, images=args.distillation > 0) if takes_copy else None
        if args.logit_scale is not None:
            with torch.no_grad():
                clip.logit_scale.fill_(math.log(args.logit_scale))
        freeze(model, args)
        if self.compiled is not None:
            clip.text_model.compile(dynamic=True, **self.compiled)
            clip.vision_model.compile(**self.compiled)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.train`].

        Raises:
            CheckpointError: if the checkpoint was not written whole, cannot be read, or is of another run.
            TrainingError: if the data held not a single batch.
        """
        self.figures.start()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self._hp_search_setup(kwargs.get("trial"))  # the settings of this trial, if it is one
        self._settings = describe_run(self.args, self._model_settings, self.train_dataset, world_size())
        self._changes = []
        if resume_from_checkpoint:
            record = read_record(resume_from_checkpoint)
            check_readable(resume_from_checkpoint)
            may_change = self.args.resume_with_changes
            self._changes = changes_since(resume_from_checkpoint, record, self._settings, may_change)
            self.figures.go_on_from(record)
        self._batch_of_step = (-1, 0)
        resume = str(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            result = super().train(resume, *args, **kwargs)
        finally:
            check_eot(self.model, True)
        if self._batch_of_step[0] < 0 and self.state.global_step < self.state.max_steps:
            raise TrainingError(
                f"Nothing was trained: the data held not a single batch of {self._train_batch_size} rows for each of "
                f"{world_size()} processes. Take a smaller per_device_train_batch_size."
            )
        return result

    def record(self) -> dict[str, Any]:
        """Counts and settings, which a run that goes on from a checkpoint takes up and compares."""
        return {**self.figures.counts(), "settings": self._settings, "changes": self._changes}

    # -- guards --------------------------------------------------------------------------------------------------

    def _check_rows(self) -> None:
        """The batch that is trained: `auto_find_batch_size` may have made it smaller."""
        batch = self._train_batch_size
        if self.args.strategy in WITH_COMPONENTS:
            dim = clip_of(self.model).config.projection_dim
            check_components(batch, self.args.components, self.args.components_scope, world_size(), dim)
        if not isinstance(self.train_dataset, IterableDataset):
            rows, together = len(self.train_dataset), batch * world_size()
            if rows < together:
                raise TrainingError(
                    f"There are {rows} rows to train on, fewer than one batch of {together}: nothing would be "
                    "trained. Take a smaller --per_device_train_batch_size, or hold out fewer rows (--heldout_rows)."
                )

    # -- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's own for a table of rows, less the last, smaller batch: every process must bring equally many.

        A `CaptionStream` divides itself among processes, so nothing may divide it again.
        """
        self._check_rows()
        self.figures.watch.start()
        if not isinstance(self.train_dataset, IterableDataset):
            asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, True
            try:
                return super().get_train_dataloader()
            finally:
                self.args.dataloader_drop_last = asked  # the held-out rows are evaluated to the last
        if self.args.distinct_short_captions:
            short_captions(self.train_dataset)  # says that a stream has none to look at
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=True,
        )
        if isinstance(self.train_dataset, CaptionStream):
            undivided = {"num_processes": 1, "process_index": 0, "dispatch_batches": False}
            return prepare_data_loader(loader, self.accelerator.device, put_on_device=True, **undivided)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's own, or one that repeats no short caption within a batch of all processes."""
        if not self.args.distinct_short_captions:
            return super()._get_train_sampler(train_dataset)
        captions = short_captions(train_dataset or self.train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return DistinctSampler(captions, self._train_batch_size * world_size(), seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """See [`~transformers.Trainer.get_eval_dataloader`]."""
        return self._every_row_once(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """See [`~transformers.Trainer.get_test_dataloader`]."""
        return self._every_row_once(super().get_test_dataloader(test_dataset))

    def _every_row_once(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        if world_size() > 1 and isinstance(loader.dataset, IterableDataset):
            raise TrainingError(
                "Several processes would evaluate some rows of a stream twice: give evaluation a table of rows."
            )
        if self.args.log_retrieved and isinstance(loader.dataset, IterableDataset):
            raise TrainingError("log_retrieved reads captions again by their rows: give evaluation a table of rows.")
        return loader

    # -- the step ------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See [`~transformers.Trainer.training_step`]."""
        step, batch = self._batch_of_step
        self._batch_of_step = self.state.global_step, batch + 1 if step == self.state.global_step else 0
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        args: LongCLIPTrainingArguments = self.args
        check_batch(inputs, args)
        collator_gives_eot = type(self.data_collator) is CaptionCollator
        self.figures.watch.before(inputs["input_ids"], collator_gives_eot, model, self._original)
        place = Place(args.seed, self.state.global_step, self._batch_of_step[1])
        inputs = with_drawn_captions(inputs, args, place, self.caption_length)
        if args.strategy == Strategy.MIXED_LENGTH:
            inputs = with_mixed_captions(inputs, args.mixed_length_share, *place)
        original = self._original_features(inputs)
        inputs = with_prefix(inputs, str(args.short_prefix), place, self.caption_length)
        embeddings = self.embed(model, inputs, short=args.encodes_short)
        terms, variance_kept = step_loss(args, embeddings, original)
        if model.training:
            self.figures.add(self.state.global_step, inputs, embeddings, terms, variance_kept)
        return (terms.loss, embeddings) if return_outputs else terms.loss

    def embed(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], short: bool) -> Embeddings:
        """Both towers on a batch, through whatever wraps the model."""
        embeddings: Embeddings = self._run(encode, model, inputs, short=short)
        return embeddings

    def _run(self, function: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any], **more: Any) -> Any:
        bare = self.accelerator.unwrap_model(model)
        how = {"grouping": self._grouping, "chunk_size": self.args.cache_chunk_size or None}
        with forward_is(bare, functools.partial(function, bare, **how, **more)), self.accelerator.autocast():
            return model(batch=inputs)

    def _grouping(self, lengths: np.ndarray) -> tuple[np.ndarray, list[int]]:
        return (even_groups if self.is_fsdp_enabled else length_groups)(lengths, self.args.length_groups)

    def _original_features(self, inputs: Mapping[str, torch.Tensor]) -> Original | None:
        """Of the model as it was before training, where it takes part."""
        if self._original is None:
            return None
        with self.accelerator.autocast():
            frozen = self._original.to(inputs["pixel_values"].device)
            return encode_original(frozen, inputs, self._grouping, self.args.cache_chunk_size or None)

    # -- optimizer -----------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and the patch embedding decay; biases, norms, the logit scale and tables of positions do not.

        The text's table must not: its first rows stay fixed, and decay would shrink them. With `decay_all` (the
        released code's one group) everything else does.
        """
        named = dict(model.named_parameters())
        if self.args.decay_all:
            return [name for name in named if not name.endswith("text_model.embeddings.position_embedding.weight")]
        return [name for name, value in named.items() if value.ndim > 1 and "position_embedding" not in name]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's own, with a learning rate for every tower and layer."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        rates = learning_rates(self.model, self.args)
        if not given and set(rates.values()) != {self.args.learning_rate}:
            set_learning_rates(optimizer, rates)
        return optimizer

    # -- what is logged ------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the losses' parts, the share of variance kept and the speed since the last log to training logs."""
        if self.figures.sums and ("loss" in logs or "train_loss" in logs):  # or of the steps after the last log
            logs |= self.figures.drain()  # every process comes by here at the same steps
            said = self.figures.nearly_all_kept(logs, self.args.components)
            if said and self.is_world_process_zero():
                logger.warning(said)
        super().log(logs, *args, **kwargs)

    def report(self) -> str:
        """Draws the curves to `curves.png`, on the main process, and returns what was skipped and cut, in words."""
        said = self.figures.report(self.args.train_length)
        if self.is_world_process_zero():
            said += curves(self.state.log_history, Path(self.args.output_dir) / "curves.png")
        return said

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.evaluation_loop`]; the speed of training does not count its time."""
        began = self.figures.now()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self.args.log_retrieved and self.is_world_process_zero():
            image, text = (torch.as_tensor(part) for part in output.predictions[:2])
            found = examples(image, text, dataloader.dataset, self.args.log_retrieved)
            name, step = kwargs.get("metric_key_prefix", "eval"), self.state.global_step
            log_examples(found, self.args.output_dir, name, step, self.callback_handler.callbacks)
        self.figures.leave_out(self.figures.now() - began)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Any, torch.Tensor | None]:
        """The features of a batch; the Trainer gathers them over batches and processes, and no row twice.

        There is no loss: in-batch losses of batches of other sizes are not comparable.
        """
        inputs = self._prepare_inputs(inputs)
        check_batch(inputs)
        with torch.no_grad():
            found = self.embed(model, inputs, short="short_input_ids" in inputs)
            features = [part for part in (found.image, found.long, found.short) if part is not None]
            if self.cuts:
                features.append(self._run(encode_cut_texts, model, inputs, whole=found.long, cuts=self.cuts))
        rows = torch.arange(len(found.image), device=found.image.device)  # without labels, no metric
        return None, tuple(features), rows
