"""Settings of training, typed and documented once: `HfArgumentParser` makes the command line of them."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from longclip_hf.training.losses import Strategy
from transformers import TrainingArguments

from longclip_hf.images import MAX_PIXELS

HELDOUT_ROWS = 1000  # as in the paper (section 4.1) and the released code


@dataclass
class DataArguments:
    """Which rows to train on, how to read them, and what to do about those that cannot be read.

    Raises:
        ValueError: for settings that contradict each other or lie outside their range.
    """

    data: str = field(
        metadata={
            "help": "What to train on: a Hub id or a local folder that `datasets` recognises, ShareGPT4V's JSON file, "
            "or for the other formats a folder, a file or a pattern such as 'shards/*.tar'."
        }
    )
    data_format: Literal["datasets", "sharegpt4v", "imagefolder", "parquet", "webdataset"] = field(
        default="datasets",
        metadata={
            "help": "How to read it. datasets: by its layout. sharegpt4v: a JSON list of objects with 'image' and "
            "'conversations'. imagefolder: images beside a metadata.jsonl. webdataset: tar shards, always streamed."
        },
    )
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset that has several."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder or URL in which image paths begin, and which they must not leave. Needed for sharegpt4v. "
            "Default: the data's own folder."
        },
    )
    image_access: Literal["root", "local", "any"] = field(
        default="root",
        metadata={
            "help": "What an image path may lead to: files below --image_root, links followed (root), any file of "
            "this machine (local), or URLs too (any). Others are bad rows."
        },
    )
    image_column: str = field(
        default="image",
        metadata={
            "help": "Column of images, of encoded images or of paths. webdataset: the extension, such as 'jpg'."
        },
    )
    long_column: str = field(
        default="caption",
        metadata={"help": "Column of long captions. A dot leads into a structure: 'json.caption'."},
    )
    short_column: str | None = field(
        default=None, metadata={"help": "Column of short captions. Default: the first sentence of the long one."}
    )
    heldout_split: str | None = field(
        default=None, metadata={"help": "Split to take the held-out rows from. Default: the split to train on."}
    )
    heldout_rows: int = field(
        default=HELDOUT_ROWS,
        metadata={"help": "The first so many rows are held out for evaluation and not trained on. 0: none."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read rows as they come, again and again, instead of preparing a table of them first."},
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Streamed rows are drawn from so many, which every dataloader worker holds undecoded."},
    )
    on_bad_row: Literal["skip", "error"] = field(
        default="skip",
        metadata={
            "help": "At a missing, unreadable, oversized or refused image or an empty caption: skip the row and count "
            "it by cause, or end with an error that names it."
        },
    )
    max_image_pixels: int = field(
        default=MAX_PIXELS,
        metadata={
            "help": "Images of more pixels are bad rows. Pillow itself refuses twice its default of 89,478,485."
        },
    )

    def __post_init__(self) -> None:
        if self.data_format == "sharegpt4v" and self.image_root is None:
            raise ValueError("sharegpt4v names its images by relative paths: say where they begin with --image_root.")
        if self.data_format == "sharegpt4v" and self.streaming:
            raise ValueError("sharegpt4v is not streamed: its table of paths is small. Leave --streaming out.")
        if self.data_format == "sharegpt4v" and (self.train_split, self.heldout_split) != ("train", None):
            raise ValueError("sharegpt4v has one split: hold out its first --heldout_rows.")
        for name, lowest in (("heldout_rows", 0), ("shuffle_buffer", 1), ("max_image_pixels", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {getattr(self, name)}.")


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = field(
        metadata={"help": "Folder or Hub id of a stretched checkpoint (conversion/stretch.py makes one)."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or a flash attention."})
    lora_rank: int = field(
        default=0,
        metadata={"help": "Train adapters of this rank on both towers (peft) instead of all weights; 0: all."},
    )
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})


@dataclass
class LongCLIPTrainingArguments(TrainingArguments):
    """transformers' training arguments, and those of Long-CLIP's method. `label_smoothing_factor` is the loss's."""

    strategy: str = field(
        default=Strategy.PRIMARY_COMPONENT,
        metadata={
            "help": "How the short-text ability is kept (paper table 5): primary-component, undistinguished, "
            "mixed-length, bounded, or long-only (direct fine-tuning).",
            "choices": [str(strategy) for strategy in Strategy],
        },
    )
    num_components: float = field(
        default=32,
        metadata={"help": "Primary components kept of the image features: a count, or below 1 a share of variance."},
    )
    components_scope: Literal["local", "global"] = field(
        default="local",
        metadata={
            "help": "Whose images define the components: each process's own (local, as released) or all (global).",
        },
    )
    short_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the short captions' loss: 1.0 as released, 0.1 before May 2024."}
    )
    mixed_length_share: float = field(
        default=0.1, metadata={"help": "Share of long captions that mixed-length replaces by the short ones."}
    )
    logit_scale: float | None = field(
        default=None, metadata={"help": "Reset the scale of the logits to this before training (released: 100)."}
    )
    max_logit_scale: float | None = field(
        default=None, metadata={"help": "Hold the scale of the logits at or below this (CLIP's own training: 100)."}
    )
    decay_all: bool = field(
        default=False,
        metadata={"help": "Weight decay on everything but the text's positions (released), not on matrices only."},
    )
    length_groups: int = field(
        default=4, metadata={"help": "Encode captions in up to so many groups of similar length, each cut to its own."}
    )
    cache_chunk_size: int = field(
        default=0,
        metadata={"help": "Encode so many images or captions at a time (gradient cache); 0: the whole batch at once."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is used in every step: looking for others costs time."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay off: the collator reads the rows."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.strategy = Strategy(self.strategy)
        # Pinned memory is for copying to an accelerator; without one, every epoch would only warn of it.
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory: bool = False
        if self.gradient_checkpointing:
            # transformers 4's default is the reentrant kind, which DDP and inputs without gradient do not bear.
            chosen: Any = self.gradient_checkpointing_kwargs
            self.gradient_checkpointing_kwargs: Any = {"use_reentrant": False} | (chosen or {})
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay off: the collator reads columns that the model has not.")
        if self.cache_chunk_size < 0 or self.length_groups < 1:
            raise ValueError(
                f"cache_chunk_size must be 0 or more and length_groups 1 or more, got {self.cache_chunk_size} and "
                f"{self.length_groups}."
            )
        if self.num_components > 1 and self.num_components != int(self.num_components):
            raise ValueError(
                f"num_components must be a whole number, or below 1 a share of variance, got {self.num_components}."
            )
        for name in ("logit_scale", "max_logit_scale"):
            scale = getattr(self, name)
            if scale is not None and scale <= 0:
                raise ValueError(f"{name} is the factor itself, 100 and not its logarithm: above 0, got {scale}.")

    @property
    def device(self) -> torch.device:
        """The device of this process. The CPU has no number: `torch.load` of a checkpoint would not know `cpu:0`."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def components(self) -> int | float:
        """`num_components` as a count where it is one: the command line knows only numbers."""
        return int(self.num_components) if self.num_components >= 1 else self.num_components
