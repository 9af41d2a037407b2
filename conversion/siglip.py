"""Stretches a SigLIP (1 or 2) to more text positions, as `stretch.py` does a CLIP; what is kept means less there.

SigLIP pads every text to the whole table, lets every position see every other, pads included, and pools at the last
one. So no text's features stay, however many rows are kept: a longer table has more pads in it. The last old row is
the one that it pools at, and is the last of the new table, bit by bit; no row is extrapolated beyond it. That makes
`keep + ratio * (rows - 1 - keep) + 1` positions: 64 become 193.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from longclip_hf.conversion import parity
from longclip_hf.conversion.checkpoint import POSITION_TABLE, stated_license
from longclip_hf.conversion.hub import CARD
from longclip_hf.conversion.key_map import shortened
from longclip_hf.conversion.pipeline import unchanged_files
from longclip_hf.conversion.positions import stretch_positions, stretched_length
from longclip_hf.conversion.settings import read_settings
from longclip_hf.conversion.tensors import StoredTensor, read_safetensors, write_safetensors
from longclip_hf.conversion.weight_files import read_weights, weight_files
from longclip_hf.errors import ConversionError
from longclip_hf.files import new_folder, read_json, write_json
from modeling_longclip.defaults import KEEP, RATIO

# `model_type` -> the stock class that loads it.
KINDS = {
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}
_SETTINGS = (".json", ".model", ".txt", "LICENSE", "NOTICE")  # of names of files that travel

_CARD = """---
{metadata}---

# {source} with {length} text positions

`{source}`, a SigLIP, after stretching of its table of text positions as in section 3.2 of
[Long-CLIP](https://arxiv.org/abs/2403.15378): the first {keep} rows are the original's, the others are interpolated
by {ratio}, and the last row is the original's last, at which SigLIP pools. No other weight was changed.

**It has not been fine-tuned, and the features of all texts have changed**, short ones too: SigLIP's attention sees the
pads, and there are more of them. Fine-tune it on long captions before relying on it; `padding="max_length"` pads to
{length}. Everything else, limits and biases included, is the original's: read its card. Stock `{stock}` loads it,
without custom code.
"""


class Stretched(NamedTuple):
    """What was written: rows before and after, kept rows, ratio, bytes, dtype, and proofs."""

    rows: int
    length: int
    keep: int
    ratio: int
    nbytes: int
    dtype: str
    proofs: dict[str, str]


def stretch_siglip(
    source: str,
    folder: Path,
    output: Path,
    *,
    length: int | None = None,
    keep: int | None = None,
    ratio: int | None = None,
    arithmetic: str = "float32",
    dtype: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> Stretched:
    """Writes the SigLIP in `folder` with a stretched table of text positions. See `longclip_hf.conversion.stretch`.

    Args:
        source: what the user named.
        folder: where it lies on this machine.
        output: the new folder: a stock SigLIP, with the tokenizer and image settings of `folder`.
        length: positions of the new table; by default all up to the old last row.
        keep: leading rows that stay (20).
        ratio: how many rows each later row becomes (4).
        arithmetic: `"float32"` or `"float16"`.
        dtype: for all tensors; by default each keeps its own.
        variant: of the weights.
        overwrite: replace an existing `output`.

    Raises:
        ConversionError: for whatever a user can mend; nothing is left behind.
        ProofError: if what was written is not what was meant; nothing is left behind.
    """
    if output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ConversionError(f"{output} is or holds the source {source}, which stays. Name another --output.")
    config = read_settings(folder, "config.json")
    text: Any = config.get("text_config", config)
    if not isinstance(text, dict) or "keep" in text:
        raise ConversionError(f"{source} is stretched already. Stretch the SigLIP that it came from.")
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(source, folder, variant):
        tensors |= read_weights(file)
    table_name = next(
        (name for name in (POSITION_TABLE, POSITION_TABLE.removeprefix("text_model.")) if name in tensors), ""
    )
    if not table_name or len(tensors[table_name].shape) != 2:
        raise ConversionError(f"{source} has no table of text positions, {POSITION_TABLE}.")
    _check_tensors(source, config, tensors)
    target = None if dtype is None else getattr(torch, dtype)
    old = tensors[table_name].load()
    old = old.to(target or old.dtype)
    rows = old.shape[0]
    keep, ratio = KEEP if keep is None else keep, RATIO if ratio is None else ratio
    whole = stretched_length(rows - 1, min(keep, rows - 1), ratio) + 1
    length = whole if length is None else length
    try:
        new = stretch_positions(old, keep, ratio, length, arithmetic)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not rows < length <= whole:
        raise ConversionError(
            f"{source} has {rows} positions, and SigLIP's last one stays the last: keep {keep} and ratio {ratio} make "
            f"up to {whole}, not {length}."
        )
    new[-1] = old[-1]  # at which SigLIP pools; where the length is all that is made, it stands there already
    text |= {"max_position_embeddings": length, "keep": keep, "ratio": ratio, "stretch_arithmetic": arithmetic}
    config["architectures"] = [KINDS[config["model_type"]]]
    config.pop("torch_dtype", None)
    config["dtype"] = str(target or old.dtype).removeprefix("torch.")
    nbytes = sum(tensor.nbytes for tensor in tensors.values()) + new.nbytes
    with new_folder(output, nbytes + 50_000_000, overwrite) as work:
        for name in unchanged_files(folder, set())[0]:
            if "/" not in name and name.endswith(_SETTINGS) and "index" not in name:
                shutil.copyfile(folder / name, work / name)
        write_json(work / "config.json", config)
        _write_tokenizer(work, source, length)
        write_safetensors(work / "model.safetensors", tensors | {table_name: new}, target)
        written = read_safetensors(work / "model.safetensors")
        table = written[table_name].load()
        others = {name: tensor for name, tensor in tensors.items() if name != table_name}
        interpolated = length if length == whole else length - 1
        proofs = {
            "kept rows": parity.prove_kept_rows(table, old, keep),
            "stretched rows": parity.prove_formula(table[:interpolated], old, keep, ratio, arithmetic),
            "last row, which is pooled": parity.prove_kept_rows(table.flip(0), old.flip(0), 1).replace(
                "rows 0 ... 0", f"row {rows - 1}, now {length - 1},"
            ),
            "other tensors": parity.prove_same_tensors(written, others, target),
            "short texts": "not claimed: SigLIP sees the pads, and there are more of them",
        }
        _write_card(work, source, folder, length, keep, ratio, KINDS[config["model_type"]])
        size = sum(file.stat().st_size for file in work.iterdir())
    return Stretched(rows, length, keep, ratio, size, config["dtype"], proofs)


def _write_tokenizer(work: Path, source: str, length: int) -> None:
    """Its files stay as they are, but for the length at which it cuts and pads."""
    settings = read_settings(work, "tokenizer_config.json")
    if not settings:
        raise ConversionError(f"{source} holds no tokenizer_config.json. Copy its tokenizer into the folder first.")
    write_json(work / "tokenizer_config.json", settings | {"model_max_length": length})
    fast = read_json(work / "tokenizer.json")
    if fast.get("truncation") or fast.get("padding"):  # some files bake the old length in
        write_json(work / "tokenizer.json", fast | {"truncation": None, "padding": None})


def _check_tensors(source: str, settings: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Whether the tensors are those of the stock class; names of a text tower may begin with `text_model.` or not."""
    stock: Any = getattr(transformers, KINDS[settings["model_type"]])
    try:
        with torch.device("meta"):
            model = stock(stock.config_class.from_dict(settings))
    except Exception as error:  # of every class: the model is built of whatever the file says
        raise ConversionError(f"{source}: config.json describes no {stock.__name__}: {error!r}.") from error
    prefix = "text_model." if settings["model_type"].endswith("text_model") else ""
    expected = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()}
    complaints = [f"{name} is missing" for name in expected if name not in found]
    complaints += [f"{name} is unknown" for name in found if name not in expected]
    complaints += [
        f"{name} has shape {shape}, not {expected[name]}"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
    ]
    if complaints:
        raise ConversionError(f"{source}: the tensors are not those of a {stock.__name__}: {shortened(complaints)}.")


def _write_card(work: Path, source: str, folder: Path, length: int, keep: int, ratio: int, stock: str) -> None:
    from_hub = not Path(source).expanduser().exists()
    metadata = ["library_name: transformers", "tags: [siglip, long-clip]"]
    if from_hub:
        metadata.append(f"base_model: {source}")
    if license_ := stated_license(folder):
        metadata.append(f"license: {license_}")
    name = source if from_hub else folder.resolve().name
    text = _CARD.format(
        metadata="\n".join(metadata) + "\n", source=name, length=length, keep=keep, ratio=ratio, stock=stock
    )
    (work / CARD).write_text(text, encoding="utf-8")
