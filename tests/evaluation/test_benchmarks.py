"""Every benchmark on a small copy of its official layout, and what is said when something does not fit."""

import gc
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from benchmark_files import (
    CIFAR,
    RETRIEVAL,
    cifar,
    imagenet_folders,
    imagenet_kaggle,
    imagenet_v2,
    json_lines,
    number_of,
    picture,
    write,
    write_pictures,
)  # fmt: skip
from conftest import run_python
from open_clip_stub import NAMES, TEMPLATES, write_open_clip
from PIL import Image

from longclip_hf.errors import BenchmarkError, ImageError
from longclip_hf.evaluation.benchmarks import BENCHMARKS, Classification, Columns, Retrieval, load_benchmark

# `datasets` leaves a CSV file open, which Python notices at any later time.
pytestmark = pytest.mark.filterwarnings(r"ignore:Exception ignored .*\.csv:pytest.PytestUnraisableExceptionWarning")

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """open_clip's stand-in, and a cache of `datasets` for these tests alone."""
    folder = tmp_path_factory.mktemp("surroundings")
    write_open_clip(folder / "site")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder / "site")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield
        gc.collect()


def contents(result: Retrieval) -> list[tuple[int, str]]:
    """(number of the picture, caption) in order: what belongs to what."""
    return [
        (number_of(result.images[image].read()), caption)
        for image, caption in zip(result.image_of, result.captions, strict=True)
    ]


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval(name: str, tmp_path: Path) -> None:
    expected = RETRIEVAL[name](tmp_path)
    result = load_benchmark(name, tmp_path)
    assert isinstance(result, Retrieval)
    assert contents(result) == expected
    assert result.name == BENCHMARKS[name].title
    images = len(set(result.image_of))
    assert len(result.images) == images
    if name == "sharegpt4v-1k":  # the only one whose copy is whole
        assert list(result.notes) == []
        return
    size = f"{images} images and {len(expected)} captions, where {BENCHMARKS[name].title} has "
    whole = f"{BENCHMARKS[name].images} and {BENCHMARKS[name].texts}: not comparable with published figures"
    assert list(result.notes) == [size + whole]


@pytest.mark.parametrize("name", RETRIEVAL)
def test_a_missing_image_is_named(name: str, tmp_path: Path) -> None:
    RETRIEVAL[name](tmp_path)
    first = Path(load_benchmark(name, tmp_path).images[0].name)
    first.unlink()
    with pytest.raises(BenchmarkError, match=f"{re.escape(str(first))}|{first.stem!r}") as raised:
        load_benchmark(name, tmp_path)
    if name != "urban1k":  # whose images are those in the folder
        assert re.search(r"1 of \d+ images are missing, the first is ", str(raised.value))
        assert f"Download: {BENCHMARKS[name].home}" in str(raised.value)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "imagefolder"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    """The path that is missing is one that the layout names."""
    benchmark = BENCHMARKS[name]
    with pytest.raises(BenchmarkError) as raised:
        load_benchmark(name, tmp_path)
    message = str(raised.value)
    missing = re.match(rf"{benchmark.title}: there is no (?:file|folder) (\S+)\. ", message)
    assert missing is not None, message
    assert Path(missing[1]).relative_to(tmp_path).as_posix() in _expanded(benchmark.layout)
    assert message.endswith(f"Expected below --data: {benchmark.layout}. Download: {benchmark.home}")


def _expanded(layout: str) -> str:
    """`a/{b,c}/d` as `a/b/d, a/c/d`."""
    return re.sub(
        r"(\S*)\{(.*?)\}(\S*)",
        lambda found: ", ".join(found[1] + part + found[3] for part in found[2].split(",")),
        layout,
    )


@pytest.mark.parametrize(
    ("name", "path", "old", "new", "message"),
    [
        ("docci", "docci_descriptions.jsonlines", '"image_file"', '"file"', r"form \(KeyError: 'image_file'\)"),
        ("docci", "docci_descriptions.jsonlines", "}", "", "is not JSON in every line"),
        ("coco-5k", "annotations/captions_val2017.json", "}", "", r"captions_val2017\.json is not JSON"),
        ("coco-5k", "annotations/captions_val2017.json", '"image_id": 7', '"image_id": 8', "1 images have no caption"),
        ("flickr30k-1k", "dataset_flickr30k.json", '"images"', '"pictures"', "KeyError: 'images'"),
        ("sharegpt4v-1k", "share-captioner_coco_lcs_sam_1246k_1107.json", "[{", "{", "must hold a JSON list"),
        ("dci", "densely_captioned_images/splits.json", '"1-data.json"', '"9-data.json"', r"no file \S*9-data\.json"),
        ("dci", "densely_captioned_images/splits.json", '"1-data', '"../1-data', r"names '\.\./1-data\.json', which"),
        ("dci", "densely_captioned_images/annotations/1-data.json", '"sa_1', '"/sa_1', "which leaves its folder"),
        ("coco-5k", "annotations/captions_val2017.json", '"000000000007', '"../../7', "which leaves its folder"),
        ("flickr30k-1k", "dataset_flickr30k.json", '"b.jpg', '"../b.jpg', "which leaves its folder"),
        ("flickr30k-31k", "results_20130124.token", "10.jpg", "/10.jpg", "which leaves its folder"),
        ("docci", "docci_descriptions.jsonlines", '"test_00000.jpg', '"a/../../b.jpg', "which leaves its folder"),
        ("iiw-400", "imageinwords/datasets/IIW-400/data.jsonl", "aar_test_01", "../01", "which leaves its folder"),
        ("iiw-612", "imageinwords/datasets/DCI_Test/data.jsonl", "sa_5", "../5", "which leaves its folder"),
        ("iiw-612", "imageinwords/datasets/DOCCI_Test/data.jsonl", "test_0", "../test_0", "which leaves its folder"),
    ],
)  # fmt: skip
def test_broken_files(name: str, path: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    RETRIEVAL[name](tmp_path)
    text = (tmp_path / path).read_text()
    assert old in text
    (tmp_path / path).write_text(text.replace(old, new))
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark(name, tmp_path)


def test_pairs_that_do_not_match(tmp_path: Path) -> None:
    RETRIEVAL["urban1k"](tmp_path)
    (tmp_path / "Urban1k" / "caption" / "10.txt").unlink()
    with pytest.raises(BenchmarkError, match=r"1 images in \S+ have no caption and 0 captions no image, such as '10'"):
        load_benchmark("urban1k", tmp_path)


def test_empty_and_shared_captions_are_counted(tmp_path: Path) -> None:
    RETRIEVAL["urban1k"](tmp_path)
    write_pictures(tmp_path / "Urban1k" / "image", "1.jpg", "10.jpg", "2.jpg", "3.jpg")
    for name, text in (("1", "A street."), ("10", "\nA bus."), ("2", "A street.\n"), ("3", "A tram.")):
        write(tmp_path / "Urban1k" / "caption" / f"{name}.txt", text)
    result = load_benchmark("Urban1k", tmp_path)  # as its title is written
    assert isinstance(result, Retrieval)
    assert contents(result) == [(1, "A street."), (3, "A street."), (4, "A tram.")]
    assert result.notes == [
        "3 images and 3 captions, where Urban1k has 1000 and 1000: not comparable with published figures",
        "empty captions, left out: 1",
        "images left out, as they had no other caption: 1",
        "captions that another image has too (only the own image counts as found): 2",
    ]


def test_images_listed_twice_are_counted(tmp_path: Path) -> None:
    RETRIEVAL["docci"](tmp_path)
    file = tmp_path / "docci_descriptions.jsonlines"
    file.write_text(file.read_text().replace("test_00001.jpg", "test_00000.jpg"))
    result = load_benchmark("docci", tmp_path)
    assert result.notes[1:] == ["images that are listed again (only the caption's own entry counts as found): 1"]


# Classification


def numbers(result: Classification) -> list[tuple[int, str]]:
    return [
        (number_of(image.read()), result.class_names[label])
        for image, label in zip(result.images, result.labels, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "make"),
    [("imagenet", imagenet_folders), ("imagenet", imagenet_kaggle), ("imagenet-v2", imagenet_v2)],
)
def test_imagenet(name: str, make: Callable[[Path], list[tuple[int, int]]], tmp_path: Path) -> None:
    """All 1000 classes can be chosen, whichever have images."""
    expected = make(tmp_path)
    result = load_benchmark(name, tmp_path)
    assert isinstance(result, Classification)
    assert sorted(numbers(result)) == [(number, NAMES[label]) for number, label in sorted(expected)]
    assert result.class_names == NAMES
    assert result.templates == TEMPLATES
    title, images = BENCHMARKS[name].title, BENCHMARKS[name].images
    assert result.notes == [
        f"{len(expected)} images and 1000 classes, where {title} has {images} and 1000: not comparable with published "
        "figures"
    ]


def test_imagenet_o_chooses_among_its_own_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "imagenet-o", "n01491361/a.JPEG", "n01443537/b.JPEG")
    write(tmp_path / "imagenet-o" / "README.txt", "About the images.")
    result = load_benchmark("imagenet-o", tmp_path)
    assert isinstance(result, Classification)
    assert result.class_names == [NAMES[1], NAMES[3]]
    assert numbers(result) == [(2, NAMES[1]), (1, NAMES[3])]
    assert "2 images and 2 classes, where ImageNet-O has 2000 and 200" in result.notes[0]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("imagenet", "val"), ("imagenet-o", "imagenet-o"), ("imagenet-v2", "imagenetv2-matched-frequency-format-val")],
)
def test_folders_that_are_no_classes(name: str, folder: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / folder, "cat/a.jpeg")
    with pytest.raises(BenchmarkError, match=r"1 of the 1 folders in .* none of ImageNet's classes, such as 'cat'"):
        load_benchmark(name, tmp_path)


def test_a_flat_val_folder_needs_its_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path / "val", "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(BenchmarkError, match="holds no folders: one for each class"):
        load_benchmark("imagenet", tmp_path)


def test_names_and_templates_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then open_clip_torch is not needed."""
    write_pictures(tmp_path / "imagenet-o", "n01491361/a.JPEG", "n01443537/b.JPEG")
    names = write(tmp_path / "names.txt", "n01491361\ttiger shark\nn01443537\tgoldfish\n")
    templates = write(tmp_path / "templates.txt", "my {}\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = load_benchmark("imagenet-o", tmp_path, class_names=names, templates=templates)
    assert isinstance(result, Classification)
    assert numbers(result) == [(2, "goldfish"), (1, "tiger shark")]
    assert result.templates == ["my {}"]
    with pytest.raises(ImportError, match="pip install --no-deps open_clip_torch"):
        load_benchmark("imagenet-o", tmp_path, class_names=names)


def test_equal_class_names_are_reported(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    names = write(tmp_path / "names.txt", "a\tmissile\nb\tmissile\nc\tboat\n")
    result = load_benchmark("imagefolder", tmp_path, class_names=names)
    assert result.notes == ["names that stand for several classes, which always tie (missile): 1"]


def test_image_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path, "golden_retriever/1.JPG", "cat/2.png", "cat/1.webp")
    write(tmp_path / "cat" / "notes.txt", "text")
    write(tmp_path / ".git" / "config", "text")
    (tmp_path / "empty").mkdir()
    result = load_benchmark("imagefolder", tmp_path)
    assert isinstance(result, Classification)
    assert result.class_names == ["cat", "empty", "golden retriever"]
    assert numbers(result) == [(3, "cat"), (2, "cat"), (1, "golden retriever")]
    assert result.templates == ["a photo of a {}."]
    assert result.notes == ["files in class folders that are not images, left out: 1", "classes without image: 1"]
    with pytest.raises(BenchmarkError, match=r"The 1 folders in .* hold no images"):
        load_benchmark("imagefolder", write(tmp_path / "other" / "cat" / "a.txt", "").parents[1])


@pytest.mark.parametrize("name", CIFAR)
def test_cifar(name: str, tmp_path: Path) -> None:
    folder, images, _ = CIFAR[name]
    records = cifar(name, tmp_path)
    classes = BENCHMARKS[name].texts or 0
    result = load_benchmark(name, tmp_path)
    assert isinstance(result, Classification)
    assert result.labels == [3, 0]
    assert result.class_names == [f"aquarium fish {number}" for number in range(classes)]
    assert result.templates == TEMPLATES
    picture = Image.open(io.BytesIO(result.images[1].read()))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (32, 32))
    assert [picture.getpixel(place) for place in ((5, 0), (0, 1), (31, 31))] == [(5, 5, 5), (40, 50, 60), (40, 50, 60)]
    assert result.images[1].name == f"row 1 of {tmp_path / folder / images}"
    assert pickle.loads(pickle.dumps(result.images[1])).read() == result.images[1].read()

    write(tmp_path / folder / images, records[:-1])
    with pytest.raises(BenchmarkError, match=rf"has {len(records) - 1} bytes, no multiple of a record's \d+"):
        load_benchmark(name, tmp_path)
    label = 0 if name == "cifar10" else 1
    write(tmp_path / folder / images, records[:label] + b"\xff" + records[label + 1 :])
    with pytest.raises(BenchmarkError, match="expected form"):
        load_benchmark(name, tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_pickles_are_refused(name: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    with pytest.raises(BenchmarkError, match=r"pickle files, .* Take the binary version, .*kriz/cifar\.html"):
        load_benchmark(name, tmp_path)


# Any source of `datasets`


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures with a metadata.jsonl of three rows: the first picture has two captions."""
    write_pictures(tmp_path / "photos", "a.png", "b.png")
    rows = [("a.png", "First."), ("b.png", "Second."), ("a.png", "Third.")]
    write(
        tmp_path / "photos" / "metadata.jsonl",
        json_lines([{"file_name": n, "caption": c, "both": [c, "x"]} for n, c in rows]),
    )
    return tmp_path / "photos"


PAIRS = [(1, "First."), (1, "Third."), (2, "Second.")]


def test_folder_of_images_with_metadata(photos: Path) -> None:
    result = load_benchmark(str(photos))
    assert isinstance(result, Retrieval)
    assert contents(result) == PAIRS
    assert result.notes == ["rows with the image of an earlier row (one image, several captions): 1"]
    assert [Path(image.name).name for image in result.images] == ["a.png", "b.png"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_files_with_paths(suffix: str, photos: Path, tmp_path: Path) -> None:
    """Paths begin beside the file, or in `data`."""
    table = datasets.Dataset.from_dict({"file": ["a.png", "b.png", "a.png"], "text": ["First.", "Second.", "Third."]})
    for folder, data in ((photos, None), (tmp_path, photos)):
        file = folder / f"rows.{suffix}"
        getattr(table, {"jsonl": "to_json", "json": "to_json"}.get(suffix, f"to_{suffix}"))(str(file))
        result = load_benchmark(str(file), data, Columns("file", ["text"]))
        assert isinstance(result, Retrieval)
        assert contents(result) == PAIRS
    missing = re.escape(str(tmp_path / "a.png"))
    with pytest.raises(BenchmarkError, match=rf"(Row 0|Line 1) of .*: missing \(there is no image {missing}"):
        load_benchmark(str(file), None, Columns("file", ["text"]))


@pytest.mark.parametrize("kind", ["saved", "saved dictionary", "parquet", "parquet of bytes"])
def test_images_within_the_rows(kind: str, tmp_path: Path) -> None:
    """They come out byte by byte as they went in, and other processes can read them."""
    encoded = [picture(number) for number in (1, 2, 3)]
    captions = {"caption": ["First.", "Second.", "Third."], "more": [["A", ""], None, ["B"]]}
    features = datasets.Features(
        {
            "picture": datasets.Value("binary") if kind == "parquet of bytes" else datasets.Image(),
            "caption": datasets.Value("string"),
            "more": datasets.Sequence(datasets.Value("string")),
        }
    )
    images: list[Any] = (
        [*encoded] if kind == "parquet of bytes" else [{"bytes": each, "path": "image.png"} for each in encoded]
    )
    rows = datasets.Dataset.from_dict({"picture": images, **captions}, features)
    if kind == "saved":
        source = tmp_path / "saved"
        rows.save_to_disk(source)
    elif kind == "saved dictionary":
        source = tmp_path / "saved"
        datasets.DatasetDict({"train": rows, "test": rows.select([2, 0])}).save_to_disk(source)
    else:
        source = tmp_path / "rows.parquet"
        rows.to_parquet(source)
    order = [2, 0] if kind == "saved dictionary" else [0, 1, 2]
    split = "test" if kind == "saved dictionary" else None
    result = load_benchmark(str(source), None, Columns("picture", ("caption", "more"), split))
    assert isinstance(result, Retrieval)
    assert [image.read() for image in pickle.loads(pickle.dumps(result.images))] == [
        encoded[number] for number in order
    ]
    texts = [["First.", "A"], ["Second."], ["Third.", "B"]]
    assert contents(result) == [(number + 1, text) for number in order for text in texts[number]]
    assert result.images[1].name == f"row 1 of {source}"
    assert result.notes == [f"empty captions, left out: {1 if split else 2}"]
    if kind == "saved dictionary":
        with pytest.raises(BenchmarkError, match="no split None: name one of train, test"):
            load_benchmark(str(source), None, Columns("picture"))


def test_sources_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "file,caption\na.png,A\n")
    with pytest.raises(BenchmarkError, match="no obvious column of images; its columns are file, caption"):
        load_benchmark(str(tmp_path / "a.csv"))
    with pytest.raises(BenchmarkError, match="no column 'text' but file, caption"):
        load_benchmark(str(tmp_path / "a.csv"), None, Columns("file", ["caption", "text"]))
    for values, message in (
        ({"image": [1], "caption": ["a"]}, "must hold images or paths, found int"),
        ({"image": [str(photos / "a.png")], "caption": [1]}, "must hold texts or lists of texts, found int: 1"),
        (
            {"image": ["a.png", None], "caption": ["a", "b"]},
            r"Row 1 of .*: missing \(there is no image in column",
        ),
        ({"image": ["a.png"], "caption": [" "]}, r"Row 0 of .*: empty_caption \(column 'caption'\)"),
    ):
        file = photos / f"{len(list(photos.iterdir()))}.parquet"
        datasets.Dataset.from_dict(values).to_parquet(str(file))
        with pytest.raises(BenchmarkError, match=message):
            load_benchmark(str(file))
    with pytest.raises(BenchmarkError, match="There is no benchmark and no file 'urban-1k'; 'urban1k' is the nearest"):
        load_benchmark("urban-1k", tmp_path)
    with pytest.raises(BenchmarkError, match=r"none of the files that are read here: \.json"):
        load_benchmark(str(photos / "a.png"))
    with pytest.raises(BenchmarkError, match="cannot be read by `datasets`"):
        load_benchmark(str(write(tmp_path / "bad.parquet", "no parquet")))


def test_settings_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="Urban1k needs --data"):
        load_benchmark("urban1k")
    with pytest.raises(BenchmarkError, match="Urban1k has no columns to choose"):
        load_benchmark("urban1k", tmp_path, Columns())
    with pytest.raises(
        BenchmarkError, match="Urban1k is a retrieval benchmark: class names and templates mean nothing"
    ):
        load_benchmark("urban1k", tmp_path, templates=tmp_path / "templates.txt")
    with pytest.raises(BenchmarkError, match="is a source for retrieval: class names and templates mean nothing"):
        load_benchmark("rows.csv", class_names=tmp_path / "names.txt")


# The table


def test_the_document_is_the_table() -> None:
    """To write the table anew: print `table()`."""
    assert table() in DOCUMENT.read_text(encoding="utf-8")


def table() -> str:
    lines = [
        "| name | kind | images | captions or classes | licence | from | below `--data` | texts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in BENCHMARKS.items():
        sizes = [f"{size:,}" if size else "any" for size in (entry.images, entry.texts)]
        layout = f"`{entry.layout}`"
        cells = [f"`{name}`", entry.kind, *sizes, entry.licence, entry.home, layout, entry.caption_rule]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [name for name, entry in BENCHMARKS.items() if entry.kind == "classification"])
def test_the_definition_is_the_one_that_was_used(name: str) -> None:
    """What is the user's own is named, what is the benchmark's stays."""
    entry, own = BENCHMARKS[name], (Path("x/names.txt"), Path("x/words.txt"))
    said = "The user's name of each class (names.txt)", "in the user's 2 templates (words.txt: `a {}`, `the {}`)"
    assert entry.definition(None, None, ["{}"]) == entry.caption_rule
    both = entry.definition(*own, ["a {}", "the {}"])
    assert said[0] in both and said[1] in both and "80" not in both and "open_clip" not in both
    names, words = entry.definition(own[0], None, ["{}"]), entry.definition(None, own[1], ["a {}", "the {}"])
    assert said[0] in names and entry.template_words in names
    assert said[1] in words and entry.name_words in words
    assert "(words.txt: `{}`)" in entry.definition(None, own[1], ["{}"])


def test_importing_costs_nothing() -> None:
    loaded = run_python(
        "import sys, longclip_hf.evaluation.benchmarks; print(*sorted(sys.modules))", fresh=True
    ).split()
    assert not {"torch", "transformers", "numpy", "huggingface_hub", "datasets", "PIL"} & set(loaded)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../secret.png", "leads out of the image root"),
        ("{folder}/secret.png", "leads out of the image root"),
        ("link.png", "leads out of the image root"),
        ("http://localhost:1/a.png", "is no file of the data set"),
        ("file:///etc/passwd", "is no file of the data set"),
    ],
)
def test_images_are_files_of_the_data_set(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "secret.png")
    row = {"image": name.format(folder=tmp_path), "caption": "a"}
    (tmp_path / "photos" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = str(tmp_path / "photos" / "rows.jsonl")
    with pytest.raises(BenchmarkError, match=f"Line 1 of .*{said}.*--image_access"):
        load_benchmark(source)
    if "://" not in name:
        found = load_benchmark(source, columns=Columns(image_access="local"))
        assert found.images[0].read() == b"secret"


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "caption": "a"}\n')
    found = load_benchmark(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ImageError, match="no regular file"):
        found.images[0].read()
