"""The checkpoint folder: what every tool of the ecosystem reads, written beside its place and renamed at the end."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import CLIPTokenizerFast, PretrainedConfig

import modeling_longclip
from conversion.tensors import ConversionError
from modeling_longclip.compat import write_slow_tokenizer

# Everything of the package but the file that makes it one: a checkpoint's code is flat.
CODE_FILES = tuple(
    sorted(file for file in Path(modeling_longclip.__file__).parent.glob("*.py") if file.name != "__init__.py")
)
CARD_RECORD = "longclip"  # the key in a card's metadata of what the card says about how the folder was made
_CARD_PLACES = (
    Path(__file__).parents[1] / "model_card.md",  # a checkout
    Path(sys.prefix) / "share" / "longclip" / "model_card.md",  # an installed wheel
)


@contextmanager
def new_folder(output: Path, nbytes: int, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, whole; on an error nothing is left of it.

    It stands beside `output` under a hidden name that ends in `.incomplete`, so that a process killed half-way leaves
    nothing that looks finished. What it replaces (`overwrite`) is removed only after it, and holds the file `marker`.

    Raises:
        ConversionError: if `output` exists and is not to be replaced, cannot be written, or `nbytes` do not fit.
    """
    output = output.resolve()  # through a link, so that what is replaced is what it points to
    if output.exists() and not overwrite:
        raise ConversionError(f"{output} exists already. Name another --output, or replace it with --overwrite.")
    if output.exists() and not output.is_dir():
        raise ConversionError(f"{output} is a file, and a checkpoint is a folder. Name another --output.")
    if output.exists() and any(output.iterdir()) and not (output / marker).is_file():
        raise ConversionError(
            f"{output} holds files and no checkpoint (no {marker}): --overwrite replaces checkpoints only. Name "
            "another --output."
        )
    work = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_space(output.parent, nbytes)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".incomplete", dir=output.parent))
        work.chmod(0o777 & ~_umask())  # mkdtemp's folders are closed to everybody else
        yield work
        replaced = None
        if overwrite and output.exists():  # without it, what has appeared meanwhile stays, and the rename fails
            replaced = work.with_suffix(".replaced")
            output.rename(replaced)
        try:
            work.rename(output)
        except BaseException:  # an interrupt too
            if replaced is not None and not output.exists():
                replaced.rename(output)
            raise
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ConversionError(f"{output} could not be written: {error}.") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(output: Path, nbytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A file to write that becomes `output` at the end, whole; on an error nothing is left of it. See `new_folder`.

    Raises:
        ConversionError: if `output` exists and is not to be replaced, cannot be written, or `nbytes` do not fit.
    """
    output = output.resolve()
    if output.exists() and not overwrite:
        raise ConversionError(f"{output} exists already. Name another --output, or replace it with --overwrite.")
    if output.is_dir():
        raise ConversionError(f"{output} is a folder, and what is written is a file. Name another --output.")
    work = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_space(output.parent, nbytes)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".incomplete", dir=output.parent))
        yield work / output.name
        (work / output.name).replace(output)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's, where a disk is full
        raise ConversionError(f"{output} could not be written: {error}.") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def write_config(
    folder: Path, config: PretrainedConfig, architecture: str, auto_map: dict[str, str] | None = None
) -> None:
    """`config.json`, with the name of the stock class, which more tools know than ours, and `auto_map` beside it."""
    config.architectures = [architecture]
    if auto_map is not None:  # a checkpoint without custom code has none
        config.auto_map = auto_map
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")


def write_code(folder: Path) -> None:
    """The model's Python files, for `trust_remote_code=True`."""
    for file in CODE_FILES:
        shutil.copyfile(file, folder / file.name)


def write_tokenizer(folder: Path, source: Path, name: str, length: int) -> int:
    """Writes the fast and the slow tokenizer's files with `model_max_length=length`.

    The files are rewritten, not saved by a tokenizer, so that both majors of transformers make the same folder. Only
    a tokenizer.json that is not there is made by transformers: its majors write it differently, with equal results.

    Args:
        folder: where to write.
        source: the folder of a CLIP tokenizer: tokenizer.json, or vocab.json and merges.txt, or all three.
        name: what the user calls `source`, for errors.
        length: tokens that a truncated text keeps.

    Returns:
        The id of its EOT token.

    Raises:
        ConversionError: if there is no CLIP tokenizer in `source`.
    """
    config = read_json(source / "tokenizer_config.json")
    if (source / "tokenizer.json").is_file():
        tokenizer = read_json(source / "tokenizer.json")
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        try:
            built = CLIPTokenizerFast.from_pretrained(str(source))
        except Exception as error:  # of other classes in each version of transformers
            raise ConversionError(
                f"{name}: vocab.json and merges.txt make no CLIP tokenizer. Download them again."
            ) from error
        tokenizer = json.loads(built.backend_tokenizer.to_str())
    else:
        raise ConversionError(
            f"{name} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt. Name a folder or Hub "
            "id that has it with --processor, for example openai/clip-vit-base-patch16."
        )
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise ConversionError(
            f"{name}: tokenizer.json is no CLIP tokenizer (its model is {model.get('type')!r}, not BPE with a "
            "vocabulary and merges)."
        )
    tokenizer["truncation"] = tokenizer["padding"] = None  # some files bake CLIP's 77 in
    special = read_json(source / "special_tokens_map.json")
    eos = _content(config.get("eos_token") or special.get("eos_token")) or "<|endoftext|>"
    defaults = {"bos_token": "<|startoftext|>", "eos_token": eos, "unk_token": eos, "pad_token": eos}
    tokens = {key: _content(config.get(key) or special.get(key)) or default for key, default in defaults.items()}
    ids = model["vocab"] | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    if eos not in ids:
        raise ConversionError(f"{name}: the tokenizer's EOT token {eos!r} is not in its vocabulary.")
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"} | config
    config |= tokens | {"model_max_length": length, "processor_class": "CLIPProcessor"}
    for key in ("is_local", "local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_file"):
        config.pop(key, None)  # how the source was once loaded
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", tokens)
    write_slow_tokenizer(folder, model)
    return int(ids[eos])


def write_image_processor(folder: Path, source: Path, name: str) -> None:
    """Writes `preprocessor_config.json`, which both majors read; transformers 5 saves `processor_config.json` instead.

    Raises:
        ConversionError: if `source` has neither.
    """
    config = read_json(source / "preprocessor_config.json")
    if not config:
        config = read_json(source / "processor_config.json").get("image_processor", {})
    if not config:
        raise ConversionError(
            f"{name} holds no image settings: neither preprocessor_config.json nor processor_config.json. Name a "
            "folder or Hub id that has them with --processor, for example openai/clip-vit-base-patch16."
        )
    config.pop("feature_extractor_type", None)  # the name of before 2023
    config |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor"}
    write_json(folder / "preprocessor_config.json", config)


def write_card(folder: Path, data: ModelCardData, **values: Any) -> None:
    """`README.md`, the card, from the template `model_card.md`; its metadata hold `values` for rendering it again."""
    data[CARD_RECORD] = {name: value for name, value in values.items() if value is not None}
    (folder / "README.md").write_text(render_card(data, **values), encoding="utf-8")


def render_card(data: ModelCardData, **values: Any) -> str:
    """The card's text, metadata included.

    Raises:
        ConversionError: if the template is not where it was installed.
    """
    template = next((place for place in _CARD_PLACES if place.is_file()), None)
    if template is None:
        raise ConversionError(f"The card's template is missing: {_CARD_PLACES[0]}. Install the package again.")
    return f"{ModelCard.from_template(data, template_path=str(template), **values)}".rstrip() + "\n"


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file} is no JSON file: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{file} holds no JSON object, but a {type(value).__name__}. Download it again.")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ConversionError(
            f"{folder} has {free / 1e6:,.0f} MB free and {nbytes / 1e6:,.0f} MB are needed. Make room, or name an "
            "--output on another disk."
        )


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
