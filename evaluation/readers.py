"""The benchmarks' own files -> images and their texts, as each of them is published.

A reader takes the folder that the downloads were unpacked in. It raises `NotThere` for a file that is missing, and
`BenchmarkError` for files that do not fit together.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from longclip_hf.errors import BenchmarkError, LongCLIPError
from longclip_hf.evaluation.data import ImageFile, Labelled, Pairs, counted, image_file
from longclip_hf.evaluation.imagenet import wordnet_ids
from longclip_hf.image_files import IMAGE_SUFFIXES
from longclip_hf.json_list import json_objects


class NotThere(LongCLIPError):
    """Files that a reader needs. `Benchmark.load` says where they come from."""


def _file(path: Path) -> Path:
    if not path.is_file():
        raise NotThere(f"there is no file {path}")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise NotThere(f"there is no folder {path}")
    return path


def _below(folder: Path, name: str) -> Path:
    """`folder / name`. Names stand in files that somebody else wrote, and lead to files of the folder only; the files
    themselves may be links, as whoever unpacked the data put them there.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BenchmarkError(
            f"A file of the benchmark names {name!r}, which leaves its folder {folder}. Download it again, from "
            "where it was published."
        )
    return folder / name


def _images(pairs: Iterable[tuple[Path, Sequence[str]]]) -> Pairs:
    """Files with their captions."""
    return [(image_file(path, path.is_file()), texts) for path, texts in pairs]


def _json(path: Path) -> Any:
    file = _file(path)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path} is not JSON: {error}. Download it again.") from error


def _json_lines(path: Path) -> list[Any]:
    with _file(path).open(encoding="utf-8") as file:
        try:
            return [json.loads(line) for line in file if line.strip()]
        except (ValueError, RecursionError) as error:
            raise BenchmarkError(f"{path} is not JSON in every line: {error}. Download it again.") from error


# Retrieval


def urban1k(data: Path) -> Pairs:
    images = {file.stem: file for file in _folder(data / "Urban1k" / "image").glob("*.jpg")}
    captions = {file.stem: file for file in _folder(data / "Urban1k" / "caption").glob("*.txt")}
    alone = sorted(images.keys() ^ captions.keys())
    if alone:
        raise BenchmarkError(
            f"Urban1k: {len(images.keys() - captions.keys())} images in {data / 'Urban1k'} have no caption and "
            f"{len(captions.keys() - images.keys())} captions no image, such as {alone[0]!r}. Unpack it again."
        )
    return [(image_file(images[stem]), [_first_line(captions[stem])]) for stem in sorted(images)]


def _first_line(file: Path) -> str:
    with file.open(encoding="utf-8-sig") as lines:
        return lines.readline()


def sharegpt4v_1k(data: Path) -> Pairs:
    # The rest is not read: the file has 1.5 GB.
    rows = itertools.islice(json_objects(_file(data / "share-captioner_coco_lcs_sam_1246k_1107.json")), 1000)
    return _images((_below(data, row["image"]), [row["conversations"][1]["value"].replace("\n", " ")]) for row in rows)


def coco_5k(data: Path) -> Pairs:
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
    files = {image["id"]: _below(data / "val2017", image["file_name"]) for image in content["images"]}
    return _images((files[number], captions[number][:5]) for number in sorted(files))


def flickr30k_1k(data: Path) -> Pairs:
    rows = [row for row in _json(data / "dataset_flickr30k.json")["images"] if row["split"] == "test"]
    folder = data / "flickr30k-images"
    return _images((_below(folder, row["filename"]), [text["raw"] for text in row["sentences"]]) for row in rows)


def flickr30k_31k(data: Path) -> Pairs:
    captions: dict[str, list[str]] = {}
    with _file(data / "results_20130124.token").open(encoding="utf-8") as lines:
        for line in lines:
            name, _, caption = line.partition("\t")  # 1000092795.jpg#0
            captions.setdefault(name.rpartition("#")[0], []).append(caption)
    return _images((_below(data / "flickr30k-images", name), texts) for name, texts in captions.items())


def docci(data: Path) -> Pairs:
    rows = [row for row in _json_lines(data / "docci_descriptions.jsonlines") if row["split"] == "test"]
    return _images((_below(data / "images", row["image_file"]), [row["description"]]) for row in rows)


def dci(data: Path) -> Pairs:
    folder = data / "densely_captioned_images"
    splits = _json(folder / "splits.json")
    rows = [
        _json(_below(folder / "annotations", name)) for split in ("train", "valid", "test") for name in splits[split]
    ]
    return _images(
        (_below(folder / "photos", row["image"]), [f"{row['short_caption']}\n{row['extra_caption']}"]) for row in rows
    )


def iiw_400(data: Path) -> Pairs:
    rows = _json_lines(data / "imageinwords" / "datasets" / "IIW-400" / "data.jsonl")
    return _images((_below(data / "images_aar", f"{row['image/key']}.jpg"), [row["IIW"]]) for row in rows)


def iiw_612(data: Path) -> Pairs:
    folder = data / "imageinwords" / "datasets"
    dci, docci = _json_lines(folder / "DCI_Test" / "data.jsonl"), _json_lines(folder / "DOCCI_Test" / "data.jsonl")
    photos = data / "densely_captioned_images" / "photos"
    return [
        *iiw_400(data),
        *_images((_below(photos, row["image"]), [row["IIW"]]) for row in dci),
        *_images((_below(data / "images", f"{row['image']}.jpg"), [row["IIW"]]) for row in docci),
    ]


# Classification


def class_folders(folder: Path) -> Labelled:
    """The images of every folder in `folder`, which is their class; both in the order of their names."""
    classes = sorted(entry.name for entry in _folder(folder).iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise BenchmarkError(f"{folder} holds no folders: one for each class is expected, with its images.")
    images, others, empty = [], 0, 0
    for name in classes:
        files = sorted(file for file in (folder / name).iterdir() if file.name[0] != ".")
        pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        images += [(image_file(file), name) for file in pictures]
        others += len(files) - len(pictures)
        empty += not pictures
    if not images:
        raise BenchmarkError(f"The {len(classes)} folders in {folder} hold no images ({', '.join(IMAGE_SUFFIXES)}).")
    notes = counted(
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


def imagenet(data: Path) -> Labelled:
    classes = wordnet_ids()
    if (data / "val").is_dir() or not (data / "LOC_val_solution.csv").is_file():
        found = _known_classes(class_folders(data / "val"), classes, data / "val")
        return Labelled(found.images, classes, found.notes)
    with (data / "LOC_val_solution.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted((row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file))
    strange = {wordnet_id for _, wordnet_id in rows} - set(classes)
    if strange:
        raise BenchmarkError(f"LOC_val_solution.csv names {len(strange)} unknown classes, such as {min(strange)!r}.")
    folder = _folder(data / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    pairs = _images((_below(folder, f"{name}.JPEG"), [wordnet_id]) for name, wordnet_id in rows)
    return Labelled([(image, texts[0]) for image, texts in pairs], classes)


def imagenet_v2(data: Path) -> Labelled:
    classes, folder = wordnet_ids(), data / "imagenetv2-matched-frequency-format-val"
    # By number: in the order of their names, "10" would come before "2".
    found = _known_classes(class_folders(folder), [str(number) for number in range(len(classes))], folder)
    return Labelled([(image, classes[int(number)]) for image, number in found.images], classes, found.notes)


def imagenet_o(data: Path) -> Labelled:
    return _known_classes(class_folders(data / "imagenet-o"), wordnet_ids(), data / "imagenet-o")


def cifar(folder: str, python_folder: str, images: str, names: str, labels: int, data: Path) -> Labelled:
    """CIFAR's binary version: records of `labels` bytes, the last of which counts, and 3 x 32 x 32 of the picture."""
    if not (data / folder).is_dir() and (data / python_folder).is_dir():
        raise NotThere(
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
