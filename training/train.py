"""Fine-tunes a stretched CLIP on images with long captions.

    python training/train.py --recipe laptop --model long-clip --data photos --output_dir tuned
    python training/train.py --recipe released --model long-clip --data captions.json --image_root DIR ...
    python training/train.py --recipe my-recipe.yaml             # every setting from a file
    accelerate launch training/train.py --recipe paper ...       # any number of processes and machines

Settings come from the recipe (`paper`, `released`, `laptop`, or a YAML file of your own), then from the command line,
which wins. A run that was interrupted goes on from its last complete checkpoint when the same command is given again.
"""

import argparse
import difflib
import functools
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from longclip_hf.command import BAD_INPUT, complain, guarded, spelled_as_known
from modeling_longclip import __version__

RECIPES = Path(__file__).parent / "recipes"
# Of transformers' 130 or so settings, those that `--help` shows beside our own, in few words: importing what
# transformers says of them takes longer than reading it.
SHOWN = {
    "output_dir": "folder of the checkpoints and of the result; one that holds a run is gone on with",
    "per_device_train_batch_size": "images per process and step",
    "gradient_accumulation_steps": "batches per step of the optimizer; they add no negatives",
    "num_train_epochs": "passes over the data, if --max_steps does not say",
    "max_steps": "steps of the optimizer; a stream needs it",
    "learning_rate": "the highest one, after the warm-up",
    "lr_scheduler_type": "linear, cosine, constant_with_warmup, ...",
    "warmup_steps": "steps in which the learning rate rises from 0",
    "weight_decay": "of matrices alone, or of all (--decay_all)",
    "label_smoothing_factor": "share of the target that is spread over all candidates",
    "max_grad_norm": "gradients are cut to this norm; 0: they are not",
    "optim": "adamw_torch, adafactor, ...",
    "bf16": "compute in bfloat16; weights stay in float32",
    "fp16": "compute in float16 with a loss scale; weights stay in float32",
    "gradient_checkpointing": "compute activations twice instead of keeping them",
    "torch_compile": "compile both towers",
    "use_cpu": "train on the CPU, whatever else there is",
    "dataloader_num_workers": "processes that read images; 0: the training process does",
    "eval_strategy": "when the held-out rows are evaluated: no, steps or epoch",
    "eval_steps": "steps between two evaluations",
    "logging_steps": "steps between two logs",
    "report_to": "none, tensorboard, wandb, ...",
    "save_strategy": "when checkpoints are written: no, steps, epoch or best",
    "save_steps": "steps between two checkpoints",
    "save_total_limit": "checkpoints that are kept",
    "load_best_model_at_end": "end with the best checkpoint by the mean of long and short text-to-image R@1",
    "resume_from_checkpoint": "checkpoint to go on from, instead of the last one in --output_dir",
    "seed": "of the order of rows and of all that is drawn",
    "log_level": "debug, info, warning, error or passive",
}
EPILOG = """\
Rows that cannot be trained on are skipped, counted by cause and reported at the end (--on_bad_row error: it ends).
Held-out rows (--heldout_rows) are evaluated with --eval_strategy and at the end: retrieval, both ways.
All of transformers' TrainingArguments are settings too: --help_all lists them, with every default.
"""


@dataclass
class Settings:
    """Everything a run is made of."""

    model: Any
    data: Any
    training: Any
    quiet: bool = False


def recipe_names() -> list[str]:
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """The settings of a recipe by its name, or of a YAML file.

    Raises:
        ValueError: if there is no such recipe, or it is not a mapping of settings to values.
    """
    file = RECIPES / f"{recipe}.yaml" if recipe in recipe_names() else Path(recipe)
    if not file.is_file():
        raise ValueError(f"There is no recipe {recipe!r}: name one of {', '.join(recipe_names())}, or a YAML file.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a 13th month
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold `setting: value` lines, found a {type(values).__name__}.")
    for name, value in values.items():
        if not _is_plain(value, 3):
            raise ValueError(
                f"{file}: {name} must be a number, a text, true, false, or a short list or mapping of them."
            )
    return values


def _is_plain(value: Any, depth: int) -> bool:
    """Not nested deeper than `depth`: aliases of YAML can make a gigabyte, or a circle, of a few lines."""
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and len(value) <= 100 and all(_is_plain(part, depth - 1) for part in parts)
    return value is None or isinstance(value, str | int | float)


def parse(args: list[str]) -> Settings:
    """The settings of a recipe and of the command line, which wins.

    Raises:
        ValueError: for a recipe that does not exist, a setting that nobody knows, or values that do not fit.
        SystemExit: after `--help`, and with code 2 for a command line that argparse refuses.
    """
    from longclip_hf.training.settings import DataArguments, MethodSettings, ModelArguments

    if {"-h", "--help"} & set(args):
        _parser((ModelArguments, DataArguments, MethodSettings), SHOWN).parse_args(["--help"])
    from longclip_hf.training.arguments import LongCLIPTrainingArguments

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    recipe, rest = first.parse_known_args(args)
    parts = (ModelArguments, DataArguments, LongCLIPTrainingArguments)
    parser = _parser(parts)
    given: list[str] = []
    if recipe.recipe is not None:
        known = {field.name for part in parts for field in fields(part) if field.init}
        for name, value in read_recipe(recipe.recipe).items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                raise ValueError(
                    f"Recipe {recipe.recipe}: there is no setting {name!r}"
                    + (f"; {near[0]!r} is the nearest." if near else ".")
                )
            if value is not None:
                given += [f"--{name}", *_words(value)]
    namespace = parser.parse_args([*given, *rest])
    if namespace.quiet:
        namespace.disable_tqdm, namespace.log_level = True, "error"
    model, data, training = (
        part(**{field.name: getattr(namespace, field.name) for field in fields(part) if field.init}) for part in parts
    )
    return Settings(model, data, training, namespace.quiet)


def _words(value: Any) -> list[str]:
    """A recipe's value as the words of a command line."""
    if isinstance(value, list):
        return [str(part) for part in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def _parser(parts: tuple[Any, ...], shown: Mapping[str, str] | None = None) -> Any:
    """The command line: every field of `parts` is a setting, and `shown` are explained beside them."""
    from transformers import HfArgumentParser

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(HfArgumentParser):
        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            return super().parse_known_args([spelled_as_known(self, word) for word in args], namespace)

        def error(self, message: str) -> None:
            """Without the usage, which would be longer than a screen."""
            complain(f"{message} (--help explains the settings)")
            raise SystemExit(BAD_INPUT)

    parser = Parser(
        parts,
        prog="longclip-train",
        description=__doc__,
        epilog=EPILOG,
        usage="%(prog)s [--recipe NAME|FILE] --model MODEL --data DATA --output_dir DIR [--SETTING VALUE ...]",
        formatter_class=functools.partial(Formatter, max_help_position=38, width=119),
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help=f"{', '.join(recipe_names())}, or a YAML file of settings")
    if shown is None:
        parser.add_argument("--help_all", action="help", help="show transformers' settings too, and exit")
    else:
        parser.add_argument("--help_all", action="store_true", help="show transformers' settings too, and exit")
    parser.add_argument("--version", action="version", version=f"longclip-train {__version__}")
    parser.add_argument("--quiet", action="store_true", help="print errors and nothing else")
    for name, meaning in (shown or {}).items():
        parser.add_argument(f"--{name}", help=meaning)
    for action in parser._actions:
        # Only what is shown: with dashes for underscores, every setting is understood too.
        action.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        if getattr(action.type, "__origin__", action.type) is dict:
            action.type = str  # JSON, which TrainingArguments reads
        if action.nargs != 0 and not 0 < len(list(action.choices or ())) < 10:
            action.metavar = "VALUE"
    return parser


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for settings, data or a checkpoint that the user can mend."""
    import transformers  # noqa: F401  its own errors, of a version that does not fit, are not ours

    settings: list[Settings] = []

    def work() -> None:
        settings.append(parse(sys.argv[1:] if args is None else args))
        run(settings[0])

    code: int | None = None
    try:
        code = guarded(
            work, lambda: "the same command goes on from the last complete checkpoint", lambda: bool(settings)
        )
        return code
    finally:
        _leave_process_group(together=code == 0)


def run(settings: Settings) -> dict[str, float]:
    """Trains, evaluates on the held-out rows, writes the checkpoint and the curves; returns the last metrics.

    Raises:
        ValueError: for settings that do not fit each other, the model or the data.
    """
    import torch
    from transformers import AutoProcessor, PrinterCallback, TrainerCallback, set_seed

    from longclip_hf.rows import BAD_ROW_CAUSES, RowLog, bad_rows_report
    from longclip_hf.training.caption_report import report_captions
    from longclip_hf.training.checkpoints import last_complete_checkpoint
    from longclip_hf.training.collator import CaptionCollator
    from longclip_hf.training.sources import load_rows
    from longclip_hf.training.streams import CaptionStream
    from longclip_hf.training.trainer import LongCLIPTrainer
    from modeling_longclip import LongCLIPModel
    from modeling_longclip.defaults import CLIP_LENGTH

    class StopIfDone(TrainerCallback):
        """The Trainer takes one step too many when it goes on from the checkpoint of the last step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                raise _Done

    training = settings.training
    set_seed(training.seed)
    options: dict[str, Any] = {"revision": settings.model.revision}
    try:
        processor = AutoProcessor.from_pretrained(settings.model.model, **options)
        # In float32 whatever the file holds, which transformers 5 would follow: --bf16 and --fp16 compute in less, and
        # the optimiser's steps are too small for weights of 16 bits.
        options |= {"attn_implementation": settings.model.attn_implementation, "dtype": torch.float32}
        model = LongCLIPModel.from_pretrained(settings.model.model, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {settings.model.model} does not load: {error}") from error
    positions = model.config.text_config.max_position_embeddings
    length = training.caption_length(positions)
    if positions <= CLIP_LENGTH and training.train_length is None:
        raise ValueError(
            f"--model {settings.model.model} reads {positions} tokens. Stretch it first: "
            f"python conversion/stretch.py {settings.model.model} (or train it as it is: --train_length {positions})"
        )
    if settings.model.lora_rank:
        model = with_adapters(model, settings.model.lora_rank, settings.model.lora_alpha)
    collator = CaptionCollator(
        processor.tokenizer, processor.image_processor, length, sentences=training.draws_sentences
    )
    resume = training.resume_from_checkpoint or last_complete_checkpoint(training.output_dir)
    bad_rows = Path(training.output_dir, "bad_rows.jsonl")
    rescaled = bad_rows.with_name("rescaled_images.jsonl")
    if resume is None and training.process_index == 0:
        bad_rows.unlink(missing_ok=True)  # of an earlier run
        rescaled.unlink(missing_ok=True)
    train_rows, heldout_rows = load_rows(
        settings.data,
        transform=collator.pixels,
        image_side=collator.pixels.side,
        seed=training.seed,
        rank=training.process_index,
        world_size=training.world_size,
        log=bad_rows,
    )
    if isinstance(train_rows, CaptionStream) and training.max_steps <= 0:
        raise ValueError("A stream has no end: say with --max_steps how many steps to train.")
    trainer = LongCLIPTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=heldout_rows,
        processing_class=processor,
        data_collator=collator,
        callbacks=[StopIfDone()],
    )
    said = trainer.is_world_process_zero() and not settings.quiet
    if said:
        print(f"{settings.data.data}: {train_rows.read}.", flush=True)
    if said and (report := report_captions(train_rows, processor.tokenizer, length)):
        print(report, flush=True)
    if settings.quiet:
        trainer.remove_callback(PrinterCallback)  # the Trainer's, where it shows no bar
    if resume is not None and trainer.is_world_process_zero() and not settings.quiet:
        print(f"Going on from {resume}.", flush=True)
    with suppress(_Done):
        trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    metrics: dict[str, float] = {}
    if heldout_rows is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        # Not into all_results.json too: the Trainer reads it first, and a kill can have left it empty.
        trainer.save_metrics("eval", metrics, combined=False)
    trainer.save_model(training.output_dir)
    said = trainer.report()
    if trainer.is_world_process_zero():
        if distinct := RowLog(bad_rows).distinct():
            counts = [distinct[cause] for cause in BAD_ROW_CAUSES]
            said += f" Each row once, these are {bad_rows_report(counts)} ({bad_rows.name} names them)."
        if deep := RowLog(rescaled).distinct().total():
            said += f" {deep} images of more than 8 bits were scaled to 8 ({rescaled.name} says from which range)."
        if not settings.quiet:
            print(said)
    return metrics


class _Done(Exception):
    """The checkpoint that a run was to go on from is that of its last step."""


def with_adapters(model: Any, rank: int, alpha: int) -> Any:
    """`model` with LoRA adapters on the attention and MLP layers of both towers.

    Raises:
        ImportError: naming the extra, where peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "longclip-hf[train]"') from error
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))


# The process and its group


def _leave_process_group(together: bool) -> None:
    """DDP on CPU aborts in some runs when the interpreter ends with the process group alive.

    Args:
        together: wait for the others first. After an error they may never come.
    """
    if "torch" not in sys.modules:  # after --help: importing it would take longer than all the rest
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
