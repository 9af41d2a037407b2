"""SigLIP's table of positions: which rows stay, what stock transformers make of it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel, SiglipTextModel

from longclip_hf.conversion.checkpoint import POSITION_TABLE
from longclip_hf.conversion.positions import stretch_positions
from longclip_hf.conversion.stretch import main, stretch
from longclip_hf.errors import ConversionError
from modeling_longclip.compat import features

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def write(folder: Path, kind: str) -> Path:
    """A tiny SigLIP of 64 positions, with what travels beside its weights."""
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": 100, "max_position_embeddings": 64, "projection_size": 32}
    if kind == "siglip2":
        model: Any = Siglip2Model(Siglip2Config(text_config=text, vision_config=TOWER | {"num_patches": 4}))
    else:
        sizes = {"image_size": 32, "patch_size": 16}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=TOWER | sizes))
    if kind == "text":
        model.save_pretrained(folder / "whole")
        model = SiglipTextModel.from_pretrained(folder / "whole")
    model.save_pretrained(folder)
    fixed = {"strategy": {"Fixed": 64}}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}, "padding": fixed, "truncation": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64, "pad_token": "</s>"}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "spiece.model").write_bytes(b"sentencepiece")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_longer_table(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "source", kind)
    assert main([str(source), "--output", str(tmp_path / "long")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "64 -> 193" in said and "which is a stock SigLIP" in said and "not claimed: SigLIP sees the pads" in said
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "long"))
    assert [name for name in old if not torch.equal(old[name], new[name])] == [POSITION_TABLE]
    table, before = new[POSITION_TABLE], old[POSITION_TABLE]
    assert torch.equal(table[:20], before[:20]) and torch.equal(table[-1], before[-1])
    assert torch.equal(table[20::4], before[20:])
    torch.testing.assert_close(table[21], 0.75 * before[20] + 0.25 * before[21])
    stock = SiglipModel if kind == "siglip" else Siglip2Model
    model = stock.from_pretrained(tmp_path / "long").eval()
    ids = torch.randint(0, 100, (2, 193), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first = features(model.get_text_features(input_ids=ids))
        ids[:, 150] = (ids[:, 150] + 1) % 100
        second = features(model.get_text_features(input_ids=ids))
    assert first.shape == (2, 32) and (first - second).abs().max() > 1e-6
    settings = json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())
    assert settings == {"model_max_length": 193, "pad_token": "</s>"}
    assert json.loads((tmp_path / "long" / "tokenizer.json").read_text())["padding"] is None
    assert (tmp_path / "long" / "spiece.model").read_bytes() == b"sentencepiece"
    card = (tmp_path / "long" / "README.md").read_text()
    assert "license: apache-2.0" in card and "the features of all texts have changed" in card
    with pytest.raises(ConversionError, match=r"is stretched already. Stretch the SigLIP that it came from"):
        stretch(str(tmp_path / "long"), tmp_path / "again")


def test_a_text_tower_and_other_sizes(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "text")
    report = stretch(str(source), tmp_path / "long", keep=10, ratio=2, length=100, dtype="float16")
    assert (report.rows, report.length, report.keep, report.ratio) == (64, 100, 10, 2)
    (table,) = (t for n, t in load_file(tmp_path / "long" / "model.safetensors").items() if "position" in n)
    (before,) = (t for n, t in load_file(source / "model.safetensors").items() if "position" in n)
    assert table.dtype == torch.float16 and torch.equal(table[-1], before[-1].half())
    assert torch.equal(table[:-1], stretch_positions(before.half(), 10, 2, 100)[:-1])
    assert SiglipTextModel.from_pretrained(tmp_path / "long").config.max_position_embeddings == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"length": 196},
            "has 64 positions, and SigLIP's last one stays the last: keep 20 and ratio 4 make up to",
        ),
        ({"length": 64}, "make up to 193, not 64"),
        ({"keep": 70}, r"keep must be within 0 \.\.\. 64"),
        ({"method": "linear"}, "is a SigLIP, for which there is no --method linear"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", "siglip")
    with pytest.raises(ConversionError, match=message):
        stretch(str(source), tmp_path / "long", **options)
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(ConversionError, match=r"holds no tokenizer_config.json"):
        stretch(str(source), tmp_path / "long")
    assert not (tmp_path / "long").exists()
