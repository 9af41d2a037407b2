"""`LongCLIPTrainer`: transformers' `Trainer` with the losses of Long-CLIP.

A step, in the order of the code: encode (`encoding`), gather with gradient (`gathering`), one of the `losses`.
"""

import copy
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from longclip_hf.evaluation.retrieval import retrieval_ranks
from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.captions import BAD_ROW_CAUSES, CaptionStream, bad_rows_report
from longclip_hf.training.checkpoints import (
    checkpoints,
    delete_checkpoint,
    last_complete_checkpoint,
    mark_complete,
    read_counts,
)
from longclip_hf.training.collator import CaptionCollator, even_groups, length_groups
from longclip_hf.training.components import check_components, primary_components, second_moments
from longclip_hf.training.curves import draw_curves
from longclip_hf.training.encoding import (
    Embeddings,
    FrozenText,
    clip_of,
    encode,
    encode_texts,
    forward_is,
    keep_rows_fixed,
)
from longclip_hf.training.gathering import all_gather_with_grad, all_reduce_with_grad, rank, world_size
from longclip_hf.training.losses import (
    LossTerms,
    Strategy,
    bounded_loss,
    contrastive_loss,
    long_only_loss,
    mixed_length_rows,
    primary_component_loss,
    undistinguished_loss,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from modeling_longclip import LongCLIPModel
from modeling_longclip.compat import complete_processor

ADAPTERS = "adapters"  # the folder of a checkpoint that holds LoRA's adapters; the checkpoint itself is merged


class LongCLIPTrainer(Trainer):
    """Fine-tunes a `LongCLIPModel` on images with a long and a short caption (paper section 3.3).

    Args:
        model: a `LongCLIPModel` in full, or in a peft model with adapters on it.
        args: `LongCLIPTrainingArguments`.
        train_dataset: rows of `training.captions`.
        eval_dataset: held-out rows; evaluation is retrieval among all of them.
        processing_class: the checkpoint's processor; it is saved with every checkpoint.
        data_collator: `CaptionCollator` of the processor by default.
        **kwargs: everything else that [`~transformers.Trainer`] takes.

    Raises:
        ValueError: for settings under which primary component matching would silently do nothing, and for several
            GPUs in one process.
    """

    loss_is_scaled_for_ga = False  # a mean over the batch: the Trainer divides it by the accumulation steps

    def __init__(
        self,
        model: nn.Module,
        args: LongCLIPTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        clip = clip_of(model)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, and this trainer takes one. Start a process for each with "
                "accelerate launch, or name one with CUDA_VISIBLE_DEVICES."
            )
        if train_dataset is not None and args.strategy == Strategy.PRIMARY_COMPONENT:
            check_components(
                args.train_batch_size, args.components, args.components_scope, world_size(), clip.config.projection_dim
            )
        if data_collator is None:
            positions = clip.config.text_config.max_position_embeddings
            data_collator = CaptionCollator(processing_class.tokenizer, processing_class.image_processor, positions)
        kwargs.setdefault("compute_metrics", retrieval_metrics)
        if args.logit_scale is not None:
            with torch.no_grad():
                clip.logit_scale.fill_(math.log(args.logit_scale))
        keep_rows_fixed(clip, getattr(clip.config.text_config, "keep", 0))
        self._original_text = FrozenText(clip) if args.strategy == Strategy.BOUNDED else None
        if args.torch_compile:
            # The towers, not the whole step, as accelerate would do it: grouping and gathering are Python.
            options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            clip.text_model.compile(dynamic=True, **options)
            clip.vision_model.compile(**options)
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, "no", None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        if self.is_fsdp_enabled:
            _refuse_what_fsdp_cannot_save(self)
            clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))  # FSDP2 divides no scalars
        self.model_accepts_loss_kwargs = False
        self.bad_rows = torch.zeros(len(BAD_ROW_CAUSES), dtype=torch.long)  # by cause, of all processes
        self.truncated = 0  # long captions cut at the model's length
        self.captions_seen = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._since = 0.0  # when the interval of the next log began
        self._batch_of_step = (-1, 0)  # a step, and which of its accumulated batches is at hand
        self.add_callback(_HoldLogitScale())

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.train`]. Of a checkpoint that was not written whole, nothing is taken up."""
        self._since = time.perf_counter()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            counts = read_counts(resume_from_checkpoint)
            self.bad_rows[: len(counts["bad_rows"])] = torch.tensor(counts["bad_rows"])
            self.truncated, self.captions_seen = counts["truncated"], counts["captions_seen"]
        resume = str(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume, *args, **kwargs)

    # -- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's own for a table of rows, less the last, smaller batch: every process must bring equally many.

        A stream divides itself among processes, so nothing may divide it again.
        """
        if isinstance(self.train_dataset, CaptionStream):
            loader: DataLoader[Any] = DataLoader(
                self.train_dataset,
                batch_size=self.args.train_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                drop_last=True,
            )
            undivided = {"num_processes": 1, "process_index": 0, "dispatch_batches": False}
            return prepare_data_loader(loader, self.accelerator.device, put_on_device=True, **undivided)
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, True
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = asked  # the held-out rows are evaluated to the last

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
        if self.args.strategy == Strategy.MIXED_LENGTH:
            inputs = self._with_mixed_captions(inputs)
        short = self.args.strategy not in (Strategy.LONG_ONLY, Strategy.MIXED_LENGTH)
        embeddings = self.embed(model, inputs, short)
        terms, variance_kept = self.loss_terms(embeddings, inputs)
        if model.training:
            self._record(inputs, embeddings, terms, variance_kept)
        return (terms.loss, embeddings) if return_outputs else terms.loss

    def embed(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], short: bool) -> Embeddings:
        """Both towers on a batch, through whatever wraps the model."""
        args: LongCLIPTrainingArguments = self.args
        bare = self.accelerator.unwrap_model(model)
        chunk_size = args.cache_chunk_size or None
        run = functools.partial(encode, bare, short=short, grouping=self._grouping, chunk_size=chunk_size)
        with forward_is(bare, run), self.accelerator.autocast():
            embeddings: Embeddings = model(batch=inputs)
        return embeddings

    def _grouping(self, lengths: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Groups of captions of similar length."""
        return (even_groups if self.is_fsdp_enabled else length_groups)(lengths, self.args.length_groups)

    def loss_terms(
        self, embeddings: Embeddings, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[LossTerms, torch.Tensor | None]:
        """The loss of the chosen strategy, and the share of the variance that primary component matching kept."""
        args: LongCLIPTrainingArguments = self.args
        _refuse_non_finite(embeddings)
        scale = embeddings.logit_scale.exp()

        def contrast(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
            return contrastive_loss(
                image_embeds,
                text_embeds,
                scale,
                args.label_smoothing_factor,
                all_gather_with_grad(image_embeds),
                all_gather_with_grad(text_embeds),
                rank() * len(image_embeds),
            )

        image, long = F.normalize(embeddings.image, dim=-1), F.normalize(embeddings.long, dim=-1)
        if args.strategy in (Strategy.LONG_ONLY, Strategy.MIXED_LENGTH) or embeddings.short is None:
            return long_only_loss(contrast, image, long), None
        if args.strategy == Strategy.BOUNDED:
            original = self._original_features(inputs)
            return bounded_loss(contrast, image, long, embeddings.short, original, args.short_loss_weight), None
        short = F.normalize(embeddings.short, dim=-1)
        if args.strategy == Strategy.UNDISTINGUISHED:
            return undistinguished_loss(contrast, image, long, short, args.short_loss_weight), None
        moments = all_reduce_with_grad(second_moments(image)) if args.components_scope == "global" else None
        coarse = primary_components(image, args.components, moments)
        terms = primary_component_loss(contrast, image, coarse.features, long, short, args.short_loss_weight)
        return terms, coarse.variance_kept

    def _with_mixed_captions(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with some long captions replaced by the short ones, before anything is encoded.

        Which ones follows from the seed, the step, the batch of an accumulated step and the place in the global batch:
        the number of processes does not change it, nor does a resumed run.
        """
        local = len(inputs["input_ids"])
        step, batch = self.state.global_step, self._batch_of_step[1]
        generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + batch)
        replaced = mixed_length_rows(local * world_size(), self.args.mixed_length_share, generator=generator)
        replaced = replaced[rank() * local : (rank() + 1) * local].to(inputs["input_ids"].device)
        mixed = dict(inputs)
        for key in ("input_ids", "attention_mask"):
            long, short = inputs[key], inputs[f"short_{key}"]
            width = max(long.shape[1], short.shape[1])
            # Whatever the tokenizer pads with: what stands after the EOT counts for nothing.
            long, short = (F.pad(part, (0, width - part.shape[1])) for part in (long, short))
            mixed[key] = torch.where(replaced[:, None], short, long)
        return mixed

    def _original_features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Short-text features of the encoder as it was before training, without gradient."""
        assert self._original_text is not None
        input_ids, attention_mask = inputs["short_input_ids"], inputs["short_attention_mask"]
        original = self._original_text.to(input_ids.device)
        chunk_size = self.args.cache_chunk_size or None
        with torch.no_grad(), self.accelerator.autocast():
            return encode_texts(original, input_ids, attention_mask, self._grouping, chunk_size)

    # -- what is logged ------------------------------------------------------------------------------------------

    def _record(
        self,
        inputs: Mapping[str, torch.Tensor],
        embeddings: Embeddings,
        terms: LossTerms,
        variance_kept: torch.Tensor | None,
    ) -> None:
        """Adds a step's figures to the running sums; nothing leaves the device before they are logged."""
        tokens = inputs["attention_mask"].sum()
        if embeddings.short is not None:
            tokens = tokens + inputs["short_attention_mask"].sum()
        figures = {
            "steps": torch.ones((), device=tokens.device),
            "loss_long": terms.long.detach(),
            "logit_scale": embeddings.logit_scale.detach().exp(),
            "images": torch.tensor(float(len(embeddings.image)), device=tokens.device),
            "tokens": tokens.float(),
        }
        if terms.short is not None:
            figures["loss_short"] = terms.short.detach()
        if variance_kept is not None:
            figures["variance_kept"] = variance_kept.detach()
        figures |= {name: inputs[name].float() for name in ("bad_rows", "truncated") if name in inputs}
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the losses' parts, the share of variance kept and the speed since the last log to training logs."""
        if self._sums and ("loss" in logs or "train_loss" in logs):  # or of the steps after the last log, at the end
            logs |= self._figures()
        super().log(logs, *args, **kwargs)

    def _figures(self) -> dict[str, float]:
        # Every process comes by here at the same steps.
        sums = {name: self.accelerator.reduce(value, "sum") for name, value in self._sums.items()}
        self._sums = {}
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        steps = sums.pop("steps").item()
        images, tokens = sums.pop("images").item(), sums.pop("tokens").item()
        bad, truncated = sums.pop("bad_rows", None), sums.pop("truncated", None)
        figures = {name: value.item() / steps for name, value in sums.items()}
        figures |= {"images_per_second": images / elapsed, "tokens_per_second": tokens / elapsed}
        if bad is not None:
            self.bad_rows = self.bad_rows + bad.long().cpu()
        if truncated is not None:
            self.truncated += int(truncated.item())
        self.captions_seen += int(images)
        return figures

    def _counts(self) -> dict[str, Any]:
        """What `report` says, by all processes so far, those of the steps since the last log included."""
        since = {name: self.accelerator.reduce(value, "sum").cpu().long() for name, value in self._sums.items()}
        return {
            "bad_rows": (self.bad_rows + since.get("bad_rows", 0)).tolist(),
            "truncated": self.truncated + int(since.get("truncated", 0)),
            "captions_seen": self.captions_seen + int(since.get("images", 0)),
        }

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

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Retrieval among all held-out rows; see `retrieval_metrics`."""
        began = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._since += time.perf_counter() - began  # the speed of training does not count it
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Any, torch.Tensor | None]:
        """The features of a batch; the Trainer gathers them over batches and processes, and no row twice.

        There is no loss: in-batch losses of batches of other sizes are not comparable.
        """
        inputs = self._prepare_inputs(inputs)
        if prediction_loss_only:
            return None, None, None
        with torch.no_grad():
            embeddings = self.embed(model, inputs, short=True)
        rows = torch.arange(len(embeddings.image), device=embeddings.image.device)  # without labels, no metric
        return None, (embeddings.image, embeddings.long, embeddings.short), rows

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own, marked when all of it is on disk, and only then are older ones deleted.

        One that was cut off by a kill has no mark and is not taken up; there is always one that has it.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        counts = self._counts()
        if self.is_world_process_zero():
            delete_checkpoint(folder)  # left by a kill, or by an earlier run that came further
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process wrote its own state of the random numbers
        if self.is_world_process_zero():
            mark_complete(folder, counts)
            best = Path(self.state.best_model_checkpoint or folder)
            for older in checkpoints(self.args.output_dir)[: -limit if limit else 0]:
                if older not in (folder, best):
                    delete_checkpoint(older)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a full folder that `AutoModel` loads, also with LoRA: the adapters are merged into the weights.

        Adapters alone are written beside it, to its folder `adapters`: training goes on from them.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.is_fsdp_enabled:
            tensors = self.accelerator.get_state_dict(self.model)  # by all processes
            if self.args.should_save:
                tensors["logit_scale"] = tensors["logit_scale"].reshape(())
                # FSDP2 changes the class of a model, and with it the code that is saved.
                with torch.device("meta"):
                    bare = LongCLIPModel(clip_of(self.model).config)
                bare.save_pretrained(folder, state_dict=tensors)
                self.processing_class.save_pretrained(folder)
        elif not _has_adapters(self.model):
            super().save_model(str(folder), _internal_call)
        elif self.args.should_save:
            adapted: Any = self.accelerator.unwrap_model(self.model)
            adapted.save_pretrained(folder / ADAPTERS)
            # A copy: merging into the weights and out again would not give the same weights.
            copy.deepcopy(adapted).merge_and_unload().save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
        if self.args.should_save and (folder / "tokenizer.json").is_file():
            complete_processor(folder)  # with the files that transformers 5 leaves out

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer's own; of a checkpoint with adapters it would load the merged weights."""
        folder = Path(resume_from_checkpoint)
        super()._load_from_checkpoint(str(folder / ADAPTERS if _has_adapters(self.model) else folder), model)

    def _load_best_model(self) -> None:
        """The same for `load_best_model_at_end`."""
        best = self.state.best_model_checkpoint
        if best is not None and _has_adapters(self.model):
            self.state.best_model_checkpoint = str(Path(best) / ADAPTERS)
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def report(self) -> str:
        """Draws the curves to `curves.png`, on the main process, and returns what was skipped and cut, in words."""
        said = (
            f"{self.captions_seen} images with captions were trained on. {bad_rows_report(self.bad_rows.tolist())}. "
            f"Long captions cut at the model's length: {self.truncated}."
        )
        if self.is_world_process_zero():
            try:
                draw_curves(self.state.log_history, Path(self.args.output_dir) / "curves.png")
            except ImportError:
                said += ' No curves.png: it needs matplotlib, pip install "longclip-hf[train]".'
        return said


class _HoldLogitScale(TrainerCallback):
    """Holds the logit scale itself at its bound: a clamp in the loss would leave it no gradient to come back by."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.max_logit_scale is not None:
            with torch.no_grad():
                clip_of(model).logit_scale.clamp_(max=math.log(args.max_logit_scale))

    on_optimizer_step = on_train_begin


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "merge_and_unload")


def retrieval_metrics(prediction: Any) -> dict[str, float]:
    """Recall among all held-out rows, both ways, with the long and with the short captions."""
    image, long, short = (torch.as_tensor(part) for part in prediction.predictions)
    metrics: dict[str, float] = {}
    for name, text in (("long", long), ("short", short)):
        for direction, ranks in retrieval_ranks(image, text, torch.arange(len(image))).items():
            metrics |= {f"{name}_{direction}_r{k}": ranks.recall(k) for k in (1, 5, 10)}
    return metrics


def _refuse_what_fsdp_cannot_save(trainer: Trainer) -> None:
    """Not every setting lets one process write the whole model."""
    if _has_adapters(trainer.model):
        raise ValueError("Adapters of LoRA are not merged under FSDP: train them with DDP, they need little memory.")
    kind = trainer.accelerator.state.fsdp_plugin.state_dict_type.name
    if kind != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP's state_dict_type is {kind}, which writes no folder that AutoModel loads. In the launcher's file: "
            "fsdp_state_dict_type: FULL_STATE_DICT."
        )


def _refuse_non_finite(embeddings: Embeddings) -> None:
    """An error on every process, naming the rows, when a feature of any process is NaN or Inf.

    Raised by one process alone, it would leave the others waiting for it in a collective.
    """
    texts = [embeddings.long] if embeddings.short is None else [embeddings.long, embeddings.short]
    finite = torch.stack([part.detach().isfinite().all(dim=1) for part in (embeddings.image, *texts)], dim=1)
    finite = all_gather_with_grad(finite.float())
    if finite.all():
        return
    named = "; ".join(
        f"{name} rows {(finite[:, column] == 0).nonzero().flatten().tolist()[:8]}"
        for column, name in enumerate(("image", "long caption", "short caption")[: finite.shape[1]])
        if not finite[:, column].all()
    )
    raise ValueError(
        f"Features of the global batch of {len(finite)} hold NaN or Inf: {named}. Look at these samples, at the "
        "learning rate and, in float16, at the loss scale."
    )
