"""What is written is read by training and evaluation, and is what was made."""

import io
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image

from examples.scenes import write
from examples.scenes.captions import CLASS_NAMES, TEMPLATES
from examples.scenes.dataset import example
from longclip_hf.evaluation.benchmarks import Classification, Retrieval, load_benchmark
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.sources import load_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(output: Path, *options: str) -> Path:
    assert write.main(["--output", str(output), *options]) == 0
    return output


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        return image.tobytes()


def test_imagefolder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "hard", "--split", "hard", "--count", "9", "--seed", "3")
    assert capsys.readouterr().out == f"{folder}: 9 rows of hard, seed 3, as imagefolder\n"
    expected = [example("hard", index, 3) for index in range(9)]
    found = load_benchmark(str(folder))
    assert isinstance(found, Retrieval)
    assert list(found.captions) == [row["caption"] for row in expected] and not found.notes
    assert [pixels(image.read()) for image in found.images] == [row["image"].tobytes() for row in expected]
    train, heldout = load_rows(DataArguments(str(folder), short_column="short_caption", heldout_rows=2))
    assert heldout is not None and (len(train), len(heldout)) == (7, 2)
    assert train[0]["caption"] == expected[2]["caption"]
    assert train[0]["short_caption"] == expected[2]["short_caption"]
    assert train[0]["image"].tobytes() == expected[2]["image"].tobytes()


def test_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "ROWS_PER_SHARD", 4)
    folder = run(tmp_path / "train", "--split", "train", "--count", "9", "--format", "webdataset")
    assert sorted(file.name for file in folder.iterdir()) == [f"scenes-0000{shard}.tar" for shard in range(3)]
    again = run(tmp_path / "again", "--split", "train", "--count", "9", "--format", "webdataset")
    assert all(file.read_bytes() == (again / file.name).read_bytes() for file in folder.iterdir())
    data = DataArguments(
        str(folder / "*.tar"),
        data_format="webdataset",
        image_column="png",
        long_column="json.caption",
        short_column="json.short_caption",
        heldout_rows=8,
    )
    _, heldout = load_rows(data)
    assert heldout is not None and len(heldout) == 8
    for index in range(8):
        row, expected = heldout[index], example("train", index)
        assert (row["caption"], row["short_caption"]) == (expected["caption"], expected["short_caption"])
        assert row["image"].tobytes() == expected["image"].tobytes()


def test_class_folders(tmp_path: Path) -> None:
    folder = run(tmp_path / "classes", "--split", "classes", "--count", "84")
    found = load_benchmark("imagefolder", folder, templates=folder / "templates.txt")
    assert isinstance(found, Classification)
    assert sorted(found.class_names) == sorted(CLASS_NAMES)
    assert tuple(found.templates) == TEMPLATES and not found.notes
    assert set(Counter(found.labels).values()) == {2}
    expected = {
        row["image"].tobytes(): CLASS_NAMES[row["label"]] for row in (example("classes", i) for i in range(84))
    }
    for image, label in zip(found.images, found.labels, strict=True):
        assert expected[pixels(image.read())] == found.class_names[label]


def test_errors_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, error in (
        (("--split", "test"), "There is no split 'test'"),
        (("--split", "short", "--count", "300"), "asked for 299"),
    ):
        assert write.main(["--output", str(tmp_path / "none"), *options]) == 2
        assert error in capsys.readouterr().err
    run(tmp_path / "there", "--split", "short", "--count", "1")
    with pytest.raises(SystemExit, match="2"):
        write.main(["--output", str(tmp_path / "there"), "--split", "short", "--count", "1"])
    assert "exists already" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]
