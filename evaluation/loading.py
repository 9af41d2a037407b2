"""A checkpoint and its processor, loaded and checked, whoever made them."""

import hashlib
import json
import pickle
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPModel

from longclip_hf.errors import EncodingError
from modeling_longclip import __version__

# `eos_token_id` of configurations older than 2023, for which CLIP pools at the highest id instead.
_LEGACY_EOS_TOKEN_ID = 2
_PASSED_ON = (ImportError, MemoryError)  # which say already what to do


def find_device(device: str | torch.device | None) -> torch.device | None:
    """`device`, tried: an empty tensor is put on it.

    Raises:
        EncodingError: if there is none of that name.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise EncodingError(f"There is no device {str(device)!r} here: {str(error).splitlines()[0]}") from error


def check_settings(name: str, revision: str | None, trust_remote_code: bool, dtype: Any) -> None:
    """What can be said of a checkpoint without loading its weights: it is there, and so are its settings.

    Raises:
        EncodingError: if configuration, tokenizer or image processor are missing, or there is no such dtype.
    """
    source, options = _source_of(name, revision, trust_remote_code, dtype)
    try:
        AutoConfig.from_pretrained(source, **options)
    except _PASSED_ON:
        raise
    except Exception as error:
        raise EncodingError(f"{name} cannot be loaded: {_said(error)}") from error
    _load_processor(name, source, options)


def load_model(name: str, revision: str | None, trust_remote_code: bool, dtype: Any) -> tuple[Any, Any]:
    """The model and its processor.

    Raises:
        EncodingError: if there is no such checkpoint, or it is incomplete, damaged or no whole CLIP.
    """
    source, options = _source_of(name, revision, trust_remote_code, dtype)
    try:
        model, info = AutoModel.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except _PASSED_ON:
        raise
    except Exception as error:  # of transformers, torch, the Hub, and the checkpoint's own code
        raise EncodingError(f"{name} cannot be loaded: {_said(error)}") from error
    for method in ("get_text_features", "get_image_features"):
        if not hasattr(model, method):
            raise EncodingError(
                f"{name} is a {type(model).__name__}, which has no {method}: texts and images are compared after "
                "their projections into one space. Name the folder or Hub id of a whole CLIP."
            )
    if info["missing_keys"]:  # transformers would draw them at random
        raise EncodingError(
            f"{name}: these tensors of {type(model).__name__} are missing: {some(sorted(info['missing_keys']))}"
        )
    return model, _load_processor(name, source, options)


def _source_of(name: str, revision: str | None, trust_remote_code: bool, dtype: Any) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with."""
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise EncodingError(f"There is no dtype {dtype!r}: name one like float32, float16 or bfloat16.")
    folder = Path(name).expanduser()
    if folder.is_dir() and revision is not None:
        raise EncodingError(f"{name} is a folder, and revision {revision!r} is for Hub ids. Leave it out.")
    source = str(folder) if folder.is_dir() else name
    return source, {"revision": revision or "main", "trust_remote_code": trust_remote_code}


def _load_processor(name: str, source: str, options: dict[str, Any]) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except _PASSED_ON:
        raise
    except Exception as error:
        raise EncodingError(f"{name}: its processor cannot be loaded: {_said(error)}") from error
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise EncodingError(
                f"{name} has no {part}: copy the processor's files from the checkpoint it was made of."
            )
    return processor


def _said(error: BaseException) -> str:
    """`error` for a user. torch's own words advise `weights_only=False`, which runs whatever a pickle says."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(map(str, chain))
    if any(isinstance(cause, pickle.UnpicklingError) for cause in chain) or "weights_only" in text:
        return (
            "its pickled weights are damaged, or hold other things than tensors, which could run any code and are "
            "refused. Download them again, or take a checkpoint in safetensors."
        )
    return f"{type(error).__name__}: {error}"


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a Hub id that was just loaded: the name of the folder that it lies in."""
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def positions_of(model: Any, tokenizer: Any) -> int:
    """Of a CLIP, its table: its tokenizer's `model_max_length` may be older than the stretch."""
    text = getattr(model.config, "text_config", model.config)
    limits = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    return int(limits[0] if isinstance(model, CLIPModel) else min(limit for limit in limits if limit))


def check_eot(name: str, model: Any, tokenizer: Any) -> None:
    """CLIP pools at the first EOT, and without one silently at position 0."""
    expected = model.config.text_config.eos_token_id
    last = tokenizer("a")["input_ids"][-1]
    if expected not in (last, _LEGACY_EOS_TOKEN_ID):
        raise EncodingError(
            f"{name}: its tokenizer ends a text with id {last}, and the model reads the feature at id {expected} "
            "(eos_token_id of text_config). One of the two is another checkpoint's."
        )


def fingerprint_of(model: Any, tokenizer: Any, image_processor: Any) -> str:
    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.digest()

    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = pool.map(digest, sorted(model.state_dict().items()))
    # Without what names classes: they differ between versions of transformers.
    pixels = {
        key: value
        for key, value in image_processor.to_dict().items()
        if not key.startswith("_") and key != "image_processor_type"
    }
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side]
    settings = as_json([pixels, sorted(tokenizer.get_vocab().items()), special])
    return hashlib.sha256(b"".join(digests) + settings).hexdigest()


def code_of(model: torch.nn.Module, *others: object) -> str:
    """SHA-256, in hexadecimal, of what computes: Python files that came with a checkpoint and were run, those of
    `modeling_longclip`, without their folders' names; and the versions of this project, torch, transformers, Pillow.
    """
    kinds = {type(part) for part in (*model.modules(), *others)}
    modules = {base.__module__ for kind in kinds for base in kind.__mro__}
    packages = {
        name.rpartition(".")[0] for name in modules if name.startswith(("transformers_modules.", "modeling_longclip."))
    }
    files = {
        Path(file)
        for name, module in list(sys.modules.items())
        if name.startswith(tuple(f"{package}." for package in packages))
        and (file := getattr(module, "__file__", None))
    }
    sources = sorted((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files)
    versions = [__version__, *map(version, ("torch", "transformers", "pillow"))]
    return hashlib.sha256(as_json([sources, versions])).hexdigest()


def as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def some(items: Iterable[Any], separator: str = ", ", most: int = 10) -> str:
    """The first ones by name, and how many more there are."""
    items = list(items)
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(str(item) for item in items[:most]) + more
