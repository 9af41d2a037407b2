"""Text towers written as image makers hold them: a file that ComfyUI's loader reads, and whole checkpoints anew."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from examples.random_clip import write_tokenizer
from longclip_hf.conversion import single_file
from longclip_hf.conversion.original import convert, main
from longclip_hf.conversion.single_file import write_into, write_text_encoder
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError, ProofError
from tests.conversion.layout_files import LAYOUTS, WHOLE, State, hugging_face, prefixed, text_tower

Capture = pytest.CaptureFixture[str]
METADATA = {"format": "pt", "modelspec.title": "Ünïque"}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_tokenizer(folder)
    return folder


def long_folder(tower: State, folder: Path, tokenizer: Path) -> Path:
    """A Long-CLIP's text tower, stretched from `tower`."""
    save_file(
        {name: tensor.contiguous() for name, tensor in hugging_face(tower).items()}, folder.with_suffix(".safetensors")
    )
    plain = folder.with_name(f"{folder.name}-77")
    convert(str(folder.with_suffix(".safetensors")), plain, tokenizer=str(tokenizer), activation="quick_gelu")
    stretch(str(plain), folder)
    return folder


@pytest.fixture(scope="session")
def towers() -> tuple[State, State]:
    return text_tower(), text_tower(128, seed=1)


@pytest.fixture(scope="session")
def long(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, Path]:
    """Two stretched text towers with other weights than `towers`, of their sizes. Read only."""
    folder = tmp_path_factory.mktemp("long")
    first = long_folder(text_tower(seed=5), folder / "first", tokenizer)
    return first, long_folder(text_tower(128, seed=6), folder / "second", tokenizer)


def whole(file: Path, content: State) -> Path:
    """A checkpoint in float16 (but for indices and fp8), with metadata."""
    half = {n: t.half() if t.dtype == torch.float32 else t for n, t in content.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in half.items()}, file, metadata=METADATA)
    return file


def raw(file: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header of a file, and the bytes of each tensor, read in straight lines."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    assert max(end for _, end in places.values()) == len(body)
    return header, {name: body[begin:end] for name, (begin, end) in places.items()}


class TestInto:
    @pytest.mark.parametrize("name", WHOLE)
    def test_only_the_encoder_changes_and_it_comes_back(
        self, name: str, towers: tuple[State, State], long: tuple[Path, Path], tokenizer: Path, tmp_path: Path
    ) -> None:
        layout = LAYOUTS[name]
        source = whole(tmp_path / "model.safetensors", layout.make(*towers))
        folder = long[layout.second]
        report = write_into(str(folder), source, tmp_path / "new.safetensors", encoder=layout.encoder)
        assert report.facts["positions"] == "77 -> 248" and "byte-identical" in report.proofs["everything else"]
        (header, before), (new_header, after) = raw(source), raw(tmp_path / "new.safetensors")
        assert list(before) == list(after) and new_header["__metadata__"] == METADATA
        prefix = name.strip("`").removesuffix("text_model.")
        for key in before:
            if not key.startswith(prefix) or key.endswith("logit_scale"):
                assert before[key] == after[key] and header[key]["dtype"] == new_header[key]["dtype"], key
            elif key.endswith("position_ids"):
                assert new_header[key]["shape"] == [1, 248]
            else:
                assert before[key] != after[key] or "bias" in key or "ln_" in key or "norm" in key, key
        with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
            assert len(list(file.keys())) == len(before)
        convert(
            str(tmp_path / "new.safetensors"), tmp_path / "back", tokenizer=str(tokenizer), activation="quick_gelu",
            encoder=layout.encoder,
        )  # fmt: skip
        ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors")
        assert ours.keys() == theirs.keys() - ({"text_projection.weight"} if not layout.projected else set())
        assert all(torch.equal(tensor, theirs[key].half()) for key, tensor in ours.items())

    def test_by_the_command(
        self, towers: tuple[State, State], long: tuple[Path, Path], tmp_path: Path, capsys: Capture
    ) -> None:
        source = whole(tmp_path / "m.safetensors", LAYOUTS["`cond_stage_model.transformer.text_model.`"].make(*towers))
        arguments = [str(long[0]), "--into", str(source), "--output", str(tmp_path / "new.safetensors")]
        assert main(arguments) == 0
        assert "Stable Diffusion 1.x" in capsys.readouterr().out.replace("\n", " ")
        assert main([*arguments, "--overwrite", "--dtype", "float16"]) == 2
        assert "--into writes a folder's text tower. Leave --dtype out" in capsys.readouterr().err

    def test_what_does_not_fit(
        self, towers: tuple[State, State], long: tuple[Path, Path], tmp_path: Path, clip_folder: Path
    ) -> None:
        source = whole(tmp_path / "m.safetensors", LAYOUTS["`conditioner.embedders.1.model.`"].make(*towers))
        output = tmp_path / "new.safetensors"
        for folder, options, message in (
            (long[0], {}, "has 2 CLIP text encoders"),
            (long[0], {"encoder": "conditioner.embedders.1.model"}, r"has shape \(.*\), not \(.*\)"),
            (long[0], {"into": tmp_path / "x.ckpt"}, "x.ckpt is no .safetensors file"),
            (long[0], {"into": tmp_path / "x.safetensors"}, "x.safetensors: no such file"),
            (long[0], {"output": source}, "m.safetensors is the source, which stays"),
        ):
            arguments: dict[str, Any] = {"into": source, "output": output} | options
            with pytest.raises(ConversionError, match=message):
                write_into(str(folder), **arguments)
        whole(tmp_path / "none.safetensors", {"x": torch.ones(1)})
        with pytest.raises(ConversionError, match="holds no CLIP text encoder"):
            write_into(str(long[0]), tmp_path / "none.safetensors", output)
        projected = prefixed("text_encoders.clip_l.transformer.", hugging_face(towers[0]))
        whole(tmp_path / "sd3.safetensors", projected)
        tensors = load_file(long[0] / "model.safetensors")
        assert "text_projection.weight" in tensors
        assert not output.exists() and sorted(tmp_path.glob(".*")) == []

    def test_a_byte_that_flips(
        self, towers: tuple[State, State], long: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = whole(tmp_path / "m.safetensors", LAYOUTS["`cond_stage_model.model.`"].make(*towers))
        write = single_file._write

        def flip(file: Path, *rest: Any) -> None:
            write(file, *rest)
            data = bytearray(file.read_bytes())
            entry = raw(file)[0]["first_stage_model.encoder.conv_in.weight"]["data_offsets"]
            data[8 + int.from_bytes(data[:8], "little") + entry[0]] ^= 1
            file.write_bytes(data)

        monkeypatch.setattr(single_file, "_write", flip)
        with pytest.raises(ProofError, match=r"first_stage_model.encoder.conv_in.weight differs from"):
            write_into(str(long[0]), source, tmp_path / "new.safetensors")
        assert not (tmp_path / "new.safetensors").exists()


def comfyui_encoder(shapes: dict[str, tuple[int, ...]]) -> tuple[str, int]:
    """What ComfyUI's loader (comfy/sd.py, comfy/text_encoders/long_clipl.py) takes a file for: the encoder, by
    layers that are there, and the positions, by the table's rows.
    """
    kind = next(
        name
        for name, layer in (("clip_g", 30), ("clip_h", 22), ("clip_l", 0))
        if f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in shapes
    )
    return kind, shapes["text_model.embeddings.position_embedding.weight"][0]


class TestComfyUI:
    def test_a_file_that_its_loader_takes(self, tokenizer: Path, tmp_path: Path, capsys: Capture) -> None:
        """Names and shapes are those of its text model; nothing else is in the file."""
        folder = long_folder(text_tower(768, layers=1, mlp=64), tmp_path / "long", tokenizer)
        file = tmp_path / "clip_l_long.safetensors"
        assert main([str(folder), "--to", "comfyui", "--output", str(file)]) == 0
        assert "248 positions are read by its long-CLIP option" in " ".join(capsys.readouterr().out.split())
        written = load_file(file)
        assert comfyui_encoder({name: tuple(tensor.shape) for name, tensor in written.items()}) == ("clip_l", 248)
        layer = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
        layer += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
        parts = [*(f"encoder.layers.0.{part}" for part in layer), "final_layer_norm"]
        expected = {f"text_model.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
        expected |= {f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")}
        assert written.keys() == expected | {"text_projection.weight"}
        theirs = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in written.items())
        convert(str(file), tmp_path / "back", tokenizer=str(tokenizer))
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    def test_what_it_does_not_read(self, long: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"has width 64, and ComfyUI's encoders have 768 \(clip_l\), 1024"):
            write_text_encoder(str(long[0]), tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match=r"x.pt is no .safetensors file"):
            write_text_encoder(str(long[0]), tmp_path / "x.pt")
