"""The exported folder alone, against torch; and what is refused."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import run_python
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoProcessor, CLIPTextModelWithProjection

from benchmarks.exported_models import recall_drift, text_batches
from longclip_hf.conversion import towers
from longclip_hf.conversion.export import ExportReport, export, main
from longclip_hf.conversion.immich import rearrange
from longclip_hf.errors import ConversionError, ProofError
from longclip_hf.evaluation.benchmarks import ImageFile, Retrieval
from modeling_longclip import LongCLIPModel, LongCLIPTextModelWithProjection
from modeling_longclip.compat import features

Capture = pytest.CaptureFixture[str]
Copy = Callable[[Path], Path]
Edit = Callable[..., None]
Patch = pytest.MonkeyPatch

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
FILES = {
    "README.md", "config.json", "export.json", "merges.txt", "preprocessor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "onnx",
    "onnx/text_model.onnx", "onnx/text_model_fp16.onnx", "onnx/text_model_int8.onnx",
    "onnx/vision_model.onnx", "onnx/vision_model_fp16.onnx", "onnx/vision_model_int8.onnx",
}  # fmt: skip
# Smallest cosine with torch's features; that of fp32 is checked entry by entry.
COSINES = {"fp16": 0.9999, "int8": 0.99}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`main` listens to SIGTERM; the process of the tests does not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def exported(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    """`longclip_folder` in all precisions."""
    folder = tmp_path_factory.mktemp("exported") / "tiny-onnx"
    return folder, export(str(longclip_folder), folder, precisions=["int8", "fp16", "fp32"])


@pytest.fixture(scope="module")
def model(longclip_folder: Path) -> LongCLIPModel:
    loaded: LongCLIPModel = LongCLIPModel.from_pretrained(longclip_folder).eval()
    return loaded


@pytest.fixture(scope="module")
def text_tower(exported: tuple[Path, ExportReport]) -> Callable[[Any], np.ndarray]:
    session = onnxruntime.InferenceSession(exported[0] / "onnx" / "text_model.onnx")
    return lambda input_ids: session.run(["text_embeds"], {"input_ids": np.asarray(input_ids)})[0]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def encode(model: LongCLIPModel, **inputs: torch.Tensor) -> np.ndarray:
    method = model.get_text_features if "input_ids" in inputs else model.get_image_features
    with torch.inference_mode():
        return features(method(**inputs)).numpy()


def unit(embeds: np.ndarray) -> np.ndarray:
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def make_ids(model: LongCLIPModel, lengths: list[int], width: int, padding: int, seed: int = 0) -> torch.Tensor:
    """Texts of random tokens, of `lengths` with EOT, padded to `width`."""
    eos = model.config.text_config.eos_token_id
    ids = torch.randint(0, eos, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        ids[row, length - 1] = eos
        ids[row, length:] = padding
    return ids


class TestFiles:
    def test_the_folder(self, exported: tuple[Path, ExportReport]) -> None:
        assert names(exported[0]) == FILES
        assert [entry.name for entry in exported[0].parent.iterdir()] == ["tiny-onnx"]

    @pytest.mark.parametrize("tower", ["text_model", "vision_model"])
    @pytest.mark.parametrize("suffix", ["", "_fp16", "_int8"])
    def test_names_types_and_sizes(self, exported: tuple[Path, ExportReport], tower: str, suffix: str) -> None:
        graph = onnx.load(exported[0] / "onnx" / f"{tower}{suffix}.onnx")
        onnx.checker.check_model(graph)
        session = onnxruntime.InferenceSession(exported[0] / "onnx" / f"{tower}{suffix}.onnx")
        (given,), (made,) = session.get_inputs(), session.get_outputs()
        if tower == "text_model":
            assert (given.name, given.type, given.shape) == ("input_ids", "tensor(int64)", ["batch", "length"])
            assert (made.name, made.type, made.shape) == ("text_embeds", "tensor(float)", ["batch", 24])
        else:
            assert (given.name, given.type) == ("pixel_values", "tensor(float)")
            assert given.shape == ["batch", 3, 32, 32]
            assert (made.name, made.type, made.shape) == ("image_embeds", "tensor(float)", ["batch", 24])

    def test_what_is_in_which_precision(self, exported: tuple[Path, ExportReport]) -> None:
        """The large weights; the table of positions stays float32 in int8."""
        kinds = {}
        for suffix in ("", "_fp16", "_int8"):
            weights = onnx.load(exported[0] / "onnx" / f"text_model{suffix}.onnx").graph.initializer
            large = [weight for weight in weights if np.prod(weight.dims) >= 24 * 32]
            kinds[suffix] = {weight.name for weight in large if weight.data_type == onnx.TensorProto.FLOAT}
            types = {weight.data_type for weight in large}
            assert {"": 1, "_fp16": 10, "_int8": 3}[suffix] in types
        assert len(kinds[""]) == 2 * 6 + 3
        assert kinds["_fp16"] == set()
        assert len(kinds["_int8"]) == 1
        assert next(iter(kinds["_int8"])).endswith("position_embedding.weight")

    def test_nothing_of_this_machine(self, exported: tuple[Path, ExportReport]) -> None:
        """torch's exporter notes source lines, with paths."""
        for file in exported[0].rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                for trace in (str(Path.cwd()), sys.prefix, "site-packages", "stack_trace", str(exported[0].parent)):
                    assert trace.encode() not in content, file.name

    def test_the_record_and_the_card(self, exported: tuple[Path, ExportReport], model: LongCLIPModel) -> None:
        folder, report = exported
        record = json.loads((folder / "export.json").read_text())
        assert record["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
        assert (record["source"], record["length"], record["image_size"]) == ("tiny-longclip", 248, 32)
        assert [(file["tower"], file["precision"]) for file in record["files"]] == [
            (tower, precision) for tower in ("text", "image") for precision in ("fp32", "fp16", "int8")
        ]
        card = (folder / "README.md").read_text()
        for file in report.files:
            assert file.nbytes == (folder / file.name).stat().st_size
            assert file.milliseconds > 0
            assert f"| {file.name} | {file.nbytes / 1e6:.1f} | {file.milliseconds:.1f} |" in card
            if file.precision == "fp32":
                assert 0 < file.normalised <= 1e-4 and 0 < file.absolute <= 1e-4
            else:
                assert COSINES[file.precision] < file.cosine < 1
        assert {file.precision: report.files[0].nbytes > file.nbytes for file in report.files[1:3]} == {
            "fp16": True,
            "int8": True,
        }

    def test_the_processor_loads(self, exported: tuple[Path, ExportReport], longclip_folder: Path) -> None:
        ours, theirs = (AutoProcessor.from_pretrained(folder) for folder in (exported[0], longclip_folder))
        text = "a red bicycle leans against a white wall " * 60
        assert ours.tokenizer.model_max_length == 248
        assert ours.tokenizer(text, truncation=True) == theirs.tokenizer(text, truncation=True)


def saturated(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The product of `uint8` (rows, n) and `int8` (n, columns) as x86-64 computes it without VNNI.

    `vpmaddubsw` adds the products of neighbours in pairs, in 16 bits that saturate; the pairs are then added in 32.
    """
    rows, odd = activations.astype(np.int32), activations.shape[1] % 2
    rows, columns = np.pad(rows, ((0, 0), (0, odd))), np.pad(weights.astype(np.int32), ((0, odd), (0, 0)))
    products = np.zeros((len(rows), columns.shape[1]), np.int64)
    for first in range(0, rows.shape[1], 2):
        pair = rows[:, first : first + 2] @ columns[first : first + 2]
        products += pair.clip(-(2**15), 2**15 - 1)
    return products


def int8_products(file: Path, given: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Quantised activations (rows, n) and weights (n, columns) of each int8 product, for one input."""
    graph = onnx.load(file)
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMulInteger" and node.input[1] in weights]
    for name in {node.input[0] for node in products}:
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(names, {session.get_inputs()[0].name: given}), strict=True))
    assert len(products) == 2 * 6 + 1  # both layers' weights and the projection
    for node in products:
        activations = values[node.input[0]]
        yield activations.reshape(-1, activations.shape[-1]), weights[node.input[1]]


class TestInt8WithoutVNNI:
    @pytest.mark.parametrize("tower", ["text_model", "vision_model"])
    def test_no_pair_of_products_can_saturate(
        self, tower: str, exported: tuple[Path, ExportReport], tmp_path: Path, monkeypatch: Patch
    ) -> None:
        """Whatever the activations: their largest is 255. With 8 bits, those of a text and of an image do saturate."""
        folder, _ = exported
        given = towers.sample_images(32)[-1] if tower == "vision_model" else None
        given = towers.sample_texts(folder / "tokenizer.json", 248)[-1] if given is None else given
        for activations, weights in int8_products(folder / "onnx" / f"{tower}_int8.onnx", given[None]):
            assert weights.dtype == np.int8 and 2 * 255 * np.abs(weights.astype(int)).max() < 2**15
            assert np.abs(weights.astype(int)).max() == 64, "all of the range is used"
            exact = activations.astype(np.int64) @ weights.astype(np.int64)
            assert np.array_equal(saturated(activations, weights), exact)

        quantize = towers.quantize_dynamic
        monkeypatch.setattr(
            towers, "quantize_dynamic", lambda *args, **more: quantize(*args, **more | {"reduce_range": False})
        )
        towers.write_int8(folder / "onnx" / f"{tower}.onnx", tmp_path / "eight_bits.onnx")
        wrong = [
            not np.array_equal(saturated(activations, weights), activations.astype(int) @ weights.astype(int))
            for activations, weights in int8_products(tmp_path / "eight_bits.onnx", given[None])
        ]
        assert any(wrong)

    def test_saturation_by_hand(self) -> None:
        activations = np.array([[255, 255, 1], [2, 3, 4]], np.uint8)
        weights = np.array([[127, -128], [127, -128], [1, 2]], np.int8)
        assert saturated(activations, weights).tolist() == [[32767 + 1, -32768 + 2], [635 + 4, -640 + 8]]

    def test_the_table_of_words_keeps_eight_bits(self, exported: tuple[Path, ExportReport]) -> None:
        graph = onnx.load(exported[0] / "onnx" / "text_model_int8.onnx").graph
        (table,) = (
            weight for weight in graph.initializer if "token_embedding" in weight.name and len(weight.dims) == 2
        )
        values = onnx.numpy_helper.to_array(table)
        assert (values.dtype, values.min(), values.max()) == (np.uint8, 0, 255)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("flags\t\t: fpu avx2 sse\nflags\t\t: fpu avx2 sse\n", "avx2"),
            ("model name\t: amx_int8\nflags\t\t: avx512_vnni avx2 avx_vnni\n", "avx2, avx_vnni, avx512_vnni"),
            ("Features\t: fp asimd asimddp i8mm\n", "asimddp, i8mm"),
            ("", "unknown"),
            (None, "unknown"),
        ],
    )
    def test_the_instructions(self, text: str | None, said: str, tmp_path: Path, monkeypatch: Patch) -> None:
        monkeypatch.setattr(towers, "CPU_INFO", tmp_path / "cpuinfo")
        if text is not None:
            (tmp_path / "cpuinfo").write_text(text)
        assert towers.int8_instructions() == said

    def test_the_check_says_what_it_ran_on(self, exported: tuple[Path, ExportReport]) -> None:
        said = towers.int8_instructions()
        folder, report = exported
        assert report.instructions == json.loads((folder / "export.json").read_text())["instructions"] == said
        assert f"Instructions for int8 of that processor: {said}." in (folder / "README.md").read_text()


class TestFeatures:
    @pytest.mark.parametrize(("batch", "width"), [(1, 2), (1, 248), (2, 77), (3, 21), (7, 20), (16, 120), (2, 248)])
    def test_texts(self, text_tower: Any, model: LongCLIPModel, batch: int, width: int) -> None:
        lengths = [max(2, width * (row + 1) // batch) for row in range(batch)]
        ids = make_ids(model, lengths, width, model.config.text_config.eos_token_id)
        ours, theirs = text_tower(ids), encode(model, input_ids=ids)
        assert np.abs(ours - theirs).max() < 1e-4
        assert np.abs(unit(ours) - unit(theirs)).max() < 1e-4

    @given(data=st.data())
    def test_padding_and_neighbours_do_not_matter(self, text_tower: Any, model: LongCLIPModel, data: Any) -> None:
        """What a text gives alone it gives in every batch, whatever stands behind its EOT."""
        lengths = data.draw(st.lists(st.integers(2, 248), min_size=1, max_size=5))
        width = data.draw(st.integers(max(lengths), 248))
        padding = data.draw(st.integers(0, model.config.text_config.eos_token_id))
        ids = make_ids(model, lengths, width, padding, seed=data.draw(st.integers(0, 100)))
        together = text_tower(ids)
        for row, length in enumerate(lengths):
            assert np.abs(together[row] - text_tower(ids[row : row + 1, :length])[0]).max() < 1e-5

    def test_the_end_counts(self, text_tower: Any, model: LongCLIPModel) -> None:
        ids = make_ids(model, [248, 248], 248, 0)
        ids[1] = ids[0]
        ids[1, 246] = (ids[0, 246] + 1) % 100
        first, second = text_tower(ids)
        assert np.abs(first - second).max() > 1e-3

    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_images(self, exported: tuple[Path, ExportReport], model: LongCLIPModel, batch: int) -> None:
        session = onnxruntime.InferenceSession(exported[0] / "onnx" / "vision_model.onnx")
        pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        ours = session.run(None, {"pixel_values": pixels.numpy()})[0]
        theirs = encode(model, pixel_values=pixels)
        assert np.abs(ours - theirs).max() < 1e-4
        assert np.abs(unit(ours) - unit(theirs)).max() < 1e-4

    @pytest.mark.parametrize("suffix", ["", "_fp16", "_int8"])
    def test_what_the_model_refuses(
        self, exported: tuple[Path, ExportReport], model: LongCLIPModel, suffix: str
    ) -> None:
        session = onnxruntime.InferenceSession(exported[0] / "onnx" / f"text_model{suffix}.onnx")
        ids = make_ids(model, [9, 5], 9, 0).numpy()
        ids[1] = 7
        embeds = session.run(None, {"input_ids": ids})[0]
        assert np.isfinite(embeds[0]).all() and np.isnan(embeds[1]).all()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(exported[0] / "onnx" / f"text_model{suffix}.onnx", options)
        state = onnxruntime.capi.onnxruntime_pybind11_state
        with pytest.raises((state.Fail, state.RuntimeException), match="248 by 249"):  # by release
            session.run(None, {"input_ids": np.full((1, 249), ids[0, 8])})

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_the_recorded_drift(
        self, exported: tuple[Path, ExportReport], model: LongCLIPModel, precision: str
    ) -> None:
        """Of the longest text, which is one of those that the record is the worst of."""
        folder, report = exported
        file = next(file for file in report.files if (file.tower, file.precision) == ("text", precision))
        row = towers.sample_texts(folder / "tokenizer.json", 248)[-1]
        assert row.shape == (248,)
        session = onnxruntime.InferenceSession(folder / file.name)
        ours = session.run(None, {"input_ids": row[None]})[0].astype(np.float64)
        theirs = encode(model, input_ids=torch.from_numpy(row)[None]).astype(np.float64)
        assert 0 < np.abs(ours - theirs).max() <= file.absolute * (1 + 1e-5)
        assert 0 < np.abs(unit(ours) - unit(theirs)).max() <= file.normalised * (1 + 1e-5)
        assert file.cosine - 1e-9 <= (unit(ours) * unit(theirs)).sum() < 1


def test_drift_by_hand() -> None:
    """Rows (3, 4) and (0, 2) against (3, 4) and (2, 0): differences 2 and 1, cosines 1 and 0."""

    class Session:
        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": "pixel_values"})]

        def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [inputs["pixel_values"][:, :, 0, 0]]

    rows = [np.array([[[3.0]], [[4.0]]], np.float32), np.array([[[0.0]], [[2.0]]], np.float32)]
    drift = towers.measure_drift(Session(), rows, torch.tensor([[3.0, 4.0], [2.0, 0.0]]))
    assert (drift.absolute, drift.normalised, drift.cosine) == (2.0, 1.0, 0.0)
    rows[1][0] = np.inf
    with pytest.raises(ProofError, match="2 of 5 features are not finite"):
        towers.measure_drift(Session(), rows, torch.zeros(2, 2))


class TestRecall:
    def test_of_what_is_right_by_construction(
        self, exported: tuple[Path, ExportReport], longclip_folder: Path, tmp_path: Path
    ) -> None:
        """fp32 answers every query as torch does, and torch as evaluation's own encoder would."""
        images = []
        for number in range(6):
            file = tmp_path / f"{number}.png"
            Image.effect_noise((40 + number, 36), 10.0 * number).convert("RGB").save(file)
            images.append(ImageFile(file.name, file.read_bytes))
        captions = [f"a photo of a dog number {number} " * (1 + 9 * number) for number in range(7)]
        data = Retrieval("noise", images, captions, [0, 1, 2, 3, 4, 5, 5], [])
        rows = recall_drift(longclip_folder, exported[0], data, ["fp32", "int8"])
        assert [row["precision"] for row in rows] == ["torch", "fp32", "int8"]
        assert rows[1] == rows[0] | {"precision": "fp32"}
        assert rows[0]["i2t_changed"] == rows[0]["t2i_changed"] == 0
        assert all(0 <= float(row["i2t_r1"]) <= 1 for row in rows)

    def test_batches_of_like_length(self, exported: tuple[Path, ExportReport]) -> None:
        tokenizer = towers.Tokenizer.from_file(str(exported[0] / "tokenizer.json"))
        captions = ["dog " * (1 + 7 * number % 20) for number in range(20)]
        batches = text_batches(captions, tokenizer)
        assert [len(rows) for rows, _ in batches] == [16, 4]
        for rows, ids in batches:
            for row, padded in zip(rows, ids, strict=True):
                alone = tokenizer.encode(captions[row]).ids
                assert padded.tolist() == alone + alone[-1:] * (ids.shape[1] - len(alone))


def test_the_snippet_of_the_documentation(
    exported: tuple[Path, ExportReport], longclip_folder: Path, model: LongCLIPModel, tmp_path: Path
) -> None:
    """It runs without torch, and gives what the model gives."""
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    shutil.copytree(exported[0], tmp_path / "long-clip-onnx")
    Image.effect_noise((61, 47), 60).convert("RGB").save(tmp_path / "photo.jpg")
    snippet += """
import sys
assert not {"torch", "transformers", "longclip_hf"} & sys.modules.keys()
print(json.dumps([captions, input_ids.tolist(), probabilities.tolist()]))
"""
    captions, input_ids, probabilities = json.loads(run_python(snippet, cwd=tmp_path, fresh=True).splitlines()[-1])
    processor = AutoProcessor.from_pretrained(longclip_folder)
    with Image.open(tmp_path / "photo.jpg") as image:
        inputs = processor(text=captions, images=image, padding=True, truncation=True, return_tensors="pt")
    found = [row[:length] for row, length in zip(input_ids, inputs.pop("attention_mask").sum(dim=1), strict=True)]
    assert found == [row[: len(ids)] for row, ids in zip(inputs["input_ids"].tolist(), found, strict=True)]
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image.softmax(dim=1).numpy()
    assert np.abs(np.array(probabilities) - expected).max() < 1e-4
    assert abs(probabilities[0][0] - 0.5) > 1e-3, "both captions the same would prove nothing"


class TestCommand:
    def test_one_precision_over_an_older_export(
        self, longclip_folder: Path, exported: tuple[Path, ExportReport], copy_of: Copy, capsys: Capture,
        monkeypatch: Patch,
    ) -> None:  # fmt: skip
        """In files with the weights beside the graph, as for those above 2 GB."""
        monkeypatch.setattr(towers, "LARGEST_FILE", 10_000)
        monkeypatch.setenv("COLUMNS", "200")
        old = copy_of(exported[0])
        old = old.rename(old.with_name("[red]tiny"))  # a name, not markup
        assert main([str(longclip_folder), "--output", str(old), "--precision", "int8", "--overwrite"]) == 0
        out, _ = capsys.readouterr()
        assert "[red]tiny" in out
        assert f"with these int8 instructions: {towers.int8_instructions()}.\n" in out
        files = {"onnx/text_model_int8.onnx", "onnx/vision_model_int8.onnx"}
        files |= {f"{file}_data" for file in files}
        assert names(old) == {name for name in FILES if not name.startswith("onnx/")} | files
        record = json.loads((old / "export.json").read_text())
        for file in record["files"]:
            parts = [old / file["name"], old / f"{file['name']}_data"]
            assert file["nbytes"] == sum(part.stat().st_size for part in parts)
            assert parts[0].stat().st_mode == parts[1].stat().st_mode
            assert re.search(rf"│ {file['name']} +│ 0\.1 +│ \d+\.\d +│ \d+\.\d +│ \S+ +│ \S+ +│ 0\.99\d+ +│", out)
            assert file["cosine"] == pytest.approx(
                next(other.cosine for other in exported[1].files if other.name == file["name"]), abs=1e-6
            )

    @pytest.mark.parametrize("case", ["no folder", "text tower", "inside", "exists", "not an export", "extra"])
    def test_refusals(
        self, case: str, longclip_folder: Path, exported: tuple[Path, ExportReport], tmp_path: Path, capsys: Capture,
        monkeypatch: Patch,
    ) -> None:  # fmt: skip
        source, output, more = longclip_folder, tmp_path / "new", []
        if case == "no folder":
            source, message = tmp_path / "nothing", "no such folder"
        elif case == "text tower":
            source, message = tmp_path / "text", "is a text tower alone, and both towers are exported"
            CLIPTextModelWithProjection.from_pretrained(longclip_folder).save_pretrained(source)
        elif case == "inside":
            output, more, message = longclip_folder, ["--overwrite"], "is or holds what is read"
        elif case == "exists":
            output, message = exported[0], "exists already. Name another --output, or replace it with --overwrite"
        elif case == "not an export":
            output, more, message = tmp_path / "mine", ["--overwrite"], "no export.json"
            output.mkdir()
            (output / "config.json").write_text("{}")
        else:
            monkeypatch.setitem(sys.modules, "onnxscript", None)
            message = 'Exporting needs onnxscript, which is not installed: pip install "longclip-hf[export]"'
        before = names(tmp_path)
        assert main([str(source), "--output", str(output), *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err.replace("\n", " ")
        assert names(tmp_path) == before

    def test_another_tokenizer(self, longclip_folder: Path, copy_of: Copy, set_config: Edit, tmp_path: Path) -> None:
        source = copy_of(longclip_folder)
        set_config(source, text_config={"eos_token_id": 5})
        with pytest.raises(ConversionError, match=r"ends a text with id \d+, and .* expects 5\. .*--processor"):
            export(str(source), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_precision_that_is_none(self, longclip_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"must be some of fp32, fp16, int8, got \['int4'\]"):
            export(str(longclip_folder), tmp_path / "new", precisions=["int4"])

    def test_a_file_that_is_not_the_model(
        self, longclip_folder: Path, exported: tuple[Path, ExportReport], copy_of: Copy, set_tensors: Edit,
        tmp_path: Path, monkeypatch: Patch,
    ) -> None:  # fmt: skip
        """A weight is off by one in a thousand, and nothing is left of the export."""
        source = copy_of(longclip_folder)
        name = "text_model.encoder.layers.1.mlp.fc2.weight"
        set_tensors(source, {name: load_file(source / "model.safetensors")[name] * 1.001})

        def copy(tower: towers.Tower, file: Path) -> int:
            shutil.copyfile(exported[0] / "onnx" / file.name, file)
            return 20

        monkeypatch.setattr(towers, "export_tower", copy)
        with pytest.raises(ProofError, match=r"text tower differs from torch by \S+ \(.*\), and 1e-04 is allowed"):
            export(str(source), tmp_path / "new")
        assert [entry.name for entry in tmp_path.iterdir()] == [source.name]

    def test_overflow_in_float16(
        self, longclip_folder: Path, copy_of: Copy, set_tensors: Edit, tmp_path: Path
    ) -> None:
        """What attention adds up is 2^20 times as large, and the same again after its projection."""
        source = copy_of(longclip_folder)
        tensors = load_file(source / "model.safetensors")
        attention = "text_model.encoder.layers.0.self_attn"
        values, projection = f"{attention}.v_proj.weight", f"{attention}.out_proj.weight"
        set_tensors(source, {values: tensors[values] * 2**20, projection: tensors[projection] / 2**20})
        with pytest.raises(ProofError, match=r"text tower in fp16: \d+ of \d+ features are not finite. float16 ends"):
            export(str(source), tmp_path / "new", precisions=["fp16"])
        assert [entry.name for entry in tmp_path.iterdir()] == [source.name]


@pytest.fixture(scope="module")
def immich_folder(
    exported: tuple[Path, ExportReport], model: LongCLIPModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = Path(shutil.copytree(exported[0], tmp_path_factory.mktemp("immich") / "ViT-B-16__openai"))
    files = [file for file in exported[1].files if file.precision == "fp32"]
    moved = rearrange(place, model.config, files)
    assert [file.name for file in moved] == ["textual/model.onnx", "visual/model.onnx"]
    assert [file.nbytes for file in moved] == [(place / file.name).stat().st_size for file in moved]
    return place


class TestImmich:
    """An export rearranged for a photo server, read as its loader reads it."""

    def test_the_files_are_its(self, immich_folder: Path) -> None:
        assert names(immich_folder) == {
            "config.json", "textual", "textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json",
            "visual", "visual/model.onnx", "visual/preprocess_cfg.json",
        }  # fmt: skip

    def test_texts(self, immich_folder: Path, model: LongCLIPModel) -> None:
        """As `OpenClipTextualEncoder` does: padded to the context's length, int32, one row, the first output."""
        length = json.loads((immich_folder / "config.json").read_text())["text_cfg"].get("context_length", 77)
        pad = json.loads((immich_folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
        tokenizer = Tokenizer.from_file(str(immich_folder / "textual" / "tokenizer.json"))
        tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
        tokenizer.enable_truncation(max_length=length)
        session = onnxruntime.InferenceSession(immich_folder / "textual" / "model.onnx")
        (taken,) = session.get_inputs()
        assert (taken.name, taken.type, taken.shape) == ("text", "tensor(int32)", [1, 248])
        for text in ("a dog", "a red bicycle leans against a white wall next to a wooden door. " * 20):
            ids = tokenizer.encode(text).ids
            ours = session.run(None, {"text": np.array([ids], dtype=np.int32)})[0][0]
            np.testing.assert_allclose(ours, encode(model, input_ids=torch.tensor([ids]))[0], rtol=0, atol=1e-4)

    def test_images(self, immich_folder: Path, model: LongCLIPModel) -> None:
        settings = json.loads((immich_folder / "visual" / "preprocess_cfg.json").read_text())
        assert settings.keys() >= {"size", "interpolation", "mean", "std", "resize_mode"}
        assert (settings["size"], settings["interpolation"]) == (32, "bicubic")
        session = onnxruntime.InferenceSession(immich_folder / "visual" / "model.onnx")
        pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
        ours = session.run(None, {"image": pixels})[0][0]
        np.testing.assert_allclose(ours, encode(model, pixel_values=torch.from_numpy(pixels))[0], rtol=0, atol=1e-4)

    def test_one_precision(self, longclip_folder: Path, tmp_path: Path) -> None:
        message = r"immich reads one file of each tower: choose one precision, got \['fp32', 'int8'\]"
        with pytest.raises(ConversionError, match=message):
            export(str(longclip_folder), tmp_path / "x", precisions=["fp32", "int8"], layout="immich")
        with pytest.raises(ConversionError, match=r"layout must be one of transformers.js, immich, got 'x'"):
            export(str(longclip_folder), tmp_path / "x", layout="x")


class TestTransformersExporters:
    """docs/export.md says what transformers 5's own exporters make of a text tower."""

    @pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning")  # transformers asks so
    @pytest.mark.slow
    def test_dynamo_takes_every_length(self, longclip_folder: Path) -> None:
        exporters = pytest.importorskip("transformers.exporters", reason="transformers 4 has no exporters")
        model = LongCLIPTextModelWithProjection.from_pretrained(longclip_folder).eval()
        eos = model.config.eos_token_id
        draw = torch.Generator().manual_seed(0)

        def ids(rows: int, length: int) -> torch.Tensor:
            input_ids = torch.randint(1, eos - 1, (rows, length), generator=draw)
            input_ids[:, -1] = eos
            return input_ids

        config = exporters.DynamoConfig(dynamic=True)
        exported = exporters.DynamoExporter().export(model, {"input_ids": ids(2, 20)}, config)
        for rows, length in ((2, 20), (1, 77), (3, 248)):
            input_ids = ids(rows, length)
            with torch.inference_mode():
                assert torch.equal(exported(input_ids=input_ids).text_embeds, model(input_ids=input_ids).text_embeds)
