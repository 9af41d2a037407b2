"""ImageNet's 1000 classes: their WordNet ids, their names, and the templates that make texts of them.

Names and templates are those of the package open_clip_torch, or of the user's files. Of the package one file is read:
importing it would import torchvision too, which nothing here needs.
"""

import importlib.util
import runpy
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

INSTALL = (
    "Install it without what it requires, of which nothing is used: pip install --no-deps open_clip_torch. "
    "Or give both from files of yours: --class_names and --templates."
)


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1000 WordNet ids in ascending order: a class's label is its place among them."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="ascii").split())


def class_names(classes: Sequence[str]) -> list[str]:
    """open_clip's name of each class.

    Args:
        classes: WordNet ids.

    Raises:
        ImportError: if open_clip_torch is not installed, or is not as expected.
    """
    named = dict(zip(wordnet_ids(), _open_clip("IMAGENET_CLASSNAMES", len(wordnet_ids())), strict=True))
    return [named[wordnet_id] for wordnet_id in classes]


def templates() -> list[str]:
    """The 80 templates with `{}` for the class (Radford et al. 2021, section 3.1.4), which the paper uses too.

    Raises:
        ImportError: if open_clip_torch is not installed, or is not as expected.
    """
    return [template("{}") for template in _open_clip("OPENAI_IMAGENET_TEMPLATES", 80)]


def _open_clip(name: str, count: int) -> Sequence[Any]:
    """A sequence of open_clip's zero_shot_metadata.py, whose templates are functions: so it is run, but by itself."""
    package = importlib.util.find_spec("open_clip")  # finds without importing
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"ImageNet's class names and templates come from open_clip_torch. {INSTALL}")
    file = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    values: Sequence[Any] = runpy.run_path(str(file)).get(name, ()) if file.is_file() else ()
    if len(values) != count:
        raise ImportError(
            f"Expected {count} {name} in open_clip_torch's {file}, found {len(values)}. "
            "Install another version, 2.20 or newer: pip install --no-deps --upgrade open_clip_torch. "
            "Or give both from files of yours: --class_names and --templates."
        )
    return values


def read_class_names(file: Path, classes: Sequence[str]) -> list[str]:
    """The name of each class, from lines of `class<TAB>name`; classes that are not asked for may be among them.

    Args:
        file: of the user's.
        classes: as the benchmark calls them: a WordNet id for ImageNet, the folder's name for folders.

    Raises:
        ValueError: for a line of another form, for a class that has two lines, or none.
    """
    named: dict[str, str] = {}
    for number, line in _lines(file):
        known, _, name = (part.strip() for part in line.partition("\t"))
        if not name or known in named:
            raise ValueError(f"{file}, line {number}: expected class<TAB>name, each class once, got {line!r:.80}.")
        named[known] = name
    missing = [name for name in classes if name not in named]
    if missing:
        raise ValueError(f"{file} has no line for {len(missing)} of {len(classes)} classes, such as {missing[0]!r}.")
    return [named[name] for name in classes]


def read_templates(file: Path) -> list[str]:
    """The lines of `file`: texts with one `{}` for the class.

    Raises:
        ValueError: for a line without it or with several, and for a file without lines.
    """
    lines = list(_lines(file))
    for number, line in lines:
        if line.count("{}") != 1:
            raise ValueError(f"{file}, line {number}: expected a text with one {{}} for the class, got {line!r:.80}.")
    if not lines:
        raise ValueError(f"{file} holds no template.")
    return [line.strip() for _, line in lines]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not empty, and their numbers.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
