"""Cleaned captions have the ids of CLIP's original tokenizer, in every tokenizer of transformers."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from original_tokenizer import OriginalTokenizer
from transformers import AutoTokenizer, CLIPTokenizer, CLIPTokenizerFast

from examples.scenes.tokenizer import write_processor
from longclip_hf.cleaning import clean_caption, neutralised, preparation

CAPTIONS = [
    "A plain caption, as most are.",
    "The sign says “Café” – it’s ‘open’…",  # curly quotes, a dash, an ellipsis
    "A no-break\xa0space,\u2003an em space\r\nand a line\tbreak.",
    "Fish &amp; chips, &lt;fresh&gt;, &amp;quot;twice&amp;quot;, 5&nbsp;pounds &#8364;",
    "donâ€™t: text that was decoded as latin-1, cafÃ©",
    "ﬁne ligatures, ＦＵＬＬ width, half ｶﾅ",
    "e\u0301 is decomposed, \u00e9 composed",
    "\x1b[31mA terminal's red\x1b[0m, a bell\x07 and a zero\u200bwidth space, \ufeffa mark",
    "一只狗在跑。它是棕色的！",
    "An emoji 🐕 and a family 👨‍👩‍👧, ½ and ²",
    "IT'S 42 µM, ΩΔ and İstanbul",
    "What stands here <|endoftext|> hides this",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return folder


@pytest.mark.parametrize("kind", [CLIPTokenizerFast, CLIPTokenizer, AutoTokenizer])
def test_ids_are_the_original_tokenizers(kind: Any, folder: Path) -> None:
    tokenizer, original = kind.from_pretrained(folder), OriginalTokenizer(folder)
    for caption in CAPTIONS:
        assert tokenizer(clean_caption(caption))["input_ids"] == original(caption), caption


def test_without_cleaning_they_are_not(folder: Path) -> None:
    """The fast one, and all of transformers 5."""
    tokenizer, original = CLIPTokenizerFast.from_pretrained(folder), OriginalTokenizer(folder)
    same = [tokenizer(caption)["input_ids"] == original(caption) for caption in CAPTIONS]
    assert same[0] and not any((same[1], same[3], same[4], same[5]))


def test_worked_by_hand() -> None:
    assert clean_caption(CAPTIONS[1]) == "The sign says \"Café\" – it's 'open'…"
    assert clean_caption(CAPTIONS[3]) == 'Fish & chips, <fresh>, "twice", 5 pounds €'
    assert clean_caption(CAPTIONS[4]) == "don't: text that was decoded as latin-1, café"
    assert clean_caption(" \r\n ") == ""


def test_what_would_hide_the_rest(folder: Path) -> None:
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    end = tokenizer.eos_token_id
    for marker in ("<|endoftext|>", "<|ENDOFTEXT|>", "<|startoftext|>"):
        text = neutralised(f"A dog {marker} runs")
        assert text == f"A dog <| {marker[2:-2]} |> runs"
        ids = tokenizer(text)["input_ids"]
        assert ids.index(end) == len(ids) - 1
    assert tokenizer("A dog <|endoftext|> runs")["input_ids"].count(end) == 2


def test_what_is_done_to_captions() -> None:
    text = "Fish &amp; <|endoftext|>"
    results = {(True, False): "Fish & <|endoftext|>", (False, True): "Fish &amp; <| endoftext |>"}
    results[True, True] = "Fish & <| endoftext |>"
    for settings, result in results.items():
        prepare = pickle.loads(pickle.dumps(preparation(*settings)))  # dataloader workers may get it so
        assert prepare(text) == result
    assert preparation(False, False) is None


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"`ftfy`, of the extras"):
        clean_caption("a")
