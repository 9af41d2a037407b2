"""The configuration: the paper's defaults, and one file that ours and the stock classes read alike."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PretrainedConfig

from modeling_longclip import LongCLIPConfig, LongCLIPTextConfig
from modeling_longclip.defaults import CLIP_LENGTH, KEEP, LENGTH, RATIO

AUTO_MAP = {
    "AutoConfig": "configuration_longclip.LongCLIPConfig",
    "AutoModel": "modeling_longclip.LongCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_longclip.LongCLIPModel",
}
STRETCH: dict[str, Any] = {
    "max_position_embeddings": 400,
    "keep": 30,
    "ratio": 8,
    "stretch_method": "linear",
    "stretch_arithmetic": "float16",
}
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
DEFAULT_STRETCH: dict[str, Any] = {
    "max_position_embeddings": 248,
    "keep": 20,
    "ratio": 4,
    "stretch_method": "knowledge-preserving",
    "stretch_arithmetic": "float32",
}


def stretch_of(config: PretrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in STRETCH}


def written(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """What `save_pretrained` writes to `config.json`."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_numbers_of_the_paper() -> None:
    assert (CLIP_LENGTH, KEEP, RATIO, LENGTH) == (77, 20, 4, 248)


@pytest.mark.parametrize("config", [LongCLIPTextConfig(), LongCLIPConfig().text_config], ids=["alone", "within"])
def test_defaults(config: PretrainedConfig) -> None:
    assert type(config) is LongCLIPTextConfig
    assert stretch_of(config) == DEFAULT_STRETCH
    ours, stock = config.to_dict(), CLIPTextConfig().to_dict()
    assert {name for name in ours if ours[name] != stock.get(name)} == set(STRETCH)


def test_image_tower_is_stock() -> None:
    config = LongCLIPConfig()
    assert type(config.vision_config) is CLIPVisionConfig
    assert config.vision_config.to_dict() == CLIPConfig().vision_config.to_dict()


@pytest.mark.parametrize(
    ("config", "name"), [(LongCLIPConfig, "clip"), (LongCLIPTextConfig, "clip_text_model")], ids=["both", "text"]
)
def test_model_type_stays_clip(config: type[PretrainedConfig], name: str, tmp_path: Path) -> None:
    assert config.model_type == name
    assert written(config(), tmp_path)["model_type"] == name


def test_parts_keep_their_model_types(tmp_path: Path) -> None:
    parts = written(LongCLIPConfig(), tmp_path)
    assert parts["text_config"]["model_type"] == "clip_text_model"
    assert parts["vision_config"]["model_type"] == "clip_vision_model"


@pytest.mark.parametrize("length", [20, 77, 248, 400])
def test_length_is_always_written(length: int, tmp_path: Path) -> None:
    """`save_pretrained` leaves out what equals a default, and ours is not stock CLIP's."""
    text = LongCLIPTextConfig(max_position_embeddings=length)
    assert written(text, tmp_path / "text")["max_position_embeddings"] == length
    both = written(LongCLIPConfig(text_config=text), tmp_path / "both")
    assert both["text_config"]["max_position_embeddings"] == length


@pytest.mark.parametrize("stretch", [DEFAULT_STRETCH, STRETCH], ids=["defaults", "others"])
@pytest.mark.parametrize("reader", ["ours", "stock"])
def test_round_trip(stretch: dict[str, Any], reader: str, tmp_path: Path) -> None:
    config = LongCLIPConfig(text_config=TOWER | stretch, vision_config=TOWER, projection_dim=48)
    config.save_pretrained(tmp_path)
    both, text = (LongCLIPConfig, LongCLIPTextConfig) if reader == "ours" else (CLIPConfig, CLIPTextConfig)
    read = both.from_pretrained(tmp_path)
    assert type(read.text_config) is text and type(read.vision_config) is CLIPVisionConfig
    assert read.projection_dim == 48
    assert read.auto_map == AUTO_MAP
    assert stretch_of(read.text_config) == stretch_of(text.from_pretrained(tmp_path)) == stretch
    for part in ("text_config", "vision_config"):
        assert {name: getattr(getattr(read, part), name) for name in TOWER} == TOWER


@pytest.mark.parametrize("stretch", [DEFAULT_STRETCH, STRETCH], ids=["defaults", "others"])
def test_round_trip_of_the_text_tower(stretch: dict[str, Any], tmp_path: Path) -> None:
    config = LongCLIPTextConfig(**TOWER, **stretch)
    config.save_pretrained(tmp_path)
    assert LongCLIPTextConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert stretch_of(CLIPTextConfig.from_pretrained(tmp_path)) == stretch


@settings(max_examples=30, deadline=None, derandomize=True)
@given(length=st.integers(0, 1000), share=st.floats(0, 1), ratio=st.integers(1, 20))
def test_any_stretch_survives(length: int, share: float, ratio: int) -> None:
    stretch = DEFAULT_STRETCH | {"max_position_embeddings": length, "keep": round(share * length), "ratio": ratio}
    config = LongCLIPConfig(text_config=stretch)
    read = LongCLIPConfig.from_dict(json.loads(config.to_json_string()))
    assert stretch_of(read.text_config) == stretch
    assert read.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "text_config",
    [
        TOWER | STRETCH,
        LongCLIPTextConfig(**TOWER, **STRETCH),
        CLIPTextConfig(**TOWER, **STRETCH),
    ],
    ids=["dictionary", "ours", "stock"],
)
@pytest.mark.parametrize("vision_config", [TOWER, CLIPVisionConfig(**TOWER)], ids=["dictionary", "object"])
def test_parts_in_any_form(text_config: Any, vision_config: Any) -> None:
    config = LongCLIPConfig(text_config=text_config, vision_config=vision_config)
    assert type(config.text_config) is LongCLIPTextConfig
    assert stretch_of(config.text_config) == STRETCH
    for part in (config.text_config, config.vision_config):
        assert {name: getattr(part, name) for name in TOWER} == TOWER


def test_length_of_a_stock_object_stays() -> None:
    assert LongCLIPConfig(text_config=CLIPTextConfig()).text_config.max_position_embeddings == 77


@pytest.mark.parametrize("text_config", [None, {}, TOWER], ids=["none", "empty", "without a length"])
def test_unnamed_length_is_248(text_config: dict[str, Any] | None) -> None:
    assert LongCLIPConfig(text_config=text_config).text_config.max_position_embeddings == 248


@pytest.mark.parametrize(
    ("legacy", "length"), [(TOWER, 248), (TOWER | STRETCH, 400)], ids=["without a length", "with a length"]
)
def test_legacy_text_config_dict(legacy: dict[str, Any], length: int) -> None:
    """The name of before 2023 wins over the new one, as in CLIPConfig."""
    config = LongCLIPConfig(text_config={"hidden_size": 32, "vocab_size": 1000}, text_config_dict=legacy)
    assert type(config.text_config) is LongCLIPTextConfig
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (64, 1000)
    assert config.text_config.max_position_embeddings == length
    assert "text_config_dict" not in config.to_dict()


def test_arguments_are_not_changed() -> None:
    text_config, auto_map = dict(TOWER), {"AutoModel": "somewhere.Else"}
    LongCLIPConfig(text_config=text_config, auto_map=auto_map)
    assert text_config == TOWER and auto_map == {"AutoModel": "somewhere.Else"}


def test_auto_map_names_no_repository(tmp_path: Path) -> None:
    """transformers writes the Hub id into what it loads; saved again, the code would come from there."""
    loaded = {name: f"user/repo--{place}" for name, place in AUTO_MAP.items()}
    config = LongCLIPConfig(auto_map=loaded)
    assert config.auto_map == AUTO_MAP
    config.auto_map |= loaded
    assert LongCLIPConfig().auto_map == written(LongCLIPConfig(), tmp_path)["auto_map"] == AUTO_MAP


def test_saving_takes_the_code_along(tmp_path: Path) -> None:
    LongCLIPConfig().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == {"configuration_longclip.py", "defaults.py"}


def test_copies_are_equal() -> None:
    config = LongCLIPConfig(text_config=STRETCH)
    twin = copy.deepcopy(config)
    assert twin.to_dict() == config.to_dict() and type(twin.text_config) is LongCLIPTextConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": -1}, "keep must be within 0 ... 248 .*, got -1"),
        ({"keep": 249}, "keep must be within 0 ... 248 .*, got 249"),
        ({"max_position_embeddings": 19}, "keep must be within 0 ... 19 .*, got 20"),
        ({"ratio": 0}, "ratio must be at least 1, got 0"),
    ],
    ids=["negative keep", "keep beyond the table", "default keep beyond a short table", "no ratio"],
)
def test_impossible_stretch(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongCLIPTextConfig(**arguments)
    with pytest.raises(ValueError, match=message):
        LongCLIPConfig(text_config=arguments)


@pytest.mark.parametrize("keep", [0, 248])
def test_bounds_of_keep(keep: int) -> None:
    assert LongCLIPTextConfig(keep=keep).keep == keep
