"""Text encoders in single files: each layout end to end, which one is meant, and what is refused by its name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from examples.random_clip import write_image_settings, write_tokenizer
from longclip_hf.conversion.encoders import folded, recognise
from longclip_hf.conversion.key_map import to_ours
from longclip_hf.conversion.original import convert, main
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError
from modeling_longclip import LongCLIPTextModelWithProjection
from tests.conversion.layout_files import LAYOUTS, State, hugging_face, prefixed, rows, text_tower
from tests.conversion.straight_line import random_state, text_features

DOCUMENT = Path(__file__).parents[2] / "docs" / "conversion.md"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_tokenizer(folder)
    write_image_settings(folder, 32)
    return folder


@pytest.fixture(scope="session")
def towers() -> tuple[State, State]:
    """Two text towers of no width that is known, of 77 positions."""
    return text_tower(), text_tower(128, seed=1)


def write(file: Path, content: Any) -> Path:
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, file)
    else:
        torch.save(content, file)
    return file


def text_ids(rows: int) -> torch.Tensor:
    ids = torch.randint(1, 757, (2, rows), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 758
    return ids


class TestLayouts:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_there(self, name: str, towers: tuple[State, State], tokenizer: Path, tmp_path: Path) -> None:
        """Every layout becomes a folder with the tower's bits, which stock transformers load."""
        layout = LAYOUTS[name]
        file = write(tmp_path / f"model.{layout.extension}", layout.make(*towers))
        report = convert(
            str(file), tmp_path / "out", tokenizer=str(tokenizer), activation="quick_gelu", encoder=layout.encoder
        )
        tower = towers[layout.second]
        expected = hugging_face(tower, layout.projected)
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert written.keys() == expected.keys()
        for key, tensor in written.items():
            if ".theta" in name and ".mlp." in key:
                torch.testing.assert_close(tensor, expected[key])
            else:
                assert torch.equal(tensor, expected[key]), key
        stock = CLIPTextModelWithProjection if layout.projected else CLIPTextModel
        assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [stock.__name__]
        model = stock.from_pretrained(tmp_path / "out").eval()
        if layout.projected:
            with torch.inference_mode():
                ours = model(input_ids=text_ids(77)).text_embeds
            torch.testing.assert_close(ours, text_features(tower, text_ids(77)), rtol=0, atol=1e-5)
        assert "Stretch it" in report.advice
        if name == "`text_model.`":
            stretch(str(tmp_path / "out"), tmp_path / "long")

    @pytest.mark.parametrize(
        ("width", "name", "activation"),
        [(768, "clip_l", "quick_gelu"), (1024, "clip_h", "gelu"), (1280, "clip_g", "gelu")],
    )
    def test_true_widths(self, width: int, name: str, activation: str, tokenizer: Path, tmp_path: Path) -> None:
        tower = {key: value.half() for key, value in text_tower(width, layers=1, mlp=64).items()}
        file = write(tmp_path / f"{name}.safetensors", hugging_face(tower))
        report = convert(str(file), tmp_path / "out", tokenizer=str(tokenizer))
        assert report.facts["activation"] == activation and f"({name}, no prefix" in report.facts["source"]
        config = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out").config
        assert (config.hidden_act, config.num_attention_heads) == (activation, width // 64)

    def test_a_long_one_is_a_longclip(self, tokenizer: Path, tmp_path: Path, towers: tuple[State, State]) -> None:
        tower = text_tower(rows=248)
        file = write(tmp_path / "long.safetensors", hugging_face(tower))
        report = convert(
            str(file), tmp_path / "out", tokenizer=str(tokenizer), activation="quick_gelu", keep=30, ratio=5
        )
        assert report.facts["positions"].startswith("248, 30 kept, ratio 5")
        model = LongCLIPTextModelWithProjection.from_pretrained(tmp_path / "out").eval()
        with torch.inference_mode():
            ours = model(input_ids=text_ids(248)).text_embeds
        torch.testing.assert_close(ours, text_features(tower, text_ids(248)), rtol=0, atol=1e-5)

    def test_two_tables_of_a_text_tower(self, tokenizer: Path, tmp_path: Path) -> None:
        tower = text_tower(rows=248)
        tables = {"positional_embedding_res": torch.randn(248, 64, generator=torch.Generator().manual_seed(3))}
        file = write(tmp_path / "long.pt", tower | tables)
        convert(str(file), tmp_path / "out", tokenizer=str(tokenizer), activation="quick_gelu")
        model = LongCLIPTextModelWithProjection.from_pretrained(tmp_path / "out").eval()
        with torch.inference_mode():
            ours = model(input_ids=text_ids(248)).text_embeds
        torch.testing.assert_close(ours, text_features(tower | tables, text_ids(248)), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("prefix", ["", "clip_model."])
    def test_a_whole_clip_under_hugging_faces_names(self, prefix: str, tokenizer: Path, tmp_path: Path) -> None:
        state = random_state((64, 256, 1), (64, 256, 1), (32, 16), 24, 759, rows=248, tables=1)
        file = write(tmp_path / "model.safetensors", prefixed(prefix, to_ours(state)))
        options = {"activation": "gelu", "image_statistics": "inception", "tokenizer": str(tokenizer)}
        report = convert(str(file), tmp_path / "out", **options)
        assert report.facts["source"].endswith("(Hugging Face's)") and report.facts["positions"] == "248, 20 kept"
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in to_ours(state).items())


def test_which_of_several(towers: tuple[State, State], tokenizer: Path, tmp_path: Path) -> None:
    layout = LAYOUTS["`conditioner.embedders.1.model.`"]
    file = write(tmp_path / "sdxl.safetensors", layout.make(*towers))
    with pytest.raises(
        ConversionError, match=r"has 2 CLIP text encoders: .*embedders.0.transformer.*, 77 positions.*--encoder"
    ):
        convert(str(file), tmp_path / "out")
    with pytest.raises(ConversionError, match=r"has no text encoder clip_h. It has: "):
        convert(str(file), tmp_path / "out", encoder="clip_h")
    with pytest.raises(ConversionError, match=r"a text tower of width 64 is none of image makers'.*--activation"):
        convert(str(file), tmp_path / "out", encoder="conditioner.embedders.0.transformer.")
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, width in (("0.transformer.text_model.embeddings.", 768), ("1.model.", 1280)):
        position = "positional_embedding" if width == 1280 else "position_embedding.weight"
        shapes |= {f"conditioner.embedders.{prefix}{position}": (77, width)}
        shapes |= {f"conditioner.embedders.{prefix}token_embedding.weight": (49408, width)}
    assert [one.name for one in recognise(shapes)] == ["clip_l", "clip_g"]


FILES: dict[str, tuple[str, bytes, str]] = {
    "Git-LFS pointer": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
                        "is a Git-LFS pointer.*git lfs pull"),
    "GGUF": ("clip.gguf", b"GGUF\x03\0\0\0", "is a GGUF file"),
    "TensorFlow": ("tf_model.h5", b"\x89HDF\r\n\x1a\n", "is TensorFlow's weights .*from_tf=True"),
    "Flax": ("flax_model.msgpack", b"\x82\xa5", "is Flax's weights.*from_flax=True"),
    "ONNX": ("model.onnx", b"\x08\x07", "is an ONNX graph"),
    "MLX's archive": ("weights.npz", b"PK\x03\x04", "is an archive of numpy's, as MLX writes"),
    "web page": ("clip_l.safetensors", b"<!DOCTYPE html><html>", "is a web page, not a file of weights"),
}  # fmt: skip
NAMES: dict[str, tuple[Callable[[State], dict[str, Any]], str]] = {
    "RN50": (lambda one: one | {"visual.layer1.0.conv1.weight": torch.ones(1)}, "is a CLIP with a ResNet"),
    "timm": (lambda one: one | {"visual.trunk.stem": torch.ones(1)}, "is a CLIP with an image tower of timm"),
    "XLM-RoBERTa": (
        lambda one: {"visual.positional_embedding": torch.ones(5, 2),
                     "text.transformer.embeddings.word_embeddings.weight": torch.ones(9, 2)},
        "is a CLIP with a text tower of the BERT family",
    ),
    "Chinese-CLIP": (
        lambda one: {"text_model.embeddings.word_embeddings.weight": torch.ones(9, 2)}, "of the BERT family"
    ),
    "SigLIP": (lambda one: hugging_face(one, False) | {"logit_bias": torch.ones(1)}, "is a SigLIP"),
    "T5": (lambda one: {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2)}, "is a T5 encoder"),
    "LoRA": (lambda one: {"lora_te_text_model.lora_down.weight": torch.ones(2)}, "is a LoRA"),
    "fp8": (
        lambda one: {n: t.to(torch.float8_e4m3fn) for n, t in hugging_face(one).items()},
        "is F8_E4M3, fp8, reduced for inference: what was rounded off does not come back. Take the float16",
    ),
    "no model at all": (lambda one: {"x": torch.ones(1)}, "No CLIP with a ViT in this layout: x is unknown"),
    "half a pair": (
        lambda one: one | {"transformer.resblocks.0.mlp.c_fc.r": torch.ones(1)},
        r"c_fc.r has shape \(1,\) and .*c_fc.theta None: a weight in lengths and directions",
    ),
    "unknown name": (lambda one: hugging_face(one) | {"text_model.adapter": torch.ones(1)}, "adapter is unknown"),
}  # fmt: skip


class TestRefused:
    """What is no CLIP, or none that is read: the message is the table's in docs/conversion.md."""

    @pytest.mark.parametrize("kind", [*FILES, *NAMES])
    def test_as_the_document_says(
        self, kind: str, towers: tuple[State, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if kind in FILES:
            name, content, message = FILES[kind]
            Path(name).write_bytes(content)
        else:
            make, message = NAMES[kind]
            name = write(Path("model.safetensors"), make(towers[0])).name
        with pytest.raises(ConversionError, match=f"^{name}:? .*{message}") as error:
            convert(name, "out", activation="gelu")
        assert f"| {kind} | {error.value} |\n" in DOCUMENT.read_text()
        assert not Path("out").exists()

    def test_fp8_of_a_pickle(self, towers: tuple[State, State], tmp_path: Path) -> None:
        torch.save({name: tensor.to(torch.float8_e5m2) for name, tensor in towers[0].items()}, tmp_path / "x.pt")
        with pytest.raises(ConversionError, match=r"x.pt: tensor \S+ is torch.float8_e5m2, fp8, reduced"):
            convert(str(tmp_path / "x.pt"), tmp_path / "out")

    def test_mlx(self, towers: tuple[State, State], tmp_path: Path) -> None:
        save_file(hugging_face(towers[0]), tmp_path / "x.safetensors", metadata={"format": "mlx"})
        with pytest.raises(ConversionError, match=r"x.safetensors is of MLX, whose convolutions have another order"):
            convert(str(tmp_path / "x.safetensors"), tmp_path / "out")

    def test_options_of_other_sources(
        self, towers: tuple[State, State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = write(tmp_path / "clip_l.safetensors", hugging_face(towers[0]))
        for option, value, message in (
            ("--vision-heads", "3", "is a text tower alone. Leave --vision-heads out"),
            ("--image-statistics", "openai", "is a text tower alone. Leave --image-statistics out"),
            ("--precision", "as-released", "is not in their layout"),
            ("--base", "x", "has 77 text positions, none of them stretched. Leave --base out"),
        ):
            arguments = [str(file), "--output", str(tmp_path / "out"), "--activation", "gelu", option, value]
            assert main(arguments) == 2
            assert message in capsys.readouterr().err

    def test_names_that_are_numbers(self, tmp_path: Path) -> None:
        torch.save({1: torch.ones(1)}, tmp_path / "x.pt")
        with pytest.raises(ConversionError, match="is no plain state dict"):
            convert(str(tmp_path / "x.pt"), tmp_path / "out")


def test_lengths_and_directions_are_folded_as_they_are_computed() -> None:
    """`r * normalize(theta)`, of whatever length theta has by the end of training."""
    theta, r = torch.randn(5, 3), torch.rand(5, 1)
    weight = folded({"mlp.c_fc.theta": theta, "mlp.c_fc.r": r, "mlp.c_fc.bias": r})
    assert weight.keys() == {"mlp.c_fc.weight", "mlp.c_fc.bias"}
    by_hand = torch.stack([length * row / row.square().sum().sqrt() for length, row in zip(r, theta, strict=True)])
    torch.testing.assert_close(weight["mlp.c_fc.weight"], by_hand)


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ConversionError, match="is corrupt or was cut short"):
        convert(str(tmp_path / "x.safetensors"), tmp_path / "out")


def test_the_documents_table_is_this() -> None:
    assert "\n".join(rows()) in DOCUMENT.read_text()
