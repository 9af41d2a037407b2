"""Writes both towers of a Long-CLIP as ONNX, for onnxruntime and whatever else runs it without torch.

    python conversion/export.py long-clip --output long-clip-onnx
    python conversion/export.py long-clip --output long-clip-onnx --precision fp32 fp16 int8
    python conversion/export.py long-clip --output ViT-B-16__openai --layout immich          # for a photo server

The folder holds a text tower (input_ids -> text_embeds) and an image tower (pixel_values -> image_embeds) in each
precision, for batches of any size and texts of any length that the checkpoint reads, and the tokenizer and image
settings beside them: nothing else is needed. The features are not normalised. Before the command ends, the files are
compared with torch: fp32 agrees to 1e-4, and the drift of fp16 and int8 is measured. A table and export.json say how
far they are, how large, and how fast on this machine, with as many threads as torch uses (OMP_NUM_THREADS), and which
instructions for int8 its processor has.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded
from longclip_hf.errors import ConversionError, ProofError
from longclip_hf.files import new_folder, read_json, write_json

if TYPE_CHECKING:
    import torch

    from longclip_hf.conversion import towers
    from longclip_hf.conversion.checkpoint import Checkpoint

# And the ends of the files' names, which are those that transformers.js looks for.
PRECISIONS = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
TOLERANCE = 1e-4  # of float32 against torch
FOLDER = "onnx"
LAYOUTS = ("transformers.js", "immich")
RECORD = "export.json"

_CARD = """---
{{ card_data }}
---

# Long-CLIP as ONNX: {{ source }}

Both towers of `{{ source }}`, a [Long-CLIP](https://arxiv.org/abs/2403.15378) that reads {{ length }} tokens, for
onnxruntime. What the model is good for, its limits and biases are that checkpoint's: read its card.

| file | takes | gives |
|---|---|---|
| `onnx/text_model*.onnx` | `input_ids`, (batch, length), length up to {{ length }} | `text_embeds` |
| `onnx/vision_model*.onnx` | `pixel_values`, (batch, 3, {{ image_size }}, {{ image_size }}) | `image_embeds` |

Ids are int64, pixels and features float32 in every precision. Features have shape (batch, {{ projection_dim }}) and
are not normalised. A text ends with EOT; what pads it behind EOT does not matter, and there is no mask. A row without
EOT gives NaN, a text that is too long an error. Probabilities are the softmax of {{ "%.2f" % logit_scale }} times the
cosines.

Compared with torch {{ versions.torch }} in float32, on built-in texts and images. Milliseconds are for one text of
{{ length }} tokens or one image, {{ threads }} thread{{ "s" if threads > 1 }}, onnxruntime {{ versions.onnxruntime }},
opset {{ opset }}. Instructions for int8 of that processor: {{ instructions }}.

| file | MB | ms | torch ms | largest difference | of unit features | smallest cosine |
|---|---|---|---|---|---|---|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}"""


@dataclass(frozen=True)
class ExportedFile:
    """A tower in one precision.

    Attributes:
        tower: `"text"` or `"image"`.
        precision: `"fp32"`, `"fp16"` or `"int8"`.
        name: of the file, relative to the folder.
        nbytes: its size, with that of the weights beside it where one file cannot hold them.
        milliseconds: for one text of the model's full length, or one image.
        absolute: the largest difference of a feature's entry from torch's in float32.
        normalised: the same, of features of length 1.
        cosine: the smallest cosine with torch's features.
    """

    tower: str
    precision: str
    name: str
    nbytes: int
    milliseconds: float
    absolute: float
    normalised: float
    cosine: float


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, as it stands in `export.json`.

    Attributes:
        source: name of the checkpoint.
        length: tokens of the longest text.
        image_size: side of an image in pixels.
        projection_dim: size of a feature.
        logit_scale: what cosines are multiplied with before a softmax.
        opset: of the files.
        threads: that the times were taken with.
        instructions: for int8 products, of the processor that the files were compared on; or `"unknown"`.
        versions: of torch, onnx and onnxruntime.
        torch_milliseconds: of torch in float32, by tower.
        files: the towers, by precision.
    """

    source: str
    length: int
    image_size: int
    projection_dim: int
    logit_scale: float
    opset: int
    threads: int
    instructions: str
    versions: dict[str, str]
    torch_milliseconds: dict[str, float]
    files: list[ExportedFile]


def export(
    source: str,
    output: Path | str,
    *,
    precisions: Sequence[str] = ("fp32",),
    layout: str = LAYOUTS[0],
    revision: str | None = None,
    processor: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda step: None,
) -> ExportReport:
    """Writes both towers of the Long-CLIP `source` as ONNX to the folder `output`, and compares them with torch.

    Args:
        source: a folder or Hub id with both towers.
        output: the new folder. It appears at the end, whole, or not at all.
        precisions: some of `"fp32"`, `"fp16"` (weights and arithmetic) and `"int8"` (weights and matrix products).
        layout: `"transformers.js"`, or `"immich"` for that photo server: one precision, inputs of one shape.
        revision: branch, tag or commit of a Hub id.
        processor: folder or Hub id of the tokenizer and image settings, where `source` has none.
        overwrite: replace an existing export.
        say: is called with each step that begins.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if a float32 file is further than 1e-4 from torch, or a feature is not finite.
    """
    from longclip_hf.conversion import folder
    from longclip_hf.conversion.checkpoint import find_folder, read_checkpoint

    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter asks for it only half-way
    except ImportError as error:
        raise ConversionError(
            f'Exporting needs {error.name}, which is not installed: pip install "longclip-hf[export]".'
        ) from error
    import torch

    from longclip_hf.conversion import towers

    output = Path(output)
    if not precisions or not set(precisions) <= PRECISIONS.keys():
        raise ConversionError(f"precisions must be some of {', '.join(PRECISIONS)}, got {list(precisions)}.")
    if layout not in LAYOUTS:
        raise ConversionError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if layout == "immich" and len(precisions) > 1:
        raise ConversionError(f"immich reads one file of each tower: choose one precision, got {list(precisions)}.")
    wanted = [precision for precision in PRECISIONS if precision in precisions and precision != "fp32"]
    checkpoint = read_checkpoint(source, revision, stretched=True)
    processor_folder = checkpoint.folder if processor is None else find_folder(processor, weights=False)
    for read in (checkpoint.folder.resolve(), processor_folder.resolve()):
        if output.resolve() in (read, *read.parents):
            raise ConversionError(f"{output} is or holds what is read, {read}. Name another --output.")
    if not checkpoint.has_image_tower:
        raise ConversionError(f"{source} is a text tower alone, and both towers are exported: name a whole CLIP.")
    text, vision = checkpoint.config.text_config, checkpoint.config.vision_config
    length = text.max_position_embeddings
    if type(checkpoint.config).from_pretrained(checkpoint.folder).text_config.max_position_embeddings != length:
        raise ConversionError(
            f"transformers does not read {source} with the {length} positions of its table. Write one that it reads: "
            f"longclip-convert {source} --output DIR."
        )

    # float32 is written in any case, the others are made of it; and each once more on the way.
    with new_folder(output, 4 * checkpoint.nbytes(torch.float32), overwrite, marker=RECORD) as work:
        eos_token_id, _ = folder.write_tokenizer(work, processor_folder, processor or source, length)
        if text.eos_token_id not in (eos_token_id, 2):  # 2: of before 2023, CLIP pools at the highest id
            raise ConversionError(
                f"The tokenizer of {processor or source} ends a text with id {eos_token_id}, and {source} expects "
                f"{text.eos_token_id}. Name the right one with --processor."
            )
        folder.write_image_processor(work, processor_folder, processor or source)
        config = read_json(checkpoint.folder / "config.json")
        config.pop("auto_map", None)  # names code, and there is none beside it
        write_json(work / "config.json", config)
        (work / FOLDER).mkdir()

        say("loading")
        model = towers.load_model(checkpoint.folder)
        samples = {
            "text": (towers.TextTower(model), towers.sample_texts(work / "tokenizer.json", length)),
            "image": (towers.ImageTower(model), towers.sample_images(vision.image_size)),
        }
        files, torch_milliseconds = [], {}
        for name, (tower, rows) in samples.items():
            say(f"{name} tower: exporting")
            opset = towers.export_tower(tower, work / FOLDER / f"{tower.file_name}.onnx")
            torch_milliseconds[name] = towers.milliseconds(partial(tower.encode, rows[-1:]))
            expected = tower.encode(rows)
            for precision in ("fp32", *wanted):
                say(f"{name} tower: {precision}")
                written = _write_precision(work / FOLDER, tower.file_name, precision)
                session = towers.open_session(written)
                drift = _check(f"{source}: {name} tower", precision, session, rows, expected, eos_token_id)
                if precision in precisions:
                    run = partial(session.run, None, {tower.input_name: rows[-1][None]})
                    where, nbytes = f"{FOLDER}/{written.name}", sum(file.stat().st_size for file in _parts(written))
                    time = towers.milliseconds(run)
                    files.append(ExportedFile(name, precision, where, nbytes, time, **asdict(drift)))
            if "fp32" not in precisions:
                for file in _parts(work / FOLDER / f"{tower.file_name}.onnx"):
                    file.unlink()
        if layout == "immich":
            from longclip_hf.conversion.immich import rearrange

            say("rearranging")
            files = rearrange(work, checkpoint.config, files)
        report = ExportReport(
            source=checkpoint.folder.resolve().name if Path(source).expanduser().exists() else source,
            length=length,
            image_size=vision.image_size,
            projection_dim=checkpoint.config.projection_dim,
            logit_scale=model.logit_scale.exp().item(),
            opset=opset,
            threads=torch.get_num_threads(),
            instructions=towers.int8_instructions(),
            versions={"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
            torch_milliseconds=torch_milliseconds,
            files=files,
        )
        write_json(work / RECORD, asdict(report))
        if layout == LAYOUTS[0]:
            _write_card(work, checkpoint, report)
    return report


def _write_precision(place: Path, name: str, precision: str) -> Path:
    """The file of the tower `name` in `precision`, written from the float32 one, which is there."""
    from longclip_hf.conversion import towers

    source, file = place / f"{name}.onnx", place / f"{name}{PRECISIONS[precision]}.onnx"
    if precision == "fp16":
        towers.write_fp16(source, file)
    elif precision == "int8":
        towers.write_int8(source, file)
    return file


def _check(
    what: str, precision: str, session: Any, rows: list[Any], expected: "torch.Tensor", padding: int
) -> "towers.Drift":
    """The drift of a file, within what its precision may have."""
    from longclip_hf.conversion import towers

    try:
        drift = towers.measure_drift(session, rows, expected, padding)
    except ProofError as error:
        reason = " float16 ends at 65504: use fp32 or int8." if precision == "fp16" else ""
        raise ProofError(f"{what} in {precision}: {error}{reason}") from error
    if precision == "fp32" and not max(drift.absolute, drift.normalised) <= TOLERANCE:
        raise ProofError(
            f"{what} differs from torch by {drift.absolute:.1e} (features of length 1: {drift.normalised:.1e}), and "
            f"{TOLERANCE:.0e} is allowed."
        )
    return drift


def _parts(file: Path) -> list[Path]:
    """`file`, and the weights beside it where one file cannot hold them."""
    return sorted(file.parent.glob(f"{file.name}*"))


def _rows(report: ExportReport) -> list[list[str]]:
    """The files as a table: name, size, times, drift."""
    return [
        [
            file.name, f"{file.nbytes / 1e6:,.1f}", f"{file.milliseconds:.1f}",
            f"{report.torch_milliseconds[file.tower]:.1f}", f"{file.absolute:.1e}", f"{file.normalised:.1e}",
            f"{file.cosine:.6f}",
        ]
        for file in report.files
    ]  # fmt: skip


def _write_card(work: Path, checkpoint: "Checkpoint", report: ExportReport) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    from_hub = not Path(checkpoint.source).expanduser().exists()
    data = ModelCardData(
        base_model=checkpoint.source if from_hub else None,
        library_name="onnx",
        license=checkpoint.license(),
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "long-clip", "onnx"],
    )
    ModelCard.from_template(data, template_str=_CARD, rows=_rows(report), **asdict(report)).save(work / "README.md")


def _parser() -> CommandParser:
    parser = CommandParser(prog="longclip-export", description=__doc__)
    parser.add_argument("source", help="Hub id or folder of a Long-CLIP, both towers")
    parser.add_argument("--output", type=Path, help="the new folder (default: NAME-onnx here)")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32"],
        help="one or several; fp16 is half as large and for GPUs, int8 a quarter and for CPUs (default: fp32)",
    )  # fmt: skip
    parser.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0],
        help="whose names of folders and inputs; immich's have one precision and inputs of one shape "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--processor", help="Hub id or folder of tokenizer and image settings, if the source has none")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")
    return parser


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for an error that the user can mend."""
    options = _parser().parse_args(args)
    output = options.output or Path(f"{Path(options.source).expanduser().resolve().name}-onnx")

    def work() -> None:
        console, errors = consoles(options.quiet)
        with errors.status("reading") as status:
            report = export(
                options.source, output, precisions=options.precision, layout=options.layout, revision=options.revision,
                processor=options.processor, overwrite=options.overwrite, say=status.update,
            )  # fmt: skip
        _print_report(console, report, output)

    return guarded(work)


def _print_report(console: Any, report: ExportReport, output: Path) -> None:
    from rich.table import Table

    title = f"Against torch in float32; times with {report.threads} thread{'s' * (report.threads > 1)}"
    table = Table("file", "MB", "ms", "torch ms", title=title, title_justify="left")
    for column in ("largest difference", "of unit features", "smallest cosine"):
        table.add_column(column)
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"Compared on a processor with these int8 instructions: {report.instructions}.\n"
        f"{output} holds everything that onnxruntime needs (opset {report.opset}); texts have up to {report.length} "
        f"tokens.\nThe same figures stand in {output / RECORD}; docs/export.md shows how to use it without torch.",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
