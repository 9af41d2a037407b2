"""What exported towers cost and lose, beside torch in float32: size, time, drift of features, and recall@1.

    python -m benchmarks.exported_models [--size ViT-B/16] [--json FILE]
    python -m benchmarks.exported_models --model long-clip --data photos

Without --model, random weights at the real shape: sizes and times are those of trained weights, the drift is not.
Times are medians for one text of full length or one image, with as many threads as torch uses (OMP_NUM_THREADS=1 for
one). --data is images with captions that `datasets` reads, or, with --benchmark, the folder of its downloads.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor

from examples.random_clip import SIZES, write_checkpoint
from longclip_hf.conversion import towers
from longclip_hf.conversion.export import PRECISIONS, ExportReport, export
from longclip_hf.conversion.stretch import stretch
from longclip_hf.evaluation.benchmarks import Retrieval, load_benchmark
from longclip_hf.evaluation.retrieval import Ranks, retrieval_ranks
from longclip_hf.images import decode_image
from longclip_hf.results import Direction

BATCH = 16
Encode = Callable[[np.ndarray], torch.Tensor]


def torch_encoder(tower: towers.Tower) -> Encode:
    def encode(batch: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            features: torch.Tensor = tower(torch.from_numpy(batch))
        return features

    return encode


def onnx_encoder(file: Path) -> Encode:
    session = towers.open_session(file)
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch})[0])


def text_batches(captions: Sequence[str], tokenizer: Tokenizer) -> list[tuple[list[int], np.ndarray]]:
    """Batches of captions of like length: their rows, and their token ids."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(captions))]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    batches = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = len(ids[rows[-1]])
        padded = [ids[row] + ids[row][-1:] * (longest - len(ids[row])) for row in rows]
        batches.append((rows, np.array(padded, dtype=np.int64)))
    return batches


def rank(encode_text: Encode, encode_image: Encode, data: Retrieval, folder: Path) -> dict[Direction, Ranks]:
    """Ranks of retrieval with the given towers; tokenizer and image settings are those of the exported `folder`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(json.loads((folder / "export.json").read_text())["length"])
    processor = AutoProcessor.from_pretrained(folder).image_processor
    texts: dict[int, torch.Tensor] = {}
    for rows, batch in text_batches(data.captions, tokenizer):
        texts.update(zip(rows, encode_text(batch), strict=True))
    images = []
    for start in range(0, len(data.images), BATCH):
        pictures = [decode_image(file.read(), file.name) for file in data.images[start : start + BATCH]]
        images.append(encode_image(processor(pictures, return_tensors="np")["pixel_values"]))
    captions = torch.stack([texts[row] for row in range(len(data.captions))])
    return retrieval_ranks(torch.cat(images), captions, torch.tensor(data.image_of))


def recall_drift(
    model: Path, folder: Path, data: Retrieval, precisions: Sequence[str]
) -> list[dict[str, str | float]]:
    """Recall@1 of torch in float32 and of each precision, and how many queries are right for only one of the two."""
    loaded = towers.load_model(model)
    encoders = {"torch": (torch_encoder(towers.TextTower(loaded)), torch_encoder(towers.ImageTower(loaded)))}
    for precision in precisions:
        text, image = (
            onnx_encoder(folder / "onnx" / f"{tower.file_name}{PRECISIONS[precision]}.onnx")
            for tower in (towers.TextTower, towers.ImageTower)
        )
        encoders[precision] = text, image
    rows: list[dict[str, str | float]] = []
    before: dict[Direction, Ranks] = {}
    for name, (text, image) in encoders.items():
        ranks = rank(text, image, data, folder)
        before = before or ranks
        row: dict[str, str | float] = {"precision": name}
        for direction in ranks:
            row[f"{direction}_r1"] = ranks[direction].recall(1)
            row[f"{direction}_changed"] = int((ranks[direction].hits(1) != before[direction].hits(1)).sum())
        rows.append(row)
    return rows


def print_sizes(report: ExportReport) -> None:
    print("| file | MB | ms | torch ms | faster | largest difference | of unit features | smallest cosine |")
    print("|---|---|---|---|---|---|---|---|")
    for file in report.files:
        before = report.torch_milliseconds[file.tower]
        print(
            f"| `{file.name}` | {file.nbytes / 1e6:,.1f} | {file.milliseconds:.1f} | {before:.1f} | "
            f"{before / file.milliseconds:.2f} | {file.absolute:.1e} | {file.normalised:.1e} | {file.cosine:.6f} |"
        )


def print_recall(rows: list[dict[str, str | float]], data: Retrieval) -> None:
    print(f"\n{data.name}: {len(data.images)} images, {len(data.captions)} captions")
    for note in data.notes:
        print(note)
    print(
        "\n| | image to text R@1 % | changed queries | text to image R@1 % | changed queries |\n|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['precision']} | {100 * float(row['i2t_r1']):.2f} | {row['i2t_changed']} | "
            f"{100 * float(row['t2i_r1']):.2f} | {row['t2i_changed']} |"
        )


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/16", help="of the random weights")
    parser.add_argument("--model", type=Path, help="folder of a Long-CLIP, instead of random weights")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--data", type=Path, help="images with captions, to measure recall on")
    parser.add_argument("--benchmark", help="the name of a benchmark whose files are in --data")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(args)
    if options.data and not options.model:
        parser.error("recall of random weights means nothing: name a --model beside --data")

    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        model = options.model
        if model is None:
            write_checkpoint(work / "clip", options.size)
            model = work / "longclip"
            stretch(str(work / "clip"), model)
        report = export(str(model), work / "onnx", precisions=options.precision)
        print_sizes(report)
        result = {"date": str(date.today()), "machine": platform.machine(), **asdict(report)}
        if options.data:
            name, folder = (options.benchmark, options.data) if options.benchmark else (str(options.data), None)
            data = load_benchmark(name, folder)
            if not isinstance(data, Retrieval):
                parser.error(f"{data.name} has classes and no captions: recall needs captions")
            result["recall"] = recall_drift(model, work / "onnx", data, options.precision)
            print_recall(result["recall"], data)
    print(
        f"\n{date.today()}, {platform.machine()}, threads: {report.threads}, opset {report.opset}, {report.versions}, "
        f"int8 instructions: {report.instructions}"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
