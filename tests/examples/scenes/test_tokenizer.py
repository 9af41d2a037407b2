"""The tokenizer is the same everywhere, knows every word, and counts what the captions promise."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, CLIPTokenizerFast

from examples.scenes.captions import CLASS_NAMES, TEMPLATES
from examples.scenes.dataset import example
from examples.scenes.tokenizer import BOS, EOT, train_merges, write_processor
from examples.scenes.world import IMAGE_SIZE

FILES_HASH = "eee4700750838940"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def captions(split: str, count: int = 120) -> list[str]:
    return [example(split, index)["caption"] for index in range(count)]


def test_merges_worked_by_hand() -> None:
    counts = Counter({"aba": 3, "ab": 2, "ca": 2})
    # a+b: 3. Then ab+a</w>: 3. Of those with 2, "a b</w>" comes first in the alphabet.
    assert train_merges(counts) == [("a", "b"), ("ab", "a</w>"), ("a", "b</w>"), ("c", "a</w>")]


def test_files_are_the_same_on_every_machine(folder: Path) -> None:
    files = sorted(file for file in folder.iterdir())
    assert [file.name for file in files] == [
        "merges.txt", "preprocessor_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    assert hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16] == FILES_HASH
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert (vocab[BOS], vocab[EOT]) == (len(vocab) - 2, len(vocab) - 1)


def test_every_word_is_one_token_in_every_tokenizer(folder: Path) -> None:
    texts = [*captions("pretrain"), *captions("train", 60), *captions("hard", 30), *captions("short")]
    texts += [template.format(name) for template in TEMPLATES for name in CLASS_NAMES]
    expected = [[BOS, *(f"{word}</w>" for word in re.findall(r"\w+|[,.]", text.lower())), EOT] for text in texts]
    for kind in (CLIPTokenizer, CLIPTokenizerFast, AutoTokenizer):
        tokenizer = kind.from_pretrained(folder, model_max_length=248)
        assert [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts).input_ids] == expected
        assert tokenizer.decode(tokenizer(texts[0]).input_ids, skip_special_tokens=True).split() == re.findall(
            r"\w+|[,.]", texts[0].lower()
        )
        strange = tokenizer("Zürich: it's 42 µm!").input_ids
        assert tokenizer.decode(strange, skip_special_tokens=True).replace(" ", "") == "zürich:it's42µm!"


@pytest.mark.parametrize("split", ["train", "validation", "long", "hard"])
def test_long_captions_have_100_to_240_tokens(split: str, tokenizer: CLIPTokenizerFast) -> None:
    lengths = [len(ids) for ids in tokenizer(captions(split, 400)).input_ids]
    assert min(lengths) >= 100 and max(lengths) <= 240


def test_sentences_have_about_20_tokens(tokenizer: CLIPTokenizerFast) -> None:
    """Whatever is drawn: five or six details make 100 to 240 tokens, and four reach beyond token 77."""
    main, details = [], []
    for text in captions("train", 300):
        first, *others = (len(ids) - 2 for ids in tokenizer(text.removesuffix(".").split(". ")).input_ids)
        main.append(first + 1)
        details += [length + 1 for length in others]
    assert (min(main), max(main)) == (9, 14) and (min(details), max(details)) == (19, 30)
    assert 2 + 9 + 5 * 19 >= 100 and 2 + 14 + 6 * 30 <= 240 and 1 + 9 + 4 * 19 >= 77


def test_captions_for_pretraining_are_mostly_under_20_tokens(tokenizer: CLIPTokenizerFast) -> None:
    lengths = [len(ids) for ids in tokenizer(captions("pretrain", 600)).input_ids]
    assert sum(length < 20 for length in lengths) / len(lengths) > 0.6
    assert max(lengths) <= 46
    words = set(" ".join(captions("pretrain", 600)).lower().replace(".", "").replace(",", "").split())
    assert set(" ".join(captions("train", 200)).lower().replace(".", "").replace(",", "").split()) <= words


def test_hard_pictures_are_told_apart_beyond_token_77(tokenizer: CLIPTokenizerFast) -> None:
    for text in captions("hard", 400):
        shared = ". ".join(text.split(". ")[:5]) + "."
        assert len(tokenizer(shared).input_ids) - 1 > 77  # without EOT


def test_pixels_reach_the_model_as_they_are(folder: Path) -> None:
    """72 pixels are neither scaled nor cropped: a patch of 24 pixels is a cell."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 0, 0))
    image.putpixel((5, 60), (0, 255, 0))
    pixels = CLIPImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values[0]
    assert pixels.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert (pixels[0] != pixels[0, 0, 0]).nonzero().tolist() == [[60, 5]]
    processor = CLIPProcessor.from_pretrained(folder)
    both = processor(text=["a large red star."], images=image, return_tensors="pt", padding=True)
    assert both.input_ids.shape == (1, 7) and both.pixel_values.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
