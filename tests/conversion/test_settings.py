"""Code of others that a source's settings name: it is said, and is in no folder that this project writes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python
from hypothesis import given
from hypothesis import strategies as st

from longclip_hf.conversion import folder as folder_module
from longclip_hf.conversion.checkpoint import read_checkpoint
from longclip_hf.conversion.settings import read_settings, without_foreign_code
from longclip_hf.conversion.stretch import main
from longclip_hf.errors import LongCLIPError
from modeling_longclip.configuration_longclip import AUTO_MAP

Copy = Callable[[Path], Path]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3),
)


@pytest.mark.parametrize(
    ("value", "kept", "dropped"),
    [
        ({"auto_map": {"AutoModel": "a/b--c.D"}, "x": 1}, {"x": 1}, ["auto_map"]),
        ({"auto_map": ["c.Slow", None]}, {}, ["auto_map"]),
        ({"auto_map": {"AutoModel": "evil.Model"}}, {}, ["auto_map"]),
        ({"auto_map": AUTO_MAP}, {}, []),
        ({"auto_map": {"AutoModel": "a/b--modeling_longclip.X"}}, {}, ["auto_map"]),
        ({"text_config": {"auto_map": {"A": "c.D"}}}, {"text_config": {}}, ["text_config.auto_map"]),
        ({"parts": [{"deep": [{"auto_map": "c.D"}]}]}, {"parts": [{"deep": [{}]}]}, ["parts[0].deep[0].auto_map"]),
        ({"custom_pipelines": {"x": {"impl": "c.D"}}}, {}, ["custom_pipelines"]),
        ({"_attn_implementation": "other/kernel"}, {}, ["_attn_implementation"]),
        ({"attn_implementation": {"text_config": "other/kernel@v1:f"}}, {}, ["attn_implementation"]),
        ({"vision_config": {"_attn_implementation_internal": "a/b"}}, {"vision_config": {}},
         ["vision_config._attn_implementation_internal"]),
        ({"_attn_implementation": "sdpa"}, {"_attn_implementation": "sdpa"}, []),
        ({"tokenizer_class": "a/b--c.D", "architectures": ["x--c.D"]}, {}, ["tokenizer_class", "architectures"]),
        ({"image_processor_type": "CLIPImageProcessor"}, {"image_processor_type": "CLIPImageProcessor"}, []),
        ({"_name_or_path": "models--openai--clip"}, {"_name_or_path": "models--openai--clip"}, []),
        ({"chat_template": "a/b--c.D"}, {"chat_template": "a/b--c.D"}, []),
    ],
)  # fmt: skip
def test_what_names_code_goes(value: Any, kept: Any, dropped: list[str]) -> None:
    assert without_foreign_code(value) == (kept, dropped)


@given(ANY_JSON)
def test_everything_else_stays(value: Any) -> None:
    assert without_foreign_code(value) == (value, [])


def test_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "a/b--c.D"}, "x": 1}')
    assert read_settings(tmp_path, "config.json") == {"x": 1}
    said = f"Not carried over from {tmp_path / 'config.json'}: auto_map, which would run the code of others.\n"
    assert capsys.readouterr().err == said


def poison(folder: Path) -> list[str]:
    """Names `evil.py`, beside them and elsewhere, in all settings of a checkpoint. Returns what is to be left out."""
    evil = "open(MARKER, 'w').close()\nclass C: pass\n"
    (folder / "evil.py").write_text(evil.replace("MARKER", repr(str(folder / "ran"))))
    reference = f"{folder}--evil.C"
    classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    auto_map: dict[str, Any] = dict.fromkeys(classes, reference) | {"AutoTokenizer": [reference, reference]}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        settings = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        if name == "config.json":
            settings["custom_pipelines"] = {"x": {"impl": "evil.C", "pt": ["AutoModel"]}}
            settings["_attn_implementation"] = "other/kernel"
            for tower in ("text_config", "vision_config"):
                settings[tower] |= {"auto_map": auto_map, "_attn_implementation": "other/kernel"}
        (folder / name).write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": auto_map, "processor_class": "C"}))
    return ["auto_map", "custom_pipelines", "_attn_implementation", "text_config.auto_map", "vision_config.auto_map"]


# AutoProcessor reads the image settings too; AutoImageProcessor asks for torchvision in the first releases of 5.
LOAD = """
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
for loader in (AutoConfig, AutoTokenizer, AutoProcessor, AutoModel):
    print(type(loader.from_pretrained({folder!r}, trust_remote_code=True)).__name__)
"""


def test_a_stretched_folder_runs_no_code_but_its_own(
    clip_folder: Path, copy_of: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, long = copy_of(clip_folder), tmp_path / "long"
    named = poison(source)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    code = "from transformers import AutoTokenizer\ntry: AutoTokenizer.from_pretrained({!r}, trust_remote_code=True)\n"
    run_python(f"{code.format(str(source))}except Exception: pass", home)
    assert (source / "ran").exists(), "what the written folder must not do, the source does"
    (source / "ran").unlink()
    assert main([str(source), "--output", str(long)]) == 0
    assert "evil" not in "".join(file.read_text() for file in long.glob("*.json"))
    assert {file.name for file in long.glob("*.py")} == {file.name for file in folder_module.CODE_FILES}
    config = json.loads((long / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and "custom_pipelines" not in config
    shown = run_python(LOAD.format(folder=str(long)), home)
    assert shown.split()[0] == "LongCLIPConfig" and shown.split()[-1] == "LongCLIPModel"
    assert not (source / "ran").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert all(f" {key}," in said for key in named) and f"from {source / 'tokenizer_config.json'}: auto_map," in said


VALUES = [None, [], "text", 1, 1.5, True, {}, 10**9, -1, [[[]]], {"a": {"b": 1}}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys on the way to every value of an object; of long ones, the first three."""
    found = [path]
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, part in parts[: 60 if len(parts) < 60 else 3]:
        found += places(part, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_values_of_any_type_in_a_configuration(
    name: str, clip_folder: Path, copy_of: Copy, shard: Callable[..., list[Path]]
) -> None:
    """A checkpoint is read, or refused by an error of this project."""
    folder = copy_of(clip_folder)
    if name != "config.json":
        shard(folder, 2)
    original = json.loads((folder / name).read_text())

    @given(st.sampled_from(places(original)), st.sampled_from(VALUES))
    def check(path: tuple[Any, ...], value: Any) -> None:
        (folder / name).write_text(json.dumps(replaced(original, path, value)))
        try:
            read_checkpoint(str(folder))
        except LongCLIPError as error:
            assert "\n" not in str(error)

    check()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"]
)
def test_values_of_any_type_in_a_processor(name: str, longclip_folder: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder, written = copy_of(longclip_folder), tmp_path / "written"
    written.mkdir()
    original = json.loads((folder / name).read_text())

    @given(st.sampled_from(places(original)), st.sampled_from(VALUES))
    def check(path: tuple[Any, ...], value: Any) -> None:
        (folder / name).write_text(json.dumps(replaced(original, path, value)))
        try:
            folder_module.write_tokenizer(written, folder, "source", 248)
            folder_module.write_image_processor(written, folder, "source")
        except LongCLIPError as error:
            assert "\n" not in str(error)

    check()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_config": {"num_hidden_layers": 10**8}}, "100000000 layers in text_model, and there are tensors of 2"),
        ({"vision_config": {"num_hidden_layers": 10**8}}, "names 100000000 layers in vision_model"),
        ({"num_labels": 10**9}, "names 1000000000 labels, and a CLIP has none"),
        ({"text_config": {"hidden_size": 10**9}}, "config.json"),
    ],
)  # fmt: skip
def test_absurd_sizes_are_never_built(
    changed: dict[str, Any], message: str, clip_folder: Path, copy_of: Copy, set_config: Callable[..., None]
) -> None:
    folder = copy_of(clip_folder)
    set_config(folder, **changed)
    began = time.perf_counter()
    with pytest.raises(LongCLIPError, match=message):
        read_checkpoint(str(folder))
    assert time.perf_counter() - began < 5
