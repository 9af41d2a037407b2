"""The command from end to end: parity with the original's forward, round trips to the last bit, and refusals."""

import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_python
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from examples.random_clip import SIZES, write_image_settings, write_tokenizer
from longclip_hf.conversion import back as back_module
from longclip_hf.conversion import layouts
from longclip_hf.conversion import tensors as tensors_module
from longclip_hf.conversion.back import convert_back
from longclip_hf.conversion.layouts import OPEN_CLIP_CONFIG
from longclip_hf.conversion.original import convert, main
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError, LongCLIPError, ProofError
from modeling_longclip import LongCLIPModel
from modeling_longclip.compat import features
from tests.conversion.straight_line import image_features, random_state, text_features

Capture = pytest.CaptureFixture[str]
State = dict[str, torch.Tensor]
CHECKOUT = Path(__file__).parents[2]
# What a loader of the original does to its checkpoint; test_key_map has the list.
HALF = re.compile(r"in_proj_|out_proj\.|c_fc\.|c_proj\.|conv1\.|^text_projection$|^visual\.proj$")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`main` listens to SIGTERM; the process of the tests does not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and image settings, as of a base model."""
    folder = tmp_path_factory.mktemp("base") / "base"
    write_tokenizer(folder)
    write_image_settings(folder, 224)
    return folder


@pytest.fixture(scope="session")
def full_tokenizer(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with CLIP's 49,408 ids."""
    folder = Path(shutil.copytree(tokenizer, tmp_path_factory.mktemp("full") / "base"))
    *tokens, bos, eos = json.loads((folder / "vocab.json").read_text())
    tokens += [f"filler{index}</w>" for index in range(49408 - 2 - len(tokens))]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, bos, eos])}))
    return folder


@pytest.fixture(scope="session")
def vocab_size(tokenizer: Path) -> int:
    return len(json.loads((tokenizer / "vocab.json").read_text()))


@pytest.fixture(scope="session")
def state(vocab_size: int) -> State:
    """A small Long-CLIP in the original's layout, several layers deep."""
    return random_state((64, 256, 3), (128, 512, 2), (32, 16), 24, vocab_size)


@pytest.fixture
def released(state: State, tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "longclip-B.pt")
    return tmp_path / "longclip-B.pt"


@pytest.fixture(scope="session")
def converted(state: State, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`state` as a folder. Read only."""
    folder = tmp_path_factory.mktemp("converted")
    torch.save(state, folder / "longclip-B.pt")
    convert(str(folder / "longclip-B.pt"), folder / "long-clip", tokenizer=str(tokenizer))
    return folder / "long-clip"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A stand-in for a checkout of the original, with the parts of its code that are called."""
    (tmp_path / "checkout" / "model").mkdir(parents=True)
    (tmp_path / "checkout" / "model" / "__init__.py").write_text("import torchvision_that_is_not_there\n")
    (tmp_path / "checkout" / "model" / "model_longclip.py").write_text(
        "from tests.conversion.straight_line import image_features, text_features\n"
        "from tests.conversion.test_original import rounded\n"
        "class CLIP:\n"
        "    def float(self): return self\n"
        "    def encode_text(self, text): return text_features(self.state, text)\n"
        "    def encode_image(self, image): return image_features(self.state, image)\n"
        "def convert_weights(model): model.state = rounded(model.state)\n"
        "def build_model(state_dict, load_from_clip):\n"
        "    model = CLIP()\n"
        "    model.state = state_dict\n"
        "    convert_weights(model)\n"
        "    return model\n"
    )
    return tmp_path / "checkout"


def rounded(state: State) -> State:
    return {name: tensor.half().float() if HALF.search(name) else tensor for name, tensor in state.items()}


def texts(vocab_size: int, length: int = 248) -> torch.Tensor:
    """Random texts of several lengths, padded with 0 as by the original's tokenizer; one has a second EOT."""
    draw = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, vocab_size - 2, (5, length), generator=draw)
    for row, count in enumerate((2, 20, 21, length - 1, length)):
        input_ids[row, count - 1] = vocab_size - 1
        input_ids[row, count:] = 0
    input_ids[1, 40] = vocab_size - 1
    return input_ids


def assert_parity(model: Any, state: State, heads: int | None = None, **settings: Any) -> None:
    """Text and image features are the straight-line reference's to 1e-5, of features of about 1."""
    vision = model.config.vision_config
    side = vision.image_size
    pixel_values = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    input_ids = texts(model.config.text_config.vocab_size, model.config.text_config.max_position_embeddings)
    with torch.inference_mode():
        text = features(model.eval().get_text_features(input_ids=input_ids))
        image = features(model.get_image_features(pixel_values=pixel_values))
    activation = {"activation": settings["activation"]} if "activation" in settings else {}
    for ours, theirs in (
        (text, text_features(state, input_ids, **settings)),
        (image, image_features(state, pixel_values, heads, **activation)),
    ):
        assert 0.3 < theirs.abs().mean() < 3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def official(size: str, vocab_size: int, **settings: Any) -> State:
    """One layer of each tower at an official width."""
    shape = SIZES[size]
    towers = [(*shape[tower][:2], 1) for tower in ("text", "vision")]
    return random_state(*towers, shape["image"], shape["projection"], vocab_size, **settings)


class TestParity:
    @pytest.mark.parametrize("size", ["ViT-B/32", "ViT-L/14-336"])
    def test_at_official_shapes(self, size: str, tokenizer: Path, vocab_size: int, tmp_path: Path) -> None:
        state = official(size, vocab_size)
        torch.save(state, tmp_path / "longclip.pt")
        convert(str(tmp_path / "longclip.pt"), tmp_path / "out", tokenizer=str(tokenizer))
        model = LongCLIPModel.from_pretrained(tmp_path / "out")
        assert (model.config.vision_config.image_size, model.config.vision_config.patch_size) == SIZES[size]["image"]
        settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
        assert settings["size"] == {"shortest_edge": SIZES[size]["image"][0]}
        assert_parity(model, state)

    def test_at_the_shapes_of_longclip_b(self, full_tokenizer: Path, tmp_path: Path) -> None:
        state = official("ViT-B/16", 49408)
        torch.save(state, tmp_path / "longclip-B.pt")
        report = convert(
            str(tmp_path / "longclip-B.pt"), tmp_path / "out", tokenizer=str(full_tokenizer), precision="as-released"
        )
        assert report.facts["heads"] == "8 text, 12 image"
        model = LongCLIPModel.from_pretrained(tmp_path / "out")
        assert model.config.text_config.eos_token_id == 49407
        assert_parity(model, rounded(state))

    @pytest.mark.parametrize("size", ["ViT-H/14", pytest.param("ViT-bigG/14", marks=pytest.mark.slow)])
    def test_open_clips_large_models(self, size: str, tokenizer: Path, vocab_size: int, tmp_path: Path) -> None:
        state = official(size, vocab_size, rows=77, tables=1)
        save_file(state, tmp_path / "open_clip_model.safetensors")
        vision = {"image_size": 224, "layers": 1, "width": SIZES[size]["vision"][0], "patch_size": 14}
        vision["head_width"] = vision["width"] // 16
        text = {"context_length": 77, "heads": SIZES[size]["text"][3]}
        model_cfg = {"embed_dim": SIZES[size]["projection"], "vision_cfg": vision, "text_cfg": text}
        (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps({"model_cfg": model_cfg}))
        report = convert(str(tmp_path / "open_clip_model.safetensors"), tmp_path / "out", tokenizer=str(tokenizer))
        assert report.facts["activation"] == "gelu"
        assert_parity(CLIPModel.from_pretrained(tmp_path / "out"), state, heads=16, activation="gelu")

    @pytest.mark.parametrize("keep", [0, 20, 30])
    def test_of_several_layers(self, keep: int, state: State, released: Path, tokenizer: Path, tmp_path: Path) -> None:
        convert(str(released), tmp_path / "out", tokenizer=str(tokenizer), keep=keep)
        model = LongCLIPModel.from_pretrained(tmp_path / "out")
        assert model.config.text_config.keep == keep
        assert_parity(model, state, keep=keep)
        with pytest.raises(AssertionError):
            assert_parity(model, state, keep=keep + 2)

    def test_stock_clip_computes_the_same(self, state: State, converted: Path) -> None:
        assert_parity(CLIPModel.from_pretrained(converted), state)

    def test_as_released_is_what_the_loader_rounds(
        self, state: State, released: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        convert(str(released), tmp_path / "out", tokenizer=str(tokenizer), precision="as-released")
        model = LongCLIPModel.from_pretrained(tmp_path / "out")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert_parity(model, rounded(state))
        with pytest.raises(AssertionError, match="not close"):
            assert_parity(model, state)

    def test_run_by_path_and_loaded_with_its_own_code(self, released: Path, tokenizer: Path, tmp_path: Path) -> None:
        script = CHECKOUT / "conversion" / "original.py"
        said = run_python(
            "import runpy, sys\n"
            f"sys.argv = ['original.py', {str(released)!r}, '--output', 'out', '--tokenizer', {str(tokenizer)!r}]\n"
            f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
            "except SystemExit as end: assert end.code == 0\n"
            "from transformers import AutoModel, AutoProcessor\n"
            "model = AutoModel.from_pretrained('out', trust_remote_code=True)\n"
            "processor = AutoProcessor.from_pretrained('out')\n"
            "text = model.config.text_config\n"
            "print()\n"
            "print(type(model).__name__, text.keep, text.ratio, text.stretch_arithmetic)\n"
            "print(processor.tokenizer.model_max_length, text.eos_token_id == processor.tokenizer.eos_token_id)",
            cwd=tmp_path,
        )
        assert said.split()[-6:] == ["LongCLIPModel", "20", "4", "float16", "248", "True"]


class TestAgainst:
    @pytest.mark.parametrize("precision", ["exact", "as-released"])
    def test_features_of_the_original(
        self, precision: str, released: Path, checkout: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        report = convert(
            str(released), tmp_path / "out", tokenizer=str(tokenizer), precision=precision, against=checkout
        )
        said = report.proofs["against the original"]
        figures = [float(figure) for figure in re.findall(r"\d\.\de[+-]\d\d", said)]
        unrounded, as_loaded = figures[:2], figures[2:]
        equal, other = (unrounded, as_loaded) if precision == "exact" else (as_loaded, unrounded)
        assert max(equal) < 1e-5 < 1e-4 < min(other), "the rounding matters"

    def test_a_difference_ends_the_conversion(
        self, released: Path, checkout: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        file = checkout / "model" / "model_longclip.py"
        file.write_text(
            file.read_text().replace("text_features(self.state, text)", "text_features(self.state, text) + 1")
        )
        with pytest.raises(ProofError, match=r"differ from the original's in .*: without its rounding text 1\.0e\+00"):
            convert(str(released), tmp_path / "out", tokenizer=str(tokenizer), against=checkout)
        assert not (tmp_path / "out").exists()

    def test_no_checkout_and_one_that_fails(
        self, released: Path, checkout: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConversionError, match=r"is no checkout of the original: it has no model/model_"):
            convert(str(released), tmp_path / "out", tokenizer=str(tokenizer), against=tmp_path)
        (checkout / "model" / "model_longclip.py").write_text("import a_module_that_is_not_there\n")
        with pytest.raises(ConversionError, match=r"The original in .* failed: ModuleNotFoundError"):
            convert(str(released), tmp_path / "out", tokenizer=str(tokenizer), against=checkout)


class TestProofs:
    """What goes wrong between reading and writing is found, and nothing is left."""

    def test_a_trained_table_that_is_lost(
        self, released: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def drop(tensors: State, keep: int) -> State:
            return {name: tensor for name, tensor in tensors.items() if name != layouts.TRAINED_TABLE}

        monkeypatch.setattr(layouts, "merge_tables", drop)
        with pytest.raises(ProofError, match="table of positions differs from the two that it was made of"):
            convert(str(released), tmp_path / "out", tokenizer=str(tokenizer))
        assert {file.name for file in tmp_path.iterdir()} == {"longclip-B.pt"}

    @pytest.mark.parametrize("to", [None, "open_clip"])
    def test_a_bit_that_flips(
        self, to: str | None, released: Path, converted: Path, tokenizer: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        write = tensors_module.write_safetensors

        def flip(file: Path, tensors: State) -> None:
            write(file, tensors)
            with file.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                last = stream.read(1)[0]
                stream.seek(-1, os.SEEK_END)
                stream.write(bytes([last ^ 1]))

        for module in (tensors_module, back_module):  # one imports it when it is called, the other has it
            monkeypatch.setattr(module, "write_safetensors", flip)
        with pytest.raises(ProofError, match="1 tensors differ from the source after writing"):
            if to is None:
                convert(str(released), tmp_path / "out", tokenizer=str(tokenizer))
            else:
                convert_back(str(converted), tmp_path / "out", to)
        assert {file.name for file in tmp_path.iterdir()} == {"longclip-B.pt"}


class TestRoundTrip:
    def test_original(self, state: State, converted: Path, tokenizer: Path, tmp_path: Path) -> None:
        report = convert_back(str(converted), tmp_path / "longclip.pt", "original")
        assert report.facts["positions"] == "248, in both tables"
        written = torch.load(tmp_path / "longclip.pt", weights_only=True)
        read = {"positional_embedding": slice(20), "positional_embedding_res": slice(20, None)}
        assert written.keys() == state.keys()
        for name, tensor in written.items():
            rows = read.get(name, ...)
            assert tensor.dtype == state[name].dtype and torch.equal(tensor[rows], state[name][rows]), name
        tables = [written[name] for name in read]
        assert torch.equal(*tables) and tables[0].data_ptr() != tables[1].data_ptr()
        convert(str(tmp_path / "longclip.pt"), tmp_path / "again", tokenizer=str(tokenizer))
        before, after = contents(converted), contents(tmp_path / "again")
        del before["README.md"], after["README.md"]  # it names the file
        assert before == after

    def test_open_clip(self, converted: Path, tmp_path: Path) -> None:
        convert_back(str(converted), tmp_path / "open-clip", "open_clip")
        assert {file.name for file in (tmp_path / "open-clip").iterdir()} == {
            OPEN_CLIP_CONFIG,
            "open_clip_model.safetensors",
        }
        convert(
            str(tmp_path / "open-clip" / "open_clip_model.safetensors"), tmp_path / "again", tokenizer=str(converted)
        )
        before, after = contents(converted), contents(tmp_path / "again")
        assert before["model.safetensors"] == after["model.safetensors"]
        assert before["preprocessor_config.json"] == after["preprocessor_config.json"]
        config = json.loads(before["config.json"])
        config["text_config"]["stretch_arithmetic"] = "float32"  # which one table does not tell
        assert json.loads(after["config.json"]) == config

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_in_other_precisions(self, dtype: str, released: Path, tokenizer: Path, tmp_path: Path) -> None:
        convert(str(released), tmp_path / "out", tokenizer=str(tokenizer), dtype=dtype)
        convert_back(str(tmp_path / "out"), tmp_path / "back.pt", "original")
        written = torch.load(tmp_path / "back.pt", weights_only=True)
        assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
        convert(str(tmp_path / "back.pt"), tmp_path / "again", tokenizer=str(tokenizer))
        assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "again")["model.safetensors"]

    def test_heads_that_the_original_cannot_say(self, longclip_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"4 text heads at width 32, not width / 64.*Use --to open_clip"):
            convert_back(str(longclip_folder), tmp_path / "x.pt", "original")
        convert_back(str(longclip_folder), tmp_path / "open-clip", "open_clip")
        convert(
            str(tmp_path / "open-clip"), tmp_path / "again", file_name="open_clip_model.safetensors",
            tokenizer=str(longclip_folder),
        )  # fmt: skip
        before, after = contents(longclip_folder), contents(tmp_path / "again")
        assert (
            load_file(tmp_path / "again" / "model.safetensors").keys()
            == load_file(longclip_folder / "model.safetensors").keys()
        )
        assert json.loads(before["config.json"])["text_config"] == json.loads(after["config.json"])["text_config"]
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize(
        ("rows", "advice"),
        [
            (77, "OpenAI's code loads it: clip.model.build_model(torch.load('{}', map_location='cpu')). Long-CLIP's "),
            (248, "The released code loads it: longclip.load('{}')."),
            (305, "The released code is written for 248 positions and loads no 305: replace 248 in its model/"),
        ],
    )
    def test_what_loads_it_is_said(
        self, rows: int, advice: str, tokenizer: Path, vocab_size: int, tmp_path: Path
    ) -> None:
        state = random_state(
            (64, 256, 1), (128, 512, 1), (32, 16), 24, vocab_size, rows=rows, tables=1 if rows == 77 else 2
        )
        torch.save(state, tmp_path / "x.pt")
        options = {"activation": "quick_gelu", "image_statistics": "openai"} if rows == 77 else {}
        convert(str(tmp_path / "x.pt"), tmp_path / "out", tokenizer=str(tokenizer), **options)
        report = convert_back(str(tmp_path / "out"), tmp_path / "back.pt", "original")
        assert report.advice.startswith(advice.format(tmp_path / "back.pt"))

    @pytest.mark.parametrize("tower", ["text", "image"])
    def test_an_mlp_that_the_original_cannot_build(
        self, tower: str, tokenizer: Path, vocab_size: int, tmp_path: Path
    ) -> None:
        """Its blocks are of `d_model * 4`, whatever the tensors say."""
        mlp = {"text": 256, "image": 512} | {tower: 192}
        state = random_state((64, mlp["text"], 1), (128, mlp["image"], 1), (32, 16), 24, vocab_size)
        torch.save(state, tmp_path / "x.pt")
        convert(str(tmp_path / "x.pt"), tmp_path / "out", tokenizer=str(tokenizer))
        width = {"text": 64, "image": 128}[tower]
        message = rf"has an MLP of 192 in the {tower} tower, not 4 x its width {width}: .*Use --to open_clip"
        with pytest.raises(ConversionError, match=message):
            convert_back(str(tmp_path / "out"), tmp_path / "back.pt", "original")
        assert {file.name for file in tmp_path.iterdir()} == {"x.pt", "out"}
        convert_back(str(tmp_path / "out"), tmp_path / "open-clip", "open_clip")

    def test_a_text_tower_has_no_other_layout(self, tmp_path: Path, clip_folder: Path) -> None:
        from transformers import CLIPTextModel

        CLIPTextModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "text")
        with pytest.raises(ConversionError, match="text tower alone"):
            convert_back(str(tmp_path / "text"), tmp_path / "x.pt", "original")


class TestPlainClip:
    def test_openais_state_dict_becomes_a_clip_that_can_be_stretched(
        self, tokenizer: Path, vocab_size: int, tmp_path: Path
    ) -> None:
        """Mixed precisions and numbers beside the weights, as in what OpenAI's archives hold."""
        state = random_state((64, 256, 1), (128, 512, 1), (32, 16), 24, vocab_size, rows=77, tables=1)
        mixed = {name: tensor.half() if HALF.search(name) else tensor for name, tensor in state.items()}
        torch.save(mixed | {"input_resolution": torch.tensor(32)}, tmp_path / "ViT-B-16.pt")
        with pytest.raises(ConversionError, match=r"mixes precisions \(\d+ \w+, \d+ \w+ tensors\).*--dtype"):
            convert(str(tmp_path / "ViT-B-16.pt"), tmp_path / "clip", tokenizer=str(tokenizer))
        report = convert(str(tmp_path / "ViT-B-16.pt"), tmp_path / "clip", tokenizer=str(tokenizer), dtype="float32")
        assert report.left_out == ["input_resolution"]
        assert (
            report.advice
            == f"It is a plain CLIP of 77 positions. Stretch it: python conversion/stretch.py {tmp_path}/clip"
        )
        config = json.loads((tmp_path / "clip" / "config.json").read_text())
        assert "auto_map" not in config and config["architectures"] == ["CLIPModel"]
        assert not list((tmp_path / "clip").glob("*.py"))
        assert_parity(CLIPModel.from_pretrained(tmp_path / "clip"), rounded(state))
        stretch(str(tmp_path / "clip"), tmp_path / "long")
        assert LongCLIPModel.from_pretrained(tmp_path / "long").config.text_config.max_position_embeddings == 248
        convert_back(str(tmp_path / "clip"), tmp_path / "back.pt", "original")
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], mixed[name].float()) for name in state)

    def test_image_statistics_are_never_guessed(self, tokenizer: Path, vocab_size: int, tmp_path: Path) -> None:
        """A state dict of OpenCLIP without its configuration: the base model's mean and std may be others."""
        state = random_state((64, 256, 1), (128, 512, 1), (32, 16), 24, vocab_size, rows=77, tables=1)
        torch.save(state, tmp_path / "clip.bin")
        command = [str(tmp_path / "clip.bin"), "--output", str(tmp_path / "clip"), "--tokenizer", str(tokenizer)]
        command += ["--activation", "gelu"]
        with pytest.raises(ConversionError, match=r"clip.bin does not say the mean .* --image-statistics openai for"):
            convert(str(tmp_path / "clip.bin"), tmp_path / "clip", tokenizer=str(tokenizer), activation="gelu")
        assert main(command) == 2 and not (tmp_path / "clip").exists()
        for name, mean, std in (("inception", [0.5] * 3, [0.5] * 3), ("imagenet", [0.485, 0.456, 0.406], None)):
            assert main([*command, "--image-statistics", name, "--overwrite"]) == 0
            images = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
            assert images["image_mean"] == mean and images["image_std"] == (std or [0.229, 0.224, 0.225])

    def test_open_clips_defaults_where_its_configuration_is_silent(
        self, tokenizer: Path, vocab_size: int, tmp_path: Path
    ) -> None:
        """OpenCLIP's own, and not those of the folder that the tokenizer comes from."""
        state = random_state((64, 256, 1), (128, 512, 1), (32, 16), 24, vocab_size, rows=77, tables=1)
        torch.save(state, tmp_path / "clip.bin")
        model_cfg = {"embed_dim": 24, "vision_cfg": {"image_size": 32}, "text_cfg": {"context_length": 77}}
        base = Path(shutil.copytree(tokenizer, tmp_path / "base"))
        images = json.loads((base / "preprocessor_config.json").read_text())
        images |= {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 2}
        (base / "preprocessor_config.json").write_text(json.dumps(images))
        for preprocess, mean in (({}, [0.48145466, 0.4578275, 0.40821073]), ({"mean": [0.5] * 3}, [0.5] * 3)):
            config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
            (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(config))
            report = convert(str(tmp_path / "clip.bin"), tmp_path / "out", tokenizer=str(base), overwrite=True)
            images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
            std = [0.26862954, 0.26130258, 0.27577711]
            assert (images["image_mean"], images["image_std"], images["resample"]) == (mean, std, 3)
            assert report.facts["image mean, std"] == f"{mean}, {std} (by open_clip_config.json)"

    def test_the_card_beside_it_travels(self, tokenizer: Path, vocab_size: int, tmp_path: Path) -> None:
        state = random_state((64, 256, 1), (128, 512, 1), (32, 16), 24, vocab_size, rows=77, tables=1)
        torch.save(state, tmp_path / "clip.bin")
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA CLIP.\n")
        report = convert(
            str(tmp_path / "clip.bin"), tmp_path / "clip", tokenizer=str(tokenizer), activation="gelu",
            image_statistics="openai",
        )  # fmt: skip
        assert report.facts["licence"] == "mit"
        stretch(str(tmp_path / "clip"), tmp_path / "long")
        assert "license: mit" in (tmp_path / "long" / "README.md").read_text()


class TestCard:
    def test_of_a_released_checkpoint(self, converted: Path) -> None:
        card = (converted / "README.md").read_text()
        head, text = card.split("---\n")[1:]
        assert "license: apache-2.0" in head and "base_model: BeichenZhang/LongCLIP-B" in head
        assert "rows 0 ... 19 from\n`positional_embedding`" in text
        assert "rows 20 ... 247 from `positional_embedding_res`" in text
        assert "No weight was changed.\n" in text
        assert "It has not been fine-tuned" not in text
        assert "{{" not in card and "{%" not in card

    def test_of_another_one_claims_less(self, released: Path, tokenizer: Path, tmp_path: Path) -> None:
        released.rename(tmp_path / "mine.pt")
        convert(str(tmp_path / "mine.pt"), tmp_path / "out", tokenizer=str(tokenizer), precision="as-released")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "license:" not in card and "base_model:" not in card
        assert "No weight was changed but those that the authors' loader rounds to float16" in card


def _executes(folder: Path) -> Any:
    class Executes:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(folder / "executed"),)

    return Executes()


def _torchscript(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))


def _without(*names: str) -> Callable[[Path, State], None]:
    return lambda file, state: torch.save({name: state[name] for name in state if name not in names}, file)


def _with(**changes: Any) -> Callable[[Path, State], None]:
    return lambda file, state: torch.save(state | changes, file)


BAD: dict[str, tuple[Callable[[Path, State], Any], str]] = {
    "a picture": (
        lambda file, state: file.write_bytes(b"\x89PNG" + bytes(100)),
        "is no plain state dict, or is corrupt",
    ),
    "empty": (lambda file, state: file.write_bytes(b""), "is no plain state dict, or is corrupt"),
    "truncated": (
        lambda file, state: (torch.save(state, file), file.write_bytes(file.read_bytes()[:-9999])),
        "corrupt: .*Nothing in it was executed. Download it again",
    ),
    "code": (
        lambda file, state: torch.save(state | {"code": _executes(file.parent)}, file),
        r"it is a pickle that calls posix.mkdir, and weights call nothing. Nothing in it was executed",
    ),
    "torchscript": (
        lambda file, state: _torchscript(file),
        r"it is a TorchScript archive, .* Nothing in it was executed\..*torch.jit.load\('longclip-B.pt', 'cpu'\)",
    ),
    "a module": (
        lambda file, state: torch.save(torch.nn.Linear(2, 2), file),
        r"calls torch.nn.modules.linear.Linear, and weights call nothing.*or of its state_dict\(\) alone",
    ),
    "numbers": (_with(epoch=3), r"is no plain state dict \(name -> tensor\), but a dict"),
    "another model": (
        lambda file, state: torch.save({"conv1.weight": torch.zeros(2), "bn1.bias": torch.zeros(2)}, file),
        "longclip-B.pt: No CLIP with a ViT in this layout: bn1.bias is unknown; conv1.weight is unknown; .* more",
    ),
    "unknown": (_with(**{"visual.adapter": torch.zeros(2)}), "layout: visual.adapter is unknown."),
    "missing": (_without("ln_final.bias"), "layout: ln_final.bias is missing."),
    "no frozen table": (_without("positional_embedding"), "positional_embedding is missing, which holds the first 20"),
    "no trained table": (
        _without("positional_embedding_res"),
        "has 248 text positions and one table of them. .* a second, positional_embedding_res",
    ),
    "no table": (
        _without("positional_embedding", "positional_embedding_res"),
        "layout: positional_embedding is missing",
    ),
    "integers": (_with(logit_scale=torch.tensor(4)), r"hold no floating-point numbers: logit_scale \(torch.int64\)"),
    "shape": (
        _with(text_projection=torch.zeros(63, 24)),
        r"the shapes make no CLIP: text_projection has shape \(63, 24\), not \(64, 24\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_nothing_is_written(
    case: str, state: State, tokenizer: Path, tmp_path: Path, capsys: Capture
) -> None:
    make, message = BAD[case]
    file = tmp_path / "longclip-B.pt"
    make(file, state)
    assert main([str(file), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == "" and line.startswith("error: ")
    assert re.search(message, line), line
    assert {file.name for file in tmp_path.iterdir()} == {"longclip-B.pt"}, "the code in it was not executed"


def test_the_code_that_is_refused_is_code_indeed(tmp_path: Path, state: State) -> None:
    BAD["code"][0](tmp_path / "x.pt", state)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


def test_a_mixed_checkpoint_needs_a_choice(state: State, tokenizer: Path, tmp_path: Path) -> None:
    torch.save(state | {"positional_embedding_res": state["positional_embedding_res"].half()}, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match=r"mixes precisions \(\d+ float32, 1 float16 tensors\)"):
        convert(str(tmp_path / "x.pt"), tmp_path / "out", tokenizer=str(tokenizer))


class TestOptions:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--dtype", "float16", "--against", "."], "--against compares in float32, not in float16"),
            (["--keep", "77"], "keep must be within 0 ... 76"),
            (["--keep", "-1"], "keep must be within 0 ... 76"),
            (["--revision", "main"], "--revision main is for Hub ids"),
            (["--activation", "gelu"], "has quick_gelu. Leave it out"),
            (["--image-statistics", "inception"], "--image-statistics inception, and the layout .* Leave it out"),
            (
                ["--to", "original", "--keep", "3", "--dtype", "float16"],
                "--to original reads a folder, .* Leave --keep, --dtype out",
            ),
            (["--to", "original"], "is a file. Name the folder that holds it"),
            (["--tokenizer", "./nowhere"], "./nowhere: no such folder"),
            ([], "no base model of that size is known.*--tokenizer"),
        ],
    )
    def test_that_do_not_fit(
        self,
        args: list[str],
        message: str,
        released: Path,
        tokenizer: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if args and not {"--to", "--tokenizer"} & set(args):
            args = [*args, "--tokenizer", str(tokenizer)]
        assert main([str(released), "--output", str(tmp_path / "out"), *args]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert {file.name for file in tmp_path.iterdir()} == {"longclip-B.pt"}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"precision": "as-released"}, "--precision as-released is what the loader of Long-CLIP's authors does"),
            ({"against": "."}, "--against compares Long-CLIP's checkpoints"),
            ({"keep": 20}, "has 77 text positions, none of them stretched"),
        ],
    )
    def test_that_are_for_longclip_only(
        self, settings: dict[str, Any], message: str, tokenizer: Path, vocab_size: int, tmp_path: Path
    ) -> None:
        state = random_state((64, 256, 1), (128, 512, 1), (32, 16), 24, vocab_size, rows=77, tables=1)
        torch.save(state, tmp_path / "clip.pt")
        with pytest.raises(ConversionError, match=message):
            convert(str(tmp_path / "clip.pt"), tmp_path / "out", tokenizer=str(tokenizer), **settings)

    def test_a_tokenizer_of_another_vocabulary(self, released: Path, full_tokenizer: Path, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"ends a text with id 49407, and .* its highest, \d+\..*--token"):
            convert(str(released), tmp_path / "out", tokenizer=str(full_tokenizer))
        assert not (tmp_path / "out").exists()

    def test_an_output_that_exists_stays(
        self, released: Path, converted: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        before = released.read_bytes()
        (tmp_path / "out").mkdir()
        for run in (
            lambda: convert(str(released), tmp_path / "out", tokenizer=str(tokenizer)),
            lambda: convert(str(released), tmp_path, tokenizer=str(tokenizer), overwrite=True),
            lambda: convert_back(str(converted), released, "original"),
            lambda: convert_back(str(converted), tmp_path / "out", "original", overwrite=True),
            lambda: convert_back(str(converted), converted, "open_clip", overwrite=True),
        ):
            with pytest.raises(LongCLIPError, match=r"exists already|is or holds the source|is a folder"):
                run()
        assert released.read_bytes() == before and not list((tmp_path / "out").iterdir())
        convert_back(str(converted), released, "original", overwrite=True)
        assert released.read_bytes() != before
        assert {file.name for file in tmp_path.iterdir()} == {"longclip-B.pt", "out"}

    def test_the_command_says_what_it_did(
        self,
        released: Path,
        tokenizer: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("COLUMNS", "250")
        assert main([str(released), "--output", str(tmp_path / "out"), "--processor", str(tokenizer)]) == 0
        out = capsys.readouterr().out
        count = len(torch.load(released, weights_only=True))
        assert f"{count} tensors of the file make the {count - 1 + 4 * 5} that config.json asks for" in out
        assert re.search(rf"values +│ {count - 1} tensors, \d\.\d MB, bit-identical, renamed back", out)
        assert "rows 0 ... 19 of the first, rows 20 ... 247 of the trained one, bit-identical" in out
        assert "apache-2.0" in out and "1 text, 2 image" in out
        assert main([str(tmp_path / "out"), "--to", "open_clip", "--output", str(tmp_path / "open-clip")]) == 0
        assert f"local-dir:{tmp_path}/open-clip" in capsys.readouterr().out

    def test_names_are_printed_as_they_are(
        self, released: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Markup of rich, a closing tag that closes nothing, and an emoji: names of files, in tables and in errors."""
        monkeypatch.setenv("COLUMNS", "400")
        source, output = tmp_path / "[red]x[" / "] :smile:.pt", tmp_path / "[" / "] :smile: [bold]y"
        source.parent.mkdir()
        released.rename(source)
        options = ["--output", str(output), "--processor", str(tokenizer)]
        assert main([str(source), *options]) == 0
        out, err = capsys.readouterr()
        assert f"{source} (Long-CLIP's two tables)" in out and f"│ {output} " in out and f"{str(output)!r}" in out
        assert err == ""
        assert main([str(source), *options]) == 2
        assert capsys.readouterr().err.startswith(f"error: {output} exists already.")
        assert main([str(output), "--to", "original", "--output", str(tmp_path / "[/].pt")]) == 0
        assert f"│ {tmp_path}/[/].pt (original) " in capsys.readouterr().out

    def test_a_limit_of_memory_is_one_line(self, tokenizer: Path, tmp_path: Path) -> None:
        """Of a file that holds 2 GB of zeros and takes no room on the disk, where 500 MB are left."""
        header = {"positional_embedding": {"dtype": "F32", "shape": [2**29], "data_offsets": [0, 2**31]}}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (tmp_path / "large.safetensors").open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(stream.tell() + 2**31)
        said = run_python(
            "import contextlib, io, re, resource\n"
            "from longclip_hf.conversion import back, layouts\n"
            "from longclip_hf.conversion.original import main\n"
            "used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)\n"
            "with contextlib.redirect_stderr(io.StringIO()) as errors:\n"
            f"    code = main(['large.safetensors', '--tokenizer', {str(tokenizer)!r}, '--output', 'out'])\n"
            "print(code, errors.getvalue())",
            cwd=tmp_path,
        )
        assert re.fullmatch(r"2 error: [^\n]*(memory|allocate)[^\n]*\n\n", said), said
        assert [file.name for file in tmp_path.iterdir()] == ["large.safetensors"]


def test_from_the_hub(released: Path, tokenizer: Path, tmp_path: Path) -> None:
    """ID and file name, with the card's licence; other files are not asked for."""
    source = tmp_path / "source"
    source.mkdir()
    released.rename(source / "longclip-L@336px.pt")
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (source / "training.log").write_text("long")
    with HubServer(tmp_path / "hub", lfs_threshold=100_000) as hub:
        hub.add_repo("user/longclip", source)
        hub.add_repo("user/base", tokenizer)
        run_python(
            "from longclip_hf.conversion.original import main\n"
            "rest = ['--tokenizer', 'user/base', '--output']\n"
            "assert main(['user/longclip', 'longclip-L@336px.pt', *rest, 'out']) == 0\n"
            "assert main(['user/longclip', 'nothing.pt', *rest, 'other']) == 2\n"
            "assert main(['user/nothing', 'x.pt', *rest, 'other']) == 2",
            hub.environment() | {"HF_HUB_OFFLINE": "0"},
            cwd=tmp_path,
        )
        assert not any("training.log" in path for _, path in hub.requests)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: user/longclip" in card and "license: cc-by-4.0" in card
    assert not (tmp_path / "other").exists()
