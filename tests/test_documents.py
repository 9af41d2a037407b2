"""What documents quote is what the code says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("modeling_longclip", "longclip_hf", "conversion", "training", "evaluation", "search")
QUOTED = re.findall(r'^\| "([^"]+)" \|', (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def said() -> str:
    """All string literals, with those that stand behind one another joined, and line ends as spaces."""
    texts = (file.read_text(encoding="utf-8") for folder in SOURCES for file in (ROOT / folder).rglob("*.py"))
    return " ".join(re.sub(r'"\s*(\+ )?f?"', "", text) for text in texts)


@pytest.mark.parametrize("words", QUOTED)
def test_errors_are_quoted_as_they_are(words: str, said: str) -> None:
    assert words in said


def test_there_are_errors() -> None:
    assert len(QUOTED) > 15
