"""One training step, forward, loss and backward: images/s and peak memory, ours and the original's, in one run.

    python -m benchmarks.training_step [--size ViT-B/16] [--batch 32] [--repeats 3] [--threads 2] [--json FILE]
        [--original CHECKOUT] [--captions FILE.jsonl --tokenizer DIR] [--dtype bf16] [--device cuda]

Variants, which alternate:

- ours: `LongCLIPTrainer.compute_loss`, captions in length groups, each cut to its own longest;
- padded: the same with every caption, long and short, padded to 248;
- cached: ours with the gradient cache (`--cache_chunk_size`);
- original: given a checkout of github beichenzbc/Long-CLIP, its own `CLIP.forward`, loss and SVD included, on our
  weights in its layout, in a process group of one. Only its `model_longclip.py` is loaded, by path, and nothing is
  stubbed: the package around it would ask for torchvision, the model does not.

Random weights, images of noise, one batch. The captions' lengths are those of `--captions` (lines of JSON with a
"caption"), a sample, and their first sentences; by default those of Urban1k. Gathering and the optimizer's step, which
cost the same in every variant, are left out.

A first round checks and warms up: losses and all gradients are compared to ours. Up to a batch of 33, 32 components
are all there are: the coarse features equal the fine ones, in ours and in the original, and its gradient may hold the
rounding errors of a singular value of zero.

Peak memory is that of the first round, above weights, batch and what was there before: gradients, activations and
scratch. On CUDA it is what torch allocated; on the CPU resident memory, its high-water mark reset before the step and
the allocator's free pages given back (Linux with glibc only, else not measured).

"expected" counts floating-point operations: the matrix products of both towers, attention in full, times 3 for the
backward pass, times 4 for the cache, which encodes twice.
"""

import argparse
import ctypes
import importlib.util
import json
import math
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # the original uses it without importing it
from torch.nn import functional as F
from transformers import AutoTokenizer

from benchmarks.operations import Batch, matmul_peak, seconds, step_operations, text_sizes
from examples.random_clip import SIZES, clip_config
from longclip_hf.sentences import first_sentence
from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.collator import CaptionCollator
from longclip_hf.training.trainer import LongCLIPTrainer
from modeling_longclip import LongCLIPConfig, LongCLIPModel

VARIANTS = ("ours", "padded", "cached", "original")
LENGTH = 248
# Tokens with BOS and EOT at these quantiles of Urban1k's 999 captions (mean 131.4) and first sentences (mean 24.2).
QUANTILES = (0, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 1)
LONG = (94, 110, 113, 116, 119, 122, 125, 127, 129, 132, 136, 139, 147, 154, 161, 167, 222)
SHORT = (9, 11, 12, 13, 14, 17, 19, 21, 23, 25, 27, 31, 35, 40, 45, 55, 76)
# Our names to the original's, in this order.
NAMES = (
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."), ("vision_model.embeddings.", "visual."),
    ("patch_embedding", "conv1"), ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"), ("visual_projection.weight", "visual.proj"),
    ("text_model.encoder.layers.", "transformer.resblocks."), ("text_model.embeddings.", ""),
    ("text_model.final_layer_norm", "ln_final"), ("text_projection.weight", "text_projection"),
    ("position_embedding.weight", "positional_embedding"), ("self_attn.", "attn."), ("layer_norm", "ln_"),
    ("fc1", "c_fc"), ("fc2", "c_proj"),
)  # fmt: skip


# Captions


def at_quantiles(values: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """`count` lengths at equally spaced quantiles, so that a small batch has the mean too, in random order."""
    lengths = []
    for place in ((index + 0.5) / count for index in range(count)):
        right = next(i for i, quantile in enumerate(QUANTILES) if quantile > place)
        share = (place - QUANTILES[right - 1]) / (QUANTILES[right] - QUANTILES[right - 1])
        lengths.append(round(values[right - 1] + share * (values[right] - values[right - 1])))
    rng.shuffle(lengths)
    return lengths


def random_captions(lengths: Sequence[int], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of any words, between BOS and EOT, padded with EOT, and their mask."""
    ids = torch.randint(1, vocab_size - 2, (len(lengths), max(lengths)))
    ids[:, 0] = vocab_size - 2
    positions, ends = torch.arange(max(lengths)), torch.tensor(lengths)[:, None] - 1
    return torch.where(positions >= ends, vocab_size - 1, ids), (positions <= ends).long()


def make_batch(config: LongCLIPConfig, count: int, captions: Path | None, tokenizer: str | None) -> Batch:
    """A batch of `CaptionCollator`'s kind; images differ in the large, so that their features do."""
    rng = random.Random(0)
    torch.manual_seed(0)
    side = config.vision_config.image_size
    coarse = F.interpolate(2 * torch.randn(count, 3, 4, 4), size=(side, side), mode="bilinear")
    batch: Batch = {"pixel_values": coarse + 0.2 * torch.randn(count, 3, side, side)}
    if captions is None:
        vocab_size = config.text_config.vocab_size
        long, short = (random_captions(at_quantiles(values, count, rng), vocab_size) for values in (LONG, SHORT))
    else:
        texts = [json.loads(line)["caption"] for line in captions.read_text(encoding="utf-8").splitlines()]
        texts = [text for text in texts if text.strip()]
        rng.shuffle(texts)
        texts = (texts * math.ceil(count / len(texts)))[:count]
        collator = CaptionCollator(AutoTokenizer.from_pretrained(tokenizer), None, LENGTH)
        long, short = collator.tokens(texts)[:2], collator.tokens([first_sentence(text) for text in texts])[:2]
    batch["input_ids"], batch["attention_mask"] = long
    batch["short_input_ids"], batch["short_attention_mask"] = short
    for name in ("", "short_"):
        batch[f"{name}lengths"] = batch[f"{name}attention_mask"].sum(1).numpy()
    return batch


def padded(batch: Batch, pad_token_id: int) -> Batch:
    """Every caption padded to 248, and its mask as if nothing were padding."""
    full = dict(batch)
    for name in ("", "short_"):
        ids, mask = batch[f"{name}input_ids"], batch[f"{name}attention_mask"]
        room = (0, LENGTH - ids.shape[1])
        full[f"{name}input_ids"] = F.pad(ids.where(mask > 0, pad_token_id), room, value=pad_token_id)
        full[f"{name}attention_mask"] = torch.ones_like(full[f"{name}input_ids"])
        full[f"{name}lengths"] = np.full(len(ids), LENGTH)
    return full


# Models and steps


def make_config(size: str) -> LongCLIPConfig:
    config = clip_config(size, max_position_embeddings=LENGTH)
    if size == "tiny":  # the original takes heads of 64 and an MLP of four widths for granted
        for tower in (config.text_config, config.vision_config):
            tower.hidden_size, tower.intermediate_size, tower.num_attention_heads = 128, 512, 2
    return LongCLIPConfig(**config.to_dict())


def make_trainer(config: LongCLIPConfig, device: str, bf16: bool) -> LongCLIPTrainer:
    """Settings as in the released code: smoothing of 0.1, 32 components, and a logit scale of 100."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = LongCLIPTrainingArguments(
            output_dir=folder, use_cpu=device == "cpu", bf16=bf16, report_to="none", label_smoothing_factor=0.1,
            logit_scale=100.0,
        )  # fmt: skip
        # No rows, so no collator's work either.
        trainer = LongCLIPTrainer(LongCLIPModel(config), args, data_collator=lambda rows: rows)
    trainer.model.train()
    return trainer


def to_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights, or their gradients, in the original's layout; both of its text tables are ours."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue  # with q
        theirs = name
        for old, new in NAMES:
            theirs = theirs.replace(old, new)
        if ".q_proj." in name:
            theirs = theirs.replace("q_proj.", "in_proj_")
            tensor = torch.cat([tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        result[theirs] = tensor.T if name in ("text_projection.weight", "visual_projection.weight") else tensor
    result["positional_embedding_res"] = result["positional_embedding"]
    return result


def make_original(checkout: Path, model: LongCLIPModel) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("model_longclip", checkout / "model" / "model_longclip.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)
    text, vision = model.config.text_config, model.config.vision_config
    original: torch.nn.Module = module.CLIP(
        model.config.projection_dim, vision.image_size, vision.num_hidden_layers, vision.hidden_size,
        vision.patch_size, LENGTH, text.vocab_size, text.hidden_size, text.num_attention_heads,
        text.num_hidden_layers, load_from_clip=False,
    )  # fmt: skip
    original.load_state_dict(to_original(dict(model.named_parameters())))
    original.get_parameter("positional_embedding").requires_grad_(False)  # as its load_from_clip makes it
    return original.to(model.device).train()


def our_step(trainer: LongCLIPTrainer, batch: Batch, groups: int, chunk_size: int) -> torch.Tensor:
    trainer.args.length_groups, trainer.args.cache_chunk_size = groups, chunk_size
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach()


def original_step(model: torch.nn.Module, batch: Batch, bf16: bool) -> torch.Tensor:
    pixels, long, short = batch["pixel_values"], batch["input_ids"], batch["short_input_ids"]
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        long_loss, short_loss = model(pixels, long, short, 0)
        loss: torch.Tensor = long_loss + short_loss
    loss.backward()
    return loss.detach()


# Measuring


def resident(field: str) -> int:
    """`VmRSS`, memory now, or `VmHWM`, the most so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def with_peak_memory(run: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, int | None]:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return run(), None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = resident("VmRSS")
    result = run()
    return result, resident("VmHWM") - before


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def difference(values: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference of all gradients relative to the norm of all."""
    if values.keys() != reference.keys():
        raise ValueError(f"Not both have a gradient: {sorted(values.keys() ^ reference.keys())}.")
    square = sum((values[name] - reference[name]).double().square().sum().item() for name in reference)
    return math.sqrt(square / sum(value.double().square().sum().item() for value in reference.values()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device, bf16, count = options.device, options.dtype == "bf16", options.batch
    trainer = make_trainer(make_config(options.size), device, bf16)
    model: Any = trainer.model
    config = model.config
    batch = make_batch(config, count, options.captions, options.tokenizer)
    batch = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
    full, zeros = padded(batch, config.text_config.eos_token_id), padded(batch, 0)  # the original pads with 0
    groups, chunk_size = trainer.args.length_groups, options.cache_chunk_size
    steps: dict[str, tuple[Any, Callable[[], torch.Tensor], float]] = {
        "ours": (model, lambda: our_step(trainer, batch, groups, 0), step_operations(config, batch, groups, 3)),
        "padded": (model, lambda: our_step(trainer, full, 1, 0), step_operations(config, full, 1, 3)),
        "cached": (
            model, lambda: our_step(trainer, batch, groups, chunk_size), step_operations(config, batch, groups, 4),
        ),
    }  # fmt: skip
    if options.original is not None:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(backend, f"file://{folder}/group", rank=0, world_size=1)
        original = make_original(options.original, model)
        steps["original"] = original, lambda: original_step(original, zeros, bf16), step_operations(config, full, 1, 3)
    steps = {name: step for name, step in steps.items() if name in options.variants}

    variants: dict[str, dict[str, Any]] = {}
    reference: dict[str, torch.Tensor] = {}
    reference_loss = math.nan
    for name, (module, step, operations) in steps.items():
        began = time.perf_counter()
        try:
            loss, peak = with_peak_memory(step, device)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
            module.zero_grad()
            continue
        found = gradients(module)
        variants[name] = {"loss": loss.item(), "peak_bytes": peak, "operations": operations, "seconds": []}
        if not options.repeats:  # one step is all that there is time for
            variants[name]["seconds"].append(time.perf_counter() - began)
        if name == "ours":
            reference, reference_loss = {key: value.clone() for key, value in found.items()}, loss.item()
        elif reference:
            compared = reference
            if name == "original":
                compared = to_original(reference)
                del compared["positional_embedding"]  # frozen there; ours has no gradient in the rows it stands for
            variants[name]["loss_difference"] = abs(loss.item() / reference_loss - 1)
            variants[name]["gradient_difference"] = apart = difference(found, compared)
            print(
                f"{name} against ours: loss {loss.item():.6f} and {reference_loss:.6f}, relative difference "
                f"{variants[name]['loss_difference']:.1e}, of the gradients {apart:.1e}",
                flush=True,
            )
            del compared
        del found  # it would hold the gradients
        module.zero_grad()
    reference.clear()

    for _ in range(options.repeats):
        for name, row in variants.items():
            module, step, _ = steps[name]
            row["seconds"].append(seconds(step, device))
            module.zero_grad()
    if dist.is_initialized():
        dist.destroy_process_group()
    long, short = (float(batch[f"{name}lengths"].mean()) for name in ("", "short_"))
    tokens, _ = text_sizes(batch, groups)
    return {
        "size": options.size, "batch": count, "dtype": options.dtype, "cache_chunk_size": chunk_size,
        "mean_tokens": {"long": long, "short": short, "both_as_encoded": tokens / count}, "variants": variants,
        "matmul_peak": matmul_peak(device, torch.bfloat16 if bf16 else torch.float32),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="bf16: under autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=3, help="0: only the first round, where one takes minutes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--cache_chunk_size", type=int, help="of the variant cached; default: a quarter of the batch")
    parser.add_argument("--original", type=Path, metavar="PATH", help="a checkout of github beichenzbc/Long-CLIP")
    parser.add_argument(
        "--captions", type=Path, help='real captions, lines of JSON with a "caption"; needs --tokenizer'
    )
    parser.add_argument("--tokenizer", help="folder or Hub id of CLIP's tokenizer")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if (options.captions is None) != (options.tokenizer is None):
        parser.error("--captions and --tokenizer go together")
    if options.original is not None and options.size in ("ViT-H/14", "ViT-bigG/14"):
        parser.error("the original knows only QuickGELU and MLPs of four widths: no ViT-H/14, no ViT-bigG/14")
    options.cache_chunk_size = options.cache_chunk_size or max(options.batch // 4, 1)
    if options.threads:
        torch.set_num_threads(options.threads)

    result = measure(options)
    variants, peak = result["variants"], result["matmul_peak"]
    base = next(name for name in ("original", "padded", *variants) if name in variants)
    print(
        f"\n| variant | TFLOP | s | images/s | against {base} | expected | of matmul peak | peak MB above weights |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for name, row in variants.items():
        pairs = zip(variants[base]["seconds"], row["seconds"], strict=True)
        median = statistics.median(row["seconds"])
        row["median_seconds"], row["images_per_second"] = median, options.batch / median
        row["ratio"] = statistics.median(theirs / own for theirs, own in pairs)
        row["expected_ratio"] = variants[base]["operations"] / row["operations"]
        row["share_of_matmul_peak"] = row["operations"] / median / peak
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        print(
            f"| {name} | {row['operations'] / 1e12:.2f} | {median:.3f} | {row['images_per_second']:.2f} | "
            f"{row['ratio']:.2f} | {row['expected_ratio']:.2f} | {row['share_of_matmul_peak']:.0%} | {memory} |"
        )
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else platform.machine()
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    tokens = result["mean_tokens"]
    print(
        f"\n{date.today()}, {machine}, {options.size}, batch {options.batch}, {options.dtype}, medians of "
        f"{options.repeats}; matmul peak {peak / 1e12:.3f} TFLOP/s; chunks of {options.cache_chunk_size} cached; "
        f"tokens per image {tokens['long']:.0f} + {tokens['short']:.0f}, encoded as {tokens['both_as_encoded']:.0f}"
    )
    if options.json:
        options.json.write_text(json.dumps({"date": str(date.today()), "machine": machine} | result, indent=2))


if __name__ == "__main__":
    main()
