"""A byte-pair tokenizer of CLIP's kind, trained on captions of this world, and the settings of its image processor.

python -m examples.scenes.tokenizer FOLDER
"""

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from examples.random_clip import write_image_settings
from examples.scenes.captions import long_caption, pretraining_caption
from examples.scenes.world import IMAGE_SIZE, Draws, draw_scene
from modeling_longclip.compat import write_slow_tokenizer
from modeling_longclip.defaults import CLIP_LENGTH

BOS, EOT = "<|startoftext|>", "<|endoftext|>"
CORPUS_SIZE = 500  # captions of each kind; tests hold that every word of the world is in
# CLIP's: contractions, words, digits one by one, punctuation.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def count_words() -> Counter[str]:
    """How often each word and each mark of punctuation occurs in the captions to train on, in lower case."""
    texts = []
    for index in range(CORPUS_SIZE):
        draws = Draws("tokenizer", index)
        texts.append(pretraining_caption(draw_scene("pretrain", index), draws))
        texts.append(long_caption(draw_scene("train", index), draws))
    return Counter(" ".join(texts).lower().replace(",", " ,").replace(".", " .").split())


def train_merges(counts: Counter[str]) -> list[tuple[str, str]]:
    """Merges the most frequent pair of tokens, again and again, until every word is one token.

    Not the trainer of `tokenizers`, which breaks ties by chance: here the alphabet breaks them.
    """
    words = {(*word[:-1], f"{word[-1]}</w>"): count for word, count in counts.items()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(parts, best): count for parts, count in words.items()}


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def write_processor(folder: Path) -> int:
    """Writes the files of a `CLIPTokenizer`, slow and fast, and of a `CLIPImageProcessor` to `folder`.

    Returns:
        The size of the vocabulary; the last two ids are BOS and EOT, as in CLIP.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    merges = train_merges(count_words())
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges), BOS, EOT]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": BOS} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), EOT)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": CLIP_LENGTH,
        "do_lower_case": True,
        "errors": "replace",
    }
    tokenizer = _fast_tokenizer(vocab, merges)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config | special),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    write_slow_tokenizer(folder, tokenizer["model"])
    write_image_settings(folder, IMAGE_SIZE)
    return len(vocab)


def _fast_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """`tokenizer.json`. Written here, as the majors of transformers make different files, with equal results."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in (BOS, EOT)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [EOT, vocab[EOT]],
            "cls": [BOS, vocab[BOS]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": EOT,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(f"{write_processor(parser.parse_args().folder)} tokens")
