"""A CLIP under Hugging Face's names, with the table of positions that it has, as a folder of this project.

No weight changes: what changes is what stands around the weights, so that every tool reads all of the table.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longclip_hf.conversion import folder, key_map, origin, parity
from longclip_hf.conversion.checkpoint import (
    POSITION_TABLE,
    Checkpoint,
    check_tensors,
    find_folder,
    long_config,
    read_checkpoint,
)
from longclip_hf.conversion.conversions import ConversionReport
from longclip_hf.conversion.encoders import text_config
from longclip_hf.conversion.layouts import Original, check_dtypes, merge_tables, stretch_settings
from longclip_hf.conversion.positions import ARITHMETICS, stretch_positions, stretched_length
from longclip_hf.conversion.tensors import as_stored, read_safetensors, write_safetensors
from longclip_hf.errors import ConversionError
from longclip_hf.files import new_folder
from modeling_longclip.defaults import CLIP_LENGTH, KEEP

LOST = 0.5  # of the stretched rows' own size: rows further from a stretch are not known to come from it


class FoundStretch(NamedTuple):
    """How a table was stretched from its base's, and in words how that was found."""

    keep: int
    ratio: int
    arithmetic: str
    said: str


def find_stretch(table: torch.Tensor, base: torch.Tensor) -> FoundStretch:
    """How many rows of `table` are kept ones of `base`, and how many each of its others became.

    Kept rows are those that are equal in both, as training leaves them; of a table that was stretched and not yet
    trained, the next row is equal too, and the closer of the two stretches tells which it is.

    Args:
        table: of shape `(rows, hidden_size)`.
        base: of shape `(fewer rows, hidden_size)`, of the CLIP that it came from.

    Raises:
        ConversionError: if the tables are of different models.
    """
    if table.ndim != 2 or base.ndim != 2 or table.shape[1] != base.shape[1] or table.shape[0] <= base.shape[0]:
        raise ConversionError(
            f"The base has positions of shape {tuple(base.shape)}, and {tuple(table.shape)} are no stretch of them. "
            "Name the CLIP of the same size that was stretched."
        )
    length, rows = table.shape[0], base.shape[0]
    table, base = table.float(), base.float()
    equal = (table[:rows].half() == base.half()).all(dim=1)  # what was released went through float16
    same = rows if bool(equal.all()) else int(equal.int().argmin())
    found = []
    for keep in {max(same - 1, 0), min(same, rows - 1)}:
        ratio = math.ceil((length - keep) / (rows - keep))
        for arithmetic in ARITHMETICS:
            meant = stretch_positions(base, keep, ratio, length, arithmetic)
            found.append((((table - meant).norm() / meant.norm()).item(), keep, ratio, arithmetic))
    distance, keep, ratio, arithmetic = min(found)
    if not same or not distance <= LOST:
        raise ConversionError(
            f"{same} rows of the base's table stand at the beginning of this one, and the rest is {distance:.0%} "
            "off its stretch: it does not tell how this one was made. Leave --base out, give --keep and --ratio."
        )
    return FoundStretch(
        keep, ratio, arithmetic, f"{same} rows equal the base's, the table is {distance:.2%} off its stretch"
    )


def adopt(
    source: str,
    output: Path | str,
    *,
    tokenizer: str | None = None,
    keep: int | None = None,
    ratio: int | None = None,
    base: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Writes a stock CLIP whose table of positions is long already as a folder of this project.

    Args:
        source: folder or Hub id of a CLIPModel, CLIPTextModel or CLIPTextModelWithProjection with more than 77 rows.
            The rows count, whatever config.json says.
        output: the new folder. It appears whole or not at all.
        tokenizer: folder or Hub id of the tokenizer and image settings, where `source` has none.
        keep: leading rows that count as kept ones (20).
        ratio: rows that each later row became; by default the smallest that reaches the length.
        base: folder or Hub id of the CLIP that was stretched, to find both by comparing the tables.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` for all tensors; by default each keeps its own.
        revision: branch, tag or commit of a Hub id.
        variant: of the weights, such as `"fp16"` for model.fp16.safetensors.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    checkpoint = read_checkpoint(source, revision, own_length=True, variant=variant)
    rows = checkpoint.text_config.max_position_embeddings
    if rows <= CLIP_LENGTH:
        raise ConversionError(
            f"{source} is in Hugging Face's layout already and has {rows} positions. Stretch it: python "
            f"conversion/stretch.py {source} --output {output}"
        )
    return write_folder(
        checkpoint, output, tokenizer=tokenizer, keep=keep, ratio=ratio, base=base, dtype=dtype, overwrite=overwrite
    )


def adopt_text_tower(
    original: Original, output: Path | str, *, activation: str | None = None, dtype: str | None = None, **options: Any
) -> ConversionReport:
    """Writes a text tower that was read from a single file as a folder: a Long-CLIP's, or a plain one of 77 positions.

    Args:
        original: a text tower alone.
        output: the new folder.
        activation: `"quick_gelu"` or `"gelu"`, where its width does not say it, or something else was trained.
        dtype: as of `adopt`.
        options: the others of `adopt`.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    tensors = original.tensors
    if original.two_tables:
        keep = options["keep"] = KEEP if options.get("keep") is None else options["keep"]
        tensors = merge_tables(tensors, keep)
    try:
        ours = key_map.to_ours(tensors, text_alone=True)
    except ConversionError as error:
        raise ConversionError(f"{original.source}: {error}") from error
    check_dtypes(original.source, tensors, dtype)
    config = text_config(original.source, tensors, activation)
    checkpoint = Checkpoint(
        original.source, original.file.parent, config, dict(as_stored(original.file, ours)), original.left_out
    )
    check_tensors(checkpoint)
    report = write_folder(checkpoint, output, dtype=dtype, **options)
    encoder = original.encoder
    if encoder is None:
        return report
    source = f"{original.source} ({encoder.name}, {encoder.prefix or 'no prefix'}: {encoder.place})"
    return replace(report, facts=report.facts | {"source": source})


def write_folder(
    checkpoint: Checkpoint,
    output: Path | str,
    *,
    tokenizer: str | None = None,
    keep: int | None = None,
    ratio: int | None = None,
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Writes `checkpoint` as a Long-CLIP, or with 77 rows as a plain CLIP. See `adopt`."""
    output = Path(output)
    began = time.perf_counter()
    table = checkpoint.tensors[POSITION_TABLE]
    length = table.shape[0]
    is_long = length > CLIP_LENGTH
    if not is_long and (named := [n for n, v in (("keep", keep), ("ratio", ratio), ("base", base)) if v is not None]):
        raise ConversionError(
            f"{checkpoint.source} has {length} text positions, none of them stretched. Leave --{named[0]} out."
        )
    stretch, said = _stretch_of(checkpoint, keep, ratio, base) if is_long else ({}, "")
    processor, processor_folder = _processor(checkpoint, tokenizer)
    for name, read in ((checkpoint.source, checkpoint.folder.resolve()), (processor, processor_folder.resolve())):
        if output.resolve() in (read, *read.parents):
            raise ConversionError(f"{output} is or holds the source {name}, which stays. Name another --output.")
    target = None if dtype is None else getattr(torch, dtype)
    long_class = checkpoint.model_class.__name__
    with new_folder(output, checkpoint.nbytes(target) + 20_000_000, overwrite) as work:
        eos_token_id, same_ids = folder.write_tokenizer(work, processor_folder, processor, length)
        text = checkpoint.text_config
        if eos_token_id >= text.vocab_size or text.eos_token_id not in (eos_token_id, 2):  # 2: the highest id
            raise ConversionError(
                f"The tokenizer of {processor} ends a text with id {eos_token_id}, and {checkpoint.source} expects "
                f"{text.eos_token_id} among its {text.vocab_size} ids. Name the right one with --tokenizer."
            )
        if checkpoint.has_image_tower:
            folder.write_image_processor(work, processor_folder, processor)
        stretch |= {"max_position_embeddings": length, "eos_token_id": eos_token_id}
        config: Any = long_config(checkpoint, **stretch) if is_long else checkpoint.config
        getattr(config, "text_config", config).eos_token_id = eos_token_id
        config.dtype = str(target or table.dtype).removeprefix("torch.")
        auto_map = folder.auto_map_of(long_class) if is_long else None
        folder.write_config(work, config, long_class.removeprefix("Long"), auto_map)
        if is_long:
            folder.write_code(work)
        write_safetensors(work / "model.safetensors", checkpoint.tensors, target)
        written = read_safetensors(work / "model.safetensors")
        read_checkpoint(str(work), stretched=True)  # strict
        proofs = {
            "values": parity.prove_same_tensors(written, checkpoint.tensors, target),
            "token ids": same_ids,
        }
        place = Path(checkpoint.source).expanduser()
        if is_long:
            license_ = checkpoint.license()
            is_local = place.exists()
            origin.write_long_card(
                work,
                config,
                source=place.resolve().name if is_local else checkpoint.source,
                long_class=long_class,
                repository=None if is_local else "/".join(checkpoint.source.split("/")[:2]),  # without the file's name
                license=license_,
                dtype=dtype,
                proofs=proofs,
            )
        else:
            license_ = origin.carry_card(work, checkpoint.folder / "README.md")
        size = sum(file.stat().st_size for file in work.iterdir())
    text = getattr(config, "text_config", config)
    return ConversionReport(
        output=output,
        facts={
            "source": f"{checkpoint.source} ({long_class.removeprefix('Long')})",
            "output": str(output),
            "positions": f"{length}, {text.keep} kept, ratio {text.ratio} ({said})" if is_long else f"{length}",
            "heads": f"{text.num_attention_heads} text"
            + (f", {config.vision_config.num_attention_heads} image" if checkpoint.has_image_tower else ""),
            "activation": text.hidden_act,
            "tokenizer": processor,
            "precision": config.dtype,
            "licence": license_ or "not known",
            "size": f"{size / 1e6:,.1f} MB",
            "seconds": f"{time.perf_counter() - began:.2f}",
        },
        proofs=proofs,
        advice=f"Load it with AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True), or as plain "
        f"{long_class.removeprefix('Long')}."
        if is_long
        else f"It is a plain CLIP of {length} positions. Stretch it: python conversion/stretch.py {output}",
        left_out=checkpoint.dropped,
    )


def _stretch_of(
    checkpoint: Checkpoint, keep: int | None, ratio: int | None, base: str | None
) -> tuple[dict[str, Any], str]:
    """What the configuration says of the stretch, and in words who said it."""
    length = checkpoint.tensors[POSITION_TABLE].shape[0]
    if base is not None:
        if keep is not None or ratio is not None:
            raise ConversionError("--base finds --keep and --ratio. Give the one or the others.")
        tables = (checkpoint.tensors[POSITION_TABLE], read_checkpoint(base).tensors[POSITION_TABLE])
        found = find_stretch(*(table.load() for table in tables))
        settings = stretch_settings(length, found.keep, two_tables=False)
        return settings | {"ratio": found.ratio, "stretch_arithmetic": found.arithmetic}, found.said
    said = "as given" if keep is not None else "Long-CLIP's own, as nothing says it; --base DIR compares with the CLIP"
    keep = KEEP if keep is None else keep
    if not 0 <= keep < CLIP_LENGTH:
        raise ConversionError(f"keep must be within 0 ... {CLIP_LENGTH - 1}, rows of CLIP's table, got {keep}.")
    settings = stretch_settings(length, keep, two_tables=False)
    if ratio is not None:
        if ratio < 1 or stretched_length(CLIP_LENGTH, keep, ratio) < length:
            raise ConversionError(
                f"{CLIP_LENGTH} rows with keep {keep} and ratio {ratio} make "
                f"{stretched_length(CLIP_LENGTH, keep, ratio)}, and {checkpoint.source} has {length}."
            )
        settings["ratio"] = ratio
    return settings, said


def _processor(checkpoint: Checkpoint, tokenizer: str | None) -> tuple[str, Path]:
    """Where the tokenizer and image settings are: as named, with the checkpoint, or of the base model of its size."""
    own = checkpoint.folder
    if tokenizer is None and any((own / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return checkpoint.source, own
    name = tokenizer or origin.base_of(checkpoint.source, checkpoint.config)
    return name, find_folder(name, weights=False)
