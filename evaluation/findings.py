"""What a model makes of one benchmark: `evaluate` encodes and measures, `describe` and `hardest_misses` tell of it.

`run.py` goes through models and benchmarks, writes and prints.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from longclip_hf.evaluation.benchmarks import Benchmark, Classification, Retrieval
from longclip_hf.evaluation.choice_data import Choices
from longclip_hf.evaluation.choices import caption_choice, pair_scores
from longclip_hf.evaluation.classification import class_embeddings, classification_ranks
from longclip_hf.evaluation.digests import Contents
from longclip_hf.evaluation.effective_length import default_lengths
from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.evaluation.long_text import VARIANTS, changed, growing, monotony
from longclip_hf.evaluation.misses import Item, Miss, Misses, Text, thumbnail
from longclip_hf.evaluation.retrieval import Ranks, retrieval_ranks
from longclip_hf.evaluation.scores import (
    Bootstrap,
    Measured,
    both,
    hardest,
    measure_choices,
    measure_classification,
    measure_lengths,
    measure_retrieval,
    measure_sentences,
    most_similar,
)
from longclip_hf.images import decode_image
from longclip_hf.results import BenchmarkInfo, Direction, EffectiveLength
from longclip_hf.sentences import sentences


@dataclass(frozen=True)
class Found:
    """What a model made of a benchmark.

    Args:
        measured: the metrics.
        truncated: captions cut at the model's length.
        effective_length: of retrieval, where it was asked for.
        ranks: by direction; of a classification, `i2t` of images among classes.
        image_embeds, text_embeds: features; of a classification, those of the classes.
        lengths: tokens of each caption before truncation; empty for a classification.
        notes: what a reader must know of the benchmark, which shows only here.
    """

    measured: Measured
    truncated: int
    effective_length: EffectiveLength | None
    ranks: dict[Direction, Ranks]
    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    lengths: torch.Tensor
    notes: Sequence[str] = ()


def evaluate(
    encoder: Encoder,
    benchmark: Retrieval | Classification | Choices,
    digests: Sequence[bytes],
    bootstrap: Bootstrap,
    lengths: bool = True,
    by_sentences: bool = False,
) -> Found:
    """Encodes and measures.

    Args:
        encoder: the model.
        benchmark: what it is measured on.
        digests: of its images, `longclip_hf.evaluation.digests.image_digests`.
        bootstrap: of the intervals.
        lengths: with the curve of effective length, for retrieval.
        by_sentences: with the figures of `longclip_hf.evaluation.long_text`, for retrieval.
    """
    image_embeds = encoder.encode_images(benchmark.images, digests)
    if isinstance(benchmark, Choices):
        return _choices(encoder, benchmark, image_embeds, bootstrap)
    if isinstance(benchmark, Retrieval):
        return _retrieval(encoder, benchmark, image_embeds, bootstrap, lengths, by_sentences)
    return _classification(encoder, benchmark, image_embeds, bootstrap)


def _retrieval(
    encoder: Encoder,
    benchmark: Retrieval,
    image_embeds: torch.Tensor,
    bootstrap: Bootstrap,
    lengths: bool,
    by_sentences: bool,
) -> Found:
    image_of = torch.tensor(benchmark.image_of)
    group_of = None if benchmark.group_of is None else torch.tensor(benchmark.group_of)
    texts = encoder.encode_texts(benchmark.captions)
    ranks: dict[Direction, Ranks] = retrieval_ranks(image_embeds, texts.embeds, image_of)
    curve = None
    if lengths and len(set(benchmark.group_of or range(len(benchmark.images)))) > 1:  # of one there is no interval
        grid = default_lengths(encoder.positions)
        longest = min(int(texts.lengths.max()), encoder.positions)
        hits: dict[Direction, list[torch.Tensor]] = {"i2t": [], "t2i": []}
        for kept in grid:
            shorter = ranks  # from the longest caption on, nothing is cut
            if kept < longest:
                embeds = encoder.encode_texts(benchmark.captions, kept).embeds
                shorter = retrieval_ranks(image_embeds, embeds, image_of)
            for direction, found in shorter.items():
                hits[direction].append(found.hits(1))
        stacked = {way: torch.stack(found) for way, found in hits.items()}
        curve = measure_lengths(stacked, grid, image_of, bootstrap, group_of)
    measured = measure_retrieval(ranks, image_of, bootstrap, group_of)
    notes = []
    if by_sentences:
        several = [row for row, caption in enumerate(benchmark.captions) if len(sentences(caption)) > 1]
        if several:
            measured = both(measured, _sentences(encoder, benchmark, image_embeds, several, bootstrap))
        if single := len(benchmark.captions) - len(several):
            notes.append(f"captions of one sentence, which has no HiMo@K and no first one to drop: {single}")
    return Found(measured, texts.truncated, curve, ranks, image_embeds, texts.embeds, texts.lengths, notes)


def _sentences(
    encoder: Encoder,
    benchmark: Retrieval,
    image_embeds: torch.Tensor,
    several: Sequence[int],
    bootstrap: Bootstrap,
) -> Measured:
    """Captions with their sentences changed, and those of `several` sentences as they grow."""
    image_of = torch.tensor(benchmark.image_of)
    hits: dict[Direction, dict[str, torch.Tensor]] = {"i2t": {}, "t2i": {}}
    for variant in VARIANTS:
        embeds = encoder.encode_texts(changed(benchmark.captions, variant)).embeds
        for side, ranks in retrieval_ranks(image_embeds, embeds, image_of).items():
            hits[side][variant] = ranks.hits(1)
    grown = [growing(benchmark.captions[row]) for row in several]
    embeds = encoder.encode_texts([text for texts in grown for text in texts]).embeds
    rows = torch.tensor(several)
    himo = monotony(image_embeds[image_of[rows]], embeds, [len(texts) for texts in grown])
    group_of = None if benchmark.group_of is None else torch.tensor(benchmark.group_of)
    return measure_sentences(hits, himo, rows, image_of, bootstrap, group_of)


def _classification(
    encoder: Encoder, benchmark: Classification, image_embeds: torch.Tensor, bootstrap: Bootstrap
) -> Found:
    prompts = [template.replace("{}", name) for name in benchmark.class_names for template in benchmark.templates]
    texts = encoder.encode_texts(prompts)
    of_classes = texts.embeds.unflatten(0, (len(benchmark.class_names), len(benchmark.templates)))
    text_embeds = class_embeddings(of_classes)
    labels = torch.tensor(benchmark.labels)
    ranks = classification_ranks(image_embeds, text_embeds, labels)
    measured = measure_classification(ranks, labels, bootstrap)
    return Found(measured, texts.truncated, None, {"i2t": ranks}, image_embeds, text_embeds, torch.tensor([]))


def _choices(encoder: Encoder, benchmark: Choices, image_embeds: torch.Tensor, bootstrap: Bootstrap) -> Found:
    texts = encoder.encode_texts(benchmark.captions)
    images_of, captions_of = torch.tensor(benchmark.images_of), torch.tensor(benchmark.captions_of)
    right: dict[str, torch.Tensor]
    if benchmark.pairs:
        right = pair_scores(image_embeds[images_of], texts.embeds[captions_of])
    else:
        right = {"choice": caption_choice(image_embeds[images_of[:, 0]], texts.embeds[captions_of])}
    measured = measure_choices(right, bootstrap)
    return Found(measured, texts.truncated, None, {}, image_embeds, texts.embeds, texts.lengths)


def describe(
    benchmark: Retrieval | Classification | Choices, known: Benchmark | None, contents: Contents
) -> BenchmarkInfo:
    """What results.json says of a benchmark before any model has read its captions: no `lengths` yet.

    Args:
        benchmark: its images and texts.
        known: its entry, where it has a name.
        contents: of its images.
    """
    notes = list(benchmark.notes)
    again = sum(count for count in Counter(contents.digests).values() if count > 1)
    if again:
        notes.append(f"{again} images are byte for byte the same as another")
    if contents.rescaled:
        notes.append(f"images of more than 8 bits, scaled to 8 by the range of their values: {contents.rescaled}")
    definition = known.caption_rule if known else "a source of the user's, all of its rows"
    groups = None
    texts: list[Sequence[Any]]
    kind: Literal["retrieval", "classification", "choice"] = "retrieval"
    if isinstance(benchmark, Choices):
        kind, definition = "choice", benchmark.definition
        texts = [benchmark.captions, benchmark.images_of, benchmark.captions_of]
        captions, classes = len(benchmark.captions), None
    elif isinstance(benchmark, Retrieval):
        texts = [benchmark.captions, benchmark.image_of]
        captions, classes = len(benchmark.captions), None
        if benchmark.group_of is not None:
            texts.append(benchmark.group_of)
            groups = len(set(benchmark.group_of))
    else:
        texts = [benchmark.class_names, benchmark.templates, benchmark.labels]
        kind, captions, classes = "classification", None, len(benchmark.class_names)
        definition = benchmark.definition or definition
    content = json.dumps([[digest.hex() for digest in contents.digests], *map(list, texts)]).encode()
    return BenchmarkInfo(
        name=benchmark.name,
        kind=kind,
        images=len(benchmark.images),
        captions=captions,
        classes=classes,
        fingerprint=hashlib.sha256(content).hexdigest(),
        definition=definition,
        licence=known.licence if known else "the source's own",
        home=known.home if known else benchmark.name,
        notes=notes,
        groups=groups,
    )


def with_texts(info: BenchmarkInfo, found: Found) -> BenchmarkInfo:
    """The same with what a model showed of its captions: their lengths in tokens, and notes."""
    notes = [*info.notes, *found.notes]
    if not len(found.lengths):
        return replace(info, notes=notes)
    if few := int((found.lengths < 5).sum()):  # start and end of text among them
        notes.append(f"captions with fewer than 3 tokens: {few}")
    return replace(info, notes=notes, lengths=found.lengths.bincount().tolist())


def hardest_misses(
    model: str,
    encoder: Encoder,
    benchmark: Retrieval | Classification | Choices,
    found: Found,
    count: int,
    reference: tuple[str, Measured] | None = None,
    shown: int = 3,
) -> list[Misses]:
    """The queries that were missed by most, with what was right and the first answers that were returned.

    Args:
        model: its name.
        encoder: it, which knows what it reads of a text.
        benchmark, found: what it was measured on, and what it made of that.
        count: misses in each direction.
        reference: the name of a model, and what it gave at every query: only what it gets right counts then.
        shown: answers of each.
    """

    def picture(row: int) -> bytes:
        file = benchmark.images[row]
        return thumbnail(decode_image(file.read(), file.name))

    def text(words: str) -> Text:
        read = encoder.read_part(words)
        return Text(words[:read], words[read:])

    listed: list[Misses] = []
    if isinstance(benchmark, Choices):  # it has no ranks
        return listed
    for direction, ranks in found.ranks.items():
        queries, candidates = found.image_embeds, found.text_embeds
        if direction == "t2i":
            queries, candidates = candidates, queries
        wrong = ranks.best > 0
        if reference is not None:
            first = "top1" if isinstance(benchmark, Classification) else f"{direction}_r1"
            wrong &= reference[1].queries[first] > 0
        misses = []
        for query in hardest(ranks, count, wrong):
            nearest = most_similar(queries[query], candidates, shown)
            asked: Item
            expected: list[Item]
            returned: list[Item]
            if isinstance(benchmark, Classification):
                names = benchmark.class_names
                asked, expected = picture(query), [Text(names[benchmark.labels[query]])]
                returned = [Text(names[row]) for row in nearest]
            elif direction == "i2t":
                captions = benchmark.captions
                own = [row for row, image in enumerate(benchmark.image_of) if image == query]
                asked, expected = picture(query), [text(captions[row]) for row in own]
                returned = [text(captions[row]) for row in nearest]
            else:
                asked, expected = text(benchmark.captions[query]), [picture(benchmark.image_of[query])]
                returned = [picture(row) for row in nearest]
            misses.append(Miss(int(ranks.best[query]) + 1, asked, expected, returned))
        name = None if reference is None else reference[0]
        listed.append(Misses(model, benchmark.name, direction, name, int(wrong.sum()), misses))
    return listed
