"""Images with their captions or classes: what benchmarks and sources give, checked and counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from longclip_hf.cleaning import SPECIAL_TOKEN
from longclip_hf.errors import BenchmarkError
from longclip_hf.image_files import ImageFiles

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_LOCAL = ImageFiles(None, access="local")  # files that a reader found itself; it opens regular ones only


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
    group_of: Sequence[int] | None = None  # of each image, where images are alike: intervals resample groups


@dataclass(frozen=True)
class Classification:
    """Images and their classes. `images[i]` shows `class_names[labels[i]]`."""

    name: str
    images: Sequence[ImageFile]
    labels: Sequence[int]
    class_names: Sequence[str]
    templates: Sequence[str]  # with "{}" for the class name
    notes: Sequence[str]
    definition: str = ""  # what the texts are; empty where the benchmark's own rule says it


# What readers give: images with their captions, or with their class and all classes there are.
Pairs = Iterable[tuple[ImageFile, Sequence[str]]]


@dataclass(frozen=True)
class Labelled:
    """Images, each with its class; all classes in the order of their labels; notes."""

    images: Sequence[tuple[ImageFile, str]]
    classes: Sequence[str]
    notes: Sequence[str] = ()


def retrieval(name: str, pairs: Pairs, notes: Sequence[str] = ()) -> Retrieval:
    """What a reader found, with what was left out counted.

    Raises:
        BenchmarkError: if no image has a caption.
    """
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
        (
            "captions with a literal <|endoftext|> or <|startoftext|>, which hides what follows unless "
            "--neutralise_special_tokens is given",
            sum(bool(SPECIAL_TOKEN.search(caption)) for caption in captions),
        ),
        ("images that are listed again (only the caption's own entry counts as found)", twice),
    )
    return Retrieval(name, images, captions, image_of, [*notes, *counted(found)])


def classification(name: str, found: Labelled, class_names: Sequence[str], templates: Sequence[str]) -> Classification:
    """What a reader found, with the words for its classes."""
    label = {key: number for number, key in enumerate(found.classes)}
    labels = [label[key] for _, key in found.images]
    same = [name for name, count in Counter(class_names).items() if count > 1]
    tied = f"names that stand for several classes, which always tie ({', '.join(same)})"
    notes = [*found.notes, *counted([(tied, len(same))])]
    return Classification(name, [image for image, _ in found.images], labels, class_names, templates, notes)


def counted(counts: Iterable[tuple[str, int]]) -> list[str]:
    """Notes of what there is any of."""
    return [f"{what}: {count}" for what, count in counts if count]


def image_file(path: Path) -> ImageFile:
    """A file by its path."""
    return ImageFile(str(path), partial(_LOCAL.read, str(path)))
