"""The captions of a step: which of a caption's sentences, in what order, and at which positions.

They are drawn from tokens, before anything is encoded. What is drawn follows from the seed, the step, the batch of an
accumulated step and the place in the global batch: the number of processes does not change it, nor does a resumed run.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from longclip_hf.training.arguments import LongCLIPTrainingArguments
from longclip_hf.training.collator import padded
from longclip_hf.training.gathering import rank

# What the original's tokenizer pads with ("!"), and so the prefix of DeBias-CLIP. Not Hugging Face's pad id: that is
# the end-of-text token, at the first of which the model pools, so that behind a prefix of it all captions are one.
PREFIX = 0

Batch = Mapping[str, Any]


class Place(NamedTuple):
    """Where a batch stands in a run: all that is drawn for it is a function of this and of the row."""

    seed: int
    step: int
    batch: int  # of an accumulated step

    def rows(self, count: int, purpose: str) -> Iterator[random.Random]:
        """A generator for each of this process's `count` rows; what is drawn for other purposes is independent."""
        begin = rank() * count
        return (random.Random(f"{purpose} {' '.join(map(str, self))} {begin + row}") for row in range(count))


def with_drawn_captions(inputs: Batch, args: LongCLIPTrainingArguments, place: Place, length: int) -> dict[str, Any]:
    """The batch with the captions of this step: long ones less the sentences dropped, short ones drawn.

    Args:
        inputs: of `CaptionCollator` with `sentences`.
        args: what to draw.
        place: of the batch.
        length: where captions are cut, in tokens.
    """
    made = dict(inputs)
    if not args.draws_sentences:
        return made
    ids, numbers = (np.asarray(inputs[f"sentence_{name}"]) for name in ("ids", "numbers"))
    rows, ends = _sentences(ids, numbers), (int(ids[0, 0]), int(ids[0, -1]))
    device = inputs["input_ids"].device
    if args.sentence_dropout:
        kept = [
            [row[number] for number in kept_sentences(len(row), args.sentence_dropout, rng)]
            for row, rng in zip(rows, place.rows(len(rows), "dropout"), strict=True)
        ]
        made |= _batch(kept, ends, length, "", device)
        made["truncated"] = np.array([int(sum(map(len, row)) + 2 > length) for row in kept])
    if args.draws_short:
        first, sample, shuffle = map(bool, (args.drop_first_sentence, args.sample_sentences, args.shuffle_sentences))
        drawn = [
            [row[number] for number in short_sentences(len(row), first, sample, shuffle, rng)]
            for row, rng in zip(rows, place.rows(len(rows), "short"), strict=True)
        ]
        made |= _batch(drawn, ends, length, "short_", device)
    return made


def short_sentences(count: int, drop_first: bool, sample: bool, shuffle: bool, rng: random.Random) -> list[int]:
    """Which of a caption's `count` sentences make its short caption, in their order in it.

    The first sentence of a long caption sums it up: with it as the short caption, a model can do without the others.

    References:
        DeBias-CLIP (arXiv 2602.22419): the first dropped, a number of the others drawn uniformly, without replacement
        and in any order. A caption of one sentence is that sentence.

    Example:
        >>> short_sentences(4, True, True, True, random.Random(0))
        [3, 2]
    """
    chosen = list(range(1 if drop_first and count > 1 else 0, count))
    if sample:
        chosen = sorted(rng.sample(chosen, rng.randint(1, len(chosen))))
    if shuffle:
        rng.shuffle(chosen)
    return chosen


def kept_sentences(count: int, share: float, rng: random.Random) -> list[int]:
    """Which of a long caption's `count` sentences are kept, each dropped with probability `share`, in their order.

    If all were dropped, one of them, drawn uniformly, stays.

    References:
        DreamLIP (arXiv 2403.17007) trains on parts of long captions, drawn at every step. How they are drawn here is
        ours.
    """
    kept = [number for number in range(count) if rng.random() >= share]
    return kept or [rng.randrange(count)]


def with_prefix(inputs: Batch, how: str, place: Place, length: int) -> dict[str, Any]:
    """The batch with every short caption moved by n positions, n drawn uniformly from 0 to what `length` leaves.

    References:
        DeBias-CLIP (arXiv 2602.22419): otherwise long captions alone would train late positions. `positions` is a
        variant of ours: the same shift without tokens to encode.

    Args:
        inputs: a batch with short captions.
        how: `"tokens"`, n times `PREFIX` behind the first token; `"positions"`, `short_position_ids` of all tokens but
            the first; or `"none"`.
        place: of the batch.
        length: positions of the model, or fewer, where captions are cut.
    """
    if how == "none":
        return dict(inputs)
    ids, mask = inputs["short_input_ids"], inputs["short_attention_mask"]
    lengths = np.asarray(inputs["short_lengths"] if "short_lengths" in inputs else mask.sum(dim=1).cpu())
    rows = zip(lengths.tolist(), place.rows(len(ids), "prefix"), strict=True)
    drawn = np.array([rng.randint(0, length - tokens) for tokens, rng in rows])
    shift = torch.from_numpy(drawn).to(ids.device)[:, None]
    if how == "positions":
        at = torch.arange(ids.shape[1], device=ids.device)
        # Of padding, too, there must be an embedding.
        return {**inputs, "short_position_ids": torch.where(at > 0, at + shift, 0).clamp(max=length - 1)}
    at = torch.arange(int((lengths + drawn).max()), device=ids.device)
    moved = ids.gather(1, (at - shift).clamp(0, ids.shape[1] - 1))
    moved = torch.where((at > 0) & (at <= shift), PREFIX, moved)
    within = (at < mask.sum(dim=1, keepdim=True) + shift).to(mask.dtype)  # groups are made by lengths
    moved_batch = {"short_input_ids": moved, "short_attention_mask": within, "short_lengths": lengths + drawn}
    return {**inputs, **moved_batch}


def _sentences(ids: np.ndarray, numbers: np.ndarray) -> list[list[list[int]]]:
    """The tokens of every sentence of every caption."""
    return [
        [row[of == number].tolist() for number in range(max(of.max(), 0) + 1)]
        for row, of in zip(ids, numbers, strict=True)
    ]


def _batch(
    rows: Sequence[Sequence[list[int]]], ends: tuple[int, int], length: int, prefix: str, device: torch.device
) -> dict[str, Any]:
    """What a batch holds of captions of these sentences; padded with their last token, which counts for nothing."""
    begin, end = ends
    cut = [[begin, *[token for sentence in row for token in sentence][: length - 2], end] for row in rows]
    input_ids, mask = padded(cut, end)
    tensors = {f"{prefix}input_ids": input_ids.to(device), f"{prefix}attention_mask": mask.to(device)}
    return {**tensors, f"{prefix}lengths": np.array([len(ids) for ids in cut])}
