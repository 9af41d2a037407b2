"""Images with their captions or classes: what benchmarks and sources give, checked and counted."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from longclip_hf.cleaning import SPECIAL_TOKEN
from longclip_hf.errors import BenchmarkError
from longclip_hf.image_files import ImageFiles

_LOCAL = ImageFiles(None, access="local")  # files that a reader found itself; it opens regular ones only


@dataclass(frozen=True)
class ImageFile:
    """An image as it is stored. It can be pickled, for other processes to read it."""

    name: str  # what an error or a report shows: a path, or "row 12 of ..."
    read: Callable[[], bytes]  # the encoded file
    is_there: bool = True  # False where a reader found that it is missing


@dataclass
class LeftOut:
    """Rows that cannot be evaluated: errors, or with `skip` left out, counted and kept for `bad_rows.jsonl`."""

    skip: bool = False
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # place, cause, what is wrong

    def add(self, place: str, cause: str, wrong: str) -> None:
        """
        Raises:
            BenchmarkError: unless such rows are skipped.
        """
        if not self.skip:
            raise BenchmarkError(f"{wrong} Or skip such rows: --on_bad_row skip.")
        self.rows.append((place, cause, wrong))

    def lines(self) -> list[str]:
        """Of `bad_rows.jsonl`."""
        return [json.dumps({"row": row, "cause": cause, "detail": wrong}) for row, cause, wrong in self.rows]

    def notes(self) -> list[str]:
        """How many were left out, by cause."""
        causes = Counter(cause for _, cause, _ in self.rows)
        return counted((f"rows left out, {cause} (bad_rows.jsonl)", count) for cause, count in sorted(causes.items()))


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


def without_unreadable(found: Retrieval | Classification, left_out: LeftOut) -> Retrieval | Classification:
    """`found` without the images that cannot be decoded, and their texts. Every image is decoded for it.

    Raises:
        BenchmarkError: if none is left.
    """
    from longclip_hf.errors import ImageError
    from longclip_hf.images import decode_image

    def wrong(image: ImageFile) -> ImageError | None:
        try:
            decode_image(image.read(), image.name)
        except ImageError as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(wrong, found.images))
    for image, error in zip(found.images, errors, strict=True):
        if error is not None:
            left_out.add(image.name, error.cause, f"{error}.")
    kept = [number for number, error in enumerate(errors) if error is None]
    if not kept:
        raise BenchmarkError(
            f"{found.name}: none of its {len(errors)} images can be decoded; the last one: {errors[-1]}."
        )
    images, notes = [found.images[number] for number in kept], [*found.notes, *left_out.notes()]
    if isinstance(found, Classification):
        return replace(found, images=images, labels=[found.labels[number] for number in kept], notes=notes)
    number_of = {number: place for place, number in enumerate(kept)}
    pairs = [pair for pair in zip(found.captions, found.image_of, strict=True) if pair[1] in number_of]
    return replace(
        found,
        images=images,
        captions=[caption for caption, _ in pairs],
        image_of=[number_of[image] for _, image in pairs],
        notes=notes,
        group_of=None if found.group_of is None else [found.group_of[number] for number in kept],
    )


def counted(counts: Iterable[tuple[str, int]]) -> list[str]:
    """Notes of what there is any of."""
    return [f"{what}: {count}" for what, count in counts if count]


def image_file(path: Path, is_there: bool = True) -> ImageFile:
    """A file by its path."""
    return ImageFile(str(path), partial(_LOCAL.read, str(path)), is_there)
