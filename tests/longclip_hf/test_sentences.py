"""Where a sentence ends."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longclip_hf.sentences import first_sentence, released_first_sentence, sentences


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A dog runs. It is brown. It barks.", ["A dog runs", "It is brown", "It barks"]),
        ("A dog runs", ["A dog runs"]),
        ("A dog runs.It is brown.", ["A dog runs.It is brown"]),
        ("It costs 3.50 dollars. Cheap.", ["It costs 3.50 dollars", "Cheap"]),
        ("a dog runs. it is brown.", ["a dog runs", "it is brown"]),
        # Line breaks are white space, Windows' too.
        ("A dog runs.\nIt is brown.", ["A dog runs", "It is brown"]),
        ("A dog runs.\r\nIt is brown.\r\n", ["A dog runs", "It is brown"]),
        ("A dog\r\nruns.\u2028It is\xa0brown.", ["A dog runs", "It is brown"]),
        # Other ends.
        ("Really? Yes! No.", ["Really?", "Yes!", "No"]),
        ("一只狗在跑。它是棕色的！是吗？是", ["一只狗在跑", "它是棕色的！", "是吗？", "是"]),
        ("他说：「好。」她走了。", ["他说：「好。」", "她走了"]),
        ("It goes on ... and on... Then it ends…", ["It goes on ... and on", "Then it ends…"]),
        # Quotations.
        ('The sign says "Main St." The bus is red.', ['The sign says "Main St."', "The bus is red"]),
        ('A truck of "Abbey Ltd." has a yacht. It is red.', ['A truck of "Abbey Ltd." has a yacht', "It is red"]),
        ("A shop (closed!) and a bar. Both are old.", ["A shop (closed!) and a bar", "Both are old"]),
        ("An advertisement of Yahoo! is seen. It glows.", ["An advertisement of Yahoo! is seen", "It glows"]),
        # No ends.
        ("A church of St. Mary. It is old.", ["A church of St. Mary", "It is old"]),
        ("(St. Mary is meant). It is old.", ["(St. Mary is meant)", "It is old"]),
        ("Dr. Who and Mr. Bean eat fruit, e.g. Apples. They smile.",
         ["Dr. Who and Mr. Bean eat fruit, e.g. Apples", "They smile"]),
        ("1. A dog. 2. A cat. b. A cow.", ["1. A dog", "2. A cat", "b. A cow"]),
        ("Route 30. The bus is red.", ["Route 30", "The bus is red"]),
        ("House No. 5 is red. No. It is blue.", ["House No. 5 is red", "No", "It is blue"]),
        ("John F. Kennedy in a letter V. It is carved.", ["John F. Kennedy in a letter V", "It is carved"]),
        # Ends or not, as the next word tells.
        ("A bus of Co., Inc. with a logo. It is in D.C. Clouds loom.",
         ["A bus of Co., Inc. with a logo", "It is in D.C", "Clouds loom"]),
        ("At 10 a.m. on a clock, with bells etc. It is old.", ["At 10 a.m. on a clock, with bells etc", "It is old"]),
        # Nothing, and nearly nothing.
        ("", []),
        (" . .. \r\n", []),
        (". Nothing before it.", ["Nothing before it"]),
    ],
)  # fmt: skip
def test_sentences(text: str, found: list[str]) -> None:
    assert sentences(text) == found


@given(st.text(alphabet="aA1. \n\r\"'!?。！St", max_size=60))
def test_the_first_one_and_that_no_word_is_lost(text: str) -> None:
    found = sentences(text)
    assert first_sentence(text) == (found[0] if found else "")
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in found)
    letters = "".join(text.split()).replace(".", "").replace("。", "")
    assert "".join(found).replace(" ", "").replace(".", "").replace("。", "") == letters


@pytest.mark.parametrize("unit", [".", ". ", '."', "。", "。」", "a. ", "(", " ", "!?", "\r\n"])
def test_time_grows_with_length(unit: str) -> None:
    """100,000 dots would take minutes in quadratic time."""
    begin = time.process_time()
    sentences(unit * 100_000 + "a")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A dog runs. It is brown. It barks.", "A dog runs"),
        ("A dog runs.It is brown.", "A dog runs.It is brown."),
        ("A dog\nruns.\n\nIt is brown.", "A dog runs"),
        ("A dog runs.\r\nIt is brown.", "A dog runs.\r It is brown."),
        ("A dog runs.", "A dog runs."),
        ("A church of St. Mary. It is old.", "A church of St"),
        ("Really? Yes. No.", "Really? Yes"),
        (". Nothing before it.", ""),
        ("", ""),
    ],
)
def test_the_released_rule(text: str, first: str) -> None:
    assert released_first_sentence(text) == first
