"""Captions as CLIP's original tokenizer cleans them before it looks at words, and what in them would hide the rest."""

import html
import re
from collections.abc import Callable

# The original lowers a text first, so any spelling counts.
SPECIAL_TOKEN = re.compile(r"<\|(startoftext|endoftext)\|>", re.IGNORECASE)


def clean_caption(text: str) -> str:
    """`text` as `basic_clean` and `whitespace_clean` of openai/CLIP's simple_tokenizer.py make it.

    Mojibake, curly quotes and other things that `ftfy` mends, HTML entities (twice), white space. Hugging Face's fast
    tokenizer does none of it but the white space. The original also lowers a text, as all tokenizers do; only the
    Greek final sigma gets another id in theirs.

    Raises:
        ImportError: without `ftfy`.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(
            'Captions are cleaned with the package `ftfy`, of the extras "train" and "evaluate": '
            'pip install "longclip-hf[train]"'
        ) from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def neutralised(text: str) -> str:
    """`text` in which `<|endoftext|>` and `<|startoftext|>` are words: CLIP reads a text to its first end."""
    return SPECIAL_TOKEN.sub(r"<| \1 |>", text)


def preparation(clean: bool, neutralise: bool) -> Callable[[str], str] | None:
    """What is done to a caption before it is tokenized; None for nothing. It can be pickled."""
    if clean and neutralise:
        return _clean_and_neutralised
    return clean_caption if clean else neutralised if neutralise else None


def _clean_and_neutralised(text: str) -> str:
    return neutralised(clean_caption(text))
