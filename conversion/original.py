"""Converts checkpoints of Long-CLIP, OpenAI's CLIP and OpenCLIP to a folder that every tool loads, and back.

    python conversion/original.py longclip-B.pt --output long-clip
    python conversion/original.py BeichenZhang/LongCLIP-L longclip-L.pt --output long-clip
    python conversion/original.py clip_l.safetensors --output clip-l           # an image maker's text encoder
    python conversion/original.py longclip-B.pt --output long-clip --tokenizer path/to/clip            # offline
    python conversion/original.py longclip-B.pt --output long-clip --precision as-released --against path/to/Long-CLIP
    python conversion/original.py open_clip_model.safetensors --output clip    # 77 positions: stretch it then
    python conversion/original.py open_clip_pytorch_model.bin --output clip --activation gelu --image-statistics openai
    python conversion/original.py path/to/folder --output long-clip      # a stock one of 248 positions
    python conversion/original.py long-clip --to original --output longclip.pt
    python conversion/original.py long-clip --to open_clip --output open-clip
    python conversion/original.py long-clip --to comfyui --output clip_l.safetensors
    python conversion/original.py long-clip --into model.safetensors --output new.safetensors    # a whole checkpoint

A released Long-CLIP has two tables of text positions: rows 0 ... 19 are read from the first, the others from the
second, which was trained. They become one table with exactly the rows that are read. Sizes come from the shapes; every
tensor of the file has its place, or the command says which has none. What was written is read again and compared bit
by bit before the command ends.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded, print_proofs
from longclip_hf.conversion.conversions import IMAGE_STATISTICS, LAYOUTS, ConversionReport
from longclip_hf.errors import ConversionError
from longclip_hf.files import new_folder, read_json, write_json
from modeling_longclip.defaults import CLIP_LENGTH, KEEP

if TYPE_CHECKING:
    from transformers import CLIPConfig

    from longclip_hf.conversion.layouts import Original

PRECISIONS = ("exact", "as-released")
ACTIVATIONS = ("quick_gelu", "gelu")
DTYPES = ("float32", "float16", "bfloat16")


def convert(
    source: str,
    output: Path | str,
    *,
    file_name: str | None = None,
    tokenizer: str | None = None,
    keep: int | None = None,
    precision: str = "exact",
    dtype: str | None = None,
    activation: str | None = None,
    vision_heads: int | None = None,
    image_statistics: str | None = None,
    encoder: str | None = None,
    ratio: int | None = None,
    base: str | None = None,
    against: Path | str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Writes a checkpoint in one file, or a text encoder in it, as a folder in Hugging Face's layout.

    Args:
        source: a file, or the Hub id or folder that holds `file_name`.
        output: the new folder: a Long-CLIP, or a plain CLIP if the source has 77 positions. It appears whole or not at
            all.
        file_name: the checkpoint's name in `source`.
        tokenizer: folder or Hub id of the tokenizer and image settings; by default the base model of that size.
        keep: rows that are read from the first of Long-CLIP's two tables (20).
        precision: `"exact"`, or `"as-released"` to round through float16 what the authors' loader rounds.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` for all tensors; needed where the source mixes them.
        activation: `"quick_gelu"` or `"gelu"`, where neither layout nor configuration says it.
        vision_heads: heads of the image tower, where neither its size nor a configuration says it.
        image_statistics: `"openai"`, `"imagenet"` or `"inception"`: the mean and standard deviation of the images that
            the model was trained on, where neither layout nor configuration says it.
        encoder: which text encoder of a file that holds several, such as `"clip_g"`.
        ratio: of a text tower alone with one long table: rows that each later row became.
        base: of the same, folder or Hub id of the CLIP that was stretched: finds `keep` and `ratio`.
        against: a checkout of the original, to compare features with.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    import torch

    from longclip_hf.conversion import adopt, folder, key_map, layouts, origin, parity
    from longclip_hf.conversion.checkpoint import find_folder, read_checkpoint, stated_license
    from longclip_hf.conversion.open_clip_config import OPEN_CLIP_CONFIG
    from longclip_hf.conversion.open_clip_config import image_settings as settings_of
    from longclip_hf.conversion.tensors import as_stored, read_safetensors, write_safetensors
    from modeling_longclip import LongCLIPConfig

    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("dtype", dtype, (None, *DTYPES)),
        ("image_statistics", image_statistics, (None, *IMAGE_STATISTICS)),
    ):
        if value not in known:
            raise ConversionError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}.")
    output = Path(output)
    began = time.perf_counter()
    original = layouts.read_original(source, file_name, revision, encoder)
    two_tables = original.two_tables
    _check_options(original, keep, precision, dtype, against)
    if original.text_alone:
        if named := [word for word, value in (("vision-heads", vision_heads), ("image-statistics", image_statistics))
                     if value is not None]:  # fmt: skip
            raise ConversionError(f"{original.source} is a text tower alone. Leave --{named[0]} out.")
        return adopt.adopt_text_tower(
            original, output, activation=activation, tokenizer=tokenizer, keep=keep, ratio=ratio, base=base,
            dtype=dtype, overwrite=overwrite,
        )  # fmt: skip
    if ratio is not None or base is not None:
        raise ConversionError(
            f"{original.source} is neither a folder nor a text tower alone. Leave --ratio and --base out."
        )
    keep = KEEP if keep is None else keep
    try:
        meant = layouts.merge_tables(original.tensors, keep) if two_tables else original.tensors
        key_map.check_names(meant)
    except ConversionError as error:
        raise ConversionError(f"{original.source}: {error}") from error
    layouts.check_dtypes(original.source, original.tensors, dtype)
    if precision == "as-released":
        meant = key_map.round_as_released(meant)
    if dtype is not None:
        meant = {name: tensor.to(getattr(torch, dtype)) for name, tensor in meant.items()}
    config: CLIPConfig = layouts.clip_config(replace(original, tensors=meant), activation, vision_heads)
    layouts.check_statistics(original, image_statistics)
    length = config.text_config.max_position_embeddings
    is_long = two_tables or length > CLIP_LENGTH
    if is_long:
        stretch = layouts.stretch_settings(length, keep, two_tables)
        config = LongCLIPConfig(**config.to_dict() | {"text_config": config.text_config.to_dict() | stretch})
    config.dtype = str(next(iter(meant.values())).dtype).removeprefix("torch.")
    processor = tokenizer or origin.base_of(original.source, config)
    processor_folder = find_folder(processor, weights=False)
    for name, read in ((source, original.file.resolve()), (processor, processor_folder.resolve())):
        if output.resolve() in (read, *read.parents):
            raise ConversionError(f"{output} is or holds the source {name}, which stays. Name another --output.")

    ours = key_map.to_ours(meant)
    nbytes = sum(tensor.nbytes for tensor in ours.values())
    with new_folder(output, nbytes + 20_000_000, overwrite) as work:
        eos_token_id, same_ids = folder.write_tokenizer(work, processor_folder, processor, length)
        if eos_token_id != config.text_config.eos_token_id:
            raise ConversionError(
                f"The tokenizer of {processor} ends a text with id {eos_token_id}, and {original.source} with its "
                f"highest, {config.text_config.eos_token_id}. Name the right one with --tokenizer."
            )
        folder.write_image_processor(work, processor_folder, processor)
        settings = work / "preprocessor_config.json"
        side = config.vision_config.image_size
        images = settings_of(read_json(settings), side, original.open_clip, image_statistics)
        write_json(settings, images)
        folder.write_config(work, config, "CLIPModel", folder.auto_map_of("LongCLIPModel") if is_long else None)
        if is_long:
            folder.write_code(work)
        write_safetensors(work / "model.safetensors", ours)

        written = read_safetensors(work / "model.safetensors")
        back = key_map.to_original({name: tensor.load() for name, tensor in written.items()})
        read_checkpoint(str(work), stretched=True)  # strict
        proofs = {
            "names": f"{len(original.tensors)} tensors of the file make the {len(written)} that config.json asks for",
            "values": parity.prove_same_tensors(as_stored(work, back), as_stored(original.file, meant))
            + ", renamed back",
            "token ids": same_ids,
        }
        if two_tables:
            proofs["two tables"] = parity.prove_merged_tables(
                back[layouts.TABLE], original.tensors[layouts.TABLE], original.tensors[layouts.TRAINED_TABLE], keep
            )
        if against is not None:
            from longclip_hf.conversion import against as against_original

            proofs["against the original"] = against_original.prove_features(
                work, Path(against), original.tensors, rounded=precision == "as-released"
            )
        released = origin.RELEASED.get(original.file.name) if two_tables else None
        if is_long:
            license_ = stated_license(original.file.parent) or (origin.RELEASED_LICENSE if released else None)
            repository = source if file_name is not None and not Path(source).expanduser().exists() else released
            origin.write_long_card(
                work, config, source=original.file.name, long_class="LongCLIPModel", repository=repository,
                license=license_, two_tables=two_tables, precision=precision, dtype=dtype, proofs=proofs,
            )  # fmt: skip
        else:
            license_ = origin.carry_card(work, original.file.with_name("README.md"))
        size = sum(file.stat().st_size for file in work.iterdir())
    text, vision = config.text_config, config.vision_config
    said_by = image_statistics or (f"by {OPEN_CLIP_CONFIG}" if original.open_clip else f"of {processor}")
    naming = "Hugging Face's" if original.encoder and original.encoder.naming != "original" else "one table"
    layout = "Long-CLIP's two tables" if two_tables else "OpenCLIP's" if original.open_clip else naming
    return ConversionReport(
        output=output,
        facts={
            "source": f"{original.source} ({layout})",
            "output": str(output),
            "positions": f"{length}, {keep} kept" if is_long else f"{length}",
            "image": f"{side} px, patches of {vision.patch_size} px",
            "image mean, std": f"{images.get('image_mean')}, {images.get('image_std')} ({said_by})",
            "heads": f"{text.num_attention_heads} text, {vision.num_attention_heads} image",
            "activation": text.hidden_act,
            "tokenizer": processor,
            "precision": f"{precision}, {config.dtype}",
            "licence": license_ or "not known",
            "size": f"{size / 1e6:,.1f} MB",
            "seconds": f"{time.perf_counter() - began:.2f}",
        },
        proofs=proofs,
        advice=f"Load it with AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True), or as plain CLIP."
        if is_long
        else f"It is a plain CLIP of {length} positions. Stretch it: python conversion/stretch.py {output}",
        left_out=original.left_out,
    )


def _check_options(
    original: "Original", keep: int | None, precision: str, dtype: str | None, against: Path | str | None
) -> None:
    """What is for Long-CLIP's own checkpoints is asked for them only."""
    from longclip_hf.conversion.layouts import TABLE

    rows = original.tensors[TABLE].shape[0] if TABLE in original.tensors and original.tensors[TABLE].ndim else 0
    is_whole = original.open_clip is not None or (original.encoder and original.encoder.one_table_is_whole)
    if rows > CLIP_LENGTH and not original.two_tables and not is_whole:
        raise ConversionError(
            f"{original.source} has {rows} text positions and one table of them. Long-CLIP's checkpoints have a "
            "second, positional_embedding_res, with the rows that were trained; without it this one is not complete. "
            "If its one table is whole, as OpenCLIP's are, put OpenCLIP's open_clip_config.json beside it."
        )
    if keep is not None and rows <= CLIP_LENGTH and not original.two_tables:
        raise ConversionError(
            f"{original.source} has {rows} text positions, none of them stretched. Leave --keep out."
        )
    if not 0 <= (keep or 0) < CLIP_LENGTH:
        raise ConversionError(f"keep must be within 0 ... {CLIP_LENGTH - 1}, rows of CLIP's table, got {keep}.")
    if precision != "exact" and not original.two_tables:
        raise ConversionError(
            f"--precision {precision} is what the loader of Long-CLIP's authors does, and {original.source} is not in "
            "their layout. Leave it out."
        )
    if against is not None and not original.two_tables:
        raise ConversionError(f"--against compares Long-CLIP's checkpoints, and {original.source} is none of them.")
    if against is not None and dtype not in (None, "float32"):
        raise ConversionError(f"--against compares in float32, not in {dtype}. Leave one of them out.")


def _parser() -> CommandParser:
    parser = CommandParser(prog="longclip-convert", description=__doc__)
    parser.add_argument(
        "source", help="file (.pt, .bin, .safetensors), Hub id, or folder in Hugging Face's layout with a long table"
    )
    parser.add_argument(
        "file",
        nargs="?",
        help="the file in a Hub id (known of Long-CLIP's repositories, and of hf-hub:ID, OpenCLIP's)",
    )
    parser.add_argument("--output", type=Path, required=True, help="the new folder; a file with --to original")
    parser.add_argument(
        "--to", choices=LAYOUTS,
        help="the other way: write a folder as a .pt of the original's code, as a folder of OpenCLIP, or its text "
        "tower as one file of ComfyUI",
    )  # fmt: skip
    parser.add_argument(
        "--into", type=Path, metavar="FILE",
        help="the other way: write this whole checkpoint (.safetensors) anew, with the text tower of a folder",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", "--processor", metavar="ID_OR_DIR",
        help="where tokenizer and image settings come from (default: the base model of that size, on the Hub)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=int,
        help=f"rows that are read from the first of two tables, or count as kept in one (default: {KEEP})",
    )  # fmt: skip
    parser.add_argument(
        "--ratio",
        type=int,
        help="rows that each later row became, of a table that is one (default: what its length takes)",
    )
    parser.add_argument(
        "--base", metavar="ID_OR_DIR", help="the CLIP of 77 positions that was stretched: finds --keep and --ratio"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS,
        help="as-released rounds through float16 what the authors' loader rounds, for their features to 1e-5 "
        "(default: exact, the file's own bits)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="cast all tensors (needed where the file mixes precisions)")
    parser.add_argument(
        "--activation", choices=ACTIVATIONS, help="where the file does not say it and no open_clip_config.json does"
    )
    parser.add_argument("--vision-heads", type=int, help="of the image tower, where its size leaves them open")
    parser.add_argument(
        "--image-statistics", choices=tuple(IMAGE_STATISTICS),
        help="mean and standard deviation of its images (inception: 0.5 and 0.5), where neither the file nor "
        "an open_clip_config.json says them",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT",
        help="also compare features with the original's code in this folder. The code in it is run",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", metavar="NAME", help="which text encoder of a file that holds several, such as clip_g"
    )
    parser.add_argument("--variant", help="of a folder's weights, such as fp16 for model.fp16.safetensors")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for an error that the user can mend."""
    options = _parser().parse_args(args)
    of_files = ("encoder", "precision", "activation", "vision_heads", "image_statistics", "against")
    forth = ("file", "tokenizer", "keep", "ratio", "base", "dtype", "variant", *of_files)
    common = {"revision": options.revision, "overwrite": options.overwrite}

    def refuse(names: tuple[str, ...], reason: str) -> None:
        if given := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]:
            raise ConversionError(f"{reason} Leave {', '.join(given)} out.")

    def work() -> None:
        console, _ = consoles(options.quiet)
        if options.into is not None:
            refuse(tuple(name for name in (*forth, "to") if name != "encoder"), "--into writes a folder's text tower.")
            from longclip_hf.conversion.single_file import write_into

            report = write_into(
                options.source, options.into, options.output, encoder=options.encoder, **common
            )  # fmt: skip
        elif options.to is not None:
            refuse(forth, f"--to {options.to} reads a folder, which says all that is needed.")
            from longclip_hf.conversion.back import convert_back

            report = convert_back(options.source, options.output, options.to, **common)
        else:
            from longclip_hf.conversion.sources import find_source

            source, file, is_folder = find_source(options.source, options.file, options.revision)
            if is_folder:
                refuse(of_files, f"{options.source} is a folder in Hugging Face's layout, whose files say that.")
                from longclip_hf.conversion.adopt import adopt

                report = adopt(
                    source, options.output, tokenizer=options.tokenizer, keep=options.keep, ratio=options.ratio,
                    base=options.base, dtype=options.dtype, variant=options.variant, **common,
                )  # fmt: skip
            else:
                refuse(("variant",), f"{options.source} is a file.")
                report = convert(
                    source, options.output, file_name=file, tokenizer=options.tokenizer, keep=options.keep,
                    precision=options.precision or PRECISIONS[0], dtype=options.dtype, activation=options.activation,
                    vision_heads=options.vision_heads, image_statistics=options.image_statistics,
                    against=options.against, encoder=options.encoder, ratio=options.ratio, base=options.base, **common,
                )  # fmt: skip
        _print_report(console, report)

    return guarded(work)


def _print_report(console: Any, report: ConversionReport) -> None:
    from rich.table import Table

    print_proofs(console, report.proofs)
    for name in report.left_out:
        console.print(f"Not carried over: {name}, which is no weight.", soft_wrap=True, highlight=False)
    summary = Table(show_header=False, title="Converted", title_justify="left")
    for name, value in report.facts.items():
        summary.add_row(name, value)
    console.print(summary)
    console.print(report.advice, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
