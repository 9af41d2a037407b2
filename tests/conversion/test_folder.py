"""A folder that appears whole or not at all, and the files in it that every tool reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCardData
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPTokenizerFast

from examples.random_clip import SENTENCES
from longclip_hf.conversion import folder as folder_module
from longclip_hf.conversion.folder import write_card, write_code, write_image_processor, write_tokenizer
from longclip_hf.conversion.parity import prove_same_ids
from longclip_hf.errors import ConversionError, LongCLIPError, ProofError

slow_tokenizer = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) >= 5,
    reason="transformers 5 has one CLIP tokenizer, the fast one",
)
TEXTS = [
    *SENTENCES,
    "",
    "It's 42 o'clock -- isn't it?!",
    "  Ünïcödé,\n\ttabs 日本語 🐕 and CAPITALS  ",
    "word " * 300,
]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden or not."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def _only_slow(folder: Path) -> None:
    assert not (folder / "tokenizer.json").exists(), "the tests' own tokenizer is vocab.json and merges.txt"


def _all(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer.to_str())


def _only_fast(folder: Path) -> None:
    _all(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def _fast_as_openai(folder: Path) -> None:
    """Merges as strings, CLIP's 77 baked in, and special tokens as objects, as in OpenAI's own repositories."""
    _only_fast(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pairs = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    tokenizer["truncation"] = {"direction": "Right", "max_length": 77, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": {"Fixed": 77}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    token = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    special = {"bos_token": token | {"content": "<|startoftext|>"}, "eos_token": token, "unk_token": token}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "<|endoftext|>"}))
    typed = {name: value | {"__type": "AddedToken"} for name, value in special.items()}
    config = {"errors": "replace", "add_prefix_space": False, "model_max_length": 77, "do_lower_case": True}
    config |= {
        "name_or_path": "./clip_ViT_B_32/",
        "pad_token": "<|endoftext|>",
        "special_tokens_map_file": "./special",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | typed))


def _no_settings(folder: Path) -> None:
    _all(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()


FORMS = [_only_slow, _only_fast, _all, _fast_as_openai, _no_settings]


@pytest.fixture(params=FORMS, ids=[form.__name__.strip("_") for form in FORMS])
def tokenizer_source(request: pytest.FixtureRequest, clip_folder: Path, tmp_path: Path) -> Path:
    """A CLIP tokenizer in one of the forms that are published."""
    folder = tmp_path / "source"
    shutil.copytree(clip_folder, folder, ignore=shutil.ignore_patterns("model.*", "preprocessor*"))
    request.param(folder)
    return folder


@pytest.fixture
def written(tokenizer_source: Path, tmp_path: Path) -> Path:
    (tmp_path / "written").mkdir()
    write_tokenizer(tmp_path / "written", tokenizer_source, "source", 248)
    return tmp_path / "written"


class TestTokenizer:
    def test_ids_are_the_sources_and_texts_are_248_long(self, written: Path, clip_folder: Path) -> None:
        original, ours = AutoTokenizer.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(written)
        assert ours(TEXTS, verbose=False)["input_ids"] == original(TEXTS, verbose=False)["input_ids"]
        assert ours.model_max_length == 248
        cut = ours(TEXTS, truncation=True, padding="max_length")["input_ids"]
        assert {len(ids) for ids in cut} == {248}
        assert all(ids[0] == 757 and 758 in ids for ids in cut)
        assert cut[-1][-1] == 758 and 758 not in cut[-1][:-1]
        assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (757, 758, 758)

    @slow_tokenizer
    def test_the_slow_tokenizer_reads_it_too(self, written: Path, clip_folder: Path) -> None:
        original = AutoTokenizer.from_pretrained(clip_folder, use_fast=False)
        ours = AutoTokenizer.from_pretrained(written, use_fast=False)
        assert not ours.is_fast
        assert ours(TEXTS, verbose=False)["input_ids"] == original(TEXTS, verbose=False)["input_ids"]
        assert ours.model_max_length == 248
        assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (757, 758, 758)

    def test_says_the_end_of_text(self, tokenizer_source: Path, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        assert write_tokenizer(tmp_path / "other", tokenizer_source, "source", 100).eos_token_id == 758
        assert json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())["model_max_length"] == 100

    def test_writes_the_same_bytes_again_and_from_what_it_wrote(
        self, tokenizer_source: Path, written: Path, tmp_path: Path
    ) -> None:
        for name, source in (("again", tokenizer_source), ("from-written", written)):
            (tmp_path / name).mkdir()
            write_tokenizer(tmp_path / name, source, "source", 248)
            assert tree(tmp_path / name) == tree(written)
        files = {"merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
        assert set(tree(written)) == files

    def test_files_worked_by_hand(self, tmp_path: Path) -> None:
        """Nothing in them comes from transformers: both majors write these bytes."""
        vocab = {"a": 0, "é</w>": 1, "aé</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
        model = {"type": "BPE", "vocab": vocab, "merges": [["a", "é</w>"]]}
        rest = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": []},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": []},
        }
        for name in ("source", "written"):
            (tmp_path / name).mkdir()
        (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(rest | {"model": model}))
        assert write_tokenizer(tmp_path / "written", tmp_path / "source", "source", 248).eos_token_id == 4
        texts = {name: content.decode() for name, content in tree(tmp_path / "written").items()}
        special = {
            "bos_token": "<|startoftext|>",
            **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        }
        assert texts["vocab.json"] == ('{"a": 0, "é</w>": 1, "aé</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}')
        assert texts["merges.txt"] == "#version: 0.2\na é</w>\n"
        assert json.loads(texts["special_tokens_map.json"]) == special
        assert json.loads(texts["tokenizer_config.json"]) == {
            "tokenizer_class": "CLIPTokenizer",
            "do_lower_case": True,
            "errors": "replace",
            **special,
            "model_max_length": 248,
            "processor_class": "CLIPProcessor",
        }
        changed = {"model": model, "truncation": None, "padding": None}
        assert json.loads(texts["tokenizer.json"]) == rest | changed

    def test_forgets_how_the_source_was_cut_and_loaded(self, written: Path) -> None:
        tokenizer = json.loads((written / "tokenizer.json").read_text())
        assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
        config = json.loads((written / "tokenizer_config.json").read_text())
        assert not {"name_or_path", "special_tokens_map_file", "tokenizer_file", "is_local"} & config.keys()
        assert config["processor_class"] == "CLIPProcessor"

    @pytest.mark.parametrize("names", [["special_tokens_map"], ["special_tokens_map", "tokenizer_config"]])
    def test_a_pad_token_of_its_own_stays(self, names: list[str], clip_folder: Path, tmp_path: Path) -> None:
        """As in the text towers of Stable Diffusion 2, whose special_tokens_map.json alone pads with "!"."""
        source = tmp_path / "source"
        shutil.copytree(clip_folder, source)
        for name in names:
            settings = json.loads((source / f"{name}.json").read_text())
            (source / f"{name}.json").write_text(json.dumps(settings | {"pad_token": "!"}))
        (tmp_path / "written").mkdir()
        write_tokenizer(tmp_path / "written", source, "source", 248)
        ours = AutoTokenizer.from_pretrained(tmp_path / "written")
        assert (ours.pad_token, ours.pad_token_id) == ("!", json.loads((source / "vocab.json").read_text())["!"])

    @pytest.mark.parametrize("form", [_only_slow, _all], ids=["only_slow", "all"])
    def test_added_tokens_stay(self, form: Callable[[Path], None], clip_folder: Path, tmp_path: Path) -> None:
        """In added_tokens.json alone: a tokenizer.json of another day does not have them."""
        source, written = tmp_path / "source", tmp_path / "written"
        shutil.copytree(clip_folder, source)
        written.mkdir()
        form(source)
        added = {"<thing>": 759, "<other thing>": 760}
        (source / "added_tokens.json").write_text(json.dumps(added))
        proof = write_tokenizer(written, source, "source", 248).proof
        assert proof == "equal ids to the source's for 11 texts, with each of 4 added tokens"
        assert json.loads((written / "added_tokens.json").read_text()) == added
        text = "an <other thing> beside a <thing>s"
        for use_fast in (True, False):
            theirs, ours = (AutoTokenizer.from_pretrained(place, use_fast=use_fast) for place in (source, written))
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
            assert {759, 760} < set(ours(text)["input_ids"])
        (written / "added_tokens.json").unlink()
        if form is _all:  # as it was written before
            lost = AutoTokenizer.from_pretrained(written)
            with pytest.raises(ProofError, match=r"gives 2 of 11 texts other ids .* 'A photo of <other thing> beside"):
                prove_same_ids(lost, AutoTokenizer.from_pretrained(source))

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "name holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt.* --processor"),
            ({"vocab.json": "{}"}, "name holds no tokenizer"),
            ({"tokenizer.json": '{"model": {"type": "WordPiece", "vocab": {}}}'}, "its model is 'WordPiece', not BPE"),
            ({"tokenizer.json": '{"model": {"type": "Unigram", "vocab": []}}'}, "its model is 'Unigram', not BPE"),
            ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "is no CLIP tokenizer"),
            ({"tokenizer.json": "{}"}, "its model is None, not BPE"),
            ({"tokenizer.json": "[1]"}, "tokenizer.json holds no JSON object, but a list"),
            ({"tokenizer.json": '{"model"'}, "tokenizer.json is no JSON file"),
            ({"tokenizer_config.json": "oops"}, "tokenizer_config.json is no JSON file"),
            ({"vocab.json": "{", "merges.txt": ""}, "name: vocab.json and merges.txt make no CLIP tokenizer"),
            (
                {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'},
                r"name: the tokenizer's EOT token '<\|endoftext\|>' is not in its vocabulary",
            ),
        ],
        ids=[
            "nothing",
            "no merges",
            "bert",
            "t5",
            "no vocabulary",
            "no model",
            "list",
            "cut",
            "settings",
            "vocab",
            "no EOT",
        ],
    )
    def test_what_is_no_clip_tokenizer_is_refused(self, files: dict[str, str], message: str, tmp_path: Path) -> None:
        for name in ("source", "written"):
            (tmp_path / name).mkdir()
        for name, text in files.items():
            (tmp_path / "source" / name).write_text(text)
        with pytest.raises(LongCLIPError, match=message):
            write_tokenizer(tmp_path / "written", tmp_path / "source", "name", 248)


def image_processor(folder: Path, clip_folder: Path) -> Any:
    """Of the class that AutoProcessor takes; AutoImageProcessor asks for torchvision in the first releases of 5."""
    return type(AutoProcessor.from_pretrained(clip_folder, use_fast=False).image_processor).from_pretrained(folder)


def pixels(folder: Path, clip_folder: Path) -> torch.Tensor:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    return image_processor(folder, clip_folder)(image, return_tensors="pt")["pixel_values"]


class TestImageProcessor:
    @pytest.mark.parametrize("form", ["openai", "resaved", "processor_config"])
    def test_pixels_are_the_sources(self, form: str, clip_folder: Path, tmp_path: Path) -> None:
        source, written = tmp_path / "source", tmp_path / "written"
        source.mkdir()
        written.mkdir()
        old = json.loads((clip_folder / "preprocessor_config.json").read_text())
        assert old["feature_extractor_type"] == "CLIPFeatureExtractor" and old["size"] == old["crop_size"] == 32
        if form == "openai":
            shutil.copy(clip_folder / "preprocessor_config.json", source)
        else:
            image_processor(clip_folder, clip_folder).save_pretrained(source)
        if form == "processor_config":
            file = source / "preprocessor_config.json"
            nested = {"image_processor": json.loads(file.read_text()), "processor_class": "CLIPProcessor"}
            (source / "processor_config.json").write_text(json.dumps(nested))
            file.unlink()
        write_image_processor(written, source, "source")
        ours = pixels(written, clip_folder)
        assert ours.shape == (1, 3, 32, 32) and ours.std() > 0.1
        assert torch.equal(ours, pixels(clip_folder, clip_folder))
        settings = json.loads((written / "preprocessor_config.json").read_text())
        assert settings["image_processor_type"] == "CLIPImageProcessor"
        assert "feature_extractor_type" not in settings

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "name holds no image settings: .* --processor"),
            ({"processor_config.json": '{"processor_class": "CLIPProcessor"}'}, "name holds no image settings"),
            ({"preprocessor_config.json": "{"}, "preprocessor_config.json is no JSON file"),
        ],
    )
    def test_without_settings_there_is_none(self, files: dict[str, str], message: str, tmp_path: Path) -> None:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(LongCLIPError, match=message):
            write_image_processor(tmp_path, tmp_path, "name")


def test_the_code_is_the_packages(tmp_path: Path) -> None:
    write_code(tmp_path)
    package = Path(folder_module.modeling_longclip.__file__).parent
    assert tree(tmp_path) == {file.name: file.read_bytes() for file in folder_module.CODE_FILES}
    assert {file.name for file in package.glob("*.py")} - tree(tmp_path).keys() == {"__init__.py"}


def test_a_lost_card_template_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_CARD_PLACES", (tmp_path / "model_card.md",))
    with pytest.raises(ConversionError, match=r"The card's template is missing: .*model_card.md"):
        write_card(tmp_path, ModelCardData())
