"""A folder in Hugging Face's layout written in the original's or OpenCLIP's: the way back of `original.py`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig

from longclip_hf.conversion import key_map, layouts, parity
from longclip_hf.conversion.checkpoint import read_checkpoint
from longclip_hf.conversion.conversions import LAYOUTS, ConversionReport
from longclip_hf.conversion.encoders import HEAD_WIDTH
from longclip_hf.conversion.open_clip_config import OPEN_CLIP_CONFIG, open_clip_config
from longclip_hf.conversion.settings import read_settings
from longclip_hf.conversion.single_file import write_text_encoder
from longclip_hf.conversion.tensors import as_stored, load_torch, read_safetensors, write_safetensors
from longclip_hf.errors import ConversionError
from longclip_hf.files import new_file, new_folder, write_json
from modeling_longclip.defaults import CLIP_LENGTH, KEEP, LENGTH

MLP_RATIO = 4  # of the original's blocks, d_model * 4


def convert_back(
    source: str, output: Path | str, layout: str, *, revision: str | None = None, overwrite: bool = False
) -> ConversionReport:
    """Writes a folder in Hugging Face's layout in another one; the inverse of `original.convert`, to the last bit.

    Args:
        source: a Hub id or folder with both towers of a CLIP or Long-CLIP.
        output: the new file for `"original"`: both tables of Long-CLIP, as its released code loads them, or OpenAI's
            one, for 77 positions. The new folder for `"open_clip"`: `open_clip_model.safetensors` with one table, and
            `open_clip_config.json`. It appears whole or not at all.
        layout: `"original"`, `"open_clip"`, or `"comfyui"` for the text tower alone in one file.
        revision: branch, tag or commit of a Hub id.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if layout == "comfyui":
        return write_text_encoder(source, output, revision=revision, overwrite=overwrite)
    output = Path(output)
    began = time.perf_counter()
    checkpoint = read_checkpoint(source, revision, stretched=True)
    if not checkpoint.has_image_tower:
        raise ConversionError(f"{source} is a text tower alone, and the other layouts hold both towers.")
    if output.resolve() in (checkpoint.folder.resolve(), *checkpoint.folder.resolve().parents):
        raise ConversionError(f"{output} is or holds the source {source}, which stays. Name another --output.")
    tensors = key_map.to_original({name: tensor.load() for name, tensor in checkpoint.tensors.items()})
    length = checkpoint.text_config.max_position_embeddings
    if layout == "original":
        _check_released_code(source, checkpoint.config)
        if length > CLIP_LENGTH:
            # Each a table of its own in memory, or torch would write them as one. The rows of the one that are read
            # from the other are those of the other.
            tensors[layouts.TRAINED_TABLE] = tensors[layouts.TABLE].clone()
        nbytes = sum(tensor.nbytes for tensor in tensors.values()) + 1_000_000
        with new_file(output, nbytes, overwrite) as file:
            torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            written = {name: tensor.load() for name, tensor in as_stored(file, load_torch(file)).items()}
            proof = _prove_back(written, checkpoint.tensors, file)
        size = output.stat().st_size
        advice = _loaded_by(output, length)
    else:
        images = read_settings(checkpoint.folder, "preprocessor_config.json")
        config = open_clip_config(checkpoint.config, images)
        with new_folder(output, checkpoint.nbytes() + 1_000_000, overwrite, OPEN_CLIP_CONFIG) as work:
            write_json(work / OPEN_CLIP_CONFIG, config)
            write_safetensors(work / "open_clip_model.safetensors", tensors)
            written = {
                name: tensor.load() for name, tensor in read_safetensors(work / "open_clip_model.safetensors").items()
            }
            proof = _prove_back(written, checkpoint.tensors, work)
            size = sum(file.stat().st_size for file in work.iterdir())
        advice = f"OpenCLIP loads it: open_clip.create_model_and_transforms('local-dir:{output}')."
    facts = {
        "source": source,
        "output": f"{output} ({layout})",
        "positions": f"{length}" + (", in both tables" if layouts.TRAINED_TABLE in tensors else ""),
        "size": f"{size / 1e6:,.1f} MB",
        "seconds": f"{time.perf_counter() - began:.2f}",
    }
    return ConversionReport(output=output, facts=facts, proofs={"values": proof}, advice=advice)


def _prove_back(written: Mapping[str, torch.Tensor], source: Mapping[str, Any], file: Path) -> str:
    """What was written in another layout is the `source` again when it is read as `original.convert` does."""
    merged = layouts.merge_tables(written, KEEP) if layouts.TRAINED_TABLE in written else written
    return parity.prove_same_tensors(as_stored(file, key_map.to_ours(merged)), source) + ", renamed back"


def _loaded_by(file: Path, length: int) -> str:
    """What loads a file of the original's layout."""
    if length == LENGTH:
        return f"The released code loads it: longclip.load({str(file)!r})."
    if length > CLIP_LENGTH:
        return (
            f"The released code is written for {LENGTH} positions and loads no {length}: replace {LENGTH} in its "
            f"model/model_longclip.py, and longclip.load({str(file)!r}) loads it."
        )
    # Not clip.load(file): it tries torch.jit.load first, which reads to the end, where torch.load then finds nothing.
    return (
        f"OpenAI's code loads it: clip.model.build_model(torch.load({str(file)!r}, map_location='cpu')). Long-CLIP's "
        f"longclip.load does not: it wants two tables of {LENGTH} positions."
    )


def _check_released_code(source: str, config: CLIPConfig) -> None:
    """The original's layout says neither heads nor activation, and its code builds one MLP, so only its own can be
    written in it.
    """
    found = []
    for name, tower in (("text", config.text_config), ("image", config.vision_config)):
        if tower.num_attention_heads * HEAD_WIDTH != tower.hidden_size:
            found.append(
                f"{tower.num_attention_heads} {name} heads at width {tower.hidden_size}, not width / {HEAD_WIDTH}"
            )
        if tower.intermediate_size != MLP_RATIO * tower.hidden_size:
            found.append(
                f"an MLP of {tower.intermediate_size} in the {name} tower, not {MLP_RATIO} x its width "
                f"{tower.hidden_size}"
            )
        if tower.hidden_act != "quick_gelu":
            found.append(f"{tower.hidden_act} in the {name} tower, not quick_gelu")
    if found:
        raise ConversionError(
            f"{source} has {'; '.join(found)}: the original's layout cannot say that, and its code would load "
            "none of it or compute something else. Use --to open_clip."
        )
