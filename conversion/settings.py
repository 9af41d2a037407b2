"""Settings that a checkpoint brings along, in JSON, without the code of others that they may name.

`trust_remote_code=True` runs whatever a folder's settings name, from any repository. What a conversion carries over is
therefore read here, and a folder of this project names no code but its own.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longclip_hf.files import inside, notice, read_json
from modeling_longclip.configuration_longclip import AUTO_MAP

# Keys that name code. `auto_map`: transformers and diffusers; `custom_pipeline(s)`: transformers' and diffusers'
# pipelines; the others: kernels, which are repositories too.
_CODE_KEYS = re.compile(r"auto_map|custom_pipelines?|custom_generate")
_KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation\w*|kernel_config")
# Keys of classes, and how transformers writes one that lies in another repository: `repository--module.Class`.
_CLASS_KEYS = re.compile(r"\w*(_class|_type|_class_name)|architectures")
_ELSEWHERE = re.compile(r"[\w.-]+(/[\w.-]+)?--[\w./-]+")
# Whose keys and values are tokens, which may be called like anything.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
_OWN_MODULES = tuple({place.split(".")[0] for place in AUTO_MAP.values()})


def read_settings(folder: Path, name: str, say: bool = True) -> dict[str, Any]:
    """The object in the JSON file `name` of `folder`, without the code of others; empty where there is no such file.

    Args:
        folder: of a checkpoint. The file must lie in it, links followed.
        name: of the file.
        say: what is left out, on stderr.

    Raises:
        FileError: if the file leads out of the folder, or holds no JSON object.
    """
    settings, dropped = without_foreign_code(read_json(inside(folder, name)))
    if dropped and say:
        notice(f"Not carried over from {folder / name}: {', '.join(dropped)}, which would run the code of others.")
    return settings


def without_foreign_code(value: Any) -> tuple[Any, list[str]]:
    """`value`, which came from JSON, without whatever names code, and what that was: `vision_config.auto_map`, ...

    What names this project's own files goes too (who writes a folder names them anew), but is not listed.
    """
    dropped: list[str] = []
    return _cleaned(value, "", dropped), dropped


def _cleaned(value: Any, place: str, dropped: list[str]) -> Any:
    if isinstance(value, dict):
        kept = {}
        for key, part in value.items():
            here = f"{place}.{key}" if place else key
            if _CODE_KEYS.fullmatch(key):
                if part and not _is_own(part):
                    dropped.append(here)
            elif (_CLASS_KEYS.fullmatch(key) and _names(part, _is_elsewhere)) or (
                _KERNEL_KEYS.fullmatch(key) and _names(part, _is_repository)
            ):
                dropped.append(here)
            else:
                kept[key] = _cleaned(part, here, dropped)
        return kept
    if isinstance(value, list):
        return [_cleaned(part, f"{place}[{index}]", dropped) for index, part in enumerate(value)]
    return value


def _is_own(auto_map: Any) -> bool:
    places = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    return all(isinstance(place, str) and place.split(".")[0] in _OWN_MODULES for place in places)


def _is_elsewhere(text: str) -> bool:
    return _ELSEWHERE.fullmatch(text) is not None


def _is_repository(text: str) -> bool:
    return "/" in text


def _names(value: Any, suspect: Callable[[str], bool]) -> bool:
    """Whether a text at any depth of `value` is suspect: one for all, or one for each tower."""
    if isinstance(value, dict | list):
        return any(_names(part, suspect) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and suspect(value)
