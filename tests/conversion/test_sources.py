"""What a name means: files and folders, Hub ids without a file, OpenCLIP's ids and names, and variants of weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_python
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from longclip_hf.conversion.adopt import adopt
from longclip_hf.conversion.back import convert_back
from longclip_hf.conversion.checkpoint import read_checkpoint
from longclip_hf.conversion.original import main
from longclip_hf.conversion.sources import Source, find_source
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError
from tests.conversion.straight_line import random_state

Capture = pytest.CaptureFixture[str]


class TestLocal:
    def test_files_and_folders(self, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.pt").write_bytes(b"x")
        assert find_source("x.pt") == Source("x.pt", None, False)
        assert find_source(str(clip_folder)) == Source(str(clip_folder), None, True)
        assert find_source(str(clip_folder), "model.safetensors") == Source(
            str(clip_folder), "model.safetensors", False
        )
        assert find_source(".") == Source(".", None, False)
        assert find_source("./nowhere.pt") == Source("./nowhere.pt", None, False)

    def test_open_clips_own_folder(self, longclip_folder: Path, tmp_path: Path, capsys: Capture) -> None:
        convert_back(str(longclip_folder), tmp_path / "open", "open_clip")
        assert find_source(str(tmp_path / "open")).file == "open_clip_model.safetensors"
        assert "is taken to mean open_clip_model.safetensors of" in capsys.readouterr().err
        assert (
            main([str(tmp_path / "open"), "--tokenizer", str(longclip_folder), "--output", str(tmp_path / "out")]) == 0
        )
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", longclip_folder))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_ids_of_the_hub(clip_folder: Path, longclip_folder: Path, tmp_path: Path) -> None:
    """Long-CLIP's repositories by their ids alone, OpenCLIP's by hf-hub: and by its own names, and a stock folder."""
    vocab_size = len(json.loads((clip_folder / "vocab.json").read_text()))
    for name in ("released", "nothing"):
        (tmp_path / name).mkdir()
    state = random_state((64, 256, 1), (64, 256, 1), (32, 16), 24, vocab_size)
    torch.save(state, tmp_path / "released" / "longclip-L.pt")
    (tmp_path / "nothing" / "weights.pt").write_bytes(b"x")
    convert_back(str(longclip_folder), tmp_path / "open", "open_clip")
    with HubServer(tmp_path / "hub", lfs_threshold=100_000) as hub:
        hub.add_repo("BeichenZhang/LongCLIP-L", tmp_path / "released")
        hub.add_repo("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", tmp_path / "open")
        hub.add_repo("user/stock", clip_folder)
        hub.add_repo("user/nothing", tmp_path / "nothing")
        said = run_python(
            "import contextlib, io\n"
            "from longclip_hf.conversion.original import main\n"
            "def run(source, code=0):\n"
            "    with contextlib.redirect_stderr(io.StringIO()) as errors:\n"
            "        rest = ['--tokenizer', 'user/stock', '--quiet', '--output', source.replace('/', '_')]\n"
            "        assert main([source, *rest]) == code\n"
            "    print(' '.join(errors.getvalue().split()))\n"
            "run('BeichenZhang/LongCLIP-L')\n"
            "run('hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K')\n"
            "run('ViT-H-14/laion2b_s32b_b79k')\n"
            "run('user/stock', 2)\n"
            "run('user/nothing', 2)",
            hub.environment() | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            cwd=tmp_path,
        )
    lines = said.strip().splitlines()[-5:]
    assert lines[0] == "BeichenZhang/LongCLIP-L is taken to mean longclip-L.pt of BeichenZhang/LongCLIP-L."
    repository = "open_clip_model.safetensors of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."
    assert lines[1].endswith(repository) and lines[2] == f"ViT-H-14/laion2b_s32b_b79k is taken to mean {repository}"
    assert "user/stock is in Hugging Face's layout already and has 77 positions. Stretch it" in lines[3]
    assert "user/nothing holds neither config.json nor OpenCLIP's open_clip_config.json with its weights" in lines[4]
    card = (tmp_path / "BeichenZhang_LongCLIP-L" / "README.md").read_text()
    assert "base_model: BeichenZhang/LongCLIP-L" in card and "license: apache-2.0" in card


class TestVariants:
    def test_the_only_weights_are_read_when_asked_for(
        self, clip_folder: Path, copy_of: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        folder = copy_of(clip_folder)
        (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
        with pytest.raises(ConversionError, match=r"holds no model.safetensors, but variants of it: fp16.*--variant"):
            read_checkpoint(str(folder))
        with pytest.raises(ConversionError, match=r"holds no model.bf16.safetensors. It has fp16"):
            read_checkpoint(str(folder), variant="bf16")
        stretch(str(folder), tmp_path / "long", variant="fp16")
        assert (
            load_file(tmp_path / "long" / "model.safetensors").keys()
            == load_file(folder / "model.fp16.safetensors").keys()
        )

    def test_of_a_stock_folder_that_is_adopted(
        self, longclip_folder: Path, copy_of: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        folder = copy_of(longclip_folder)
        config = json.loads((folder / "config.json").read_text())
        del config["text_config"]["keep"], config["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
        half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(half, folder / "model.fp16.safetensors")
        assert adopt(str(folder), tmp_path / "out", variant="fp16").facts["precision"] == "float16"
        assert adopt(str(folder), tmp_path / "full").facts["precision"] == "float32"

    def test_other_formats_of_weights_are_named(self, clip_folder: Path, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(clip_folder)
        (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ConversionError, match=r"model.safetensors is a Git-LFS pointer"):
            read_checkpoint(str(folder))
        (folder / "model.safetensors").unlink()
        (folder / "flax_model.msgpack").write_bytes(b"\x82")
        with pytest.raises(ConversionError, match=r"flax_model.msgpack is Flax's weights"):
            read_checkpoint(str(folder))


def test_a_layer_that_the_configuration_leaves_out(
    clip_folder: Path, copy_of: Callable[[Path], Path], capsys: Capture, set_config: Callable[..., None]
) -> None:
    """Stable Diffusion 2.1 names 23 layers, and some of its files hold ViT-H's 24."""
    folder = copy_of(clip_folder)
    set_config(folder, text_config={"num_hidden_layers": 1})
    checkpoint = read_checkpoint(str(folder))
    assert "names 1 text layers, and its file holds 2: the last are left out" in capsys.readouterr().err
    left = {name.split(".")[3] for name in checkpoint.tensors if name.startswith("text_model.encoder")}
    assert left == {"0"}
    set_config(folder, vision_config={"num_hidden_layers": 1})
    with pytest.raises(ConversionError, match="names 1 layers in vision_model, and there are tensors of 2"):
        read_checkpoint(str(folder))
