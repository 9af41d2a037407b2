"""Short runs of `LongCLIPTrainer` on a tiny model, and one process of those that `test_trainer` compares.

    RANK=0 WORLD_SIZE=2 ... python tests/trainer_runs.py CHECKPOINT OUTPUT

Trains with every strategy on this process's share of the same batches, and writes losses and gradients as DDP averages
them, the features that evaluation gathered, and what was said of a row of NaN.
"""

import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, TrainerCallback

from examples.random_clip import SENTENCES
from longclip_hf.sentences import first_sentence
from longclip_hf.training import step as step_module
from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.captions import CaptionRow
from longclip_hf.training.components import PrimaryComponents, primary_components
from longclip_hf.training.trainer import LongCLIPTrainer
from modeling_longclip import LongCLIPModel

BATCH, STEPS, HELD_OUT = 12, 2, 7
CASES = {
    f"{name}{'-cached' if chunk else ''}": {**settings, "cache_chunk_size": chunk}
    for chunk in (0, 4)
    for name, settings in {
        "primary-component-local": {"strategy": "primary-component", "components_scope": "local"},
        "primary-component-global": {"strategy": "primary-component", "components_scope": "global"},
        "undistinguished": {"strategy": "undistinguished"},
        "mixed-length": {"strategy": "mixed-length", "mixed_length_share": 0.3},
        "bounded": {"strategy": "bounded"},
        "long-only": {"strategy": "long-only"},
        "himo": {"strategy": "himo", "num_components": 0.9},
        "debias": {"strategy": "debias", "short_loss_weight": 0.5},
        "debias-positions": {"strategy": "debias", "short_prefix": "positions", "sentence_dropout": 0.4},
        "long-only-distillation": {"strategy": "long-only", "distillation": 10.0},
        "undistinguished-margin": {"strategy": "undistinguished", "hard_negative_margin": 0.5},
    }.items()
}


def make_rows(count: int, seed: int = 0, longest: int = 120) -> list[CaptionRow]:
    """Noise for images, and captions of one to `longest` words beyond their first sentence."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    rows = []
    for _ in range(count):
        caption = " ".join(rng.choices(words, k=rng.randint(2, 9))) + ". "
        said = rng.choices(words, k=rng.randint(1, longest))
        caption += " ".join(f"{word}." if number % 9 == 8 else word for number, word in enumerate(said))
        image = torch.randn(3, 32, 32, generator=generator)
        rows.append(
            CaptionRow(image=image, caption=caption, short_caption=first_sentence(caption), bad_rows=[0, 0, 0, 0, 0])
        )
    return rows


def arguments(output: Path, **settings: Any) -> LongCLIPTrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 3,
        "num_components": 3,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
    }
    return LongCLIPTrainingArguments(output_dir=str(output), **(defaults | settings))


def make_trainer(checkpoint: Path, output: Path, rows: Any, heldout: Any = None, **settings: Any) -> LongCLIPTrainer:
    adapt = settings.pop("adapt", lambda model: model)
    model = adapt(LongCLIPModel.from_pretrained(checkpoint))
    processor = AutoProcessor.from_pretrained(checkpoint)
    args = arguments(output, **settings)
    return LongCLIPTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=heldout, processing_class=processor
    )


def with_adapters(model: LongCLIPModel) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1"]))


class Gradients(TrainerCallback):
    """Keeps a copy of every gradient, step by step, as the optimizer gets it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def of_halves(features: torch.Tensor, num_components: int | float, moments: Any = None, **check: Any) -> Any:
    """What two processes of the local scope do, in one."""
    if moments is not None:
        return primary_components(features, num_components, moments, **check)
    halves = [primary_components(half, num_components, **check) for half in features.chunk(2)]
    kept = torch.stack([half.variance_kept for half in halves]).mean()
    return PrimaryComponents(torch.cat([half.features for half in halves]), halves[0].num_kept, kept)


def main(checkpoint: str, output: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(output).with_suffix(".runs")
    rows, heldout = make_rows(BATCH * STEPS + 5), make_rows(HELD_OUT, seed=1)
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH // processes}
    if processes > 1:
        options["ddp_backend"] = "gloo"
    else:
        step_module.primary_components = of_halves
    for case, settings in CASES.items():
        trainer = make_trainer(Path(checkpoint), folder, rows, heldout, **options, **settings)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        results[case] = {"gradients": gradients.steps, "logs": logs, "seen": trainer.figures.captions_seen}
    predictions = trainer.predict(heldout)
    results["evaluation"] = {"features": predictions.predictions, "metrics": predictions.metrics}
    for row in rows[3:]:
        row["image"] = torch.full((3, 32, 32), torch.nan)
    try:
        make_trainer(Path(checkpoint), folder, rows, **options).train()
    except ValueError as error:
        results["not finite"] = str(error)
    torch.save(results, output)
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
