"""Folders whose table of positions is long already: how their stretch is found, and what is written of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTextModelWithProjection

from longclip_hf.conversion.adopt import adopt, find_stretch
from longclip_hf.conversion.back import convert_back
from longclip_hf.conversion.checkpoint import POSITION_TABLE, read_checkpoint
from longclip_hf.conversion.export import export
from longclip_hf.conversion.original import main
from longclip_hf.conversion.positions import stretch_positions
from longclip_hf.conversion.publish import prepare
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError
from modeling_longclip import LongCLIPModel, LongCLIPTextModelWithProjection
from modeling_longclip.compat import features

Capture = pytest.CaptureFixture[str]


def make_common(folder: Path, stretched: Path, **text: Any) -> dict[str, torch.Tensor]:
    """A folder as the common Long-CLIPs of the Hub are: `text_config` says 248, and a `text_config_dict` beside it
    does not; the tokenizer still cuts at 77; no code, and no word of the stretch.
    """
    folder.mkdir()
    for file in stretched.iterdir():
        if file.suffix == ".json" or file.name in ("model.safetensors", "merges.txt"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    for key in ("keep", "ratio", "stretch_method", "stretch_arithmetic"):
        del config["text_config"][key]
    for tower in ("text", "vision"):
        legacy = {
            name: value for name, value in config[f"{tower}_config"].items() if name != "max_position_embeddings"
        }
        config[f"{tower}_config_dict"] = legacy
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_file(folder / "model.safetensors")


@pytest.fixture
def common(longclip_folder: Path, tmp_path: Path) -> Path:
    make_common(tmp_path / "common", longclip_folder)
    return tmp_path / "common"


class TestCommonFolder:
    def test_stock_clip_does_not_load_it(self, common: Path) -> None:
        """The reason for all of this; if it loads one day, the mending may go."""
        assert AutoConfig.from_pretrained(common).text_config.max_position_embeddings == 77
        with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
            CLIPModel.from_pretrained(common)

    def test_it_is_read_with_its_own_size_and_that_is_said(self, common: Path, capsys: Capture) -> None:
        checkpoint = read_checkpoint(str(common))
        assert checkpoint.text_config.max_position_embeddings == 248
        said = "has a text_config_dict without max_position_embeddings, which resets it to 77, and its table"
        assert said in capsys.readouterr().err

    def test_it_becomes_a_folder_that_loads(self, common: Path, tmp_path: Path, capsys: Capture) -> None:
        assert main([str(common), "--output", str(tmp_path / "out")]) == 0
        assert "248, 20 kept, ratio 4" in capsys.readouterr().out
        before, after = load_file(common / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        ours, stock = (kind.from_pretrained(tmp_path / "out") for kind in (LongCLIPModel, CLIPModel))
        assert (ours.config.text_config.keep, ours.config.text_config.ratio) == (20, 4)
        assert CLIPProcessor.from_pretrained(tmp_path / "out").tokenizer.model_max_length == 248
        eos = ours.config.text_config.eos_token_id
        ids = torch.randint(0, eos - 1, (2, 248), generator=torch.Generator().manual_seed(0))
        ids[:, -1] = eos
        with torch.inference_mode():
            torch.testing.assert_close(*(features(model.get_text_features(input_ids=ids)) for model in (ours, stock)))
        assert prepare(tmp_path / "out", "me/long").positions == 248

    def test_the_other_commands_read_it(self, common: Path, tmp_path: Path) -> None:
        convert_back(str(common), tmp_path / "open-clip", "open_clip")
        with pytest.raises(ConversionError, match=r"does not read .* with the 248 positions .*longclip-convert "):
            export(str(common), tmp_path / "out")
        with pytest.raises(
            ConversionError, match=r"has 248 positions already.*longclip-convert .*common --output DIR"
        ):
            stretch(str(common), tmp_path / "out")
        with pytest.raises(ConversionError, match=r"with longclip-convert .*common --output DIR if its table"):
            prepare(common, "me/long")

    def test_a_size_that_nothing_explains_is_refused_and_adopted(
        self, common: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        config = json.loads((common / "config.json").read_text())
        config["text_config_dict"]["max_position_embeddings"] = config["text_config"]["max_position_embeddings"] = 77
        (common / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match=r"names 77 positions and .* has 248 rows.*longclip-convert "):
            read_checkpoint(str(common))
        adopt(str(common), tmp_path / "out")
        assert "has max_position_embeddings 77, and its table of positions has 248 rows" in capsys.readouterr().err
        assert CLIPModel.from_pretrained(tmp_path / "out").config.text_config.max_position_embeddings == 248


@pytest.mark.parametrize("stock", [CLIPTextModel, CLIPTextModelWithProjection])
def test_a_text_tower(stock: type, longclip_folder: Path, tmp_path: Path, clip_folder: Path) -> None:
    stock.from_pretrained(longclip_folder).save_pretrained(tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("keep", "ratio", "auto_map")})
    )
    report = adopt(str(tmp_path / "text"), tmp_path / "out", tokenizer=str(clip_folder), dtype="float16", keep=0)
    assert report.facts["positions"].startswith("248, 0 kept, ratio 4 (as given")
    checkpoint = read_checkpoint(str(tmp_path / "out"), stretched=True)
    assert checkpoint.model_class.__name__ == f"Long{stock.__name__}"
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float16}
    if stock is CLIPTextModelWithProjection:
        assert LongCLIPTextModelWithProjection.from_pretrained(tmp_path / "out").config.keep == 0


@pytest.mark.parametrize(("keep", "ratio", "length"), [(20, 4, None), (0, 4, 248), (30, 8, 400), (76, 9, None)])
@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_stretch_is_found(keep: int, ratio: int, length: int | None, arithmetic: str, trained: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(77, 16, generator=draw).half().float()
    table = stretch_positions(base, keep, ratio, length, arithmetic)
    if trained and keep:
        table[keep:] += 0.05 * torch.randn(table[keep:].shape, generator=draw)
    found = find_stretch(table, base)
    assert found[:2] == (keep, ratio)
    assert trained or found.arithmetic == arithmetic
    assert ("0.00%" in found.said) == (not (trained and keep))


def test_the_base_is_named(common: Path, clip_folder: Path, tmp_path: Path) -> None:
    report = adopt(str(common), tmp_path / "out", base=str(clip_folder))
    assert "20 kept, ratio 4 (21 rows equal the base's, the table is 0.00% off" in report.facts["positions"]
    table = load_file(tmp_path / "out" / "model.safetensors")[POSITION_TABLE]
    assert torch.equal(table, stretch_positions(load_file(clip_folder / "model.safetensors")[POSITION_TABLE]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 77}, "keep must be within 0 ... 76, rows of CLIP's table, got 77"),
        ({"keep": 20, "ratio": 3}, "77 rows with keep 20 and ratio 3 make 191, and .* has 248"),
        ({"base": "here", "keep": 3}, "--base finds --keep and --ratio. Give the one or the others"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, common: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        adopt(str(common), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_base_that_tells_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    base, other = torch.randn(77, 16, generator=draw), torch.randn(77, 16, generator=draw)
    with pytest.raises(
        ConversionError, match=r"0 rows of the base's table stand at the beginning of this one.*--keep"
    ):
        find_stretch(stretch_positions(other), base)
    with pytest.raises(ConversionError, match=r"positions of shape \(77, 8\), and \(248, 16\) are no stretch of them"):
        find_stretch(stretch_positions(other), base[:, :8])


def test_what_is_no_long_stock_folder(
    clip_folder: Path, longclip_folder: Path, tmp_path: Path, copy_of: Callable[[Path], Path], capsys: Capture
) -> None:
    with pytest.raises(ConversionError, match=r"has 77 positions. Stretch it: python conversion/stretch.py "):
        adopt(str(clip_folder), tmp_path / "out")
    with pytest.raises(ConversionError, match="is already a Long-CLIP of 248 positions"):
        adopt(str(longclip_folder), tmp_path / "out")
    assert main([str(clip_folder), "--activation", "gelu", "--output", str(tmp_path / "out")]) == 2
    assert "in Hugging Face's layout, whose files say that. Leave --activation out" in capsys.readouterr().err
    folder = copy_of(clip_folder)
    with pytest.raises(ConversionError, match=f"{folder} is or holds the source"):
        make_common(tmp_path / "common", longclip_folder)
        adopt(str(tmp_path / "common"), folder, tokenizer=str(folder))
