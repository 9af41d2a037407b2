"""The checkpoint folder: what every tool of the ecosystem reads, written beside its place and renamed at the end."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import CLIPTokenizerFast, PretrainedConfig

import longclip_hf
import modeling_longclip
from longclip_hf.conversion.hub import CARD_RECORD
from longclip_hf.conversion.parity import prove_same_ids
from longclip_hf.conversion.settings import read_settings
from longclip_hf.errors import ConversionError, ProofError
from longclip_hf.files import inside, read_json, write_json
from modeling_longclip.compat import write_slow_tokenizer
from modeling_longclip.configuration_longclip import AUTO_MAP

# Everything of the package but the file that makes it one: a checkpoint's code is flat.
CODE_FILES = tuple(
    sorted(file for file in Path(modeling_longclip.__file__).parent.glob("*.py") if file.name != "__init__.py")
)
# Of tokenizer_config.json: how the source was once loaded. What ends in `_file` goes too: it names files anywhere.
_HOW_LOADED = ("is_local", "local_files_only", "name_or_path", "fast_tokenizer_files")
_CARD_PLACES = (
    Path(longclip_hf.__file__).with_name("model_card.md"),  # an installed wheel: setup.py puts it there
    Path(__file__).parents[1] / "model_card.md",  # a checkout
)


class WrittenTokenizer(NamedTuple):
    """The id of a tokenizer's EOT token, and in words the proof that it gives the ids of its source."""

    eos_token_id: int
    proof: str


def write_config(
    folder: Path, config: PretrainedConfig, architecture: str, auto_map: dict[str, str] | None = None
) -> None:
    """`config.json`, with the name of the stock class, which more tools know than ours, and `auto_map` beside it."""
    config.architectures = [architecture]
    if auto_map is not None:  # a checkpoint without custom code has none
        config.auto_map = auto_map
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")


def auto_map_of(long_class: str) -> dict[str, str]:
    """The code of a Long-CLIP, or of its text tower alone, as `config.json` names it."""
    if long_class == "LongCLIPModel":
        return dict(AUTO_MAP)
    return {
        "AutoConfig": "configuration_longclip.LongCLIPTextConfig",
        "AutoModel": f"modeling_longclip.{long_class}",
    }


def write_code(folder: Path) -> None:
    """The model's Python files, for `trust_remote_code=True`."""
    for file in CODE_FILES:
        shutil.copyfile(file, folder / file.name)


def write_tokenizer(folder: Path, source: Path, name: str, length: int) -> WrittenTokenizer:
    """Writes the fast and the slow tokenizer's files with `model_max_length=length`.

    The files are rewritten, not saved by a tokenizer, so that both majors of transformers make the same folder. Only
    a tokenizer.json that is not there is made by transformers: its majors write it differently, with equal results.

    Args:
        folder: where to write.
        source: the folder of a CLIP tokenizer: tokenizer.json, or vocab.json and merges.txt, or all three, and
            added_tokens.json where tokens were added to them.
        name: what the user calls `source`, for errors.
        length: tokens that a truncated text keeps.

    Raises:
        ConversionError: if there is no CLIP tokenizer in `source`.
        ProofError: if what was written gives other ids than `source`.
    """
    for file in ("vocab.json", "merges.txt"):
        inside(source, file)
    added = read_json(inside(source, "added_tokens.json"))
    built = None
    config = read_settings(source, "tokenizer_config.json")
    special = read_settings(source, "special_tokens_map.json")
    if inside(source, "tokenizer.json").is_file():
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
    model = tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("type") != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise ConversionError(
            f"{name}: tokenizer.json is no CLIP tokenizer (its model is {model.get('type')!r}, not BPE with a "
            "vocabulary and merges)."
        )
    tokenizer["truncation"] = tokenizer["padding"] = None  # some files bake CLIP's 77 in
    eos = _token(config, special, "eos_token", name) or "<|endoftext|>"
    defaults = {"bos_token": "<|startoftext|>", "eos_token": eos, "unk_token": eos, "pad_token": eos}
    tokens = {key: _token(config, special, key, name) or default for key, default in defaults.items()}
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"} | config
    config |= tokens | {"model_max_length": length, "processor_class": "CLIPProcessor"}
    for key in [*config]:
        if key in _HOW_LOADED or key.endswith("_file"):
            del config[key]
    try:  # the values of both files may be of any type
        ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        eos_token_id = ids.get(eos)
        write_json(folder / "tokenizer.json", tokenizer)
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", tokens)
        write_slow_tokenizer(folder, model)
        if added:
            write_json(folder / "added_tokens.json", added)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConversionError(f"{name}: tokenizer.json is no CLIP tokenizer: {error!r}. Download it again.") from error
    if type(eos_token_id) is not int:
        raise ConversionError(f"{name}: the tokenizer's EOT token {eos!r} is not in its vocabulary.")
    try:
        written = CLIPTokenizerFast.from_pretrained(str(folder))
        proof = prove_same_ids(written, built or CLIPTokenizerFast.from_pretrained(str(source)))
    except ProofError:
        raise
    except Exception as error:  # of other classes in each version of transformers
        raise ConversionError(
            f"{name}: its tokenizer files make no CLIP tokenizer ({' '.join(repr(error).split())}). Download them "
            "again."
        ) from error
    return WrittenTokenizer(eos_token_id, proof)


def write_image_processor(folder: Path, source: Path, name: str) -> None:
    """Writes `preprocessor_config.json`, which both majors read; transformers 5 saves `processor_config.json` instead.

    Raises:
        ConversionError: if `source` has neither, or it is none.
    """
    config = read_settings(source, "preprocessor_config.json")
    if not config:
        config = read_settings(source, "processor_config.json").get("image_processor", {})
    if not config:
        raise ConversionError(
            f"{name} holds no image settings: neither preprocessor_config.json nor processor_config.json. Name a "
            "folder or Hub id that has them with --processor, for example openai/clip-vit-base-patch16."
        )
    try:
        config.pop("feature_extractor_type", None)  # the name of before 2023
        config |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor"}
        write_json(folder / "preprocessor_config.json", config)
        # Transformers 5 has two of them, and says on stderr that it takes this one where there is no torchvision.
        read_by = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        read_by.from_pretrained(str(folder))(Image.new("RGB", (8, 4)), return_tensors="np")
    except Exception as error:  # of every class: the values may be of any type
        raise ConversionError(
            f"{name}: its image settings make no CLIP image processor ({' '.join(repr(error).split())}). Download "
            "them again."
        ) from error


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


def _token(config: dict[str, Any], special: dict[str, Any], key: str, name: str) -> str | None:
    """A special token: a string, or an object that holds one, in either of the two files.

    Where they differ, as in Stable Diffusion 2 (its map pads with "!"), transformers reads the map, unless
    tokenizer_config.json is of the later form that lists the added tokens.
    """
    first, second = (config, special) if "added_tokens_decoder" in config else (special, config)
    token = first.get(key) or second.get(key)
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise ConversionError(f"{name}: the tokenizer's {key} is {content!r}, and no text. Download it again.")
    return content
