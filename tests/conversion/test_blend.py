"""A blend's weights, number by number, and the pairs that have none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_python
from safetensors.torch import load_file

from longclip_hf.conversion.blend import blend, main
from longclip_hf.conversion.card import read_origin
from longclip_hf.conversion.checkpoint import POSITION_TABLE
from longclip_hf.conversion.publish import prepare
from longclip_hf.errors import ConversionError
from modeling_longclip import LongCLIPModel, LongCLIPTextModelWithProjection

Copy = Callable[[Path], Path]
Edit = Callable[..., None]
BIAS = "vision_model.encoder.layers.0.mlp.fc1.bias"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@pytest.fixture
def tuned(longclip_folder: Path, tmp_path: Path) -> Path:
    """The model with noise on all weights but one, as the trainer saves it."""
    model = LongCLIPModel.from_pretrained(longclip_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter) if name != BIAS else 0.0)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_every_weight_lies_at_alpha_between_the_two(
    longclip_folder: Path, tuned: Path, tmp_path: Path, alpha: float
) -> None:
    report = blend(str(longclip_folder), str(tuned), alpha, tmp_path / "blended")
    one, other, found = weights(longclip_folder), weights(tuned), weights(tmp_path / "blended")
    assert found.keys() == one.keys() and report.tensors == len(one)
    assert report.different == sum(not torch.equal(one[name], other[name]) for name in one)
    for name, tensor in found.items():
        meant = (1 - alpha) * one[name].double() + alpha * other[name].double()
        torch.testing.assert_close(tensor.double(), meant, rtol=2e-7, atol=1e-8)
        assert tensor.dtype == one[name].dtype


def test_zero_and_one_are_the_two_to_the_last_bit(
    longclip_folder: Path, tuned: Path, copy_of: Copy, set_tensors: Edit, tmp_path: Path
) -> None:
    first = copy_of(longclip_folder)
    set_tensors(first, {BIAS: torch.full_like(weights(first)[BIAS], -0.0)})
    for alpha, meant in ((0.0, first), (1.0, tuned)):
        blend(str(first), str(tuned), alpha, tmp_path / f"at-{alpha}")
        found = weights(tmp_path / f"at-{alpha}")
        assert all(same_bits(found[name], tensor) for name, tensor in weights(meant).items())


def test_arithmetic_is_float32_and_the_dtype_is_the_firsts(longclip_folder: Path, tuned: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(longclip_folder, half)
    LongCLIPModel.from_pretrained(longclip_folder, dtype=torch.bfloat16).save_pretrained(half)
    blend(str(half), str(tuned), 0.3, tmp_path / "blended")
    one, other, found = weights(half)[POSITION_TABLE], weights(tuned)[POSITION_TABLE], weights(tmp_path / "blended")
    assert same_bits(found[POSITION_TABLE], torch.lerp(one.float(), other, 0.3).bfloat16())
    assert json.loads((tmp_path / "blended" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_folder_loads_everywhere_and_is_one_to_publish(longclip_folder: Path, tuned: Path, tmp_path: Path) -> None:
    blended = tmp_path / "blended"
    assert main([str(longclip_folder), str(tuned), "--alpha", "0.5", "--output", str(blended)]) == 0
    assert {file.name for file in blended.iterdir()} == {file.name for file in longclip_folder.iterdir()}
    said = run_python(
        "from transformers import AutoModel, AutoProcessor, CLIPModel\n"
        f"AutoProcessor.from_pretrained({str(blended)!r})\n"
        f"for model in (AutoModel.from_pretrained({str(blended)!r}, trust_remote_code=True), "
        f"CLIPModel.from_pretrained({str(blended)!r})):\n"
        "    print(type(model).__name__, model.config.text_config.keep)",
    )
    assert said.split() == ["LongCLIPModel", "20", "CLIPModel", "20"]
    publication = prepare(blended, "USER/blended")
    assert "blend.py tiny-longclip tuned --alpha=0.5 --output DIR" in publication.card
    assert read_origin(blended).trained


def test_text_towers(longclip_folder: Path, tuned: Path, tmp_path: Path) -> None:
    towers = []
    for folder in (longclip_folder, tuned):
        towers.append(tmp_path / f"text-of-{folder.name}")
        shutil.copytree(longclip_folder, towers[-1], ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        LongCLIPTextModelWithProjection.from_pretrained(folder).save_pretrained(towers[-1])
    blend(*map(str, towers), 0.5, tmp_path / "blended")
    model = LongCLIPTextModelWithProjection.from_pretrained(tmp_path / "blended")
    meant = torch.lerp(weights(longclip_folder)[POSITION_TABLE], weights(tuned)[POSITION_TABLE], 0.5)
    assert torch.equal(model.state_dict()[next(n for n in model.state_dict() if "position_emb" in n)], meant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"keep": 10}}, "text_config.keep is 20 and 10"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act is quick_gelu and gelu"),
    ],
)
def test_other_settings_are_refused(
    longclip_folder: Path, copy_of: Copy, set_config: Edit, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    other = copy_of(longclip_folder)
    set_config(other, **change)
    with pytest.raises(ConversionError, match=f"are not the same model: .*{message}"):
        blend(str(longclip_folder), str(other), 0.5, tmp_path / "blended")
    assert not (tmp_path / "blended").exists()


def test_other_pixels_shapes_and_keys_are_refused(
    longclip_folder: Path, clip_folder: Path, copy_of: Copy, tmp_path: Path
) -> None:
    other = copy_of(longclip_folder)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ConversionError, match=r"image_mean is .* and "):
        blend(str(longclip_folder), str(other), 0.5, tmp_path / "blended")
    text = tmp_path / "text"
    shutil.copytree(longclip_folder, text, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    LongCLIPTextModelWithProjection.from_pretrained(longclip_folder).save_pretrained(text)
    with pytest.raises(ConversionError, match=r"are not the same model: .* and missing"):
        blend(str(longclip_folder), str(text), 0.5, tmp_path / "blended")
    with pytest.raises(ConversionError, match="reads 77 tokens and is no Long-CLIP"):
        blend(str(clip_folder), str(longclip_folder), 0.5, tmp_path / "blended")
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConversionError, match="alpha must be within"):
            blend(str(longclip_folder), str(longclip_folder), alpha, tmp_path / "blended")
    with pytest.raises(ConversionError, match="is or holds the source"):
        blend(str(longclip_folder), str(other), 0.5, other)


def test_help_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "longclip-blend" in said and "--alpha" in said and "arXiv 2109.01903" in said
