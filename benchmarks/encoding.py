"""Encoding captions grouped by length, beside padding all of them to 248 tokens: seconds, and the same features.

    python -m benchmarks.encoding [--captions FILE --tokenizer DIR] [--count 1000] [--device cuda] [--json FILE]

A text tower of the real shape with random weights. The captions are random words in the lengths of Urban1k's
(131 +- 13 tokens, their first sentences 24 +- 9), or the lines of a .txt file, or the "caption"s of a .jsonl file.
Both ways tokenise, form batches of at most `--batch-tokens` tokens, and leave the features on the CPU; both call the
same model without a mask, so that only the padding differs. Medians of runs that alternate, after a warm-up of each.
"""

import argparse
import json
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, CLIPModel

from examples.random_clip import SENTENCES, SIZES, clip_config, write_image_settings, write_tokenizer
from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.sentences import first_sentence
from modeling_longclip.compat import features
from modeling_longclip.defaults import LENGTH

GOALS = {"captions": 0.6, "first sentences": 0.15}


def make_captions(count: int) -> list[str]:
    """One token is one word or one full stop; start and end of text are two more."""
    rng = random.Random(0)
    words = [word for sentence in SENTENCES for word in sentence.split()]

    def sentence(mean: float, deviation: float, shortest: int, longest: int) -> str:
        length = min(max(round(rng.gauss(mean, deviation)), shortest), longest)
        return " ".join(rng.choices(words, k=length))

    return [f"{sentence(22, 9, 2, 74)}. {sentence(106, 9, 20, 140)}" for _ in range(count)]


def read_captions(file: Path, count: int) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["caption"] if file.suffix == ".jsonl" else line for line in lines]
    whole = [text for text in texts if text.strip()][:count]
    print(
        f"{file.name}: {len(whole)} captions, of {len(texts)} lines ({sum(not t.strip() for t in texts)} are empty)\n"
    )
    return whole


def write_model(folder: Path, size: str, layers: int | None, tokenizer: Path | None) -> None:
    """A text tower of the real shape and length; of the image tower, which is not asked, one layer."""
    if tokenizer is None:
        write_tokenizer(folder)
    else:
        shutil.copytree(tokenizer, folder)
    write_image_settings(folder, SIZES[size]["image"][0])
    ids = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    torch.manual_seed(0)
    ends = {"bos_token_id": ids[0], "eos_token_id": ids[-1]}
    config = clip_config(size, layers=layers, max_position_embeddings=LENGTH)
    config.text_config.update(ends)
    config.vision_config.num_hidden_layers = 1
    CLIPModel(config).save_pretrained(folder)


@torch.inference_mode()
def padded(encoder: Encoder, texts: Sequence[str]) -> torch.Tensor:
    ids = encoder.tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )["input_ids"]
    batches = ids.split(max(1, encoder.batch_tokens // LENGTH))
    return torch.cat(
        [features(encoder.model.get_text_features(input_ids=b.to(encoder.device))).float().cpu() for b in batches]
    )


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="a .txt file with one in a line, or a .jsonl file")
    parser.add_argument("--tokenizer", type=Path, help="folder of CLIP's tokenizer, for --captions")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/16")
    parser.add_argument("--layers", type=int, help="of the text tower, where the official number is too much")
    parser.add_argument("--batch-tokens", type=int, help="default: the encoder's for the device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()

    captions = read_captions(options.captions, options.count) if options.captions else make_captions(options.count)
    texts = {"captions": captions, "first sentences": [first_sentence(caption) for caption in captions]}
    with tempfile.TemporaryDirectory() as work:
        write_model(Path(work) / "clip", options.size, options.layers, options.tokenizer)
        encoder = Encoder(
            Path(work) / "clip", device=options.device, dtype=options.dtype, batch_tokens=options.batch_tokens
        )
    results = {name: encoder.encode_texts(some) for name, some in texts.items()}
    errors = {name: (results[name].embeds - padded(encoder, texts[name])).abs().max().item() for name in texts}
    runs: dict[str, Callable[[], object]] = {
        "padded": lambda: padded(encoder, captions),
        **{name: lambda some=some: encoder.encode_texts(some) for name, some in texts.items()},  # type: ignore[misc]
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):  # the features above were the warm-up
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}

    print(f"| texts | mean tokens | padded to {LENGTH}, s | grouped, s | ratio | goal | largest difference |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name, goal in GOALS.items():
        row = {
            "texts": name,
            "mean_tokens": results[name].lengths.float().mean().item(),
            "padded_seconds": medians["padded"],
            "grouped_seconds": medians[name],
            "ratio": statistics.median(a / b for a, b in zip(times[name], times["padded"], strict=True)),
            "largest_difference": errors[name],
        }
        rows.append(row)
        print(
            f"| {len(texts[name])} {name} | {row['mean_tokens']:.0f} | {row['padded_seconds']:.2f} | "
            f"{row['grouped_seconds']:.2f} | {row['ratio']:.2f} | {goal} | {row['largest_difference']:.1e} |"
        )
    norm = results["captions"].embeds.norm(dim=1).mean()
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else platform.machine()
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(
        f"\n{date.today()}, {machine}, transformers {transformers.__version__}, {options.size} in {options.dtype}, "
        f"medians of {options.repeats}; the features' mean length is {norm:.1f}"
    )
    if options.json:
        options.json.write_text(json.dumps({"date": str(date.today()), "machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
