"""Files as Winoground, SugarCrepe and ARO publish them, and a run on them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_files import imagefolder, make_rows, png
from PIL import Image
from torch.nn import functional as F

from longclip_hf.errors import BenchmarkError
from longclip_hf.evaluation import run
from longclip_hf.evaluation.benchmarks import Choices, load_benchmark
from longclip_hf.evaluation.choice_data import read_choices
from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.results import read_results

WINOGROUND = [
    {f"image_{side}": f"ex_{n}_img_{side}" for side in (0, 1)}
    | {"caption_0": f"a dog above {n}", "caption_1": f"{n} above a dog"}
    for n in range(3)
]
SUGARCREPE = {
    str(n): {"filename": f"{n}.png", "caption": f"a red sign {n}", "negative_caption": f"a blue sign {n}"}
    for n in range(4)
}
ARO = [{"image_path": "grey.png", "true_caption": "the dog on the road", "false_caption": "the road on the dog",
        "bbox_x": 4, "bbox_y": 6, "bbox_w": 20, "bbox_h": 10}]  # fmt: skip
ORDERS = [{"image": f"{n}.png", "caption_options": [f"{n} a b c", f"{n} b a c", f"{n} c b a"]} for n in range(2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images beside each other, and the files."""
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    for n in range(3):
        for side in (0, 1):
            (tmp_path / f"ex_{n}_img_{side}.png").write_bytes(png(10 + 2 * n + side))
    Image.linear_gradient("L").resize((40, 32)).save(tmp_path / "grey.png")
    (tmp_path / "winoground.jsonl").write_text("".join(json.dumps(row) + "\n" for row in WINOGROUND))
    for name, rows in (("sugarcrepe", SUGARCREPE), ("aro", ARO), ("orders", ORDERS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def load(file: Path) -> Choices:
    found = load_benchmark(str(file))
    assert isinstance(found, Choices)
    return found


def test_winoground(folder: Path) -> None:
    found = load(folder / "winoground.jsonl")
    assert found.pairs and len(found.images) == len(found.captions) == 6
    assert list(found.images_of) == list(found.captions_of) == [(0, 1), (2, 3), (4, 5)]
    assert found.images[3].name.endswith("ex_1_img_1.png") and found.captions[3] == "1 above a dog"
    assert found.notes[0] == "3 rows like those of Winoground, 2 captions each"


def test_sugarcrepe_and_aro(folder: Path) -> None:
    found = load(folder / "sugarcrepe.json")
    assert not found.pairs and list(found.captions_of) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert found.captions[:2] == ["a red sign 0", "a blue sign 0"]
    orders = load(folder / "orders.json")
    assert list(orders.images_of) == [(0,), (1,)] and list(orders.captions_of) == [(0, 1, 2), (3, 4, 5)]
    (part,) = load(folder / "aro.json").images
    with Image.open(io.BytesIO(part.read())) as image:
        whole = Image.linear_gradient("L").resize((40, 32)).convert("RGB")
        assert image.size == (20, 10) and image.tobytes() == whole.crop((4, 6, 24, 16)).tobytes()


def test_anything_else_is_retrieval(folder: Path, tmp_path: Path) -> None:
    (folder / "plain.jsonl").write_text(json.dumps({"image": "0.png", "caption": "a sign"}) + "\n")
    for name in ("plain.jsonl", "nothing.jsonl", "0.png"):
        assert read_choices(str(folder / name), None) is None
    (folder / "photos").mkdir()
    imagefolder(make_rows(2), folder / "photos")
    assert read_choices(str(folder / "photos"), None) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ORDERS[0], {"image": "1.png"}], "Row 1 of .* lacks a column of ARO's orders: it has image"),
        ([{"image": "0.png", "caption_options": ["a"]}], "needs two captions or more"),
        (
            [{"image": "0.png", "caption": "a", "negative_caption": " "}],
            "needs two captions or more, texts with a word",
        ),
        ([ORDERS[0], ORDERS[1] | {"caption_options": ["a", "b"]}], "has 2 captions to choose from, the first one 3"),
        ([{"image": "none.png", "caption": "a", "negative_caption": "b"}], r"no image .*none\.png; names begin in"),
    ],
)
def test_what_is_wrong_is_said(rows: list[dict[str, Any]], message: str, folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark(str(folder / "rows.json"))


def test_a_run(folder: Path, longclip_folder: Path) -> None:
    """The figures are those of cosines by hand."""
    files = [folder / "winoground.jsonl", folder / "sugarcrepe.json"]
    given = [longclip_folder, "--benchmark", *files, "--output", folder / "out", "--resamples", 100, "--device", "cpu"]
    assert run.main([str(word) for word in [*given, "--html", "--quiet"]]) == 0
    results = read_results(folder / "out" / "results.json")
    assert [info.kind for info in results.benchmarks] == ["choice", "choice"]
    pairs, captions = (score.metrics for score in results.scores)
    assert pairs.keys() == {"text_score", "image_score", "group_score"} and captions.keys() == {"choice"}
    encoder, found = Encoder(longclip_folder, device="cpu"), load(folder / "winoground.jsonl")
    images = F.normalize(encoder.encode_images(found.images).double(), dim=1).view(3, 2, -1)
    texts = F.normalize(encoder.encode_texts(found.captions).embeds.double(), dim=1).view(3, 2, -1)
    right = 0
    for image, text in zip(images, texts, strict=True):
        cosines = image @ text.T
        right += bool(cosines[0, 0] > cosines[0, 1] and cosines[1, 1] > cosines[1, 0])
    assert pairs["text_score"].value == pytest.approx(right / 3, abs=1e-6)
    text = (folder / "out" / "report.md").read_text()
    assert "Choice, 6 images, 6 captions." in text and "| Right caption chosen" in text
    assert "sugarcrepe.json, right caption" in text
    assert torch.tensor([value.value for value in captions.values()]).le(1).all()
