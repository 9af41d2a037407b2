"""Writes a pipeline (Stable Diffusion 1.x, 2.x, XL, 3, FLUX.1 ...) whose prompts have 248 tokens, for stock diffusers.

    python conversion/diffusion.py path/to/stable-diffusion --output long-sd
    python conversion/diffusion.py path/to/stable-diffusion --output long-sd --text-encoder path/to/long-clip-l
    python conversion/diffusion.py stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --output long-sdxl

Every CLIP text encoder of the pipeline is stretched in place; with --text-encoder, the first one is replaced by the
text tower of a Long-CLIP instead. Variants (model.fp16.safetensors) and dtypes stay. The tokenizers cut at the new
length. T5 and all other files are copied as they are, or hard-linked with --link. Afterwards

    pipe = StableDiffusionPipeline.from_pretrained("long-sd")
    pipe("a prompt of up to 248 tokens ...")

is all there is to it: no custom class, no prompt embeddings made by hand. A replaced encoder was trained on long
texts; a stretched one reads them, and understands them no better than CLIP did.
"""

import filecmp
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded, print_proofs
from longclip_hf.errors import ConversionError, ProofError
from longclip_hf.files import inside, load_json, new_folder, read_json, write_json
from modeling_longclip.defaults import CLIP_LENGTH, KEEP, LENGTH, RATIO

if TYPE_CHECKING:
    from longclip_hf.conversion.checkpoint import Checkpoint
    from longclip_hf.conversion.pipeline import TextEncoder

# Both forms of CLIP's tokenizer treat them alike; "!" pads in SDXL.
_SHORT_PROMPTS = ("", "a photo of a dog!", "two cats, one bench, 3 red bicycles")


@dataclass(frozen=True)
class DiffusionReport:
    """What was written and proven.

    Attributes:
        source: what the user named.
        output: the new folder.
        pipeline: the pipeline's class.
        length: tokens of a prompt.
        encoders: what became of each CLIP text encoder.
        proofs: claim to result, all of them about the written files.
        left_out: what of the source is not in the output.
    """

    source: str
    output: Path
    pipeline: str
    length: int
    encoders: dict[str, str]
    proofs: dict[str, str]
    left_out: list[str]


def convert(
    source: str,
    output: Path | str,
    *,
    text_encoder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    link: bool = False,
    overwrite: bool = False,
) -> DiffusionReport:
    """Writes the pipeline `source` with long CLIP text encoders to the folder `output` (section 4.5).

    Args:
        source: a folder in diffusers' layout, or a Hub id (which needs diffusers).
        output: the new folder. It appears at the end, whole, or not at all.
        text_encoder: folder or Hub id of a Long-CLIP whose text tower replaces the first text encoder. The others are
            stretched to its length.
        revision: branch, tag or commit of a Hub id.
        variant: of a Hub id's weights, such as `"fp16"`. In a folder, all variants are converted.
        link: hard-link what does not change instead of copying it, where the file system can.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    from longclip_hf.conversion import pipeline as source_pipeline
    from longclip_hf.conversion.checkpoint import POSITION_TABLE, read_checkpoint
    from longclip_hf.conversion.positions import stretched_length

    output = Path(output)
    folder = source_pipeline.find_pipeline(source, revision, variant)
    if output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ConversionError(f"{output} is or holds the source {source}, which stays. Name another --output.")
    pipeline, encoders = source_pipeline.read_encoders(source, folder)
    replacement = None if text_encoder is None else read_checkpoint(text_encoder, stretched=True)
    if replacement is None:
        keep, ratio, length = KEEP, RATIO, stretched_length(CLIP_LENGTH)
    else:
        text = replacement.text_config
        keep, ratio = getattr(text, "keep", KEEP), getattr(text, "ratio", RATIO)
        length = text.max_position_embeddings
        source_pipeline.check_replacement(replacement, encoders[0], source)
    stretched = encoders if replacement is None else encoders[1:]
    for encoder in stretched:
        for checkpoint in encoder.variants.values():
            rows = checkpoint.text_config.max_position_embeddings
            if rows != CLIP_LENGTH:
                raise ConversionError(
                    f"{checkpoint.source} has {rows} positions, and CLIP has {CLIP_LENGTH}. Convert the pipeline that "
                    "it came from instead."
                )

    rewritten = {place for encoder in encoders for place in (encoder.name, encoder.tokenizer)}
    carried, hidden = source_pipeline.unchanged_files(folder, rewritten)
    nbytes = 0 if link else sum((folder / file).stat().st_size for file in carried)
    for encoder in encoders:
        for checkpoint in encoder.variants.values():
            nbytes += checkpoint.nbytes() + length * checkpoint.tensors[POSITION_TABLE].nbytes // CLIP_LENGTH
    described: dict[str, str] = {}
    proofs: dict[str, str] = {}
    with new_folder(output, nbytes + 20_000_000, overwrite, marker=source_pipeline.INDEX) as work:
        for encoder in encoders:
            replaced = replacement is not None and encoder not in stretched
            proofs |= _write_encoder(
                folder, work, encoder, replacement if replaced else None, keep=keep, ratio=ratio, length=length
            )
            proofs[encoder.tokenizer] = _write_tokenizer(source, folder, work, encoder, length)
            described[encoder.name] = (
                f"replaced by {text_encoder}" if replaced else f"{CLIP_LENGTH} -> {length} positions"
            )
        proofs["all other files"], foreign = _carry_over(folder, work, carried, link)
    left_out = [f"{encoder.name}/{name}" for encoder in encoders for name in encoder.left_out]
    for encoder in encoders:
        dropped = {name for checkpoint in encoder.variants.values() for name in checkpoint.dropped}
        left_out += [f"{encoder.name}: the tensor {name}, which CLIP makes itself" for name in sorted(dropped)]
    return DiffusionReport(source, output, pipeline, length, described, proofs, left_out + foreign + hidden)


def _write_encoder(
    folder: Path,
    work: Path,
    encoder: "TextEncoder",
    replacement: "Checkpoint | None",
    *,
    keep: int,
    ratio: int,
    length: int,
) -> dict[str, str]:
    """Writes all variants of a text encoder as the stock class reads them, and proves them."""
    from longclip_hf.conversion import parity
    from longclip_hf.conversion.checkpoint import POSITION_TABLE, read_files
    from longclip_hf.conversion.positions import stretch_positions
    from longclip_hf.conversion.settings import read_settings
    from longclip_hf.conversion.tensors import write_safetensors

    place = work / encoder.name
    place.mkdir()
    # Everything else stays: the pipeline's number of layers, and its pooling.
    config = read_settings(folder / encoder.name, "config.json", say=False) | {"max_position_embeddings": length}
    write_json(place / "config.json", config)
    proofs = {}
    for variant, checkpoint in encoder.variants.items():
        file = place / f"model{f'.{variant}' * bool(variant)}.safetensors"
        label = f"{encoder.name}{f' {variant}' * bool(variant)}: "
        old_table = checkpoint.tensors[POSITION_TABLE].load()
        if replacement is not None:
            dtype = old_table.dtype
            tensors = {name: replacement.tensors[name] for name in checkpoint.tensors}
            write_safetensors(file, tensors, dtype)
            written = read_files(str(file), place, [file])
            same = parity.prove_same_tensors(written.tensors, tensors, dtype)
            proofs[f"{label}tensors of the Long-CLIP"] = same
            continue
        try:
            new_table = stretch_positions(old_table, keep, ratio, length)
        except ValueError as error:
            raise ConversionError(
                f"{checkpoint.source} cannot be stretched as the replaced encoder was: {error}"
            ) from error
        write_safetensors(file, {**checkpoint.tensors, POSITION_TABLE: new_table})
        written = read_files(str(file), place, [file])
        table = written.tensors[POSITION_TABLE].load()
        others = {name: tensor for name, tensor in checkpoint.tensors.items() if name != POSITION_TABLE}
        proofs |= {
            f"{label}kept rows": parity.prove_kept_rows(table, old_table, keep),
            f"{label}stretched rows": parity.prove_formula(table, old_table, keep, ratio, "float32"),
            f"{label}other tensors": parity.prove_same_tensors(written.tensors, others),
            f"{label}short prompts": parity.prove_short_features(
                written.tensors,
                before=(old_table, checkpoint.text_config),
                after=(table, written.text_config),
                keep=keep,
            ),
        }
    return proofs


def _write_tokenizer(source: str, folder: Path, work: Path, encoder: "TextEncoder", length: int) -> str:
    """Copies a tokenizer with a `model_max_length` of `length`, and proves that nothing else of it changed.

    vocab.json and merges.txt, which every version reads, are added where transformers 5 saved tokenizer.json alone.
    """
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    from longclip_hf.conversion.pipeline import unchanged_files
    from longclip_hf.conversion.settings import read_settings
    from modeling_longclip.compat import write_slow_tokenizer

    label = f"{source}/{encoder.tokenizer}"
    before, after = inside(folder, encoder.tokenizer), work / encoder.tokenizer
    slow = all((before / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not slow and not (before / "tokenizer.json").is_file():  # transformers 5 would make an empty tokenizer
        raise ConversionError(f"{label} holds neither tokenizer.json nor vocab.json and merges.txt.")
    for name in unchanged_files(before, set())[0]:
        (after / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(before / name, after / name)
    config = {"tokenizer_class": "CLIPTokenizer"} | read_settings(before, "tokenizer_config.json")
    # A key that ends so names a file anywhere on this machine.
    config = {name: value for name, value in config.items() if not name.endswith("_file")}
    fast = read_json(before / "tokenizer.json")
    try:
        write_json(after / "tokenizer_config.json", config)
        old = CLIPTokenizerFast.from_pretrained(str(after))
        write_json(after / "tokenizer_config.json", config | {"model_max_length": length})
        if fast.get("truncation") or fast.get("padding"):  # some files bake CLIP's 77 in
            write_json(after / "tokenizer.json", fast | {"truncation": None, "padding": None})
        if not slow:
            write_slow_tokenizer(after, fast["model"])
        forms = [form.from_pretrained(str(after)) for form in (CLIPTokenizer, CLIPTokenizerFast)]
    except OSError as error:
        if error.errno is not None:  # of this machine's files, such as a full disk
            raise
        raise ConversionError(f"{label} is no CLIP tokenizer: {error!r}. Download it again.") from error
    except Exception as error:  # of other classes in each version of transformers
        raise ConversionError(f"{label} is no CLIP tokenizer: {error!r}. Download it again.") from error
    vocabulary = min(checkpoint.text_config.vocab_size for checkpoint in encoder.variants.values())
    if len(old) > vocabulary:
        raise ConversionError(f"{label} has {len(old)} tokens, and {encoder.name} has embeddings of {vocabulary}.")
    for new in forms:
        for prompt in _SHORT_PROMPTS:
            own = old(prompt).input_ids
            padded = new(prompt, padding="max_length", truncation=True).input_ids
            if padded != own + [old.pad_token_id] * (length - len(own)):
                raise ProofError(f"{label}: {type(new).__name__} reads {prompt!r} in another way than before.")
        cut = new("a " * length, truncation=True).input_ids
        if len(cut) != length or cut[-1] != old.eos_token_id:
            raise ProofError(f"{label}: {type(new).__name__} cuts a long prompt to {len(cut)} tokens, not {length}.")
    return f"cuts at {length} tokens, pads with {old.pad_token!r} (id {old.pad_token_id}); ids of short prompts stay"


def _carry_over(folder: Path, work: Path, files: list[str], link: bool) -> tuple[str, list[str]]:
    """Copies or hard-links `files`. Returns the proof, and what of them was left out: code of others, by its name."""
    from longclip_hf.conversion.settings import VOCABULARIES, without_foreign_code

    linked = nbytes = 0
    left_out: list[str] = []
    cleaned: dict[str, Any] = {}
    for name in files:
        if name.endswith(".json") and Path(name).name not in VOCABULARIES:
            settings, dropped = without_foreign_code(load_json(folder / name))
            if dropped:
                cleaned[name] = settings
                left_out += [f"{name}: {key}, which would run the code of others" for key in dropped]
    for name in files:
        file, target = folder / name, work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in cleaned:
            write_json(target, cleaned[name])
            continue
        nbytes += file.stat().st_size
        if link:
            try:
                os.link(file.resolve(), target)  # resolved: the cache of the Hub holds links
                linked += 1
                continue
            except OSError:  # another disk, or a file system without hard links
                pass
        shutil.copyfile(file, target)
        if not filecmp.cmp(file, target, shallow=False):
            raise ProofError(f"{name} differs from the source after copying.")
    count = len(files) - len(cleaned)
    done = [f"{number} {how}" for number, how in ((linked, "hard-linked"), (count - linked, "copied")) if number]
    proof = f"{count} files, {nbytes / 1e6:,.1f} MB, byte-identical ({', '.join(done)})"
    return proof + f"; {len(cleaned)} without code of others" * bool(cleaned), left_out


def _parser() -> CommandParser:
    parser = CommandParser(prog="longclip-diffusion", description=__doc__)
    parser.add_argument("source", help="folder or Hub id of a pipeline with a CLIP text encoder")
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument(
        "--text-encoder", metavar="LONGCLIP",
        help="folder or Hub id of a Long-CLIP whose text tower replaces the first text encoder (default: stretch the "
        f"pipeline's own to {LENGTH} positions)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--variant", help="of a Hub id's weights, such as fp16; a folder is converted with all")
    parser.add_argument(
        "--link", action="store_true",
        help="hard-link the unchanged files: they take no space, but what is later written into one changes the "
        "source too (default: copy)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for an error that the user can mend."""
    options = _parser().parse_args(args)

    def work() -> None:
        console, errors = consoles(options.quiet)
        with errors.status("Converting, then proving what was written"):
            report = convert(
                options.source, options.output, text_encoder=options.text_encoder, revision=options.revision,
                variant=options.variant, link=options.link, overwrite=options.overwrite,
            )  # fmt: skip
        _print_report(console, report)

    return guarded(work)


def _print_report(console: Any, report: DiffusionReport) -> None:

    print_proofs(console, report.proofs)
    for name in report.left_out:
        console.print(f"Not carried over: {name}", soft_wrap=True)
    for name, what in report.encoders.items():
        console.print(f"{name}: {what}", soft_wrap=True, highlight=False)
    console.print(
        f"Load it with {report.pipeline}.from_pretrained({str(report.output)!r}).\n"
        f"Prompts have up to {report.length} tokens.",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
