"""Captions drawn at every step, against captions that are put together as text and then tokenized."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_runs import arguments
from transformers import AutoProcessor

from longclip_hf.sentences import sentences
from longclip_hf.training import drawing
from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.collator import CaptionCollator
from longclip_hf.training.drawing import Place, kept_sentences, short_sentences, with_drawn_captions, with_prefix
from longclip_hf.training.encoding import encode_texts
from modeling_longclip import LongCLIPModel
from modeling_longclip.compat import features

CAPTIONS = [
    "A dog on a beach. It runs! Is the sky blue? There is a red bicycle.",
    "A street with a taxi. A woman in a coat crosses it. The wall is red. A cat sleeps. Rain falls",
    "A house.",
    'A door. The sign says "stop." A window... The roof, a tree, the man.',
    "A cat. " + "The dog and the man and the tree and the house. " * 30,
]
PARTS = ("drop_first_sentence", "sample_sentences", "shuffle_sentences")
PLACE = Place(seed=3, step=5, batch=1)


@pytest.fixture(scope="module")
def tokenizer(longclip_folder: Path) -> Any:
    return AutoProcessor.from_pretrained(longclip_folder).tokenizer


def made_of(tokenizer: Any, captions: list[str], length: int = 248) -> dict[str, Any]:
    collator = CaptionCollator(tokenizer, None, length, sentences=True)
    return collator([{"image": torch.zeros(3, 4, 4), "caption": caption} for caption in captions])


def whole(caption: str) -> list[str]:
    """Its sentences with the full stops that they have in it."""
    return [s if s.endswith(("!", "?", '"')) else f"{s}." for s in sentences(caption)]


def tokens(tokenizer: Any, text: str, length: int = 248) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    return list(ids if len(ids) <= length else [*ids[: length - 1], ids[-1]])


def rows(batch: dict[str, Any], prefix: str) -> list[list[int]]:
    """Captions less their padding; the three ways in which their lengths are said must agree."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    assert mask.sum(1).tolist() == batch[f"{prefix}lengths"].tolist() and ids.shape[1] == mask.sum(1).max()
    return [row[: int(of.sum())].tolist() for row, of in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("length", [248, 20])
@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), PARTS], ids="+".join)
def test_short_captions_are_those_put_together_as_text(
    tokenizer: Any, tmp_path: Path, parts: tuple[str, ...], length: int
) -> None:
    args = arguments(tmp_path, **dict.fromkeys(parts, True))
    before = made_of(tokenizer, CAPTIONS, length)
    batch = with_drawn_captions(before, args, PLACE, length)
    expected = []
    for number, caption in enumerate(CAPTIONS):
        rng, said = random.Random(f"short 3 5 1 {number}"), whole(caption)
        if "drop_first_sentence" in parts:
            said = said[1:] or said
        if "sample_sentences" in parts:  # in the order of the caption
            chosen = rng.sample(range(len(said)), rng.randint(1, len(said)))
            said = [said[place] for place in sorted(chosen)]
        if "shuffle_sentences" in parts:
            rng.shuffle(said)
        expected.append(tokens(tokenizer, " ".join(said), length))
    assert rows(batch, "short_") == expected
    assert batch["input_ids"] is before["input_ids"]  # the long ones are what they were


def test_long_captions_with_sentences_left_out(tokenizer: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, sentence_dropout=0.4)
    before = made_of(tokenizer, CAPTIONS)
    assert before["truncated"].tolist() == [0, 0, 0, 0, 1]
    batch = with_drawn_captions(before, args, PLACE, 248)
    expected = []
    for number, caption in enumerate(CAPTIONS):
        rng, said = random.Random(f"dropout 3 5 1 {number}"), whole(caption)
        kept = [sentence for sentence in said if rng.random() >= 0.4] or [said[rng.randrange(len(said))]]
        expected.append(" ".join(kept))
    assert rows(batch, "") == [tokens(tokenizer, text) for text in expected]
    full = [len(tokenizer(text, verbose=False)["input_ids"]) for text in expected]
    assert batch["truncated"].tolist() == [int(count > 248) for count in full]
    assert batch["short_input_ids"] is before["short_input_ids"]


def test_without_draws_nothing_is_touched(tokenizer: Any, tmp_path: Path) -> None:
    batch = made_of(tokenizer, CAPTIONS)
    assert with_drawn_captions(batch, arguments(tmp_path), PLACE, 248) == batch
    assert with_prefix(batch, "none", PLACE, 248) == batch


def test_a_draw_is_of_its_step_and_row_whoever_makes_it(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args: LongCLIPTrainingArguments = arguments(tmp_path, strategy="debias", sentence_dropout=0.5)

    def drawn(captions: list[str], place: Place = PLACE) -> list[list[int]]:
        made = with_drawn_captions(made_of(tokenizer, captions), args, place, 248)
        moved = with_prefix(made, "tokens", place, 248)
        shifted = with_prefix(made, "positions", place, 248)["short_position_ids"].max(1).values
        return [*map(list, zip(rows(made, ""), rows(moved, "short_"), shifted.tolist(), strict=True))]

    captions = CAPTIONS[:2] * 4
    one = drawn(captions)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(drawing, "rank", lambda rank=rank: rank)
        halves += drawn(captions[rank * 4 : rank * 4 + 4])
    assert [row[:2] for row in halves] == [row[:2] for row in one]
    monkeypatch.setattr(drawing, "rank", lambda: 0)
    assert drawn(captions) == one
    for other in (PLACE._replace(seed=4), PLACE._replace(step=6), PLACE._replace(batch=0)):
        assert drawn(captions, other) != one


def test_which_sentences() -> None:
    rng = random.Random(0)
    drawn = [short_sentences(5, True, True, True, rng) for _ in range(4000)]
    counts = Counter(map(len, drawn))
    assert set(counts) == {1, 2, 3, 4} and all(abs(count - 1000) < 130 for count in counts.values())
    assert {number for chosen in drawn for number in chosen} == {1, 2, 3, 4}
    assert all(len(set(chosen)) == len(chosen) for chosen in drawn) and any(c != sorted(c) for c in drawn)
    assert short_sentences(1, True, True, True, rng) == [0] and short_sentences(3, False, False, False, rng) == [
        0,
        1,
        2,
    ]
    kept = [kept_sentences(4, 0.5, rng) for _ in range(4000)]
    assert all(kept) and all(part == sorted(part) for part in kept)
    # Four halves, and in one of 16 cases the one that stays.
    assert sum(map(len, kept)) / 4000 == pytest.approx(2 + 1 / 16, abs=0.06)


# Positions


@pytest.mark.parametrize("length", [248, 40])
def test_a_prefix_by_hand(tokenizer: Any, length: int) -> None:
    """BOS, n times id 0 with mask 1, the caption: not the pad token, which would be the first EOT of every caption."""
    batch = made_of(tokenizer, CAPTIONS, length)
    before = rows({**batch, "short_lengths": batch["short_attention_mask"].sum(1)}, "short_")
    moved = with_prefix(batch, "tokens", PLACE, length)
    shifts = []
    for row, now in zip(before, rows(moved, "short_"), strict=True):
        shift = len(now) - len(row)
        assert now == [row[0], *[0] * shift, *row[1:]] and len(now) <= length
        shifts.append(shift)
    assert len(set(shifts)) > 1
    eot = tokenizer.eos_token_id
    ends = [(row == eot).nonzero()[0].item() for row in moved["short_input_ids"]]
    assert ends == [count - 1 for count in moved["short_lengths"]]
    positions = with_prefix(batch, "positions", PLACE, length)["short_position_ids"]
    for row, ids, shift in zip(positions.tolist(), before, shifts, strict=True):
        assert row[: len(ids)] == [0, *range(1 + shift, len(ids) + shift)] and max(row) < length


def test_every_shift_is_drawn(tokenizer: Any) -> None:
    batch = made_of(tokenizer, ["A cat."] * 300, 12)
    count = int(batch["short_attention_mask"][0].sum())
    drawn = Counter((with_prefix(batch, "tokens", PLACE, 12)["short_lengths"] - count).tolist())
    assert set(drawn) == set(range(12 - count + 1))


def test_shifted_texts_are_encoded_where_they_are(tokenizer: Any, longclip_folder: Path) -> None:
    """In groups cut to their own lengths, chunk by chunk, as alone; and they are not what they are unshifted."""
    model = LongCLIPModel.from_pretrained(longclip_folder).eval()
    batch = with_prefix(made_of(tokenizer, CAPTIONS), "positions", PLACE, 248)
    ids, mask, positions = (batch[f"short_{name}"] for name in ("input_ids", "attention_mask", "position_ids"))
    from longclip_hf.training.collator import length_groups

    with torch.no_grad():
        got = encode_texts(model, ids, batch["short_lengths"], lambda lengths: length_groups(lengths, 2), 2, positions)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = model.get_text_features(
                input_ids=ids[row, None, :length], position_ids=positions[row, None, :length]
            )
            torch.testing.assert_close(got[row], features(alone)[0], rtol=1e-5, atol=1e-6)
            unmoved = features(model.get_text_features(input_ids=ids[row, None, :length]))[0]
            assert (got[row] - unmoved).norm() > 1e-3 * unmoved.norm()


def test_sentences_of_a_batch(tokenizer: Any) -> None:
    """Put together again, all sentences are the caption, uncut."""
    batch = made_of(tokenizer, CAPTIONS[3:], 30)
    for caption, ids, numbers in zip(CAPTIONS[3:], batch["sentence_ids"], batch["sentence_numbers"], strict=True):
        said = tokenizer(" ".join(whole(caption)), verbose=False)["input_ids"]
        assert ids[: len(said)].tolist() == said and set(ids[len(said) :]) == {tokenizer.eos_token_id}
        assert np.flatnonzero(numbers >= 0).tolist() == list(range(1, len(said) - 1))
        assert numbers.max() + 1 == len(sentences(caption)) and (np.diff(numbers[1 : len(said) - 1]) >= 0).all()
