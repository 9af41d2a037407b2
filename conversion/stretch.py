"""Stretches any CLIP checkpoint to 248 text positions and writes a folder that every tool loads.

    python conversion/stretch.py openai/clip-vit-base-patch16
    python conversion/stretch.py path/to/clip --output long-clip --arithmetic float16
    python conversion/stretch.py openai/clip-vit-large-patch14 --keep 30 --ratio 8 --length 400
    python conversion/stretch.py openai/clip-vit-base-patch16 --method linear      # 231 rows, the paper's baseline
    python conversion/stretch.py google/siglip-base-patch16-224                    # 64 -> 193; docs/conversion.md

The output is proven before the command ends: kept rows and all other tensors bit-identical, stretched rows against the
paper's formula, features of short texts unchanged. A stretched model reads 248 tokens; it has yet to be fine-tuned on
long captions to understand them.
"""

import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded, print_proofs
from longclip_hf.errors import ConversionError, LongCLIPError, NotCLIPError
from longclip_hf.files import new_folder
from modeling_longclip.defaults import CLIP_LENGTH, KEEP, LENGTH, RATIO

if TYPE_CHECKING:
    from longclip_hf.conversion.checkpoint import Checkpoint

LINEAR_RATIO = 3  # the paper's direct fine-tuning baseline: every row becomes three, 77 -> 231
METHODS = ("knowledge-preserving", "linear")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class StretchReport:
    """What a stretch did: where, how long, how many bytes, and what was proven about it."""

    source: str
    output: Path
    rows: int
    length: int
    keep: int
    ratio: int
    method: str
    arithmetic: str
    dtype: str
    nbytes: int
    proofs: dict[str, str]
    dropped: list[str]
    seconds: dict[str, float]
    custom_code: bool = True


def stretch(
    source: str,
    output: Path | str,
    *,
    length: int | None = None,
    keep: int | None = None,
    ratio: int | None = None,
    method: str = "knowledge-preserving",
    arithmetic: str = "float32",
    dtype: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    processor: str | None = None,
    overwrite: bool = False,
    progress: Any = None,
) -> StretchReport:
    """Writes the checkpoint `source` with a stretched table of text positions to the folder `output` (paper 3.2).

    Args:
        source: a Hub id or folder holding a CLIPModel, CLIPTextModel or CLIPTextModelWithProjection; or a SigLIP, of
            which `siglip.py` says what it means.
        output: the new folder. It appears at the end, whole, or not at all.
        length: positions of the new table; by default all that `keep` and `ratio` make (248).
        keep: leading rows that stay (20, or 0 for `linear`).
        ratio: how many rows each later row becomes (4, or 3 for `linear`).
        method: `"knowledge-preserving"` (eq. 2) or `"linear"` (eq. 1: no row is kept).
        arithmetic: `"float32"`, or `"float16"` to reproduce the released tables bit for bit.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` for all tensors; by default each keeps its own.
        revision: branch, tag or commit of a Hub id.
        variant: of the weights, such as `"fp16"` for model.fp16.safetensors.
        processor: folder or Hub id of the tokenizer and image settings, where `source` has none.
        overwrite: replace an existing `output`.
        progress: a `rich.progress.Progress` to report to.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    import torch

    from longclip_hf.conversion import folder, parity, siglip
    from longclip_hf.conversion.checkpoint import (
        POSITION_TABLE,
        find_folder,
        long_config,
        read_checkpoint,
    )
    from longclip_hf.conversion.positions import stretch_positions
    from longclip_hf.conversion.tensors import read_safetensors, write_safetensors

    output = Path(output)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if method not in METHODS:
        raise ConversionError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if method == "linear" and keep:
        raise ConversionError(
            f"The linear method keeps no row, got --keep {keep}. Leave it out, or use the other method."
        )
    asked = keep, ratio
    keep = (0 if method == "linear" else KEEP) if keep is None else keep
    ratio = (LINEAR_RATIO if method == "linear" else RATIO) if ratio is None else ratio

    began = time.perf_counter()
    try:
        checkpoint = read_checkpoint(source, revision, variant=variant)
    except NotCLIPError as other:
        if other.model_type not in siglip.KINDS:
            raise
        if method == "linear" or processor is not None:
            raise ConversionError(
                f"{source} is a SigLIP, for which there is no --method linear nor --processor."
            ) from None
        made = siglip.stretch_siglip(
            source, other.folder, output, length=length, keep=asked[0], ratio=asked[1], arithmetic=arithmetic,
            dtype=dtype, variant=variant, overwrite=overwrite,
        )  # fmt: skip
        return StretchReport(
            source, output, made.rows, made.length, made.keep, made.ratio, method, arithmetic, made.dtype, made.nbytes,
            made.proofs, [], {"all": time.perf_counter() - began}, custom_code=False,
        )  # fmt: skip
    processor_folder = checkpoint.folder if processor is None else find_folder(processor, weights=False)
    for name, read in ((source, checkpoint.folder.resolve()), (processor, processor_folder.resolve())):
        if output.resolve() in (read, *read.parents):
            raise ConversionError(f"{output} is or holds the source {name}, which stays. Name another --output.")
    old_table = checkpoint.tensors[POSITION_TABLE].load()
    rows = old_table.shape[0]
    if rows > CLIP_LENGTH:
        raise ConversionError(
            f"{source} has {rows} positions already; CLIP has {CLIP_LENGTH}. To use it as it is: longclip-convert "
            f"{source} --output DIR. To make another one, stretch the CLIP it came from."
        )
    target = None if dtype is None else getattr(torch, dtype)
    old_table = old_table.to(target or old_table.dtype)
    try:
        new_table = stretch_positions(old_table, keep, ratio, length, arithmetic)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    length = new_table.shape[0]
    if length <= rows:
        raise ConversionError(f"{source} has {rows} positions already, and {length} would be no more. Ask for more.")
    nbytes = checkpoint.nbytes(target)
    seconds = {"read": time.perf_counter() - began}

    report_bytes, finish = _reporter(progress, "Copying", nbytes)
    with new_folder(output, nbytes + new_table.nbytes + 20_000_000, overwrite) as work:
        began = time.perf_counter()
        eos_token_id, same_ids = folder.write_tokenizer(work, processor_folder, processor or source, length)
        text = checkpoint.text_config
        if eos_token_id >= text.vocab_size or text.eos_token_id not in (eos_token_id, 2):  # 2: see below
            raise ConversionError(
                f"The tokenizer of {processor or source} ends a text with id {eos_token_id}, and {source} expects "
                f"{text.eos_token_id} among its {text.vocab_size} ids. Name the right one with --processor."
            )
        if checkpoint.has_image_tower:
            folder.write_image_processor(work, processor_folder, processor or source)
        config = long_config(
            checkpoint,
            max_position_embeddings=length,
            keep=keep,
            ratio=ratio,
            stretch_method=method,
            stretch_arithmetic=arithmetic,
            eos_token_id=eos_token_id,  # old configurations say 2, for which CLIP pools at the highest id
        )
        weights = work / "model.safetensors"
        config.dtype = str(target or old_table.dtype).removeprefix("torch.")
        long_class = checkpoint.model_class.__name__
        folder.write_config(work, config, long_class.removeprefix("Long"), folder.auto_map_of(long_class))
        folder.write_code(work)
        written_config = type(config).from_pretrained(work)
        with ThreadPoolExecutor(1) as pool:
            # Computed while the kernel copies, with the tensors of the source. That those of the file are the same,
            # and the kept rows, is proven below.
            short_texts = pool.submit(
                parity.prove_short_features,
                checkpoint.tensors,
                before=(old_table, checkpoint.text_config),
                after=(new_table, getattr(written_config, "text_config", written_config)),
                keep=keep,
                dtype=target,
            )
            write_safetensors(weights, {**checkpoint.tensors, POSITION_TABLE: new_table}, target, report_bytes)
            finish()
            seconds["write"] = time.perf_counter() - began

            began = time.perf_counter()
            report_bytes, finish = _reporter(progress, "Proving", nbytes)
            written = read_safetensors(weights)
            table = written[POSITION_TABLE].load()
            others = {name: tensor for name, tensor in checkpoint.tensors.items() if name != POSITION_TABLE}
            same_tensors = parity.prove_same_tensors(written, others, target, report_bytes)
        proofs = {
            "kept rows": parity.prove_kept_rows(table, old_table, keep, target),
            "stretched rows": parity.prove_formula(table, old_table, keep, ratio, arithmetic),
            "other tensors": same_tensors,
            "short texts": short_texts.result(),
            "token ids": same_ids,
        }
        finish()
        _write_card(work, checkpoint, config, dtype, proofs)
        seconds["prove"] = time.perf_counter() - began
        folder_bytes = sum(file.stat().st_size for file in work.iterdir())
    return StretchReport(
        source=source,
        output=output,
        rows=rows,
        length=length,
        keep=keep,
        ratio=ratio,
        method=method,
        arithmetic=arithmetic,
        dtype=str(config.dtype).removeprefix("torch."),
        nbytes=folder_bytes,
        proofs=proofs,
        dropped=checkpoint.dropped,
        seconds=seconds,
    )


def _write_card(work: Path, checkpoint: "Checkpoint", config: Any, dtype: str | None, proofs: dict[str, str]) -> None:
    from huggingface_hub import ModelCardData

    from longclip_hf.conversion.folder import write_card

    text = getattr(config, "text_config", config)
    from_hub = not Path(checkpoint.source).expanduser().exists()
    data = ModelCardData(
        base_model=checkpoint.source if from_hub else None,
        library_name="transformers",
        license=checkpoint.license(),
        pipeline_tag="zero-shot-image-classification" if checkpoint.has_image_tower else "feature-extraction",
        tags=["clip", "long-clip"],
    )
    write_card(
        work,
        data,
        source=checkpoint.source if from_hub else Path(checkpoint.source).expanduser().resolve().name,
        long_class=checkpoint.model_class.__name__,
        dtype=dtype,
        has_image_tower=checkpoint.has_image_tower,
        rows=checkpoint.text_config.max_position_embeddings,
        length=text.max_position_embeddings,
        keep=text.keep,
        ratio=text.ratio,
        method=text.stretch_method,
        arithmetic=text.stretch_arithmetic,
        proofs=proofs,
    )


def _reporter(progress: Any, what: str, total: int) -> tuple[Any, Any]:
    """Two functions: one takes a number of bytes done, the other says that all is done."""
    if progress is None:
        return (lambda count: None), (lambda: None)
    task = progress.add_task(what, total=total)
    return (lambda count: progress.update(task, advance=count)), (lambda: progress.update(task, completed=total))


def _push(output: Path, repo: str, private: bool) -> str:
    """Publishes `output` as `longclip-publish` does, with all its checks, and returns the address."""
    from longclip_hf.conversion import hub, publish

    repo_id = repo
    try:
        repo_id = hub.full_name(repo)
        publication = publish.prepare(output, repo_id)
        publish.check_loads(publication)
        publish.write_card(publication)
        return hub.upload(repo_id, publication.contents(), private=private).url
    except LongCLIPError as error:
        again = shlex.join(
            ["python", "conversion/publish.py", str(output), repo_id, "--yes", *["--private"] * private]
        )
        raise ConversionError(
            f"{error} The checkpoint itself is complete in {output}. Push it again: {again}"
        ) from error


def _parser() -> CommandParser:
    parser = CommandParser(prog="longclip-stretch", description=__doc__)
    parser.add_argument("source", help="Hub id or folder of a CLIP, its text tower, or a SigLIP")
    parser.add_argument("--output", type=Path, help="the new folder (default: long-NAME here)")
    parser.add_argument(
        "--length", type=int, help=f"positions of the new table (default: all that keep and ratio make, {LENGTH})"
    )
    parser.add_argument("--keep", type=int, help=f"leading rows that stay (default: {KEEP}; linear: 0)")
    parser.add_argument(
        "--ratio", type=int, help=f"rows that each later row becomes (default: {RATIO}; linear: {LINEAR_RATIO})"
    )
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="how the table grows: paper eq. 2, or eq. 1 for all rows"
    )
    parser.add_argument(
        "--arithmetic", choices=("float32", "float16"), default="float32",
        help="float16 reproduces the released tables bit for bit (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="cast all tensors (default: each keeps its own)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--variant", help="of the weights, such as fp16 for model.fp16.safetensors")
    parser.add_argument("--processor", help="Hub id or folder of tokenizer and image settings, if the source has none")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload it there in one commit (NAME or USER/NAME)")
    parser.add_argument(
        "--private", action="store_true", help="push only into a private repository; a new one will be"
    )
    return parser


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for an error that the user can mend."""
    options = _parser().parse_args(args)
    output = options.output or Path(f"long-{Path(options.source).expanduser().resolve().name}")
    complete = False

    def work() -> None:
        console, errors = consoles(options.quiet)
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )  # fmt: skip

        nonlocal complete
        if options.private and not options.push_to_hub:
            raise ConversionError("--private is for --push-to-hub REPO, which is missing.")
        bar = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(*bar, TransferSpeedColumn(), TimeElapsedColumn(), console=errors, transient=True) as progress:
            report = stretch(
                options.source, output, length=options.length, keep=options.keep, ratio=options.ratio,
                method=options.method, arithmetic=options.arithmetic, dtype=options.dtype, revision=options.revision,
                variant=options.variant, processor=options.processor, overwrite=options.overwrite, progress=progress,
            )  # fmt: skip
        complete = True
        _print_report(console, report)
        if options.push_to_hub:
            address = _push(output, options.push_to_hub, options.private)
            console.print(f"Pushed to {address}", soft_wrap=True)

    return guarded(work, lambda: f"the checkpoint is complete in {output}" if complete else "nothing was left behind")


def _print_report(console: Any, report: StretchReport) -> None:
    from rich.table import Table

    print_proofs(console, report.proofs)
    for name in report.dropped:
        console.print(f"Not carried over: {name}, an index that CLIP makes itself.")
    summary = Table(show_header=False, title="Long-CLIP checkpoint", title_justify="left")
    summary.add_row("source", report.source)
    summary.add_row("output", str(report.output))
    summary.add_row("positions", f"{report.rows} -> {report.length}")
    summary.add_row(
        "method", f"{report.method}, keep {report.keep}, ratio {report.ratio}, {report.arithmetic} arithmetic"
    )
    summary.add_row("size", f"{report.nbytes / 1e6:,.1f} MB, {report.dtype}")
    parts = ", ".join(f"{name} {value:.2f}" for name, value in report.seconds.items())
    summary.add_row("seconds", f"{sum(report.seconds.values()):.2f} ({parts})")
    console.print(summary)
    plain = "trust_remote_code=True), or as plain CLIP" if report.custom_code else "which is a stock SigLIP)"
    console.print(
        f"Load it with AutoModel.from_pretrained({str(report.output)!r}, {plain}.\n"
        f"It reads {report.length} tokens; fine-tune it on long captions to make it understand them.",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
