"""The command from end to end: what it writes, what it says, and what it leaves when something goes wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fork_server
import pytest
import torch
from conftest import run_python
from hub_server import HubServer
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
)

from examples.random_clip import SENTENCES, SIZES, write_checkpoint
from longclip_hf.conversion import folder as folder_module
from longclip_hf.conversion import tensors
from longclip_hf.conversion.checkpoint import DERIVED_BUFFERS, POSITION_TABLE
from longclip_hf.conversion.positions import stretch_positions
from longclip_hf.conversion.stretch import main, stretch
from longclip_hf.errors import ConversionError, FileError
from modeling_longclip import LongCLIPConfig, LongCLIPModel, LongCLIPTextModel, LongCLIPTextModelWithProjection
from modeling_longclip.compat import features

Capture = pytest.CaptureFixture[str]
Copy = Callable[[Path], Path]
Edit = Callable[..., None]
Patch = pytest.MonkeyPatch

CHECKOUT = Path(__file__).parents[2]
CLAIMS = ("kept rows", "stretched rows", "other tensors", "short texts", "token ids")
FILES = {
    "README.md", "compat.py", "config.json", "configuration_longclip.py", "defaults.py", "merges.txt",
    "model.safetensors", "modeling_longclip.py", "preprocessor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json",
}  # fmt: skip


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`main` listens to SIGTERM; the process of the tests does not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def numbered_clip(copy_of: Copy, clip_folder: Path, set_tensors: Edit) -> Path:
    """A CLIP in whose table row i is filled with i: stretched, it shows where each new row stands."""
    folder = copy_of(clip_folder)
    set_tensors(folder, {POSITION_TABLE: torch.arange(77.0)[:, None].expand(77, 32).contiguous()})
    return folder


@pytest.fixture
def text_tower(tmp_path: Path, clip_folder: Path) -> Path:
    """A text tower and nothing else: no tokenizer, no image settings."""
    CLIPTextModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "text-tower")
    return tmp_path / "text-tower"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in names(folder)}


def where(folder: Path) -> list[float]:
    """The rows of a table whose columns are all the same."""
    table = load_file(folder / "model.safetensors")[POSITION_TABLE]
    assert torch.equal(table, table[:, :1].expand_as(table))
    return table[:, 0].tolist()


def encode(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return features(model.eval().get_text_features(**inputs))


def refusal(args: list[str], capsys: Capture) -> str:
    """The one message of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


class TestResult:
    def test_says_what_is_proven_and_how_to_load_it(
        self, clip_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        assert main([str(clip_folder), "--output", str(tmp_path / "long")]) == 0
        out, _ = capsys.readouterr()
        proofs = dict(re.findall(r"│ (\w+ \w+)\s+│ (.*?)\s+│", out))
        assert tuple(proofs) == CLAIMS
        assert proofs["kept rows"] == "rows 0 ... 19 bit-identical"
        assert re.fullmatch(
            r"228 rows within \S+ of eq\. 2 in float64 \(rounding explains \S+\)", proofs["stretched rows"]
        )
        assert proofs["other tensors"] == "77 tensors, 0.3 MB, bit-identical"
        assert proofs["short texts"].startswith("texts of 3, 8, 14, 20 tokens: largest change 0.0")
        # The two special tokens are all that was added to the vocabulary.
        assert re.fullmatch(
            r"equal ids to the source's for \d+ texts, with each of 2 added tokens", proofs["token ids"]
        )
        assert "77 -> 248" in out
        assert out.splitlines()[-2:] == [
            f"Load it with AutoModel.from_pretrained('{tmp_path}/long', trust_remote_code=True), or as plain CLIP.",
            "It reads 248 tokens; fine-tune it on long captions to make it understand them.",
        ]
        assert names(tmp_path / "long") == FILES
        card = (tmp_path / "long" / "README.md").read_text()
        assert all(f"| proven: {claim} | {result} |" in card for claim, result in proofs.items())

    def test_tensors_are_the_sources_but_for_the_table(self, clip_folder: Path, longclip_folder: Path) -> None:
        old, new = (load_file(folder / "model.safetensors") for folder in (clip_folder, longclip_folder))
        assert list(old) == list(new)
        assert [name for name in old if not torch.equal(old[name], new[name])] == [POSITION_TABLE]
        assert torch.equal(new[POSITION_TABLE], stretch_positions(old[POSITION_TABLE]))

    def test_short_texts_and_images_have_the_features_that_they_had(
        self, clip_folder: Path, longclip_folder: Path
    ) -> None:
        old, new = CLIPModel.from_pretrained(clip_folder), LongCLIPModel.from_pretrained(longclip_folder)
        inputs = AutoTokenizer.from_pretrained(longclip_folder)(list(SENTENCES), padding=True, return_tensors="pt")
        assert inputs["input_ids"].shape[1] <= 20
        assert torch.equal(encode(old, inputs), encode(new, inputs))
        pixel_values = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            old_image, new_image = (
                features(m.eval().get_image_features(pixel_values=pixel_values)) for m in (old, new)
            )
        assert torch.equal(old_image, new_image)

    def test_clip_model_and_long_clip_model_agree_on_long_texts(self, longclip_folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(longclip_folder)
        texts = [" and ".join(SENTENCES), " and ".join(SENTENCES * 9), SENTENCES[0]]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        assert inputs["attention_mask"].sum(dim=1).tolist()[1] == 248
        stock, ours = (encode(c.from_pretrained(longclip_folder), inputs) for c in (CLIPModel, LongCLIPModel))
        assert torch.equal(stock, ours)
        cut = encode(
            LongCLIPModel.from_pretrained(longclip_folder),
            tokenizer(texts[1], truncation=True, max_length=77, return_tensors="pt"),
        )
        assert (cut - ours[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
    def test_every_official_size(self, size: str, tmp_path: Path) -> None:
        dtype = "float16" if size in ("ViT-H/14", "ViT-bigG/14") else "float32"
        write_checkpoint(tmp_path / "clip", size, dtype, layers=1, full_vocabulary=False)
        report = stretch(str(tmp_path / "clip"), tmp_path / "long")
        assert (report.rows, report.length, report.dtype) == (77, 248, dtype)
        assert tuple(report.proofs) == CLAIMS
        assert "largest change 0.0" in report.proofs["short texts"]
        stock, ours = (c.from_pretrained(tmp_path / "long", dtype=dtype) for c in (CLIPModel, LongCLIPModel))
        width, projection = SIZES[size]["text"][0], SIZES[size]["projection"]
        assert ours.text_model.embeddings.position_embedding.weight.shape == (248, width)
        inputs = AutoTokenizer.from_pretrained(tmp_path / "long")(" ".join(SENTENCES), return_tensors="pt")
        assert inputs["input_ids"].shape[1] > 77
        encoded = encode(ours, inputs)
        assert encoded.shape == (1, projection) and encoded.isfinite().all()
        assert torch.equal(encode(stock, inputs), encoded)

    @pytest.mark.parametrize(
        ("stock", "ours"),
        [(CLIPTextModel, LongCLIPTextModel), (CLIPTextModelWithProjection, LongCLIPTextModelWithProjection)],
    )
    def test_a_text_tower_stays_one(
        self, stock: type, ours: type, clip_folder: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        stock.from_pretrained(clip_folder).save_pretrained(tmp_path / "text")
        output = tmp_path / "long"
        assert main([str(tmp_path / "text"), "--output", str(output), "--processor", str(clip_folder)]) == 0
        assert names(output) == FILES - {"preprocessor_config.json"}
        config = json.loads((output / "config.json").read_text())
        assert config["model_type"] == "clip_text_model"
        assert config["architectures"] == [stock.__name__]
        assert config["auto_map"]["AutoModel"] == f"modeling_longclip.{ours.__name__}"
        inputs = AutoTokenizer.from_pretrained(output)(" ".join(SENTENCES), return_tensors="pt")
        with torch.inference_mode():
            outputs = [c.from_pretrained(output).eval()(**inputs)[0] for c in (stock, ours)]
        assert torch.equal(*outputs)

    def test_openais_old_form(
        self,
        clip_folder: Path,
        copy_of: Copy,
        to_old_form: Edit,
        tmp_path: Path,
        capsys: Capture,
    ) -> None:
        source = copy_of(clip_folder)
        to_old_form(source, "patch32")
        assert main([str(source), "--output", str(tmp_path / "long")]) == 0
        out, _ = capsys.readouterr()
        assert re.findall(r"Not carried over: (\S+),", out) == list(DERIVED_BUFFERS)
        text = json.loads((tmp_path / "long" / "config.json").read_text())["text_config"]
        assert (text["eos_token_id"], text["max_position_embeddings"], text["keep"]) == (758, 248, 20)
        inputs = AutoTokenizer.from_pretrained(source)(list(SENTENCES), padding=True, return_tensors="pt")
        old, new = CLIPModel.from_pretrained(source), CLIPModel.from_pretrained(tmp_path / "long")
        assert old.config.text_config.eos_token_id == 2
        assert torch.equal(encode(old, inputs), encode(new, inputs))

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_shards_make_one_file(
        self,
        form: str,
        clip_folder: Path,
        longclip_folder: Path,
        copy_of: Copy,
        shard: Edit,
        tmp_path: Path,
    ) -> None:
        source = copy_of(clip_folder)
        shard(source, 3, form)
        stretch(str(source), tmp_path / "long")
        ours, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "long", longclip_folder))
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[name], whole[name]) for name in whole)

    def test_the_card_states_the_licence(self, clip_folder: Path, copy_of: Copy, tmp_path: Path) -> None:
        source = copy_of(clip_folder)
        (source / "README.md").write_text("---\nlicense: mit\n---\n")
        stretch(str(source), tmp_path / "long")
        card = (tmp_path / "long" / "README.md").read_text()
        assert "license: mit" in card
        assert "{{" not in card and "{%" not in card and str(tmp_path) not in card

    @pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
    def test_the_card_states_the_cast(self, dtype: str | None, clip_folder: Path, tmp_path: Path) -> None:
        stretch(str(clip_folder), tmp_path / "long", dtype=dtype)
        card = (tmp_path / "long" / "README.md").read_text()
        assert (f"All weights were cast to {dtype}." in card) == (dtype is not None)
        assert ("No other weight was changed." in card) == (dtype is None)

    @pytest.mark.parametrize("keep", [0, 1, 2, 3, 20])
    def test_the_card_claims_short_texts_where_there_are_any(
        self, keep: int, clip_folder: Path, tmp_path: Path
    ) -> None:
        report = stretch(str(clip_folder), tmp_path / "long", keep=keep)
        card = " ".join((tmp_path / "long" / "README.md").read_text().split())
        claimed = f"Texts of up to {keep} tokens have exactly the features that they had. Longer texts are read"
        assert (claimed in card) == (keep > 2) == ("largest change 0.0" in report.proofs["short texts"])
        assert ("All features of texts have changed. Long texts are read" in card) == (keep <= 2)
        assert ("exactly the features" in card) == (keep > 2)

    def test_float64_stays_float64(self, clip_folder: Path, copy_of: Copy, set_tensors: Edit, tmp_path: Path) -> None:
        source, draw = copy_of(clip_folder), torch.Generator().manual_seed(0)
        old = {name: t.double() for name, t in load_file(source / "model.safetensors").items()}
        old[POSITION_TABLE] = torch.randn(77, 32, generator=draw, dtype=torch.float64)
        assert not torch.equal(old[POSITION_TABLE], old[POSITION_TABLE].float().double())
        set_tensors(source, old)
        report = stretch(str(source), tmp_path / "long")
        new = load_file(tmp_path / "long" / "model.safetensors")
        assert report.dtype == "float64" and "largest change 0.0" in report.proofs["short texts"]
        assert torch.equal(new[POSITION_TABLE][:20], old[POSITION_TABLE][:20])
        assert torch.equal(new[POSITION_TABLE][20::4], old[POSITION_TABLE][20:])
        assert all(torch.equal(new[name], old[name]) for name in old if name != POSITION_TABLE)


class TestOptions:
    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            ([], [*range(20), *(20 + n / 4 for n in range(228))]),
            (["--length", "100"], [*range(20), *(20 + n / 4 for n in range(80))]),
            (["--keep", "30"], [*range(30), *(30 + n / 4 for n in range(188))]),
            (["--ratio", "8"], [*range(20), *(20 + n / 8 for n in range(456))]),
            (["--keep", "30", "--ratio", "8", "--length", "400"], [*range(30), *(30 + n / 8 for n in range(370))]),
            (["--length", "78"], [*range(20), *(20 + n / 4 for n in range(58))]),
            (["--keep", "76", "--ratio", "2"], [*range(77), 76.5]),
            (["--keep", "0", "--ratio", "2"], [n / 2 for n in range(154)]),
            (["--method", "linear", "--ratio", "4"], [n / 4 for n in range(308)]),
            (["--arithmetic", "float16"], [*range(20), *(20 + n / 4 for n in range(228))]),
        ],
        ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
    )
    def test_rows_worked_by_hand(
        self,
        args: list[str],
        expected: list[float],
        numbered_clip: Path,
        tmp_path: Path,
        capsys: Capture,
    ) -> None:
        output = tmp_path / "long"
        assert main([str(numbered_clip), "--output", str(output), *args]) == 0
        assert where(output) == expected
        assert CLIPConfig.from_pretrained(output).text_config.max_position_embeddings == len(expected)
        assert AutoTokenizer.from_pretrained(output).model_max_length == len(expected)
        assert f"77 -> {len(expected)}" in capsys.readouterr().out

    def test_linear_is_the_baseline_of_231(self, numbered_clip: Path, tmp_path: Path) -> None:
        report = stretch(str(numbered_clip), tmp_path / "long", method="linear")
        assert (report.keep, report.ratio, report.length) == (0, 3, 231)
        assert where(tmp_path / "long") == pytest.approx([n / 3 for n in range(231)], rel=1e-6)
        assert where(tmp_path / "long")[::3] == list(range(77))
        assert report.proofs["kept rows"] == "no row is kept"
        assert report.proofs["short texts"].startswith("not claimed")
        text = json.loads((tmp_path / "long" / "config.json").read_text())["text_config"]
        assert (text["stretch_method"], text["keep"], text["ratio"]) == ("linear", 0, 3)

    def test_float16_arithmetic_is_the_released_codes(
        self, clip_folder: Path, longclip_folder: Path, tmp_path: Path
    ) -> None:
        stretch(str(clip_folder), tmp_path / "long", arithmetic="float16")
        table = load_file(tmp_path / "long" / "model.safetensors")[POSITION_TABLE]
        old = load_file(clip_folder / "model.safetensors")[POSITION_TABLE]
        assert table.dtype == torch.float32
        assert torch.equal(table[20:], table[20:].half().float())
        assert torch.equal(table[:20], old[:20]) and not torch.equal(old[:20], old[:20].half().float())
        assert torch.equal(table, stretch_positions(old, arithmetic="float16"))
        text = json.loads((tmp_path / "long" / "config.json").read_text())["text_config"]
        assert text["stretch_arithmetic"] == "float16"

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("own", ["float32", "float16"])
    def test_dtype_casts_every_tensor(self, dtype: str, own: str, tmp_path: Path, capsys: Capture) -> None:
        write_checkpoint(tmp_path / "clip", "tiny", own, full_vocabulary=False)
        output = tmp_path / "long"
        assert main([str(tmp_path / "clip"), "--output", str(output), "--dtype", dtype]) == 0
        old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "clip", output))
        assert {tensor.dtype for tensor in new.values()} == {getattr(torch, dtype)}
        expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in old.items()}
        expected[POSITION_TABLE] = stretch_positions(expected[POSITION_TABLE])
        assert all(torch.equal(new[name], expected[name]) for name in old)
        assert json.loads((output / "config.json").read_text())["dtype"] == dtype
        assert LongCLIPModel.from_pretrained(output, dtype="auto").dtype == getattr(torch, dtype)

    def test_overwrite_replaces_the_folder(self, clip_folder: Path, tmp_path: Path, capsys: Capture) -> None:
        output = tmp_path / "long"
        assert main([str(clip_folder), "--output", str(output), "--length", "100"]) == 0
        (output / "stale").touch()
        capsys.readouterr()
        assert "long exists already" in refusal([str(clip_folder), "--output", str(output)], capsys)
        assert AutoTokenizer.from_pretrained(output).model_max_length == 100
        assert main([str(clip_folder), "--output", str(output), "--overwrite"]) == 0
        assert AutoTokenizer.from_pretrained(output).model_max_length == 248
        assert names(tmp_path) == {"long", *(f"long/{name}" for name in FILES)}

    def test_overwrite_leaves_what_is_no_checkpoint(self, clip_folder: Path, tmp_path: Path, capsys: Capture) -> None:
        photos = tmp_path / "photos"
        (photos / "2024").mkdir(parents=True)
        for file in (photos / "one.jpg", photos / "2024" / "two.jpg"):
            file.write_bytes(b"mine")
        before = contents(tmp_path)
        message = refusal([str(clip_folder), "--output", str(photos), "--overwrite"], capsys)
        assert message.startswith(f"{photos} holds files and no checkpoint (no config.json)")
        assert contents(tmp_path) == before

    def test_overwrite_fills_an_empty_folder(self, clip_folder: Path, tmp_path: Path, capsys: Capture) -> None:
        (tmp_path / "long").mkdir()
        assert main([str(clip_folder), "--output", str(tmp_path / "long"), "--overwrite"]) == 0
        assert names(tmp_path) == {"long", *(f"long/{name}" for name in FILES)}

    @pytest.mark.parametrize("overwrite", [["--overwrite"], []], ids=["overwrite", ""])
    @pytest.mark.parametrize("output", ["here/clip", "./here/../here/clip/", "link", "here", ".", ".."])
    def test_the_source_is_never_replaced(
        self, output: str, overwrite: list[str], clip_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
    ) -> None:
        """Nor what it lies in, though that looks like a checkpoint."""
        monkeypatch.chdir(tmp_path)
        shutil.copytree(clip_folder, "here/clip")
        for folder in (tmp_path / "here", tmp_path):
            (folder / "config.json").write_text("{}")
        (tmp_path / "link").symlink_to("here/clip")
        before = contents(tmp_path)
        for source in ("here/clip", str(tmp_path / "here" / "clip"), "link"):
            message = refusal([source, "--output", output, *overwrite], capsys)
            assert message.startswith(f"{Path(output)} is or holds the source {source}, which stays.")
        assert contents(tmp_path) == before

    def test_beside_and_below_the_source_is_room(self, clip_folder: Path, copy_of: Copy, tmp_path: Path) -> None:
        source = copy_of(clip_folder)
        before = contents(source)
        for output in (source / "long", tmp_path / f"{source.name}-long"):
            stretch(str(source), output, overwrite=True)
            assert names(output) == FILES
        shutil.rmtree(source / "long")
        assert contents(source) == before

    @pytest.mark.parametrize(
        ("own", "dtype", "size"),
        [("float16", None, 2), ("float16", "float32", 4), ("float32", None, 4), ("float32", "float16", 2)],
    )
    def test_room_is_asked_for_what_is_written(
        self, own: str, dtype: str | None, size: int, tmp_path: Path, monkeypatch: Patch
    ) -> None:
        write_checkpoint(tmp_path / "clip", "tiny", own, full_vocabulary=False)
        values = sum(tensor.numel() for tensor in load_file(tmp_path / "clip" / "model.safetensors").values())
        needed = size * (values + 248 * 32) + 20_000_000
        usage, before = shutil.disk_usage(tmp_path), names(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(FileError, match="has 20 MB free and 20 MB are needed"):
            stretch(str(tmp_path / "clip"), tmp_path / "long", dtype=dtype)
        assert names(tmp_path) == before
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        assert stretch(str(tmp_path / "clip"), tmp_path / "long", dtype=dtype).nbytes < needed

    def test_the_default_output_stands_here(
        self, clip_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main([str(clip_folder)]) == 0
        assert names(tmp_path / "long-tiny-clip") == FILES

    @pytest.mark.parametrize("name", ["[bold]long", "[/]long", "long clip's", "lång"])
    def test_any_name_is_an_output(
        self,
        name: str,
        clip_folder: Path,
        tmp_path: Path,
        capsys: Capture,
        monkeypatch: Patch,
    ) -> None:
        monkeypatch.setenv("COLUMNS", "300")
        assert main([str(clip_folder), "--output", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.count(name) >= 2
        assert names(tmp_path / name) == FILES

    def test_a_tokenizer_that_is_another_models_is_refused(
        self,
        text_tower: Path,
        clip_folder: Path,
        copy_of: Copy,
        tmp_path: Path,
        capsys: Capture,
    ) -> None:
        processor = copy_of(clip_folder)
        vocab = json.loads((processor / "vocab.json").read_text())
        vocab["<|endoftext|>"] = 49407
        (processor / "vocab.json").write_text(json.dumps(vocab))
        before = names(tmp_path)
        message = refusal([str(text_tower), "--output", str(tmp_path / "long"), "--processor", str(processor)], capsys)
        assert "ends a text with id 49407" in message and "expects 758 among its 759 ids" in message
        assert names(tmp_path) == before


class TestRefused:
    def test_bad_sources(self, bad_source: tuple[Path, str], tmp_path: Path, capsys: Capture) -> None:
        folder, message = bad_source
        before = names(tmp_path)
        assert re.search(message, refusal([str(folder), "--output", str(tmp_path / "long")], capsys))
        assert names(tmp_path) == before

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--length", "249"], "77 rows with keep 20 and ratio 4 make 248, not 249 (ratio 5 would reach it)."),
            (["--length", "19"], "make 248, not 19 (keep is 20)."),
            (["--length", "30"], "has 77 positions already, and 30 would be no more. Ask for more."),
            (["--length", "77"], "has 77 positions already, and 77 would be no more. Ask for more."),
            (["--ratio", "1"], "has 77 positions already, and 77 would be no more. Ask for more."),
            (["--keep", "77"], "has 77 positions already, and 77 would be no more. Ask for more."),
            (["--method", "linear", "--ratio", "1"], "has 77 positions already, and 77 would be no more."),
            (["--keep", "78"], "keep must be within 0 ... 77, the rows of the table, got 78."),
            (["--keep", "-1"], "keep must be within 0 ... 77, the rows of the table, got -1."),
            (["--ratio", "0"], "ratio must be at least 1, got 0."),
            (["--method", "linear", "--keep", "20"], "The linear method keeps no row, got --keep 20."),
            (["--revision", "main"], "is a folder, and --revision main is for Hub ids."),
            (["--processor", "./nowhere"], "./nowhere: no such folder."),
            (["--private"], "--private is for --push-to-hub REPO, which is missing."),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options_that_do_not_fit(
        self, args: list[str], message: str, clip_folder: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        assert message in refusal([str(clip_folder), "--output", str(tmp_path / "long"), *args], capsys)
        assert names(tmp_path) == set()

    @pytest.mark.parametrize(
        "args", [["--arithmetic", "int8"], ["--dtype", "int8"], ["--method", "cubic"], ["--keep", "x"], []]
    )
    def test_options_that_are_none(self, args: list[str], tmp_path: Path, capsys: Capture) -> None:
        with pytest.raises(SystemExit) as caught:
            main([*args, *(["source"] if args else [])])
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err

    def test_the_same_arguments_from_python(self, clip_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(
            ConversionError, match=r"method must be one of knowledge-preserving, linear, got 'cubic'\."
        ):
            stretch(str(clip_folder), tmp_path / "long", method="cubic")
        with pytest.raises(ConversionError, match=r"dtype must be one of float32, float16, bfloat16, got 'foo'\."):
            stretch(str(clip_folder), tmp_path / "long", dtype="foo")
        with pytest.raises(ConversionError, match=r"arithmetic must be one of float32, float16, got 'foo'\."):
            stretch(str(clip_folder), tmp_path / "long", arithmetic="foo")
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("kind", ["ours", "ours, text tower", "stock of 248 rows"])
    def test_a_stretched_checkpoint(
        self,
        kind: str,
        longclip_folder: Path,
        copy_of: Copy,
        tmp_path: Path,
        capsys: Capture,
    ) -> None:
        source = copy_of(longclip_folder)
        if kind == "ours, text tower":
            LongCLIPTextModel.from_pretrained(longclip_folder).save_pretrained(source)
        elif kind == "stock of 248 rows":
            config = json.loads((source / "config.json").read_text())
            for name in ("keep", "ratio", "stretch_method", "stretch_arithmetic"):
                del config["text_config"][name]
            del config["auto_map"]
            (source / "config.json").write_text(json.dumps(config))
        before = names(tmp_path)
        message = refusal([str(source), "--output", str(tmp_path / "long")], capsys)
        assert re.search(r"already a Long-CLIP of 248 positions|has 248 positions already; CLIP has 77", message)
        assert names(tmp_path) == before

    def test_a_text_tower_without_a_tokenizer(self, text_tower: Path, tmp_path: Path, capsys: Capture) -> None:
        before = names(tmp_path)
        message = refusal([str(text_tower), "--output", str(tmp_path / "long")], capsys)
        assert "holds no tokenizer" in message and "--processor" in message
        assert names(tmp_path) == before

    def test_a_clip_without_image_settings(
        self, clip_folder: Path, copy_of: Copy, tmp_path: Path, capsys: Capture
    ) -> None:
        source = copy_of(clip_folder)
        (source / "preprocessor_config.json").unlink()
        before = names(tmp_path)
        message = refusal([str(source), "--output", str(tmp_path / "long")], capsys)
        assert "holds no image settings" in message and "--processor" in message
        assert names(tmp_path) == before

    def test_unknown_sources(self, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        assert "./nowhere: no such folder." in refusal(["./nowhere"], capsys)
        assert "nobody/nothing: no such folder here, and the Hub gave no such model" in refusal(
            ["nobody/nothing"], capsys
        )
        (tmp_path / "file").touch()
        assert "file is a file. Name the folder that holds it" in refusal(["file"], capsys)
        assert names(tmp_path) == {"file"}

    @pytest.mark.parametrize("limit", [0, 500, 3_000, 12_000, 40_000, 200_000])
    def test_a_disk_that_is_full_at_any_write(
        self, limit: int, clip_folder: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        """No file may grow beyond `limit` bytes: settings, vocabulary, code and weights are met one after another."""
        resource = pytest.importorskip("resource", reason="limits of POSIX")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            code = main([str(clip_folder), "--output", str(tmp_path / "long")])
            said = capsys.readouterr().err
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 2 and "could not be written" in said
        assert names(tmp_path) == set()

    def test_a_full_disk(self, clip_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
        def full(*args: object, **kwargs: object) -> int:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "copy_file_range", full)
        message = refusal([str(clip_folder), "--output", str(tmp_path / "long")], capsys)
        assert message == f"{tmp_path}/long could not be written: [Errno 28] No space left on device."
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_an_interrupted_command(
        self, overwrite: bool, clip_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
    ) -> None:
        def interrupted(*args: object, **kwargs: object) -> int:
            raise KeyboardInterrupt

        if overwrite:
            shutil.copytree(clip_folder, tmp_path / "long")
        before = contents(tmp_path)
        monkeypatch.setattr(os, "copy_file_range", interrupted)
        assert main([str(clip_folder), "--output", str(tmp_path / "long"), *["--overwrite"] * overwrite]) == 130
        out, err = capsys.readouterr()
        assert (out, err.strip()) == ("", "Interrupted; nothing was left behind.")
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("claim", CLAIMS)
    def test_a_proof_that_fails(
        self,
        claim: str,
        clip_folder: Path,
        tmp_path: Path,
        monkeypatch: Patch,
        capsys: Capture,
    ) -> None:
        """A fault of the writing, of each kind that a proof is there to find."""
        write = tensors.write_safetensors

        def wrongly(file: Path, written: dict, *args: object, **kwargs: object) -> None:
            name = POSITION_TABLE if "rows" in claim else "logit_scale"
            value = written[name] if isinstance(written[name], torch.Tensor) else written[name].load()
            value = value.clone()
            value.view(-1)[{"kept rows": 5 * 32, "stretched rows": 100 * 32}.get(claim, 0)] += 0.5
            write(file, {**written, name: value}, *args, **kwargs)

        def wrong_config(work: Path, config: LongCLIPConfig, *args: object) -> None:
            config.text_config.hidden_act = "relu"
            write_config(work, config, *args)

        def wrong_words(file: Path, value: dict) -> None:
            if file.name == "tokenizer.json":
                vocab = value["model"]["vocab"]
                vocab["a</w>"], vocab["b</w>"] = vocab["b</w>"], vocab["a</w>"]
            write_json(file, value)

        write_config, write_json = folder_module.write_config, folder_module.write_json
        if claim == "token ids":
            monkeypatch.setattr(folder_module, "write_json", wrong_words)
        elif claim == "short texts":
            monkeypatch.setattr(folder_module, "write_config", wrong_config)
        else:
            monkeypatch.setattr(tensors, "write_safetensors", wrongly)
        message = refusal([str(clip_folder), "--output", str(tmp_path / "long")], capsys)
        expected = {
            "kept rows": "One of the 20 rows to keep differs",
            "stretched rows": "The stretched rows differ from eq. 2 by 5.00e-01",
            "other tensors": "1 tensors differ from the source after writing: logit_scale",
            "short texts": "The features of texts of [3, 8, 14, 20] tokens changed",
            "token ids": "gives 4 of 9 texts other ids than its source, the first of them 'A brown dog",
        }
        assert expected[claim] in message
        assert names(tmp_path) == set()


# Copies a little of the weights, says so, and sleeps.
STALLED = """
import signal, sys, time
from longclip_hf.conversion import tensors
from longclip_hf.conversion.stretch import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

copy = tensors.copy_range

def stall(source, offset, count, stream, on_bytes):
    copy(source, offset, min(count, 1000), stream, on_bytes)
    print("copying", flush=True)
    time.sleep(120)

tensors.copy_range = stall
sys.exit(main(sys.argv[1:]))
"""


class TestProcess:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_killed_half_way_leaves_nothing_that_looks_finished(
        self, number: signal.Signals, clip_folder: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        args = [str(clip_folder), "--output", str(tmp_path / "long")]
        with fork_server.Fork([sys.executable, "-c", STALLED, *args]) as child:
            limit = time.monotonic() + 60
            while child.printed()[0] != "copying\n" and time.monotonic() < limit:
                time.sleep(0.02)
            assert child.printed()[0] == "copying\n"
            (work,) = tmp_path.iterdir()
            assert (work / "model.safetensors").stat().st_size > 1000
            child.send_signal(number)
            _, errors = child.communicate(timeout=60)
            assert child.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
            assert ("Interrupted; nothing was left behind." in errors) == (number != signal.SIGKILL)
            assert "Traceback" not in errors
        left = {path.name for path in tmp_path.iterdir()}
        assert left == ({work.name} if number == signal.SIGKILL else set())
        assert re.fullmatch(r"\.long\..*\.incomplete", work.name)
        assert main(args) == 0
        assert names(tmp_path / "long") == FILES
        assert {path.name for path in tmp_path.iterdir()} == {"long"}
        said = " ".join(capsys.readouterr().err.split())
        assert (f"{work.name}, left by a run that was killed" in said) == (number == signal.SIGKILL)

    def test_runs_by_path_from_anywhere(self, clip_folder: Path, longclip_folder: Path, tmp_path: Path) -> None:
        script = CHECKOUT / "conversion" / "stretch.py"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(script), str(clip_folder)],
            capture_output=True, text=True, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert (done.returncode, done.stderr.strip()) == (0, "")
        assert all(claim in done.stdout for claim in CLAIMS)
        output = tmp_path / "long-tiny-clip"
        assert names(output) == FILES
        for name in FILES - {"README.md"}:
            assert (output / name).read_bytes() == (longclip_folder / name).read_bytes()

    def test_runs_in_a_thread(self, clip_folder: Path, tmp_path: Path, capsys: Capture) -> None:
        """Where Python lets nobody set signals, as in a notebook's or a server's worker."""
        before = signal.getsignal(signal.SIGTERM)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(main, [str(clip_folder), "--output", str(tmp_path / "long")]).result(120) == 0
        assert signal.getsignal(signal.SIGTERM) == before
        assert names(tmp_path / "long") == FILES

    def test_help_teaches(self, capsys: Capture) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        examples = re.findall(r"python conversion/stretch\.py \S+", shown)
        assert len(examples) >= 3
        for said in (
            "248",
            "default: 20",
            "default: 4",
            "231",
            "eq. 2",
            "bit for bit",
            "fine-tuned",
            "--push-to-hub REPO",
        ):
            assert said in shown

    def test_help_does_not_wait_for_torch(self) -> None:
        code = (
            "import sys, runpy\n"
            f"sys.argv = ['stretch.py', '--help']\n"
            f"try: runpy.run_path({str(CHECKOUT / 'conversion' / 'stretch.py')!r}, run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
        )
        assert run_python(code, fresh=True).splitlines()[-1] == "[]"

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_from_the_hub_and_back(self, form: str, clip_folder: Path, copy_of: Copy, tmp_path: Path) -> None:
        source = copy_of(clip_folder)
        (source / "README.md").write_text("---\nlicense: mit\n---\n")
        for unwanted in ("flax_model.msgpack", "tf_model.h5", "training.log"):
            (source / unwanted).write_bytes(b"0" * 1000)
        if form == "bin":
            torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
            (source / "model.safetensors").unlink()
            # It has not the token of added_tokens.json, which transformers adds to it.
            built = CLIPTokenizerFast.from_pretrained(source)
            (source / "tokenizer.json").write_text(built.backend_tokenizer.to_str())
        token = json.dumps({"<thing>": len(json.loads((source / "vocab.json").read_text()))})
        (source / "added_tokens.json").write_text(token)
        files = FILES | {"added_tokens.json"}
        with HubServer(tmp_path / "hub", lfs_threshold=100_000) as hub:
            wanted = hub.add_repo("user/clip", source)
            (source / "config.json").write_text("{}")
            hub.add_repo("user/clip", source)
            run_python(
                f"from longclip_hf.conversion.stretch import main\n"
                f"assert main(['user/clip', '--revision', '{wanted}', '--push-to-hub', 'user/long']) == 0",
                hub.environment(),
                cwd=tmp_path,
            )
            pushed = hub.files("user/long")
            assert pushed.keys() == files | {".gitattributes"}
            output = tmp_path / "long-clip"
            assert all(pushed[name].read_bytes() == (output / name).read_bytes() for name in files)
            assert not any(name in path for name in ("flax", "tf_model", "training.log") for _, path in hub.requests)
        old, new = load_file(clip_folder / "model.safetensors"), load_file(output / "model.safetensors")
        assert [name for name in old if not torch.equal(old[name], new[name])] == [POSITION_TABLE]
        card = (output / "README.md").read_text()
        assert "base_model: user/clip" in card and "license: mit" in card
        assert "with each of 3 added tokens" in card
        for use_fast in (True, False):
            theirs, ours = (AutoTokenizer.from_pretrained(folder, use_fast=use_fast) for folder in (source, output))
            ids = theirs("a <thing> on the <thing>s")["input_ids"]
            assert ids == ours("a <thing> on the <thing>s")["input_ids"]
            assert ids.count(theirs.convert_tokens_to_ids("<thing>")) == 2
