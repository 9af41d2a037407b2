"""transformers' training arguments joined with `settings.py`, and what contradicts itself among them."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from longclip_hf.errors import TrainingError
from longclip_hf.training.settings import MethodSettings, Strategy

# What `load_best_model_at_end` goes by where nothing else is named: see `figures.retrieval_metrics`.
BEST_METRIC = "mean_t2i_r1"


@dataclass
class LongCLIPTrainingArguments(MethodSettings, TrainingArguments):
    """transformers' training arguments, and those of Long-CLIP's method. `label_smoothing_factor` is the loss's."""

    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is used in every step: looking for others costs time."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay off: the collator reads the rows."}
    )

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log other losses in the place of NaN and Inf, which end training anyway."}
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model: str | None = BEST_METRIC  # the Trainer's default, the loss, is not computed
        super().__post_init__()
        self.strategy: str = Strategy(self.strategy)
        # Pinned memory is for copying to an accelerator; without one, every epoch would only warn of it.
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory: bool = False
        # The captions of two batches differ in width: batches are never put together and divided again.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        if self.gradient_checkpointing:
            # transformers 4's default is the reentrant kind, which DDP and inputs without gradient do not bear.
            chosen: Any = self.gradient_checkpointing_kwargs
            self.gradient_checkpointing_kwargs: Any = {"use_reentrant": False} | (chosen or {})
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay off: the collator reads columns that the model has not.")
        if self.prediction_loss_only:
            raise ValueError(
                "prediction_loss_only leaves evaluation nothing: it measures retrieval among all rows, and no loss."
            )
        if self.cache_chunk_size < 0 or self.length_groups < 1:
            raise ValueError(
                f"cache_chunk_size must be 0 or more and length_groups 1 or more, got {self.cache_chunk_size} and "
                f"{self.length_groups}."
            )
        if self.num_components > 1 and self.num_components != int(self.num_components):
            raise ValueError(
                f"num_components must be a whole number, or below 1 a share of variance, got {self.num_components}."
            )
        if self.components_of is None:
            self.components_of: Literal["image", "text"] = "text" if self.strategy == Strategy.HIMO else "image"
        debias = self.strategy == Strategy.DEBIAS
        for name in ("drop_first_sentence", "sample_sentences", "shuffle_sentences"):
            if getattr(self, name) is None:
                setattr(self, name, debias)
        if self.short_prefix is None:
            self.short_prefix: Literal["none", "tokens", "positions"] = "tokens" if debias else "none"
        if self.draws_short and not self.needs_short:
            raise ValueError(f"{self.strategy} has no short captions, so that none are made of sentences.")
        if self.short_prefix != "none" and not self.encodes_short:
            raise ValueError(f"{self.strategy} encodes no short captions, so that short_prefix would move none.")
        if not 0 <= self.sentence_dropout < 1:
            raise ValueError(f"sentence_dropout must be at least 0 and below 1, got {self.sentence_dropout}.")
        for name in ("hard_negative_margin", "distillation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.keep is not None and self.keep < 0:
            raise ValueError(f"keep must be 0 or more rows, got {self.keep}.")
        if self.train_length is not None and self.train_length < 3:
            raise ValueError(
                f"train_length must leave a token between those of begin and end: 3 or more, got {self.train_length}."
            )
        if self.distinct_short_captions and (not self.needs_short or self.draws_short):
            raise ValueError(
                f"distinct_short_captions compares the rows' short captions, and {self.strategy} "
                + ("draws others at every step." if self.draws_short else "uses none.")
            )
        if self.log_retrieved < 0:
            raise ValueError(f"log_retrieved is a number of captions, 0 for none, got {self.log_retrieved}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}.")
        for name in ("logit_scale", "min_logit_scale", "max_logit_scale"):
            scale = getattr(self, name)
            if scale is not None and scale <= 0:
                raise ValueError(f"{name} is the factor itself, 100 and not its logarithm: above 0, got {scale}.")
        low, high = self.min_logit_scale, self.max_logit_scale
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_logit_scale {low} lies above max_logit_scale {high}.")

    @property
    def needs_short(self) -> bool:
        """Whether short captions take part in the loss."""
        return self.strategy not in (Strategy.LONG_ONLY, Strategy.HIMO) or self.distillation > 0

    @property
    def encodes_short(self) -> bool:
        """Whether they do in a pass of their own."""
        return self.needs_short and (self.strategy != Strategy.MIXED_LENGTH or self.distillation > 0)

    @property
    def draws_short(self) -> bool:
        """Whether short captions are made of the long one's sentences at every step."""
        return bool(self.drop_first_sentence or self.sample_sentences or self.shuffle_sentences)

    @property
    def draws_sentences(self) -> bool:
        """Whether any captions are."""
        return self.draws_short or self.sentence_dropout > 0

    def caption_length(self, positions: int) -> int:
        """Where captions are cut, for a model of so many `positions`.

        Raises:
            TrainingError: for a `train_length` beyond them.
        """
        if self.train_length is not None and self.train_length > positions:
            raise TrainingError(f"train_length is {self.train_length}, and the model reads {positions} tokens.")
        return self.train_length or positions

    @property
    def device(self) -> torch.device:
        """The device of this process. The CPU has no number: `torch.load` of a checkpoint would not know `cpu:0`."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def components(self) -> int | float:
        """`num_components` as a count where it is one: the command line knows only numbers."""
        return int(self.num_components) if self.num_components >= 1 else self.num_components
