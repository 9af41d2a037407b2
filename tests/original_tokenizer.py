"""What openai/CLIP's simple_tokenizer.py (MIT) makes of a text, in a straight line, for a vocabulary of any size."""

import html
import itertools
import json
from pathlib import Path

import ftfy
import regex

PATTERN = regex.compile(
    r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
    regex.IGNORECASE,
)


def bytes_to_unicode() -> dict[int, str]:
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class OriginalTokenizer:
    """`vocab.json` and `merges.txt` of a folder, read as the original reads its one file."""

    def __init__(self, folder: Path) -> None:
        self.vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.bytes = bytes_to_unicode()

    def bpe(self, token: str) -> list[str]:
        if token in ("<|startoftext|>", "<|endoftext|>"):
            return [token]
        word = [*token[:-1], token[-1] + "</w>"]
        while len(word) > 1:
            pairs = list(itertools.pairwise(word))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 10**9))
            if best not in self.ranks:
                break
            merged: list[str] = []
            for part in word:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            word = merged
        return word

    def __call__(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        ids = [self.vocab["<|startoftext|>"]]
        for token in regex.findall(PATTERN, text):
            token = token if token.startswith("<|") else "".join(self.bytes[byte] for byte in token.encode("utf-8"))
            ids += [self.vocab[part] for part in self.bpe(token)]
        return [*ids, self.vocab["<|endoftext|>"]]
