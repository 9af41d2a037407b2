"""Every benchmark on a small copy of its official layout, and what must come out of it."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from longclip_hf.evaluation.benchmarks import BENCHMARKS


def picture(number: int) -> bytes:
    """A picture whose colour is its number. Its size keeps it lossless as PNG, whatever a file calls it."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 2 * number, 99)).save(file, "PNG")
    return file.getvalue()


def number_of(content: bytes) -> int:
    red: int = Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0))[0]  # type: ignore[index]
    return red


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_pictures(folder: Path, *names: str) -> None:
    """Pictures 1, 2, 3 and so on."""
    for number, name in enumerate(names, 1):
        write(folder / name, picture(number))


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# One small copy of each official layout, and what must come out of it.


def urban1k(data: Path) -> list[tuple[int, str]]:
    write_pictures(data / "Urban1k" / "image", "1.jpg", "10.jpg", "2.jpg")
    for name, text in (("1", "A café.\nSecond line.\n"), ("10", "A bus."), ("2", " A dog. \r\n\r\n")):
        write(data / "Urban1k" / "caption" / f"{name}.txt", text)
    write(data / "Urban1k" / "caption" / ".DS_Store", b"\0\1")
    return [(1, "A café."), (2, "A bus."), (3, "A dog.")]


def sharegpt4v(data: Path) -> list[tuple[int, str]]:
    rows = [
        {
            "id": f"{number}",
            "image": f"sam/images/sa_{number}.jpg",
            "conversations": [
                {"from": "human", "value": "What is this?\n<image>"},
                {"from": "gpt", "value": f"Scene {number}.\n\nIt goes on."},
            ],
        }
        for number in range(1, 1003)
    ]
    for number in range(1, 1001):
        write(data / "sam" / "images" / f"sa_{number}.jpg", picture(number % 100))
    write(data / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(rows))
    return [(number % 100, f"Scene {number}.  It goes on.") for number in range(1, 1001)]


def coco(data: Path) -> list[tuple[int, str]]:
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in (42, 7)]
    rows = [{"image_id": 42, "id": 900 - number, "caption": f"Late {number}"} for number in range(6)]
    rows.insert(2, {"image_id": 7, "id": 1, "caption": "Early\n"})
    write(data / "annotations" / "captions_val2017.json", json.dumps({"images": images, "annotations": rows}))
    write_pictures(data / "val2017", "000000000007.jpg", "000000000042.jpg", "000000000099.jpg")
    return [(1, "Early"), *((2, f"Late {number}") for number in range(5))]


def flickr_1k(data: Path) -> list[tuple[int, str]]:
    def entry(name: str, split: str) -> dict[str, Any]:
        raw = [{"raw": f"{name} {number}.", "tokens": [name, str(number)]} for number in range(5)]
        return {"filename": f"{name}.jpg", "split": split, "sentences": raw, "imgid": 0, "sentids": [0]}

    images = [entry("b", "test"), entry("x", "train"), entry("a", "test"), entry("y", "val")]
    write(data / "dataset_flickr30k.json", json.dumps({"dataset": "flickr30k", "images": images}))
    write_pictures(data / "flickr30k-images", "b.jpg", "a.jpg")
    return [(image, f"{name} {number}.") for image, name in ((1, "b"), (2, "a")) for number in range(5)]


def flickr_31k(data: Path) -> list[tuple[int, str]]:
    lines = [f"{name}.jpg#{number}\t{name} , a \u2028 {number} .\n" for name in ("10", "36") for number in range(5)]
    write(data / "results_20130124.token", "".join(lines))
    write_pictures(data / "flickr30k-images", "10.jpg", "36.jpg")
    return [(image, f"{name} , a \u2028 {n} .") for image, name in ((1, "10"), (2, "36")) for n in range(5)]


def docci(data: Path) -> list[tuple[int, str]]:
    def row(split: str, name: str) -> dict[str, Any]:
        return {"example_id": name, "split": split, "image_file": f"{name}.jpg", "description": f"This is {name}."}

    rows = [row("train", "train_00000"), row("test", "test_00000"), row("qual_test", "qual_test_00000")]
    write(data / "docci_descriptions.jsonlines", json_lines([*rows, row("test", "test_00001")]))
    write_pictures(data / "images", "test_00000.jpg", "test_00001.jpg")
    return [(1, "This is test_00000."), (2, "This is test_00001.")]


def dci(data: Path) -> list[tuple[int, str]]:
    folder = data / "densely_captioned_images"
    splits = {"test": ["3-data.json"], "train": ["1-data.json"], "valid": ["2-data.json"]}
    write(folder / "splits.json", json.dumps(splits))
    for number, extra in ((1, "More."), (2, ""), (3, "Two\nlines.")):
        row = {"image": f"sa_{number}.jpg", "short_caption": f"Short {number}.", "extra_caption": extra}
        row |= {"mask_data": {"0": {"label": "mask", "caption": "not this"}}, "mask_keys": ["0"]}
        write(folder / "annotations" / f"{number}-data.json", json.dumps(row))
    write_pictures(folder / "photos", "sa_1.jpg", "sa_2.jpg", "sa_3.jpg")
    return [(1, "Short 1.\nMore."), (2, "Short 2."), (3, "Short 3.\nTwo\nlines.")]


def iiw_400(data: Path) -> list[tuple[int, str]]:
    rows = [
        {"image/key": f"aar_test_0{n}", "IIW": f"Human {n}.", "IIW-P5B": "Machine.", "objects": []} for n in (1, 2)
    ]
    write(data / "imageinwords" / "datasets" / "IIW-400" / "data.jsonl", json_lines(rows))
    write_pictures(data / "images_aar", "aar_test_01.jpg", "aar_test_02.jpg")
    return [(1, "Human 1."), (2, "Human 2.")]


def iiw_612(data: Path) -> list[tuple[int, str]]:
    expected = iiw_400(data)
    folder = data / "imageinwords" / "datasets"
    row: dict[str, Any] = {"image": "sa_5.jpg", "ex_id": "5-data.json", "IIW": "Balcony."}
    write(folder / "DCI_Test" / "data.jsonl", json_lines([row]))
    row = {"image": "test_00731", "IIW": "Towels.", "DOCCI": "Not this."}
    write(folder / "DOCCI_Test" / "data.jsonl", json_lines([row]))
    write(data / "densely_captioned_images" / "photos" / "sa_5.jpg", picture(5))
    write(data / "images" / "test_00731.jpg", picture(6))
    return [*expected, (5, "Balcony."), (6, "Towels.")]


RETRIEVAL: dict[str, Callable[[Path], list[tuple[int, str]]]] = {
    "urban1k": urban1k,
    "sharegpt4v-1k": sharegpt4v,
    "coco-5k": coco,
    "flickr30k-1k": flickr_1k,
    "flickr30k-31k": flickr_31k,
    "docci": docci,
    "dci": dci,
    "iiw-400": iiw_400,
    "iiw-612": iiw_612,
}


def imagenet_folders(data: Path) -> list[tuple[int, int]]:
    """Labels 1, 4 and 999."""
    write_pictures(data / "val", "n01491361/b.JPEG", "n01443537/a.JPEG", "n15075141/c.JPEG", "n15075141/d.JPEG")
    return [(2, 1), (1, 3), (3, 999), (4, 999)]


def imagenet_kaggle(data: Path) -> list[tuple[int, int]]:
    solution = [
        ("ILSVRC2012_val_00000002", "n15075141 1 2 3 4 n15075141 5 6 7 8 "),
        ("ILSVRC2012_val_00000001", "n01443537 1 2 3 4 "),
    ]
    with write(data / "LOC_val_solution.csv", "").open("w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *solution])
    folder = data / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    write_pictures(folder, "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG")
    return [(1, 1), (2, 999)]


def imagenet_v2(data: Path) -> list[tuple[int, int]]:
    write_pictures(data / "imagenetv2-matched-frequency-format-val", "10/a.jpeg", "2/b.jpeg", "999/c.jpeg")
    return [(1, 10), (2, 2), (3, 999)]


# Folder, images and names of the binary versions.
CIFAR = {
    "cifar10": ("cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt"),
    "cifar100": ("cifar-100-binary", "test.bin", "fine_label_names.txt"),
}


def cifar(name: str, data: Path) -> bytes:
    """Two pictures, of labels 3 and 0; returns the file of them."""
    folder, images, names = CIFAR[name]
    classes = [f"aquarium_fish_{number}" for number in range(BENCHMARKS[name].texts or 0)]
    write(data / folder / names, "\n".join(classes) + "\n\n")
    records = b""
    for label, (red, green, blue) in ((3, (10, 20, 30)), (0, (40, 50, 60))):
        records += (bytes([19]) if name == "cifar100" else b"") + bytes([label])
        first_row = bytes(range(32))  # so that a turned or mirrored picture would be seen
        records += b"".join(first_row + bytes([value]) * (31 * 32) for value in (red, green, blue))
    write(data / folder / images, records)
    return records
