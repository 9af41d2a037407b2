"""The main job, offline: stretch a CLIP, fine-tune it on long captions, measure what that gave, and search with it.

    python -m examples.demo [--output demo-output]

The CLIP is the small one of examples/scenes, pre-trained on short captions of that world. Every step is a command that
works on real checkpoints too; it is shown before it runs, and at the end for openai/clip-vit-base-patch16.
A demo that was interrupted goes on when the same command is given again.
"""

import argparse
import hashlib
import json
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.scenes import CLIP, RECIPE
from modeling_longclip.defaults import CLIP_LENGTH

if TYPE_CHECKING:
    from longclip_hf.results import Results, Value

REPO = "YOU/longclip-scenes"  # the card's title
TESTS = ("short", "long", "hard")
SHOWN_PICTURES = 6
REAL_USE = """\
python conversion/stretch.py openai/clip-vit-base-patch16 --output long-clip
python training/train.py --recipe released --model long-clip --output_dir tuned \\
    --data share-captioner_coco_lcs_sam_1246k_1107.json --data_format sharegpt4v --image_root ShareGPT4V/data
python evaluation/run.py openai/clip-vit-base-patch16 long-clip tuned --data downloads --html \\
    --benchmark coco-5k flickr30k-1k urban1k imagenet
python conversion/publish.py tuned YOU/longclip-b16 --results evaluation-results/results.json\
"""


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="%(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="of fine-tuning; default: the recipe's")
    parser.add_argument("--rows", type=int, default=13_000, metavar="N", help="to fine-tune on, %(default)s")
    parser.add_argument(
        "--test_rows", type=int, default=500, metavar="N", help="long and hard scenes, %(default)s each"
    )
    parser.add_argument("--query", type=int, default=0, metavar="N", help="which hard scene to search for")
    options = parser.parse_args(args)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on.", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Every step in turn. Returns the exit code of the first that fails, or 0."""
    began = time.perf_counter()
    output: Path = options.output
    data, tuned, evaluation = output / "scenes", output / "longclip", output / "evaluation"
    settings = {name: getattr(options, name) for name in ("steps", "rows", "test_rows")}
    if problem := _other_settings(output, settings | {"start": _digest(RECIPE, CLIP / "model.safetensors")}):
        print(problem, file=sys.stderr)
        return 2
    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()
    console = Console(highlight=False)
    counts = {"train": options.rows, "long": options.test_rows, "hard": options.test_rows}
    for split in ("train", *TESTS, "classes"):
        if not (data / split).exists():
            count = counts.get(split)
            words = ["--split", split, "--output", str(data / split), *(["--count", str(count)] if count else [])]
            if code := _step(console, "examples.scenes.write", words):
                return code
    if not (output / "stretched").exists():
        words = [str(CLIP), "--output", str(output / "stretched"), "--dtype", "float32"]
        if code := _step(console, "longclip_hf.conversion.stretch", words):
            return code
    training = ["--recipe", str(RECIPE), "--model", str(output / "stretched"), "--data", str(data / "train")]
    training += ["--output_dir", str(tuned), *(["--max_steps", str(options.steps)] if options.steps else [])]
    if code := _step(console, "longclip_hf.training.train", training):
        return code
    words = [str(CLIP), str(output / "stretched"), str(tuned), "--output", str(evaluation), "--html", "--replace"]
    words += ["--benchmark", *(str(data / split) for split in TESTS), "imagefolder"]
    words += ["--data", str(data / "classes"), "--templates", str(data / "classes" / "templates.txt")]
    if code := _step(console, "longclip_hf.evaluation.run", words, quiet=True):
        return code
    _write_card(tuned, evaluation / "results.json", training)
    console.print()
    ranks = search(tuned, data / "hard", options.query, output / "ranking.png")
    conclude(console, evaluation / "results.json", ranks, time.perf_counter() - began)
    written = {
        "the fine-tuned model and its card": tuned,
        "the report": evaluation / "report.html",
        "the figures": evaluation / "results.json",
        "the training's curves": tuned / "curves.png",
        "the search": output / "ranking.png",
    }
    for what, path in written.items():
        console.print(f"  {what:<36}{path}", soft_wrap=True)
    console.print(f"\nThe same on real data:\n\n{textwrap.indent(REAL_USE, '  ')}", soft_wrap=True)
    return 0


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _other_settings(output: Path, settings: dict[str, Any]) -> str | None:
    """What is wrong if `output` was made with other settings: nothing in it would fit."""
    file = output / "settings.json"
    if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8"))) != settings:
        return f"error: {output} was made with {found}, not with {settings}: remove it or name another --output."
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return None


def _step(console: Any, module: str, words: list[str], quiet: bool = False) -> int:
    """Shows a command and runs it, in this process, which has imported torch already.

    Args:
        quiet: without what it prints, which is in its files.
    """
    import contextlib
    import importlib
    import io

    console.print(f"\n[bold]$ {shown_command(module)} {shlex.join(words)}[/]", soft_wrap=True)
    main: Callable[[list[str]], int] = importlib.import_module(module).main
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        return main(words)


def shown_command(module: str) -> str:
    """What is typed in the checkout, where the folders of `longclip_hf` lie beside it."""
    if module.startswith("examples."):
        return f"python -m {module}"
    return f"python {module.removeprefix('longclip_hf.').replace('.', '/')}.py"


def _write_card(folder: Path, results: Path, training: list[str]) -> None:
    """The model's card with what was measured, as `conversion/publish.py` would send it."""
    from longclip_hf.conversion.publish import prepare, write_card

    made_with = shlex.join(["python", "training/train.py", *training])
    write_card(prepare(folder, REPO, results=[results], made_with=made_with, license="apache-2.0", overwrite=True))


def search(tuned: Path, hard: Path, query: int, picture: Path) -> dict[str, int]:
    """Searches the hard scenes for a long caption with the original and the fine-tuned model, and draws what is found.

    Returns:
        The place of the right picture in either ranking, from 1.
    """
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor, CLIPModel

    rows = [json.loads(line) for line in (hard / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [Image.open(hard / row["file_name"]).convert("RGB") for row in rows]
    caption = rows[query]["caption"]
    models = {
        "the original, 77 tokens": (CLIPModel.from_pretrained(CLIP, dtype=torch.float32), CLIP),
        "fine-tuned, 248 tokens": (AutoModel.from_pretrained(tuned, trust_remote_code=True), tuned),
    }
    orders: dict[str, list[int]] = {}
    for name, (model, folder) in models.items():
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(text=[caption], images=images, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            similarity: torch.Tensor = model.eval()(**inputs).logits_per_text[0]
        orders[name] = similarity.argsort(descending=True).tolist()
    offsets = processor.tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
    read = offsets[CLIP_LENGTH - 2][1] if len(offsets) > CLIP_LENGTH else len(caption)  # the last place is EOT's
    draw_ranking(caption, read, query, images, orders, picture)
    return {name: order.index(query) + 1 for name, order in orders.items()}


def draw_ranking(
    caption: str, read: int, query: int, images: list[Any], orders: dict[str, list[int]], picture: Path
) -> None:
    """A row of the best pictures for each model, the right one framed.

    Args:
        read: characters of the caption that the original reads; the others are grey.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.25 * SHOWN_PICTURES, 4.2), dpi=200)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.05, top=0.75, hspace=0.35, wspace=0.06)
    lines, unread = textwrap.wrap(f"“{caption[:read]}", 155), caption[read:].lstrip()
    parts = [("\n".join(lines), "black")]
    if unread:
        below = textwrap.fill(f"{unread}”  (not read by the original)", 155)
        parts.append(("\n" * len(lines) + below, "#8a8a8a"))
    for text, colour in parts:
        figure.text(0.01, 0.985, text, fontsize=6.5, va="top", style="italic", color=colour)
    grid = figure.subplots(len(orders), SHOWN_PICTURES, squeeze=False)
    for axes_of_row, (name, order) in zip(grid, orders.items(), strict=True):
        for place, (axes, index) in enumerate(zip(axes_of_row, order, strict=False), start=1):
            is_right = index == query
            axes.imshow(images[index], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{place}, the right one" if is_right else str(place), fontsize=7)
            for spine in axes.spines.values():
                spine.set(edgecolor="#009E73" if is_right else "#dddddd", linewidth=4 if is_right else 0.6)
        found = order.index(query) + 1
        axes_of_row[0].set_title(
            f"{name}: the right picture is number {found} of {len(order)}", loc="left", fontsize=8
        )
    figure.savefig(picture)


def conclude(console: Any, results: Path, ranks: dict[str, int], seconds: float) -> None:
    """The one table: what the original, the stretched and the fine-tuned model can do."""
    from rich.table import Table

    from longclip_hf.results import read_results

    found = read_results(results)
    names = ("original", "stretched", "fine-tuned")
    table = Table("", *names, title="What it gave (percent with 95 % intervals; tokens)", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, cells in figures(found).items():
        table.add_row(label, *cells)
    console.print(table)
    for name, rank in ranks.items():
        console.print(f"A search for one long caption among hard scenes, {name}: the right one is number {rank}.")
    console.print(f"\n{seconds / 60:.1f} minutes. Written:")


def figures(results: "Results") -> dict[str, list[str]]:
    """Row -> a cell for each model."""
    scores = {(score.benchmark, score.model): score for score in results.scores}
    rows: dict[str, list[str]] = {}
    for info in results.benchmarks:
        of_models, name = [scores[info.name, model.name] for model in results.models], Path(info.name).name
        labels = {"i2t_r1": f"{name}: image to text R@1", "t2i_r1": f"{name}: text to image R@1"}
        if info.kind == "classification":
            labels = {"top1": "zero-shot top-1"}
        for metric, label in labels.items():
            values = [score.metrics[metric] for score in of_models]
            rows[label] = [shown(v, 1, 100) for v in values]
        curves = [score.effective_length for score in of_models]
        if name != "short" and all(curves):
            lengths = [curve.effective["t2i"] for curve in curves if curve is not None]
            rows[f"{name}: effective length"] = [shown(v, 0) for v in lengths]
    return rows


def shown(value: "Value | None", digits: int, scale: int = 1) -> str:
    """A value, and its interval where it has one."""
    if value is None:
        return "–"
    ends = "" if value.low is None or value.high is None else f" ({scale * value.low:.0f}–{scale * value.high:.0f})"
    return f"{scale * value.value:.{digits}f}{ends}"


if __name__ == "__main__":
    sys.exit(main())
