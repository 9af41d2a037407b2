"""The one module that knows the majors of transformers apart."""

import configparser
import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from modeling_longclip import LongCLIPTextConfig, compat

ROOT = Path(__file__).parents[2]


def load_compat() -> ModuleType:
    """A second copy of the module, so that the first one stays as it is."""
    spec = importlib.util.spec_from_file_location("copy_of_compat", compat.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_setup_cfg(version: str) -> bool:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    requirements = map(Requirement, parser["options"]["install_requires"].strip().splitlines())
    return next(r for r in requirements if r.name == "transformers").specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("version", ["4.56.2", "5.0.0", "5.0.0rc1", "5.3.0", "5.5.4"])
def test_versions_that_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=rf">=4\.57,<5 or >=5\.6,<6, found {version} .*pip install"):
        load_compat()
    assert not in_setup_cfg(version)


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.6.0", "5.23.0", "5.24.0.dev0"])
def test_versions_that_are_supported(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    assert load_compat().SUPPORTED_TRANSFORMERS == compat.SUPPORTED_TRANSFORMERS
    assert in_setup_cfg(version)


def test_features_of_either_major() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert compat.features(tensor) is tensor
    assert compat.features(SimpleNamespace(last_hidden_state=None, pooler_output=tensor)) is tensor


@pytest.mark.parametrize(
    "entries",
    [["b.weight", "a.weight"], [("b.weight", (24, 32), (8, 32)), ("a.weight", torch.Size([77, 32]), (248, 32))]],
    ids=["4.57", "5"],
)
def test_misfits_of_either_major(entries: list[Any]) -> None:
    shapes = (None, None) if isinstance(entries[0], str) else ((77, 32), (24, 32))
    expected = dict(zip(("a.weight", "b.weight"), shapes, strict=True))
    assert compat.misfits({"mismatched_keys": entries, "missing_keys": ["c.weight"]}) == expected
    assert compat.misfits({"mismatched_keys": set(entries)}) == expected
    assert compat.misfits({"mismatched_keys": []}) == {}


def test_text_transformer_is_the_inner_one() -> None:
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformer = compat.text_transformer(LongCLIPTextConfig(vocab_size=10, **tower))
    assert [name for name, _ in transformer.named_children()] == ["embeddings", "encoder", "final_layer_norm"]
    assert transformer.embeddings.position_embedding.weight.shape == (248, 8)


@pytest.mark.parametrize(
    "merges", [["a b</w>", "c ab</w>"], [["a", "b</w>"], ["c", "ab</w>"]]], ids=["lines", "pairs"]
)
def test_processor_of_transformers_5_is_completed(merges: list[Any], tmp_path: Path) -> None:
    vocabulary, image = {"a": 0, "é</w>": 1}, {"crop_size": 32, "image_mean": [0.5]}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    compat.complete_processor(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == vocabulary
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\na b</w>\nc ab</w>\n"
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == image


def test_complete_processor_stays(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": "{}",
        "vocab.json": "{}",
        "preprocessor_config.json": "{}",
        "processor_config.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    compat.complete_processor(str(tmp_path))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files
