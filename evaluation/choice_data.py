"""Choices between few texts or images, as Winoground, SugarCrepe and ARO publish them, from JSON and JSON lines."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longclip_hf.errors import BenchmarkError
from longclip_hf.evaluation.data import ImageFile
from longclip_hf.image_files import ImageFiles


@dataclass(frozen=True)
class Choices:
    """Rows of images and captions that belong together.

    Args:
        name: of the benchmark.
        images, captions: each once.
        images_of, captions_of: of each row, which of them. Two images and two captions, where the first belongs to the
            first; or one image and two captions or more, of which the first is right.
        notes: what is out of the ordinary.
        definition: what is chosen.
    """

    name: str
    images: Sequence[ImageFile]
    captions: Sequence[str]
    images_of: Sequence[tuple[int, ...]]
    captions_of: Sequence[tuple[int, ...]]
    notes: Sequence[str]
    definition: str

    @property
    def pairs(self) -> bool:
        """Whether rows have two images."""
        return len(self.images_of[0]) == 2


@dataclass(frozen=True)
class _Shape:
    """The columns by which rows are known."""

    like: str
    images: tuple[tuple[str, ...], ...]  # of each image, the names that its column may have
    captions: tuple[str, ...]  # or one column of lists
    definition: str


_ONE = "One image, captions that differ in little: the right one must be the most similar."
_SHAPES = (
    _Shape(
        "Winoground",
        (("image_0",), ("image_1",)),
        ("caption_0", "caption_1"),
        "Two images, two captions of the same words: each must be nearest to its own.",
    ),
    _Shape("SugarCrepe", (("filename", "image", "image_path"),), ("caption", "negative_caption"), _ONE),
    _Shape("ARO", (("image_path", "image", "filename"),), ("true_caption", "false_caption"), _ONE),
    _Shape("ARO's orders", (("image_path", "image", "filename"),), ("caption_options",), _ONE),
)
_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")  # ARO's relations and attributes are of a part of the image


def read_choices(source: str, root: str | Path | None, access: Any = "root") -> Choices | None:
    """Choices, or None where `source` is no file of JSON whose first row has their columns.

    `image_0`, `image_1`, `caption_0`, `caption_1` are Winoground's; an image with `caption` and `negative_caption`
    SugarCrepe's; with `true_caption` and `false_caption`, or with a list of `caption_options`, the first of which is
    right, ARO's. Rows are JSON lines, a list, or an object of objects. A part of an image (`bbox_x`, `bbox_y`,
    `bbox_w`, `bbox_h`) is cut out.

    Args:
        source: the file.
        root: where names of images begin; by default beside the file.
        access: of images outside it; see `longclip_hf.image_files.ImageFiles`.

    Raises:
        BenchmarkError: for rows that are not as the first one.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return None
    rows = _rows(path)
    first = next(rows, None)
    shape = next((shape for shape in _SHAPES if first is not None and _columns(shape, first)), None)
    if first is None or shape is None:
        return None
    files = ImageFiles(root or path.parent, access=access)
    images: dict[object, tuple[int, ImageFile]] = {}
    captions: dict[str, int] = {}
    images_of: list[tuple[int, ...]] = []
    captions_of: list[tuple[int, ...]] = []
    for number, row in enumerate([first, *rows]):
        columns = _columns(shape, row)
        if columns is None:
            raise BenchmarkError(f"Row {number} of {source} lacks a column of {shape.like}: it has {', '.join(row)}.")
        texts = row[shape.captions[0]] if len(shape.captions) == 1 else [row[name] for name in shape.captions]
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise BenchmarkError(f"Row {number} of {source} needs two captions or more, texts with a word each.")
        if len(captions_of) and len(texts) != len(captions_of[0]):
            raise BenchmarkError(
                f"Row {number} of {source} has {len(texts)} captions to choose from, the first one "
                f"{len(captions_of[0])}: chance differs, so evaluate them apart."
            )
        box = tuple(row[name] for name in _BOX) if all(name in row for name in _BOX) else None
        of_row = []
        for name in columns:
            key = (row[name], box)
            if key not in images:
                images[key] = len(images), _image(files, str(row[name]), box)
            of_row.append(images[key][0])
        images_of.append(tuple(of_row))
        captions_of.append(tuple(captions.setdefault(text.strip(), len(captions)) for text in texts))
    same = sum(len(set(of_row)) < len(of_row) for of_row in captions_of)
    notes = [f"{len(captions_of):,} rows like those of {shape.like}, {len(captions_of[0])} captions each"]
    if same:
        notes.append(f"rows with the same caption twice, which always tie: {same}")
    found = [image for _, image in images.values()]
    return Choices(source, found, list(captions), images_of, captions_of, notes, shape.definition)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError, RecursionError):
        return  # another reader says what is wrong with it
    listed = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else []
    yield from (row for row in listed if isinstance(row, dict))


def _columns(shape: _Shape, row: Mapping[str, Any]) -> list[str] | None:
    """The row's columns of images, or None where it has another shape."""
    if not all(name in row for name in shape.captions):
        return None
    found = [next((name for name in names if isinstance(row.get(name), str)), None) for names in shape.images]
    return None if None in found else [name for name in found if name is not None]


def _image(files: ImageFiles, name: str, box: tuple[float, ...] | None) -> ImageFile:
    where = files.place(name)
    if "://" not in where and not Path(where).exists():
        with_suffix = next((f"{name}{end}" for end in (".png", ".jpg") if Path(f"{where}{end}").exists()), None)
        if with_suffix is None:  # Winoground names images without their suffix
            raise BenchmarkError(
                f"There is no image {where}; names begin in --image_root, --data, or beside the file."
            )
        name, where = with_suffix, files.place(with_suffix)
    if box is None:
        return ImageFile(where, partial(files.read, name))
    return ImageFile(f"{where}, {box}", partial(_part, files, name, box))


def _part(files: ImageFiles, name: str, box: tuple[float, ...]) -> bytes:
    """A part of an image, as a file."""
    from longclip_hf.images import decode_image

    left, top, width, height = box
    image = decode_image(files.read(name), name).crop((left, top, left + width, top + height))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
