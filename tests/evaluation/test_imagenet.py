"""ImageNet's class names and templates, from the package and from files."""

import importlib.util
import sys
from pathlib import Path

import pytest
from open_clip_stub import NAMES, TEMPLATES, write_open_clip

from longclip_hf.evaluation import imagenet


@pytest.fixture
def open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_open_clip(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_wordnet_ids() -> None:
    """tench, goldfish, toilet tissue: labels 0, 1 and 999 wherever ImageNet's labels are listed."""
    ids = imagenet.wordnet_ids()
    assert len(ids) == len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    assert (ids[0], ids[1], ids[999]) == ("n01440764", "n01443537", "n15075141")


@pytest.mark.usefixtures("open_clip")
def test_names_and_templates_without_importing_the_package() -> None:
    assert imagenet.class_names(["n15075141", "n01440764"]) == [NAMES[999], NAMES[0]]
    assert imagenet.templates() == TEMPLATES
    assert not {"open_clip", "torchvision"} & set(sys.modules)


@pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None,
    reason="open_clip_torch is not installed (pip install --no-deps open_clip_torch)",
)
def test_the_real_package() -> None:
    assert imagenet.class_names(["n01440764", "n15075141"]) == ["tench", "toilet paper"]
    templates = imagenet.templates()
    assert len(set(templates)) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert templates[:2] == ["a bad photo of a {}.", "a photo of many {}."]
    assert not {"open_clip", "torchvision"} & set(sys.modules)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (imagenet.templates, lambda: imagenet.class_names(["n01440764"])):
        with pytest.raises(ImportError, match=r"pip install --no-deps open_clip_torch\. .*--class_names and --templ"):
            ask()


def test_another_version_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_open_clip(tmp_path, names=999)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"Expected 1000 IMAGENET_CLASSNAMES .*zero_shot_metadata.py, found 999"):
        imagenet.class_names(["n01440764"])
    (tmp_path / "open_clip" / "zero_shot_metadata.py").unlink()
    with pytest.raises(ImportError, match=r"Expected 80 OPENAI_IMAGENET_TEMPLATES .*found 0"):
        imagenet.templates()


def test_class_names_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("﻿n2\tgreat white shark \n\nn1\ttench\nn3\tunused\n", encoding="utf-8")
    assert imagenet.read_class_names(file, ["n1", "n2"]) == ["tench", "great white shark"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1\ttench\nn2 shark\n", r"line 2: expected class<TAB>name, each class once, got 'n2 shark'"),
        ("n1\ttench\nn2\t \n", "line 2: expected class<TAB>name"),
        ("n1\ttench\nn1\tshark\n", "line 2: expected class<TAB>name, each class once"),
        ("n1\ttench\n", "no line for 1 of 2 classes, such as 'n2'"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        imagenet.read_class_names(tmp_path / "names.txt", ["n1", "n2"])


def test_templates_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\n\nmy {}\n")
    assert imagenet.read_templates(file) == ["a photo of a {}.", "my {}"]
    for text, message in (
        ("a {}\na photo\n", "line 2: expected a text with one {}"),
        ("{} and {}\n", "line 1"),
        ("\n", "no template"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            imagenet.read_templates(file)
    with pytest.raises(ValueError, match=r"none\.txt cannot be read"):
        imagenet.read_templates(tmp_path / "none.txt")
