"""Text -> its sentences. The first one of a long caption is its short caption in training."""

import re
from collections.abc import Iterator

# Behind these a name, a number or what is meant follows: their full stop ends no sentence.
_GO_ON = frozenset({
    "approx", "ca", "capt", "cf", "col", "dr", "e.g", "fig", "ft", "gen", "gov", "hon", "i.e", "lt", "mr", "mrs", "ms",
    "mt", "prof", "rep", "rev", "sen", "sgt", "st", "vol", "vs",
})  # fmt: skip
# The full stop of these ends one where the next word is not in lower case. So does that of "U.S.", "a.m.", "D.C.".
_MAY_END = frozenset({"ave", "blvd", "bros", "co", "corp", "dept", "etc", "inc", "jr", "ltd", "rd", "sr"})
_LETTERS = re.compile(r"(?:[a-z]\.)+[a-z]")
_CLOSING = "\"'”’»)]」』）】"
_OPENING = "\"'“‘«([「『（【"
# They have no space behind them.
_FULL_WIDTH = re.compile(rf"[。！？]+[{re.escape(_CLOSING)}]*")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in its order, without the full stop that ends them; `!` and `?` stay.

    A sentence ends with `.`, `!` or `?` before white space, such as a line break, and with `。`, `！` or `？`
    anywhere. It goes on behind "St." and "e.g.", behind the number or letter that it begins with ("1. A dog"),
    behind an initial ("John F. Kennedy"), and in lower case behind a quotation ('the sign "Main St." is red'). White
    space becomes one space. It takes linear time.

    Example:
        >>> sentences("A dog at St. Mary's runs.\\r\\nIt is brown.")
        ["A dog at St. Mary's runs", 'It is brown']
    """
    return list(_sentences(text))


def first_sentence(text: str) -> str:
    """`sentences(text)[0]`, or `""` where there is none."""
    return next(_sentences(text), "")


def released_first_sentence(text: str) -> str:
    """The text before the first `". "`, or all of it; a line feed counts as a space. The rule of the released code."""
    return text.replace("\n", " ").partition(". ")[0]


def _sentences(text: str) -> Iterator[str]:
    words = _FULL_WIDTH.sub(r"\g<0> ", text).split()
    begin = 0
    for at, word in enumerate(words):
        if at + 1 == len(words) or _ends(word, words[at + 1], words[at - 1] if at > begin else ""):
            sentence = " ".join(words[begin : at + 1]).rstrip(".。 ")
            if sentence:
                yield sentence
            begin = at + 1


def _ends(word: str, following: str, before: str) -> bool:
    """Whether `word` ends a sentence; `before` is empty where it begins one."""
    bare = word.rstrip(_CLOSING)
    if bare.endswith(("。", "！", "？")):
        return True
    if not bare.endswith((".", "!", "?", "…")):
        return False
    new = not following.lstrip(_OPENING)[:1].islower()
    if bare != word or not bare.endswith(".") or bare.endswith(".."):
        return new
    said = bare[:-1].lstrip(_OPENING)
    name = said.lower()
    if name in _MAY_END or (_LETTERS.fullmatch(name) and name not in _GO_ON):
        return new
    if not before and (name.isdecimal() or len(name) == 1):
        return False
    if len(name) == 1 and said.isupper() and before[:1].isupper():
        return False
    return name not in _GO_ON and not (name == "no" and following[:1].isdecimal())
