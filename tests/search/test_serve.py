"""The page finds what `SearchIndex` finds, says what is read, and gives away no file."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from caption_files import imagefolder, make_rows

from longclip_hf.search import embed
from longclip_hf.search.search_index import SearchIndex

pytest.importorskip("lancedb", reason="the extra `search` is not installed")
pytest.importorskip("gradio", reason="the page's tests need the extra serve, which the test environments do not have")

from longclip_hf.search.page import read_and_cut

ROWS = 5


@pytest.fixture(scope="module")
def found(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    home = tmp_path_factory.mktemp("serve")
    (home / "photos").mkdir()
    imagefolder(make_rows(ROWS), home / "photos")
    words = [home / "photos", "--model", longclip_folder, "--output", home / "table", "--device", "cpu", "--quiet"]
    assert embed.main(list(map(str, words))) == 0
    return SearchIndex(home / "table", device="cpu")


@pytest.mark.parametrize(("words", "inside"), [(1, 1), (75, 75), (76, 75), (300, 75)])
def test_what_a_stock_clip_reads(found: SearchIndex, words: int, inside: int) -> None:
    """75 tokens of the text, with its start and end 77; the two parts are the text."""
    text = " ".join(["dog"] * words)
    read, beyond, tokens = read_and_cut(found, text, 77)
    assert read + beyond == text and len(read.split()) == inside and tokens == words + 2


@pytest.fixture(scope="module")
def url(found: SearchIndex) -> Iterator[str]:
    """Of the command in a process of its own, as users start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "longclip_hf.search.serve",
        str(found.folder),
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in said
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0  # gradio ends like that


def call(url: str, name: str, data: list[Any]) -> Any:
    """An event of the page, as its own script sends it."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/{name}/{event}") as answer:
        lines = answer.read().decode().splitlines()
    return json.loads(lines[lines.index("event: complete") + 1].removeprefix("data: "))


def test_a_question(url: str, found: SearchIndex) -> None:
    said, pictures, cut = call(url, "ask", ["a dog " * 50, None, "row < 3", 10, True])[:3]
    assert said == "102 of 102 tokens were read. " and len(pictures) == len(cut) == 3
    hits = found.search("a dog " * 50, where="row < 3")
    assert [one["caption"] for one in pictures] == [f"{hit.score:.3f}  {hit.text}" for hit in hits]


def test_tokens_while_typing(url: str) -> None:
    (parts,) = call(url, "count_tokens", ["dog " * 80])
    assert [(part["class_or_confidence"], len(part["token"].split())) for part in parts] == [
        (None, 75 + 2), ("beyond 77 tokens", 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("question", "expected"),
    [(["", None, "", 5, False], "Write a text"), (["a", None, "prise < 2", 5, False], "No field named prise")],
)
def test_what_cannot_be_answered(url: str, question: list[Any], expected: str) -> None:
    said, pictures = call(url, "ask", question)[:2]
    assert expected in said and pictures == []


def test_no_file_is_given_away(url: str, found: SearchIndex) -> None:
    for file in ("/etc/passwd", found.folder / "longclip.json", found.folder.parent / "photos" / "0003.png"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{url}/gradio_api/file={file}")


def test_an_address_that_is_taken(url: str, found: SearchIndex) -> None:
    words = [str(found.folder), "--port", url.rpartition(":")[2], "--device", "cpu"]
    line = [sys.executable, "-m", "longclip_hf.search.serve", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2 and "cannot be listened at" in done.stderr
