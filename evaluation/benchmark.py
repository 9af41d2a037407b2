"""One benchmark: what it is, where its files come from, and how they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from longclip_hf.errors import BenchmarkError, JSONListError
from longclip_hf.evaluation import imagenet, readers
from longclip_hf.evaluation.data import Classification, LeftOut, Retrieval, classification, retrieval

TEMPLATES_80 = "in the 80 ImageNet templates"


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
    # Of a classification: the words of `caption_rule` that speak of the names, and of the templates.
    name_words: str = "The name of each class"
    template_words: str = TEMPLATES_80

    def load(
        self,
        data: Path,
        *,
        class_names: Path | None = None,
        templates: Path | None = None,
        left_out: LeftOut | None = None,
    ) -> Retrieval | Classification:
        """
        Args:
            data: the folder that the downloads were unpacked in.
            left_out: takes the images that are missing; without it they are an error.
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
            found = self._there(found, left_out or LeftOut())
        except readers.NotThere as error:
            raise BenchmarkError(f"{self.title}: {error}. {self.remedy}") from error
        except (KeyError, IndexError, TypeError, AttributeError, JSONListError) as error:
            raise BenchmarkError(
                f"{self.title}: the files are not of the expected form ({type(error).__name__}: {error}). "
                f"{self.remedy}"
            ) from error
        result: Retrieval | Classification
        if self.kind == "retrieval":
            result = retrieval(self.title, found)
            texts, kind_of_text = len(result.captions), "captions"
        else:
            result = classification(
                self.title,
                found,
                imagenet.read_class_names(class_names, found.classes) if class_names else self.names(found.classes),
                imagenet.read_templates(templates) if templates else self.templates(),
            )
            texts, kind_of_text = len(result.class_names), "classes"
            result = replace(result, definition=self.definition(class_names, templates, result.templates))
        if (self.images, self.texts) in ((None, None), (len(result.images), texts)):
            return result
        note = (
            f"{len(result.images)} images and {texts} {kind_of_text}, where {self.title} has {self.images} and "
            f"{self.texts}: not comparable with published figures"
        )
        return replace(result, notes=[note, *result.notes])

    def definition(self, class_names: Path | None, templates: Path | None, used: Sequence[str]) -> str:
        """What the texts of a classification were: `caption_rule`, or what it is with files of the user's.

        Args:
            class_names, templates: as of `load`.
            used: the templates that were used.
        """
        rule = self.caption_rule
        if class_names:
            rule = rule.replace(self.name_words, f"The user's name of each class ({class_names.name})")
        if templates:
            many = "template" if len(used) == 1 else "templates"
            shown = ", ".join(f"`{template}`" for template in used[:3]) + ", ..." * (len(used) > 3)
            rule = rule.replace(self.template_words, f"in the user's {len(used)} {many} ({templates.name}: {shown})")
        return rule

    def _there(self, found: Any, left_out: LeftOut) -> Any:
        """What was found without the images that are missing."""
        pairs = list(found if self.kind == "retrieval" else found.images)
        missing = [image for image, _ in pairs if not image.is_there]
        if missing and (not left_out.skip or len(missing) == len(pairs)):
            raise readers.NotThere(
                f"{len(missing)} of {len(pairs)} images are missing, the first is {missing[0].name}"
            )
        for image in missing:
            left_out.add(image.name, "missing", f"there is no image {image.name}.")
        there = [pair for pair in pairs if pair[0].is_there]
        return there if self.kind == "retrieval" else replace(found, images=there)

    @property
    def remedy(self) -> str:
        """Where the files come from and how they lie, for errors."""
        return f"Expected below --data: {self.layout}. Download: {self.home}"
