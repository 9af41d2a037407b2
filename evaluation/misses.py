"""Misses as a page shows them: what was asked, what is right, what a model returned; kept for pages of later runs."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from longclip_hf.results import Direction

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Text:
    """A caption, or the name of a class: what the model read of it, and what is beyond its tokens."""

    read: str
    unread: str = ""


Item = Text | bytes  # bytes: a picture from `thumbnail`


@dataclass(frozen=True)
class Miss:
    """A query whose right answer is not the most similar one."""

    rank: int  # of the best placed right answer, from 1
    query: Item
    expected: list[Item]  # every right answer
    returned: list[Item]  # the most similar ones, best first


@dataclass(frozen=True)
class Misses:
    """Of one model on one benchmark in one direction.

    Args:
        model, benchmark: their names.
        direction: "i2t" for classification too: its answers are the names of classes.
        reference: the model that gets them right. None: they are all of the model's, whoever gets them right.
        total: how many there are.
        shown: some of them, the hardest first.
    """

    model: str
    benchmark: str
    direction: Direction
    reference: str | None
    total: int
    shown: list[Miss]


def thumbnail(image: "Image", side: int = 224) -> bytes:
    """A JPEG no larger than `side` pixels either way; `image` is in mode RGB and stays as it is."""
    small = image.copy()
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=80)
    return data.getvalue()


def to_json(groups: Sequence[Misses]) -> str:
    """As a text that `from_json` reads."""

    def plain(value: Any) -> Any:
        return {"jpeg": base64.b64encode(value).decode()}

    return json.dumps([asdict(group) for group in groups], default=plain, ensure_ascii=False)


def from_json(text: str, model: str, benchmark: str) -> list[Misses]:
    """Read again, under the names of now: a collection of results may have others.

    Raises:
        ValueError, KeyError, TypeError: for any other text.
    """

    def item(data: dict[str, str]) -> Item:
        return base64.b64decode(data["jpeg"]) if "jpeg" in data else Text(**data)

    def miss(data: dict[str, Any]) -> Miss:
        lists = {name: [item(entry) for entry in data[name]] for name in ("expected", "returned")}
        return Miss(int(data["rank"]), item(data["query"]), **lists)

    return [
        Misses(**{**group, "model": model, "benchmark": benchmark, "shown": [miss(entry) for entry in group["shown"]]})
        for group in json.loads(text)
    ]
