"""Benchmarks by name, by folder, and of any source that the library `datasets` reads.

`load_benchmark` gives images and captions (`Retrieval`), or images and classes (`Classification`). Nothing is decoded
here, and nothing is left out without being counted in `notes`. docs/benchmarks.md is the table of `BENCHMARKS`.
"""

import csv
import difflib
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from longclip_hf.evaluation import imagenet

from longclip_hf.errors import BenchmarkError, JSONListError, LongCLIPError
from longclip_hf.json_list import json_objects

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImageFile:
    """An image as it is stored. It can be pickled, for other processes to read it."""

    name: str  # what an error or a report shows: a path, or "row 12 of ..."
    read: Callable[[], bytes]  # the encoded file


@dataclass(frozen=True)
class Retrieval:
    """Images and their captions. `captions[i]` belongs to `images[image_of[i]]`; every image has one at least."""

    name: str
    images: Sequence[ImageFile]
    captions: Sequence[str]
    image_of: Sequence[int]
    notes: Sequence[str]  # what was left out, and what is out of the ordinary, with counts


@dataclass(frozen=True)
class Classification:
    """Images and their classes. `images[i]` shows `class_names[labels[i]]`."""

    name: str
    images: Sequence[ImageFile]
    labels: Sequence[int]
    class_names: Sequence[str]
    templates: Sequence[str]  # with "{}" for the class name
    notes: Sequence[str]


@dataclass(frozen=True)
class Columns:
    """Where a source of `datasets` keeps what.

    Args:
        image: of images, encoded images, or paths.
        captions: one column or several, of texts or lists of texts.
        split: or None, where there is only one.
    """

    image: str = "image"
    captions: Sequence[str] = ("caption",)
    split: str | None = None


# What readers give: images with their captions, or with their class and all classes there are.
Pairs = Iterable[tuple[ImageFile, Sequence[str]]]


@dataclass(frozen=True)
class Labelled:
    """Images, each with its class; all classes in the order of their labels; notes."""

    images: Sequence[tuple[ImageFile, str]]
    classes: Sequence[str]
    notes: Sequence[str] = ()


def plain_names(classes: Sequence[str]) -> list[str]:
    """The classes' own names, with spaces for underscores."""
    return [name.replace("_", " ") for name in classes]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its files come from, how they lie below `--data`, what the texts are, and its reader."""

    name: str
    kind: Literal["retrieval", "classification"]
    title: str
    images: int | None  # how many the whole benchmark has; None: any number
    texts: int | None  # captions, or classes
    licence: str
    home: str  # the page to download it from
    layout: str  # the paths below --data
    caption_rule: str  # what the texts are
    read: Callable[[Path], Any]  # Pairs or Labelled
    names: Callable[[Sequence[str]], Sequence[str]] = plain_names
    templates: Callable[[], Sequence[str]] = imagenet.templates

    def load(
        self, data: Path, *, class_names: Path | None = None, templates: Path | None = None
    ) -> Retrieval | Classification:
        """
        Args:
            data: the folder that the downloads were unpacked in.
            class_names: lines of `class<TAB>name`, for a classification with other names than its own.
            templates: lines with one `{}`, for one with other templates.

        Raises:
            BenchmarkError: for files that are missing, or not of the expected form.
            ValueError: for class names or templates that do not fit.
            ImportError: if names or templates come from open_clip_torch, which is not installed.
        """
        if self.kind == "retrieval" and (class_names or templates):
            raise BenchmarkError(
                f"{self.title} is a retrieval benchmark: class names and templates mean nothing to it."
            )
        try:
            found = self.read(data.expanduser())
        except _NotThere as error:
            raise BenchmarkError(f"{self.title}: {error}. {self._remedy}") from error
        except (KeyError, IndexError, TypeError, AttributeError, JSONListError) as error:
            raise BenchmarkError(
                f"{self.title}: the files are not of the expected form ({type(error).__name__}: {error}). "
                f"{self._remedy}"
            ) from error
        result: Retrieval | Classification
        if self.kind == "retrieval":
            result = _retrieval(self.title, found)
            texts, kind_of_text = len(result.captions), "captions"
        else:
            result = _classification(
                self.title,
                found,
                imagenet.read_class_names(class_names, found.classes) if class_names else self.names(found.classes),
                imagenet.read_templates(templates) if templates else self.templates(),
            )
            texts, kind_of_text = len(result.class_names), "classes"
        if (self.images, self.texts) in ((None, None), (len(result.images), texts)):
            return result
        note = (
            f"{len(result.images)} images and {texts} {kind_of_text}, where {self.title} has {self.images} and "
            f"{self.texts}: not comparable with published figures"
        )
        return replace(result, notes=[note, *result.notes])

    @property
    def _remedy(self) -> str:
        return f"Expected below --data: {self.layout}. Download: {self.home}"


def load_benchmark(
    source: str,
    data: Path | None = None,
    columns: Columns | None = None,
    *,
    class_names: Path | None = None,
    templates: Path | None = None,
) -> Retrieval | Classification:
    """A benchmark by its name, or a retrieval benchmark made of a source that `datasets` reads.

    Args:
        source: one of `BENCHMARKS`; or a folder saved by `datasets`, a folder that it recognises (such as images with
            a metadata.jsonl), a parquet, JSON or CSV file, or a Hub id.
        data: the folder that a named benchmark's downloads were unpacked in; for a source with paths of images,
            where relative ones begin (by default, beside the file).
        columns: of a source, where they are not `image` and `caption`.
        class_names: a file with lines of `class<TAB>name`, for a classification with other names than its own.
        templates: a file with one template in a line, for one with other templates.

    Raises:
        BenchmarkError: for a name that nobody knows, a missing file, a column that is not there, or data that does not
            fit together.
        ValueError: for class names or templates that do not fit.
        ImportError: if `datasets` or open_clip_torch is needed and not installed.
    """
    benchmark = BENCHMARKS.get(source.lower())
    if benchmark is None:
        if class_names or templates:
            raise BenchmarkError(f"{source} is a source for retrieval: class names and templates mean nothing to it.")
        return _source(source, data, columns or Columns())
    if columns is not None:
        raise BenchmarkError(f"{benchmark.title} has no columns to choose: leave them out.")
    if data is None:
        raise BenchmarkError(f"{benchmark.title} needs --data. {benchmark._remedy}")
    return benchmark.load(data, class_names=class_names, templates=templates)


# What the readers found, checked and counted


class _NotThere(LongCLIPError):
    """Files that a reader needs. `Benchmark.load` says where they come from."""


def _retrieval(name: str, pairs: Pairs, notes: Sequence[str] = ()) -> Retrieval:
    images: list[ImageFile] = []
    captions: list[str] = []
    image_of: list[int] = []
    empty = without = 0
    for image, texts in pairs:
        kept = [text.strip() for text in texts if text.strip()]
        empty += len(texts) - len(kept)
        without += not kept
        if kept:
            image_of += [len(images)] * len(kept)
            captions += kept
            images.append(image)
    if not images:
        raise BenchmarkError(f"{name} holds no image with a caption ({empty} captions are empty).")
    owners: dict[str, set[int]] = {}
    for caption, owner in zip(captions, image_of, strict=True):
        owners.setdefault(caption, set()).add(owner)
    shared = sum(len(owners[caption]) > 1 for caption in captions)
    twice = len(images) - len({image.name for image in images})
    found = (
        ("empty captions, left out", empty),
        ("images left out, as they had no other caption", without),
        ("captions that another image has too (only the own image counts as found)", shared),
        ("images that are listed again (only the caption's own entry counts as found)", twice),
    )
    return Retrieval(name, images, captions, image_of, [*notes, *_counted(found)])


def _classification(
    name: str, found: Labelled, class_names: Sequence[str], templates: Sequence[str]
) -> Classification:
    label = {key: number for number, key in enumerate(found.classes)}
    labels = [label[key] for _, key in found.images]
    same = [name for name, count in Counter(class_names).items() if count > 1]
    tied = f"names that stand for several classes, which always tie ({', '.join(same)})"
    notes = [*found.notes, *_counted([(tied, len(same))])]
    return Classification(name, [image for image, _ in found.images], labels, class_names, templates, notes)


def _counted(counts: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{what}: {count}" for what, count in counts if count]


def _file(path: Path) -> Path:
    if not path.is_file():
        raise _NotThere(f"there is no file {path}")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise _NotThere(f"there is no folder {path}")
    return path


def _image(path: Path) -> ImageFile:
    return ImageFile(str(path), path.read_bytes)


def _images(pairs: Iterable[tuple[Path, Sequence[str]]]) -> Pairs:
    """Files with their captions. One error for all that are missing."""
    pairs = list(pairs)
    missing = [path for path, _ in pairs if not path.is_file()]
    if missing:
        raise _NotThere(f"{len(missing)} of {len(pairs)} images are missing, the first is {missing[0]}")
    return [(_image(path), texts) for path, texts in pairs]


def _json(path: Path) -> Any:
    try:
        return json.loads(_file(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} is not JSON: {error}. Download it again.") from error


def _json_lines(path: Path) -> list[Any]:
    with _file(path).open(encoding="utf-8") as file:
        try:
            return [json.loads(line) for line in file if line.strip()]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{path} is not JSON in every line: {error}. Download it again.") from error


# Readers of retrieval benchmarks


def _urban1k(data: Path) -> Pairs:
    images = {file.stem: file for file in _folder(data / "Urban1k" / "image").glob("*.jpg")}
    captions = {file.stem: file for file in _folder(data / "Urban1k" / "caption").glob("*.txt")}
    alone = sorted(images.keys() ^ captions.keys())
    if alone:
        raise BenchmarkError(
            f"Urban1k: {len(images.keys() - captions.keys())} images in {data / 'Urban1k'} have no caption and "
            f"{len(captions.keys() - images.keys())} captions no image, such as {alone[0]!r}. Unpack it again."
        )
    return [(_image(images[stem]), [_first_line(captions[stem])]) for stem in sorted(images)]


def _first_line(file: Path) -> str:
    with file.open(encoding="utf-8-sig") as lines:
        return lines.readline()


def _sharegpt4v_1k(data: Path) -> Pairs:
    # The rest is not read: the file has 1.5 GB.
    rows = itertools.islice(json_objects(_file(data / "share-captioner_coco_lcs_sam_1246k_1107.json")), 1000)
    return _images((data / row["image"], [row["conversations"][1]["value"].replace("\n", " ")]) for row in rows)


def _coco_5k(data: Path) -> Pairs:
    content = _json(data / "annotations" / "captions_val2017.json")
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    strangers = [row["id"] for row in content["annotations"] if row["image_id"] not in captions]
    for row in content["annotations"]:
        if row["image_id"] in captions:
            captions[row["image_id"]].append(row["caption"])
    without = [name for name, texts in captions.items() if not texts]
    if strangers or without:
        raise BenchmarkError(
            f"COCO: in captions_val2017.json {len(without)} images have no caption and {len(strangers)} captions have "
            f"no image, such as number {(without or strangers)[0]}. Download it again."
        )
    files = {image["id"]: data / "val2017" / image["file_name"] for image in content["images"]}
    return _images((files[number], captions[number][:5]) for number in sorted(files))


def _flickr30k_1k(data: Path) -> Pairs:
    rows = [row for row in _json(data / "dataset_flickr30k.json")["images"] if row["split"] == "test"]
    folder = data / "flickr30k-images"
    return _images((folder / row["filename"], [text["raw"] for text in row["sentences"]]) for row in rows)


def _flickr30k_31k(data: Path) -> Pairs:
    captions: dict[str, list[str]] = {}
    with _file(data / "results_20130124.token").open(encoding="utf-8") as lines:
        for line in lines:
            name, _, caption = line.partition("\t")  # 1000092795.jpg#0
            captions.setdefault(name.rpartition("#")[0], []).append(caption)
    return _images((data / "flickr30k-images" / name, texts) for name, texts in captions.items())


def _docci(data: Path) -> Pairs:
    rows = [row for row in _json_lines(data / "docci_descriptions.jsonlines") if row["split"] == "test"]
    return _images((data / "images" / row["image_file"], [row["description"]]) for row in rows)


def _dci(data: Path) -> Pairs:
    folder = data / "densely_captioned_images"
    splits = _json(folder / "splits.json")
    rows = [_json(folder / "annotations" / name) for split in ("train", "valid", "test") for name in splits[split]]
    return _images(
        (folder / "photos" / row["image"], [f"{row['short_caption']}\n{row['extra_caption']}"]) for row in rows
    )


def _iiw_400(data: Path) -> Pairs:
    rows = _json_lines(data / "imageinwords" / "datasets" / "IIW-400" / "data.jsonl")
    return _images((data / "images_aar" / f"{row['image/key']}.jpg", [row["IIW"]]) for row in rows)


def _iiw_612(data: Path) -> Pairs:
    folder = data / "imageinwords" / "datasets"
    dci, docci = _json_lines(folder / "DCI_Test" / "data.jsonl"), _json_lines(folder / "DOCCI_Test" / "data.jsonl")
    photos = data / "densely_captioned_images" / "photos"
    return [
        *_iiw_400(data),
        *_images((photos / row["image"], [row["IIW"]]) for row in dci),
        *_images((data / "images" / f"{row['image']}.jpg", [row["IIW"]]) for row in docci),
    ]


# Readers of classification benchmarks


def _class_folders(folder: Path) -> Labelled:
    """The images of every folder in `folder`, which is their class; both in the order of their names."""
    classes = sorted(entry.name for entry in _folder(folder).iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise BenchmarkError(f"{folder} holds no folders: one for each class is expected, with its images.")
    images, others, empty = [], 0, 0
    for name in classes:
        files = sorted(file for file in (folder / name).iterdir() if file.name[0] != ".")
        pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        images += [(_image(file), name) for file in pictures]
        others += len(files) - len(pictures)
        empty += not pictures
    if not images:
        raise BenchmarkError(f"The {len(classes)} folders in {folder} hold no images ({', '.join(IMAGE_SUFFIXES)}).")
    notes = _counted(
        [("files in class folders that are not images, left out", others), ("classes without image", empty)]
    )
    return Labelled(images, classes, notes)


def _known_classes(found: Labelled, classes: Sequence[str], folder: Path) -> Labelled:
    strange = sorted(set(found.classes) - set(classes))
    if strange:
        raise BenchmarkError(
            f"{len(strange)} of the {len(found.classes)} folders in {folder} are none of ImageNet's classes, such as "
            f"{strange[0]!r} (expected names such as {classes[0]!r})."
        )
    return found


def _imagenet(data: Path) -> Labelled:
    classes = imagenet.wordnet_ids()
    if (data / "val").is_dir() or not (data / "LOC_val_solution.csv").is_file():
        found = _known_classes(_class_folders(data / "val"), classes, data / "val")
        return Labelled(found.images, classes, found.notes)
    with (data / "LOC_val_solution.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted((row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file))
    strange = {wordnet_id for _, wordnet_id in rows} - set(classes)
    if strange:
        raise BenchmarkError(f"LOC_val_solution.csv names {len(strange)} unknown classes, such as {min(strange)!r}.")
    folder = _folder(data / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    pairs = _images((folder / f"{name}.JPEG", [wordnet_id]) for name, wordnet_id in rows)
    return Labelled([(image, texts[0]) for image, texts in pairs], classes)


def _imagenet_v2(data: Path) -> Labelled:
    classes, folder = imagenet.wordnet_ids(), data / "imagenetv2-matched-frequency-format-val"
    # By number: in the order of their names, "10" would come before "2".
    found = _known_classes(_class_folders(folder), [str(number) for number in range(len(classes))], folder)
    return Labelled([(image, classes[int(number)]) for image, number in found.images], classes, found.notes)


def _imagenet_o(data: Path) -> Labelled:
    return _known_classes(_class_folders(data / "imagenet-o"), imagenet.wordnet_ids(), data / "imagenet-o")


def _cifar(folder: str, python_folder: str, images: str, names: str, labels: int, data: Path) -> Labelled:
    """CIFAR's binary version: records of `labels` bytes, the last of which counts, and 3 x 32 x 32 of the picture."""
    if not (data / folder).is_dir() and (data / python_folder).is_dir():
        raise _NotThere(
            f"{data / python_folder} is the Python version: pickle files, which can run any code when they are read. "
            f"Take the binary version, {data / folder}"
        )
    file, size = _file(data / folder / images), labels + 3 * 32 * 32
    classes = _file(data / folder / names).read_text(encoding="ascii").split()
    content = file.read_bytes()
    if not content or len(content) % size:
        raise BenchmarkError(f"{file} has {len(content)} bytes, no multiple of a record's {size}. Download it again.")
    return Labelled(
        [
            (ImageFile(f"row {row} of {file}", partial(_cifar_png, file, row * size + labels)), classes[label])
            for row, label in enumerate(content[labels - 1 :: size])
        ],
        classes,
    )


def _cifar_png(file: Path, offset: int) -> bytes:
    from PIL import Image

    with file.open("rb") as stream:
        stream.seek(offset)
        planes = [Image.frombytes("L", (32, 32), stream.read(32 * 32)) for _ in "RGB"]
    png = io.BytesIO()
    Image.merge("RGB", planes).save(png, "PNG")
    return png.getvalue()


# Any source of `datasets`

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def _source(source: str, root: Path | None, columns: Columns) -> Retrieval:
    rows = _open_source(source, columns.split)
    missing = [name for name in (columns.image, *columns.captions) if name not in rows.column_names]
    if missing:
        raise BenchmarkError(f"{source} has no column {missing[0]!r} but {', '.join(rows.column_names)}.")
    if root is None:
        root = Path(source) if Path(source).is_dir() else Path(source).parent
    # Rows of one file, or that hold the same bytes, are one image: two equal candidates would tie, which is a miss.
    merged: dict[str | bytes, tuple[ImageFile, list[str]]] = {}
    images = _row_images(rows, columns.image, source, root)
    for (key, image), row in zip(images, rows.select_columns(list(dict.fromkeys(columns.captions))), strict=True):
        texts = merged.setdefault(key, (image, []))[1]
        for column in columns.captions:
            texts += _texts(row[column], column, source)
    joined = len(rows) - len(merged)
    unnamed = len(_image_files(root) - {Path(key).resolve() for key in merged if isinstance(key, str)})
    notes = _counted(
        [
            ("rows with the image of an earlier row (one image, several captions)", joined),
            ("images in the folder that no row names, left out", unnamed if Path(source).is_dir() else 0),
        ]
    )
    return _retrieval(source, merged.values(), notes)


def _image_files(folder: Path) -> set[Path]:
    return {file.resolve() for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES}


def _open_source(source: str, split: str | None) -> Any:
    """A `datasets.Dataset` whose images stay undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Sources other than the named benchmarks are read with the package `datasets`, of the extra "evaluate": '
            'pip install "longclip-hf[evaluate]"'
        ) from error
    path = Path(source).expanduser()
    if not path.exists() and "/" not in source:
        near = difflib.get_close_matches(source.lower(), BENCHMARKS, 1)
        raise BenchmarkError(
            f"There is no benchmark and no file {source!r}"
            + (f"; {near[0]!r} is the nearest name" if near else "")
            + f". Benchmarks: {', '.join(BENCHMARKS)}."
        )
    if path.is_file() and path.suffix.lower() not in FORMATS:
        raise BenchmarkError(f"{source} is none of the files that are read here: {', '.join(FORMATS)}.")
    try:
        if path.is_file():
            rows = datasets.load_dataset(FORMATS[path.suffix.lower()], data_files=str(path))
        elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise BenchmarkError(f"{source} cannot be read by `datasets`: {type(cause).__name__}: {cause}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows and (split is not None or len(rows) > 1):
            raise BenchmarkError(f"{source} has no split {split!r}: name one of {', '.join(map(str, rows))}.")
        rows = rows[split or next(iter(rows))]
    elif split is not None:
        raise BenchmarkError(f"{source} has no splits, so there is no {split!r} in it: leave it out.")
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _row_images(rows: Any, column: str, source: str, root: Path) -> Iterator[tuple[str | bytes, ImageFile]]:
    """The image of every row, and what tells it from others: its path, or the digest of the bytes in the row."""
    import pyarrow
    import pyarrow.compute

    number = 0
    rows = rows.select_columns([column])
    for batch in rows.with_format("arrow").iter(1000):
        cells = batch[column]
        if pyarrow.types.is_struct(cells.type) and {"bytes", "path"} <= {field.name for field in cells.type}:
            held = pyarrow.compute.struct_field(cells, "bytes")
            paths = pyarrow.compute.struct_field(cells, "path").to_pylist()
        elif pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
            held, paths = [None] * len(cells), cells.to_pylist()
        elif pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type):
            held, paths = cells, [None] * len(cells)
        else:
            raise BenchmarkError(f"Column {column!r} of {source} must hold images or paths, found {cells.type}.")
        for content, path in zip(held, paths, strict=True):
            if content is not None and content.is_valid:
                digest = hashlib.sha256(content.as_buffer()).digest()
                yield digest, ImageFile(f"row {number} of {source}", partial(_read_cell, rows, number, column))
            elif not path:
                raise BenchmarkError(f"Row {number} of {source} has no image in column {column!r}.")
            elif "://" in path:
                yield path, ImageFile(path, partial(_read_url, path))
            elif not (root / path).is_file():
                raise BenchmarkError(
                    f"There is no image {root / path}, which row {number} of {source} names. Relative paths begin in "
                    "--data, or beside the source."
                )
            else:
                yield str(root / path), _image(root / path)
            number += 1


def _read_cell(rows: Any, number: int, column: str) -> bytes:
    cell: Any = rows[number][column]
    content: bytes = cell["bytes"] if isinstance(cell, Mapping) else cell
    return content


def _read_url(url: str) -> bytes:
    import fsspec  # of datasets: hf://, zip://, https://

    with fsspec.open(url, "rb") as file:
        content: bytes = file.read()
        return content


def _texts(cell: Any, column: str, source: str) -> list[str]:
    """The captions in a cell: one, or a list of them. None is an empty one."""
    texts = ["" if text is None else text for text in (cell if isinstance(cell, list) else [cell])]
    if not all(isinstance(text, str) for text in texts):
        raise BenchmarkError(f"Column {column!r} of {source} must hold texts or lists of texts, found {cell!r:.60}.")
    return texts


# The table

TEMPLATES_80 = "in the 80 ImageNet templates"

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "urban1k",
            "retrieval",
            "Urban1k",
            1000,
            1000,
            "CC BY-NC 4.0 (dataset card)",
            "https://huggingface.co/datasets/BeichenZhang/Urban1k",
            "Urban1k/image/*.jpg, Urban1k/caption/*.txt",
            "The first line of the text file with the image's stem.",
            _urban1k,
        ),
        Benchmark(
            "sharegpt4v-1k",
            "retrieval",
            "ShareGPT4V-1k",
            1000,
            1000,
            "CC BY-NC 4.0 (captions); the images have their sources' own",
            "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
            "share-captioner_coco_lcs_sam_1246k_1107.json, and the images that its first 1000 rows name, such as "
            "sam/images/*.jpg",
            "The second turn of each of the first 1000 rows, with spaces for line breaks: the rows held out from "
            "training.",
            _sharegpt4v_1k,
        ),
        Benchmark(
            "coco-5k",
            "retrieval",
            "COCO 2017 5k",
            5000,
            25000,
            "CC BY 4.0 (annotations); Flickr's terms (images)",
            "https://cocodataset.org/#download",
            "annotations/captions_val2017.json, val2017/*.jpg",
            "The first 5 captions of each image in the file's order; images by ascending id.",
            _coco_5k,
        ),
        Benchmark(
            "flickr30k-1k",
            "retrieval",
            "Flickr30k 1k",
            1000,
            5000,
            "research and education only; Flickr's terms (images)",
            "https://cs.stanford.edu/people/karpathy/deepimagesent/ (split), "
            "https://shannon.cs.illinois.edu/DenotationGraph/ (images)",
            "dataset_flickr30k.json, flickr30k-images/*.jpg",
            "All raw sentences of the images of Karpathy's test split.",
            _flickr30k_1k,
        ),
        Benchmark(
            "flickr30k-31k",
            "retrieval",
            "Flickr30k 31k",
            31783,
            158915,
            "research and education only; Flickr's terms (images)",
            "https://shannon.cs.illinois.edu/DenotationGraph/",
            "results_20130124.token, flickr30k-images/*.jpg",
            "All captions of all images, as in the Long-CLIP paper: not the 1k split.",
            _flickr30k_31k,
        ),
        Benchmark(
            "docci",
            "retrieval",
            "DOCCI",
            5000,
            5000,
            "CC BY 4.0",
            "https://google.github.io/docci/#downloads",
            "docci_descriptions.jsonlines, images/*.jpg",
            "The description of each image of the test split.",
            _docci,
        ),
        Benchmark(
            "dci",
            "retrieval",
            "DCI",
            7805,
            7805,
            "CC BY-NC 4.0 (captions); SA-1B's licence (images)",
            "https://github.com/facebookresearch/DCI",
            "densely_captioned_images/splits.json, densely_captioned_images/annotations/*.json, "
            "densely_captioned_images/photos/*.jpg",
            "The short caption, a line break and the extra caption, for the images of all three splits; without the "
            "captions of masks.",
            _dci,
        ),
        Benchmark(
            "iiw-400",
            "retrieval",
            "IIW-400",
            400,
            400,
            "CC BY 4.0",
            "https://github.com/google/imageinwords (captions), https://google.github.io/docci/#downloads (images)",
            "imageinwords/datasets/IIW-400/data.jsonl, images_aar/*.jpg",
            "The human description (IIW) of each image.",
            _iiw_400,
        ),
        Benchmark(
            "iiw-612",
            "retrieval",
            "IIW",
            612,
            612,
            "CC BY 4.0; SA-1B's licence (112 images)",
            "https://github.com/google/imageinwords (captions), https://google.github.io/docci/#downloads and "
            "https://github.com/facebookresearch/DCI (images)",
            "imageinwords/datasets/{IIW-400,DCI_Test,DOCCI_Test}/data.jsonl, images_aar/*.jpg, "
            "densely_captioned_images/photos/*.jpg, images/*.jpg",
            "The human description (IIW) of each image of IIW-400, DCI-Test and DOCCI-Test.",
            _iiw_612,
        ),
        Benchmark(
            "imagenet",
            "classification",
            "ImageNet",
            50000,
            1000,
            "research and education only",
            "https://www.kaggle.com/competitions/imagenet-object-localization-challenge/data",
            "val/WNID/*.JPEG, or as on Kaggle LOC_val_solution.csv, ILSVRC/Data/CLS-LOC/val/*.JPEG",
            f"open_clip's name of each of the 1000 classes {TEMPLATES_80}.",
            _imagenet,
            imagenet.class_names,
        ),
        Benchmark(
            "imagenet-v2",
            "classification",
            "ImageNet-V2",
            10000,
            1000,
            "none stated; Flickr's terms (images)",
            "https://huggingface.co/datasets/vaishaal/ImageNetV2",
            "imagenetv2-matched-frequency-format-val/0 ... 999/*.jpeg",
            f"open_clip's name of each of the 1000 classes {TEMPLATES_80}; the folder's number is the class.",
            _imagenet_v2,
            imagenet.class_names,
        ),
        Benchmark(
            "imagenet-o",
            "classification",
            "ImageNet-O",
            2000,
            200,
            "none stated",
            "https://github.com/hendrycks/natural-adv-examples",
            "imagenet-o/WNID/*.JPEG",
            f"open_clip's name of each of its 200 classes {TEMPLATES_80}: a choice among 200, as in CLIP_benchmark.",
            _imagenet_o,
            imagenet.class_names,
        ),
        Benchmark(
            "cifar10",
            "classification",
            "CIFAR-10",
            10000,
            10,
            "none stated",
            "https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
            "cifar-10-batches-bin/test_batch.bin, cifar-10-batches-bin/batches.meta.txt",
            f"The name of each class {TEMPLATES_80}, as in Long-CLIP's own evaluation.",
            partial(_cifar, "cifar-10-batches-bin", "cifar-10-batches-py", "test_batch.bin", "batches.meta.txt", 1),
        ),
        Benchmark(
            "cifar100",
            "classification",
            "CIFAR-100",
            10000,
            100,
            "none stated",
            "https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
            "cifar-100-binary/test.bin, cifar-100-binary/fine_label_names.txt",
            f"The name of each fine class, with spaces for underscores, {TEMPLATES_80}, as in Long-CLIP's own "
            "evaluation.",
            partial(_cifar, "cifar-100-binary", "cifar-100-python", "test.bin", "fine_label_names.txt", 2),
        ),
        Benchmark(
            "imagefolder",
            "classification",
            "Image folder",
            None,
            None,
            "your own",
            "your own",
            "CLASS/*.jpg or other images",
            "The name of each folder, with spaces for underscores, in `a photo of a {}.`",
            _class_folders,
            templates=lambda: ["a photo of a {}."],
        ),
    )
}
