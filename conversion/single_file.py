"""A text tower written as image makers hold it: in a file of its own, or into a whole checkpoint in one file.

Of a whole checkpoint only the text encoder's tensors change. All other bytes are copied from file to file, whatever
their dtype is, and compared afterwards; no tensor of them is loaded.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longclip_hf.conversion import key_map, parity
from longclip_hf.conversion.checkpoint import Checkpoint, read_checkpoint
from longclip_hf.conversion.conversions import ConversionReport
from longclip_hf.conversion.encoders import KINDS, MADE, Encoder, choose, recognise
from longclip_hf.conversion.tensors import (
    Entry,
    StoredTensor,
    as_stored,
    copy_range,
    read_header,
    read_safetensors,
    write_safetensors,
)
from longclip_hf.errors import ConversionError, ProofError
from longclip_hf.files import new_file
from longclip_hf.weights import DTYPE_NAMES, bytes_of
from modeling_longclip.defaults import CLIP_LENGTH

_PROJECTION = "text_projection.weight"
_TABLE = "embeddings.position_embedding.weight"
_CHUNK = 8 * 2**20  # bytes compared at a time


def write_text_encoder(
    source: str, output: Path | str, *, revision: str | None = None, overwrite: bool = False
) -> ConversionReport:
    """Writes the text tower of a folder as `clip_l.safetensors` and its kin are: Hugging Face's names, in one file.

    Args:
        source: folder or Hub id of a CLIP or Long-CLIP, or of its text tower.
        output: the new `.safetensors` file.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    began = time.perf_counter()
    output = _checked(Path(output))
    checkpoint = read_checkpoint(source, revision, stretched=True)
    kind = KINDS.get(checkpoint.text_config.hidden_size)
    if kind is None:
        known = ", ".join(f"{width} ({kind.name})" for width, kind in KINDS.items())
        raise ConversionError(
            f"The text tower of {source} has width {checkpoint.text_config.hidden_size}, and ComfyUI's encoders have "
            f"{known}. It reads no other."
        )
    tensors = _text_tower(checkpoint)
    with new_file(output, sum(tensor.nbytes for tensor in tensors.values()) + 1_000_000, overwrite) as file:
        write_safetensors(file, tensors)
        proof = parity.prove_same_tensors(read_safetensors(file), tensors)
    rows = checkpoint.text_config.max_position_embeddings
    reads = f"{rows} positions are read by its long-CLIP option" if rows > CLIP_LENGTH else f"{rows} positions"
    return ConversionReport(
        output=output,
        facts={
            "source": source,
            "output": f"{output} ({kind.name})",
            "positions": f"{rows}",
            "projection": "with" if _PROJECTION in tensors else "without: ComfyUI takes the identity",
            "size": f"{output.stat().st_size / 1e6:,.1f} MB",
            "seconds": f"{time.perf_counter() - began:.2f}",
        },
        proofs={"values": proof},
        advice=f"ComfyUI loads it: put it into models/text_encoders, and choose it as {kind.name}; {reads}.",
    )


def write_into(
    source: str,
    into: Path | str,
    output: Path | str,
    *,
    encoder: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Writes a whole checkpoint in one file anew, with the text tower of a folder in the place of its own.

    Names, order, dtypes and metadata of the file stay; shapes too, but for the table of positions.

    Args:
        source: folder or Hub id of a CLIP or Long-CLIP, or of its text tower.
        into: the `.safetensors` checkpoint that holds the text encoder.
        output: the new file.
        encoder: which text encoder, of several.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: if the tower is not of the size of the one in the file, or for whatever else a user can mend;
            nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    began = time.perf_counter()
    output, into = _checked(Path(output)), _checked(Path(into).expanduser())
    if not into.is_file():
        raise ConversionError(f"{into}: no such file.")
    if output.resolve() == into.resolve():
        raise ConversionError(f"{output} is the source, which stays. Name another --output.")
    checkpoint = read_checkpoint(source, revision, stretched=True)
    entries, metadata = read_header(into)
    found = recognise({name: entry.shape for name, entry in entries.items()})
    if not found:
        raise ConversionError(f"{into} holds no CLIP text encoder under names that are known.")
    chosen = choose(str(into), found, encoder)
    old = read_safetensors(into, chosen.names)
    new = {name: tensor.to(old[name].dtype) for name, tensor in _renamed(str(into), chosen, old, checkpoint).items()}
    kept = {name: entry for name, entry in entries.items() if name not in new}
    layout = {name: _entry(new[name]) if name in new else entry for name, entry in entries.items()}
    with new_file(output, sum(entry.nbytes for entry in layout.values()) + 1_000_000, overwrite) as file:
        _write(file, into, entries, layout, new, metadata)
        written, written_metadata = read_header(file)
        if written_metadata != metadata or list(written) != list(entries):
            raise ProofError(f"{file} has other names or metadata than {into}.")
        proofs = {
            "text encoder": parity.prove_same_tensors(read_safetensors(file, new), dict(as_stored(file, new))),
            "everything else": _prove_same_bytes(file, written, into, kept),
        }
    rows = checkpoint.text_config.max_position_embeddings
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in new.values()})
    return ConversionReport(
        output=output,
        facts={
            "source": source,
            "into": f"{into} ({chosen.name}, {chosen.prefix or 'no prefix'}: {chosen.place})",
            "output": str(output),
            "positions": f"{chosen.rows} -> {rows}",
            "precision": f"{', '.join(dtypes)}, as in the file",
            "size": f"{output.stat().st_size / 1e6:,.1f} MB",
            "seconds": f"{time.perf_counter() - began:.2f}",
        },
        proofs=proofs,
        advice=f"A program that builds the encoder with {CLIP_LENGTH} positions refuses this file; one that goes by "
        "the table reads it."
        if rows > CLIP_LENGTH
        else "It is loaded as before.",
    )


def _checked(file: Path) -> Path:
    if file.suffix != ".safetensors":
        raise ConversionError(f"{file} is no .safetensors file, and image makers' files are read and written as such.")
    return file


def _text_tower(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    return {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("text_model.") or name == _PROJECTION
    }


def _renamed(
    into: str, encoder: Encoder, old: Mapping[str, StoredTensor], checkpoint: Checkpoint
) -> dict[str, torch.Tensor]:
    """The tower's tensors under the names that the encoder has in the file, with an index of its positions."""
    tower = {name: tensor.load() for name, tensor in _text_tower(checkpoint).items()}
    rest = {name.removeprefix(encoder.prefix): tensor for name, tensor in old.items()}
    rows = checkpoint.text_config.max_position_embeddings
    made = {name: rest.pop(name) for name in MADE if name in rest}
    rest.pop("logit_scale", None)  # it stays
    projected = any(name.startswith("text_projection") for name in rest)
    if projected and _PROJECTION not in tower:
        raise ConversionError(
            f"{into} has a text projection, and {checkpoint.source} none. Name a checkpoint that has one."
        )
    if not projected:  # Stable Diffusion 1.x, and SDXL's first: it is not read
        tower.pop(_PROJECTION, None)
    if encoder.naming == "original":
        tower = key_map.to_original(tower, text_alone=True)
        if "text_projection.weight" in rest:
            tower["text_projection.weight"] = tower.pop("text_projection").t()
    elif encoder.naming == "flat":
        tower = {name.removeprefix("text_model."): tensor for name, tensor in tower.items()}
    if encoder.naming != "original" and "text_projection" in rest:
        tower["text_projection"] = tower.pop(_PROJECTION).t()
    tables = (_TABLE, f"text_model.{_TABLE}", "positional_embedding")
    complaints = [f"{name} is not in the folder" for name in rest if name not in tower]
    complaints += [f"{name} is not in the file" for name in tower if name not in rest]
    complaints += [
        f"{name} has shape {tuple(tensor.shape)}, not {rest[name].shape}"
        for name, tensor in tower.items()
        if name in rest and tuple(tensor.shape) != rest[name].shape
        and not (name in tables and tensor.shape[1:] == rest[name].shape[1:])
    ]  # fmt: skip
    if complaints:
        raise ConversionError(
            f"The text tower of {checkpoint.source} is another than {encoder.name} of {into}: "
            f"{key_map.shortened(complaints)}."
        )
    for name, tensor in made.items():
        if name.endswith("position_ids"):
            tower[name] = torch.arange(rows).expand((*tensor.shape[:-1], rows))
        elif rows != encoder.rows:
            raise ConversionError(f"{into}: {name} is made for {encoder.rows} positions. Take it out of the file.")
    return {f"{encoder.prefix}{name}": tensor.contiguous() for name, tensor in tower.items()}


def _entry(tensor: torch.Tensor) -> Entry:
    return Entry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)


def _write(
    file: Path,
    source: Path,
    entries: Mapping[str, Entry],
    layout: Mapping[str, Entry],
    new: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """`source` with the tensors in `new`, in its order: neighbours that stay are copied as one range."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in layout.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("xb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.flush()
        begin, count = 0, 0  # of the range that is to be copied
        for name, entry in entries.items():
            if name not in new and count and begin + count == entry.offset:
                count += entry.nbytes
                continue
            copy_range(source, begin, count, stream)
            begin, count = (entry.offset, entry.nbytes) if name not in new else (0, 0)
            if name in new:
                stream.write(bytes_of(new[name]))
                stream.flush()
        copy_range(source, begin, count, stream)


def _prove_same_bytes(file: Path, written: Mapping[str, Entry], source: Path, entries: Mapping[str, Entry]) -> str:
    """
    Raises:
        ProofError: naming the first tensor that has other bytes, or another dtype or shape.
    """
    with file.open("rb", buffering=0) as ours, source.open("rb", buffering=0) as theirs:
        for name, entry in entries.items():
            place = written[name]
            same = replace(place, offset=entry.offset) == entry
            ours.seek(place.offset)
            theirs.seek(entry.offset)
            left = entry.nbytes
            while same and left:
                count = min(_CHUNK, left)
                one = ours.read(count)
                same = len(one) > 0 and one == theirs.read(len(one))
                left -= len(one)
            if not same:
                raise ProofError(f"{name} differs from {source} after writing.")
    return f"{len(entries)} tensors, {sum(entry.nbytes for entry in entries.values()) / 1e6:,.1f} MB, byte-identical"
