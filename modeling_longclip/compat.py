"""The one place that knows transformers 4 from transformers 5. It travels to the Hub with every checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

SUPPORTED_TRANSFORMERS = ">=4.57,<5 or >=5.6,<6"

_installed = Version(transformers.__version__)
if _installed < Version("4.57") or Version("5.0.dev0") <= _installed < Version("5.6"):
    raise ImportError(
        f"Long-CLIP needs transformers {SUPPORTED_TRANSFORMERS}, found {transformers.__version__} (5.0 to 5.5 lose "
        'the hidden states of CLIP\'s text model). Run: pip install "transformers>=5.6,<6"'
    )


def text_transformer(config: CLIPTextConfig) -> Any:
    """CLIP's text transformer: `CLIPTextModel.text_model` up to 4.57, `CLIPTextModel` itself since 5.6."""
    model = CLIPTextModel._from_config(config)
    return getattr(model, "text_model", model)


def encode_text(transformer: Any, **inputs: Any) -> BaseModelOutputWithPooling:
    """The output of `text_transformer(...)` by names, also where the configuration asks for tuples.

    Up to 4.57 it has no `return_dict`; since 5.6 it follows the configuration, which it shares with the outer model.
    """
    return transformer(**inputs, return_dict=True) if isinstance(transformer, CLIPTextModel) else transformer(**inputs)


def features(output: Any) -> torch.Tensor:
    """What `get_text_features` and `get_image_features` computed, of shape `(batch_size, projection_dim)`.

    They return the tensor up to 4.57, and since 5 an output that holds it as `pooler_output`.
    """
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def misfits(loading_info: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The tensors that a checkpoint had in another shape, from `from_pretrained`'s loading information, by name.

    With that shape on 5, which lists `(name, shape in the checkpoint, shape in the model)`; 4.57 lists names.
    """
    entries = loading_info["mismatched_keys"]
    return dict(sorted((entry, None) if isinstance(entry, str) else (entry[0], tuple(entry[1])) for entry in entries))


def complete_processor(folder: str | Path) -> None:
    """Adds what transformers 5 leaves out when it saves a `CLIPProcessor` to `folder`.

    The slow tokenizer's files, which 4.57 and other tools read, and `preprocessor_config.json`. What is there stays.
    """
    folder = Path(folder)
    if not (folder / "vocab.json").is_file():
        write_slow_tokenizer(folder, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"])
    combined = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file() and combined.is_file():
        config = json.loads(combined.read_text(encoding="utf-8"))["image_processor"]
        (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_slow_tokenizer(folder: Path, model: Mapping[str, Any]) -> None:
    """Writes `vocab.json` and `merges.txt` of the byte-pair `model` of a `tokenizer.json`."""
    merges = "".join(f"{merge if isinstance(merge, str) else ' '.join(merge)}\n" for merge in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
