"""The page, as a parser sees it."""

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from sample_results import sample_results

from longclip_hf.evaluation.page import Miss, thumbnail, write_page

HOSTILE = "</p></li><script>alert(1)</script><img src=x onerror=alert(2)> \"'><b>&amp; {{ 7 * 7 }} {% raw %}"
FIRST = "openai/clip-vit-base-patch16"
VOID = {"meta", "img", "br", "wbr"}


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


def picture(colour: str) -> bytes:
    return thumbnail(Image.new("RGB", (640, 320), colour))


def miss(rank: int = 12, model: str = FIRST, benchmark: str = "Urban1k", caption: str = "a red wall") -> Miss:
    return Miss(model, benchmark, "t2i", rank, caption, [picture("red")], [picture("blue"), picture("green")])


def page_of(path: Path, *misses: Miss, limit: int = 6) -> tuple[str, Page]:
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
    _, page = page_of(tmp_path, miss())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [str(image["src"]) for image in page.all("img")]
    # Urban1k has three plots, COCO two (no curve), CIFAR-10 one; the miss has three pictures.
    assert [source.split(";")[0] for source in sources] == ["data:image/png"] * 6 + ["data:image/jpeg"] * 3
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    with Image.open(io.BytesIO(base64.b64decode(sources[6].split(",")[1]))) as image:
        assert image.size == (224, 112)


def test_captions_are_text_whatever_they_hold(tmp_path: Path) -> None:
    found = Miss(FIRST, "Urban1k", "i2t", 3, picture("red"), [HOSTILE], ["a wall", HOSTILE])
    text, page = page_of(tmp_path, miss(caption=HOSTILE), found)
    assert "<script" not in text and "onerror=alert(2)>" not in text
    assert page.texts["p"].count(HOSTILE) == 3


def test_names_are_text_too(tmp_path: Path) -> None:
    results = sample_results()
    models = [replace(results.models[0], name=HOSTILE)]
    info = replace(results.benchmarks[0], name=HOSTILE, definition=HOSTILE, notes=[HOSTILE], home="javascript:x")
    score = replace(results.scores[0], model=HOSTILE, benchmark=HOSTILE)
    hostile = replace(results, models=models, benchmarks=[info], scores=[score], differences=[], command=HOSTILE)
    write_page(hostile, [miss(model=HOSTILE, benchmark=HOSTILE)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert HOSTILE in page.texts["h2"] and HOSTILE in page.texts["li"] and HOSTILE in page.texts["code"]
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))


def test_what_was_asked_and_returned(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, miss(rank=1234))
    assert page.texts["h4"] == ["Asked", "Right answer, at rank 1,234", "Returned, best first"]
    assert [image["alt"] for image in page.all("img")][-3:] == [
        "Right answer 1", "Returned at rank 1", "Returned at rank 2",
    ]  # fmt: skip
    assert "a red wall" in page.texts["p"]


def test_the_hardest_are_shown_and_how_many_there_are(tmp_path: Path) -> None:
    misses = [miss(rank, caption=f"caption of rank {rank}") for rank in (5, 90, 7, 2, 40)]
    _, page = page_of(tmp_path, *misses, limit=3)
    shown = [text for text in page.texts["p"] if text.startswith("caption of rank")]
    assert shown == ["caption of rank 90", "caption of rank 40", "caption of rank 7"]
    # R@1 of 53.6 % leaves 464 of 1000 captions.
    assert page.texts["summary"] == [f"{FIRST} · Text to image · 3 of 464 misses"]


def test_misses_of_a_classification(tmp_path: Path) -> None:
    found = Miss(FIRST, "CIFAR-10", "i2t", 4, picture("red"), ["horse"], ["dog", "deer"])
    _, page = page_of(tmp_path, found)
    assert page.texts["summary"] == [f"{FIRST} · Image to class · 1 of 920 misses"]  # 9.2 % of 10,000


def test_it_can_be_read_without_seeing_it(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, miss())
    assert page.all("html") == [{"lang": "en"}]
    assert all(image.get("alt") for image in page.all("img"))
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) == 1 + 3 * 2
    identifiers = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {str(link["href"])[1:] for link in page.all("a")} <= identifiers
    assert "−0.7 [−1.9, +0.5]" in page.texts["td"] and "+10.8" in page.texts["strong"]


def test_a_page_without_misses(tmp_path: Path) -> None:
    text, page = page_of(tmp_path)
    assert "Hardest misses" not in text and not page.all("details")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nobody' on 'Urban1k', and the results have no such score"):
        page_of(tmp_path, miss(model="nobody"))
    with pytest.raises(ValueError, match="rank 1: that is a hit"):
        page_of(tmp_path, miss(rank=1))
    assert not list(tmp_path.iterdir())
