"""Pre-trains the small CLIP of this world on short captions only, with CLIP's own loss and 77 positions.

    python -m examples.scenes.pretrain --output details
    python -m examples.scenes.pretrain --start details --main_share 1 --learning_rate 2e-3 --steps 300 --output mains
    python -m examples.scenes.pretrain --start mains --main_share 0.35 --learning_rate 1e-3 --steps 500 --output clip

It is transformers' CLIPModel and Trainer, nothing of Long-CLIP. `clip/` beside this file was made by these commands
and holds their logs; README.md says why there are three. A run that was interrupted goes on when the same command is
given again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.scenes.dataset import scenes
from examples.scenes.tokenizer import write_processor
from examples.scenes.world import CELL, IMAGE_SIZE
from modeling_longclip.defaults import CLIP_LENGTH

STEPS, BATCH_SIZE, LEARNING_RATE, SEED = 2500, 256, 2e-3, 0
# 2.4 million weights: 4.9 MB in float16. `gelu` is one operation on a CPU, and CLIP's own `quick_gelu` three.
VISION = {"hidden_size": 224, "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 7}
TEXT = {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 5}
PROJECTION = 256
LOG = "training_log.json"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="%(default)s")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE, metavar="X", help="%(default)s")
    parser.add_argument("--start", type=Path, metavar="DIR", help="what to begin with; default: random weights")
    parser.add_argument(
        "--main_share",
        type=float,
        default=0.0,
        metavar="X",
        help="captions that give way to the main sentence, %(default)s",
    )
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, metavar="N", help="%(default)s")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="of weights and order, %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; by default as many as there are cores")
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    pretrain(
        options.output, options.start, steps=options.steps, learning_rate=options.learning_rate,
        main_share=options.main_share, batch_size=options.batch_size, seed=options.seed,
    )  # fmt: skip
    return 0


def pretrain(
    folder: Path, start: Path | None = None, *, steps: int = STEPS, learning_rate: float = LEARNING_RATE,
    main_share: float = 0.0, batch_size: int = BATCH_SIZE, seed: int = SEED,
) -> None:  # fmt: skip
    """Trains from `start` or from random weights; writes a checkpoint in float16, processor and logs to `folder`."""
    from transformers import AutoProcessor, CLIPModel, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    work = folder.with_name(f"{folder.name}.training")
    write_processor(work)
    processor = AutoProcessor.from_pretrained(work)
    set_seed(seed)
    if start is None:
        model = CLIPModel(configuration(processor.tokenizer))
    else:
        model = CLIPModel.from_pretrained(start, dtype=torch.float32)
    settings = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, steps // 4),
        weight_decay=0.1,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        logging_steps=50,
        save_steps=250,
        save_total_limit=2,
        seed=seed,
        remove_unused_columns=False,
        dataloader_num_workers=1,
        dataloader_pin_memory=False,
        use_cpu=True,
        report_to="none",
    )
    collator = Collator(processor, main_share)
    trainer = Trainer(model=model, args=settings, train_dataset=scenes("pretrain"), data_collator=collator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    model.half().save_pretrained(folder)
    write_processor(folder)
    logs = json.loads((start / LOG).read_text(encoding="utf-8")) if start is not None else []
    (folder / LOG).write_text(json.dumps([*logs, trainer.state.log_history], indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)


def configuration(tokenizer: Any) -> Any:
    """The `CLIPConfig`: an image has ten tokens, and a text at most 77, as in CLIP."""
    from transformers import CLIPConfig

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_LENGTH, "hidden_act": "gelu"}
    vision = {"image_size": IMAGE_SIZE, "patch_size": CELL, "hidden_act": "gelu"}
    return CLIPConfig(
        text_config=TEXT | text | ids | {"projection_dim": PROJECTION},
        vision_config=VISION | vision | {"projection_dim": PROJECTION},
        projection_dim=PROJECTION,
    )


class Collator:
    """A batch of what `CLIPModel` takes; the loss is among what it is asked for.

    Args:
        processor: CLIP's.
        main_share: of the rows, so many of the first have the main sentence for a caption.
    """

    def __init__(self, processor: Any, main_share: float = 0.0) -> None:
        self.tokenizer = processor.tokenizer
        self.main_share = main_share
        self.mean, self.std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        mains = round(self.main_share * len(rows))
        captions = [row["short_caption" if number < mains else "caption"] for number, row in enumerate(rows)]
        text = self.tokenizer(captions, padding=True, return_tensors="pt")
        # What the image processor does, but all at once: the pictures have the right size already.
        pictures = torch.from_numpy(np.stack([np.asarray(row["image"]) for row in rows])).permute(0, 3, 1, 2)
        pixels = ((pictures / 255 - self.mean) / self.std).contiguous()
        return {
            "pixel_values": pixels,
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "return_loss": True,
        }


if __name__ == "__main__":
    sys.exit(main())
