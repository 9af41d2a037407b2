"""The page, as a parser sees it."""

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sample_results import sample_results

from longclip_hf.evaluation import page
from longclip_hf.evaluation.look import Ground
from longclip_hf.evaluation.misses import Item, Miss, Misses, Text, from_json, thumbnail, to_json
from longclip_hf.evaluation.page import write_page
from longclip_hf.evaluation.plots import Plot
from longclip_hf.results import Results

HOSTILE = "</p></li><script>alert(1)</script><img src=x onerror=alert(2)> \"'><b>&amp; {{ 7 * 7 }} {% raw %}"
FIRST = "openai/clip-vit-base-patch16"
VOID = {"meta", "img", "br", "wbr", "source"}


class Page(HTMLParser):
    """Tags with their attributes, and the text of each element of the body; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module", autouse=True)
def plots_are_drawn_once() -> Iterator[None]:
    drawn: dict[Any, list[Plot]] = {}

    def plots(results: Results, ground: Ground) -> list[Plot]:
        key = (results.models[0].name, results.benchmarks[0].name, ground)
        return drawn.get(key) or drawn.setdefault(key, real(results, ground))

    real = page.plots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "plots", plots)
        yield


def picture(colour: str) -> bytes:
    return thumbnail(Image.new("RGB", (640, 320), colour))


WALL = Text("a red wall")


def miss(rank: int = 12, caption: Item = WALL) -> Miss:
    return Miss(rank, caption, [picture("red")], [picture("blue"), picture("green")])


def group(*misses: Miss, model: str = FIRST, benchmark: str = "Urban1k", total: int = 464) -> Misses:
    return Misses(model, benchmark, "t2i", None, total, list(misses) or [miss()])


def page_of(path: Path, *misses: Misses, limit: int = 6) -> tuple[str, Page]:
    write_page(sample_results(), misses, path / "page.html", limit)
    text = (path / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_thumbnails_are_small_and_keep_the_picture() -> None:
    original = Image.new("RGB", (640, 320), "red")
    with Image.open(io.BytesIO(thumbnail(original))) as image:
        assert image.format == "JPEG" and image.size == (224, 112)
        pixel = image.convert("RGB").getpixel((10, 10))
        assert isinstance(pixel, tuple) and pixel == pytest.approx((254, 0, 0), abs=3)
    assert original.size == (640, 320)
    with Image.open(io.BytesIO(thumbnail(Image.new("RGB", (20, 30))))) as image:
        assert image.size == (20, 30), "never enlarged"


def test_self_contained_and_without_script(tmp_path: Path) -> None:
    _, parsed = page_of(tmp_path, group())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    sources = [str(image["src"]) for image in parsed.all("img")]
    # Urban1k has three plots, COCO two (no curve), CIFAR-10 one; the miss has three pictures.
    assert [source.split(";")[0] for source in sources] == ["data:image/svg+xml"] * 6 + ["data:image/jpeg"] * 3
    dark = parsed.all("source")
    assert [source["media"] for source in dark] == ["(prefers-color-scheme: dark)"] * 6
    assert not {source["srcset"] for source in dark} & set(sources)
    assert all(str(link["href"]).startswith("#") for link in parsed.all("a"))
    policy = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    with Image.open(io.BytesIO(base64.b64decode(sources[6].split(",")[1]))) as image:
        assert image.size == (224, 112)


def test_captions_are_text_whatever_they_hold(tmp_path: Path) -> None:
    found = Miss(3, picture("red"), [Text(HOSTILE)], [Text("a wall"), Text(HOSTILE, HOSTILE)])
    text, parsed = page_of(tmp_path, group(miss(caption=Text(HOSTILE))), replace(group(found), direction="i2t"))
    assert "<script" not in text and "onerror=alert(2)>" not in text
    assert parsed.texts["p"].count(HOSTILE) == 2 and parsed.texts["p"].count(f"{HOSTILE} (not read:) {HOSTILE}") == 1


def test_names_are_text_too(tmp_path: Path) -> None:
    results = sample_results()
    models = [replace(results.models[0], name=HOSTILE)]
    info = replace(results.benchmarks[0], name=HOSTILE, definition=HOSTILE, notes=[HOSTILE], home="javascript:x")
    score = replace(results.scores[0], model=HOSTILE, benchmark=HOSTILE)
    hostile = replace(results, models=models, benchmarks=[info], scores=[score], differences=[], command=HOSTILE)
    write_page(hostile, [group(model=HOSTILE, benchmark=HOSTILE)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert "<script" not in text
    assert HOSTILE in parsed.texts["h2"] and HOSTILE in parsed.texts["li"] and HOSTILE in parsed.texts["code"]
    assert all(str(link["href"]).startswith("#") for link in parsed.all("a"))


def test_what_was_asked_and_returned(tmp_path: Path) -> None:
    _, parsed = page_of(tmp_path, group(miss(rank=1234)))
    assert parsed.texts["h4"] == ["Asked", "Right answer, at rank 1,234", "Returned, best first"]
    assert [image["alt"] for image in parsed.all("img")][-3:] == [
        "Right answer 1", "Returned at rank 1", "Returned at rank 2",
    ]  # fmt: skip
    assert "a red wall" in parsed.texts["p"]


def test_the_hardest_are_shown_and_how_many_there_are(tmp_path: Path) -> None:
    misses = [miss(rank, Text(f"caption of rank {rank}")) for rank in (5, 90, 7, 2, 40)]
    others = replace(group(model="long-clip-vit-base-patch16", total=1234), reference=FIRST)
    _, parsed = page_of(tmp_path, others, group(*misses), limit=3)
    shown = [text for text in parsed.texts["p"] if text.startswith("caption of rank")]
    assert shown == ["caption of rank 90", "caption of rank 40", "caption of rank 7"]
    assert parsed.texts["summary"] == [  # in the models' order
        f"{FIRST} · Text to image · 3 of 464 misses",
        f"long-clip-vit-base-patch16 · Text to image · 1 of 1,234 misses that {FIRST} gets right",
    ]


def test_what_the_model_did_not_read_is_marked(tmp_path: Path) -> None:
    _, parsed = page_of(tmp_path, group(miss(caption=Text("A red wall.", " It is made of bricks."))))
    assert {"class": "unread"} in parsed.all("span")
    assert "A red wall. (not read:)  It is made of bricks." in parsed.texts["p"]


def test_misses_are_kept_as_they_are(tmp_path: Path) -> None:
    groups = [group(miss(caption=Text("a", " b"))), replace(group(), reference="clip", direction="i2t")]
    assert from_json(to_json(groups), FIRST, "Urban1k") == groups
    renamed = from_json(to_json(groups), "other (1a2b3c4)", "Urban1k")
    assert [found.model for found in renamed] == ["other (1a2b3c4)"] * 2


def test_misses_of_a_classification(tmp_path: Path) -> None:
    found = Miss(4, picture("red"), [Text("horse")], [Text("dog"), Text("deer")])
    _, parsed = page_of(tmp_path, Misses(FIRST, "CIFAR-10", "i2t", None, 920, [found]))
    assert parsed.texts["summary"] == [f"{FIRST} · Image to class · 1 of 920 misses"]


def test_it_can_be_read_without_seeing_it(tmp_path: Path) -> None:
    _, parsed = page_of(tmp_path, group())
    assert parsed.all("html") == [{"lang": "en"}]
    assert all(image.get("alt") for image in parsed.all("img"))
    assert all(cell["scope"] in ("row", "col") for cell in parsed.all("th"))
    assert len(parsed.all("caption")) == len(parsed.all("table")) == 2 + 3 * 2
    recall = next(str(image["alt"]) for image in parsed.all("img") if str(image["alt"]).startswith("Recall"))
    assert f"Urban1k, {FIRST}: Image to text, R@1 68.1" in recall
    curve = next(str(image["alt"]) for image in parsed.all("img") if str(image["alt"]).startswith("Effective"))
    assert "effective length 150" in curve and "% at 248 tokens" in curve
    identifiers = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    assert {str(link["href"])[1:] for link in parsed.all("a")} <= identifiers
    assert "−0.7 [−1.9, +0.5]" in parsed.texts["td"] and "+10.8" in parsed.texts["strong"]


def test_it_begins_with_models_by_benchmarks(tmp_path: Path) -> None:
    text, _ = page_of(tmp_path)
    first = Page(text[text.index("<main>") : text.index("</table>") + 8] + "</div></main>")
    assert first.texts["th"][:4] == [
        "Model", "Urban1k, image to text R@1", "Urban1k, text to image R@1", "COCO 2017 5k, image to text R@1",
    ]  # fmt: skip
    # Urban1k's, and of CIFAR-10 the two that share the first place.
    assert first.texts["strong"] == ["90.8", "90.8", "78.9", "79.5", "57.6", "40.4"]
    assert first.texts["td"][5:8] == ["67.4 (−0.7)", "54.9 (+1.3*)", "52.0 (−0.4)"]


def test_a_page_without_misses(tmp_path: Path) -> None:
    text, parsed = page_of(tmp_path)
    assert "Hardest misses" not in text and not parsed.all("details")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nobody' on 'Urban1k', and the results have no such score"):
        page_of(tmp_path, group(model="nobody"))
    with pytest.raises(ValueError, match="rank 1: that is a hit"):
        page_of(tmp_path, group(miss(rank=1)))
    assert not list(tmp_path.iterdir())
