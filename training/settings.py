"""Settings of a run that are ours, typed and documented once: `train.py` makes its command line of them.

Without torch and transformers, so that `--help` takes no time; `arguments.py` joins them to transformers' own.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from longclip_hf.image_files import Kind
from longclip_hf.images import MAX_PIXELS

HELDOUT_ROWS = 1000  # as in the paper (section 4.1) and the released code


class Strategy(StrEnum):
    """How the short-text ability is kept while long captions are learnt: paper table 5, and what came after it."""

    PRIMARY_COMPONENT = "primary-component"
    UNDISTINGUISHED = "undistinguished"
    MIXED_LENGTH = "mixed-length"
    BOUNDED = "bounded"
    LONG_ONLY = "long-only"
    HIMO = "himo"
    DEBIAS = "debias"


@dataclass
class DataArguments:
    """Which rows to train on, how to read them, and what to do about those that cannot be read.

    Raises:
        ValueError: for settings that contradict each other or lie outside their range.
    """

    data: str = field(
        metadata={
            "help": "What to train on: a folder, a file, a pattern such as 'shards/*.tar', an address or a Hub id."
        }
    )
    more_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further sources to train on, each read as its layout says; their columns may have other names.",
            "nargs": "+",
        },
    )
    data_format: Kind = field(
        default="auto",
        metadata={
            "help": "How to read it. auto: as its layout says. datasets: as the library does. sharegpt4v: a JSON list "
            "of objects with 'image' and 'conversations'. imagefolder: images beside a metadata.jsonl. webdataset: "
            "tars, always streamed. pairs: a text file beside each image. Files may be packed (.gz, .zst)."
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
    image_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of images, of encoded images or of paths. webdataset: the extension, such as 'jpg'. "
            "Default: the obvious one, which is said."
        },
    )
    long_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of long captions, of lists of them, of which each epoch draws one, or of conversations. A "
            "dot leads into a structure: 'json.caption'. Default: the obvious one, which is said."
        },
    )
    short_column: str | None = field(
        default=None, metadata={"help": "Column of short captions. Default: the first sentence of the long one."}
    )
    first_sentence: Literal["punctuation", "released"] = field(
        default="punctuation",
        metadata={
            "help": "Where the first sentence ends. punctuation: longclip_hf/sentences.py. released: before the first "
            "'. ', as in the released code."
        },
    )
    clean_captions: bool = field(
        default=False,
        metadata={
            "help": "Clean captions as CLIP's original tokenizer does (ftfy, HTML entities); transformers' fast one "
            "reads them as they are."
        },
    )
    neutralise_special_tokens: bool = field(
        default=False,
        metadata={"help": "Read a literal <|endoftext|> within a caption as words. As a token it hides what follows."},
    )
    heldout_split: str | None = field(
        default=None, metadata={"help": "Split to take the held-out rows from. Default: the split to train on."}
    )
    heldout_rows: int = field(
        default=HELDOUT_ROWS,
        metadata={"help": "The first so many rows are held out for evaluation and not trained on. 0: none."},
    )
    heldout_shuffle: bool = field(
        default=False,
        metadata={"help": "Hold out as many rows drawn from all (by --seed) instead of the first. Not of a stream."},
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
    reduced_decoding: bool = field(
        default=False,
        metadata={
            "help": "Decode images to no more than twice the side that the model sees, where they have more: faster "
            "for large JPEG, and pixels change a little (docs/training.md)."
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
class MethodSettings:
    """How Long-CLIP is trained (paper sections 3.3 and 4.4)."""

    strategy: str = field(
        default=Strategy.PRIMARY_COMPONENT,
        metadata={
            "help": "How the short-text ability is kept: primary-component, undistinguished, mixed-length, bounded, "
            "long-only (direct fine-tuning) (paper table 5); himo (components of the long text, no short captions), "
            "debias (primary-component with short captions drawn from all sentences but the first).",
            "choices": [str(strategy) for strategy in Strategy],
        },
    )
    num_components: float = field(
        default=32,
        metadata={"help": "Primary components kept of the features: a count, or below 1 a share of variance."},
    )
    components_of: Literal["image", "text"] | None = field(
        default=None,
        metadata={
            "help": "Whose features are reduced to components, beside the other's whole ones. Default: the text's for "
            "himo, the image's for others."
        },
    )
    components_scope: Literal["local", "global"] = field(
        default="local",
        metadata={
            "help": "Whose features define the components: each process's own (local, as released) or all (global).",
        },
    )
    short_loss_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the second loss, of short captions or components: 1.0 as released, 0.1 before May 2024."
        },
    )
    drop_first_sentence: bool | None = field(
        default=None,
        metadata={"help": "Make short captions of the long one's sentences, less the first. Default: with debias."},
    )
    sample_sentences: bool | None = field(
        default=None,
        metadata={"help": "Make them of a random number of sentences, drawn at every step. Default: with debias."},
    )
    shuffle_sentences: bool | None = field(
        default=None, metadata={"help": "Make them of sentences in any order. Default: with debias."}
    )
    short_prefix: Literal["none", "tokens", "positions"] | None = field(
        default=None,
        metadata={
            "help": "Move short captions to a random place, behind a prefix (tokens) or by their position_ids alone "
            "(positions, cheaper). Default: tokens with debias, none otherwise."
        },
    )
    sentence_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of each sentence of a long caption to be left out, drawn at every step."},
    )
    distillation: float = field(
        default=0.0,
        metadata={
            "help": "Weight of how far similarities of images and short captions come from those before training, "
            "with any strategy. It takes a frozen copy of both towers. 0: none."
        },
    )
    hard_negative_margin: float = field(
        default=0.0,
        metadata={
            "help": "Add so many times the captions' own similarity to the logits of negatives (HN margin: 0.5 within "
            "the domain, 0.25 for transfer), with any strategy. 0: none."
        },
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
    min_logit_scale: float | None = field(
        default=None, metadata={"help": "Hold the scale of the logits at or above this."}
    )
    decay_all: bool = field(
        default=False,
        metadata={"help": "Weight decay on everything but the text's positions (released), not on matrices only."},
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the image tower. Default: that of everything."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the text tower. Default: that of everything."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Every layer's learning rate is that of the layer above times this."}
    )
    frozen_vision_layers: int | None = field(
        default=None,
        metadata={"help": "Freeze the image tower's embeddings and so many lowest layers; -1: all."},
    )
    frozen_text_layers: int | None = field(
        default=None,
        metadata={"help": "Likewise of the text tower; its positions are frozen only with all of it."},
    )
    keep: int | None = field(
        default=None,
        metadata={
            "help": "First rows of the text's table of positions that stay fixed; 0: none. Default: those that the "
            "stretch kept."
        },
    )
    train_length: int | None = field(
        default=None,
        metadata={
            "help": "Cut captions to so many tokens, in training and its evaluation. Default: the model's positions. "
            "Said, a CLIP that was not stretched is trained too."
        },
    )
    length_groups: int = field(
        default=4, metadata={"help": "Encode captions in up to so many groups of similar length, each cut to its own."}
    )
    cache_chunk_size: int = field(
        default=0,
        metadata={"help": "Encode so many images or captions at a time (gradient cache); 0: the whole batch at once."},
    )
    distinct_short_captions: bool = field(
        default=False,
        metadata={"help": "No two rows of a batch, of all processes, have the same short caption. Not for streams."},
    )
    log_retrieved: int = field(
        default=0,
        metadata={"help": "At every evaluation, log what so many held-out captions find, to a file and TensorBoard."},
    )
    eval_effective_length: bool = field(
        default=False,
        metadata={"help": "At every evaluation, encode long captions cut at 10, 20, 30 ... tokens too."},
    )
    resume_with_changes: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint with other settings than its run's; the next ones record both."},
    )
