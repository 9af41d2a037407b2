"""Batches of rows, and groups of similar length."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_files import (
    COUNTS,
    ROWS,
    SPOILED,
    make_rows,
    png,
    sharegpt4v,
    spoil,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor, CLIPTokenizer, CLIPTokenizerFast

from longclip_hf.errors import DataError
from longclip_hf.images import to_rgb
from longclip_hf.rows import BAD_ROW_CAUSES
from longclip_hf.training.collator import CaptionCollator, even_groups, length_groups
from longclip_hf.training.pixels import normalised
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.sources import load_rows

# Python 3.12 warns of the fork by which dataloader workers begin.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def processor(clip_folder: Path) -> Any:
    return AutoProcessor.from_pretrained(clip_folder)


def words(count: int) -> str:
    """A caption of `count + 2` tokens: every `a` is one."""
    return " ".join(["a"] * count)


def row_of(caption: str, number: int = 1, bad_rows: Sequence[int] = (0, 0, 0, 0, 0), short: str = "a") -> Any:
    image = Image.open(io.BytesIO(png(number)))
    return {"image": image, "caption": caption, "short_caption": short, "bad_rows": bad_rows}


def tokenizers(clip_folder: Path, processor: Any) -> list[Any]:
    kinds = [processor.tokenizer]
    if CLIPTokenizer is not CLIPTokenizerFast:  # 4.57 has a slow one besides
        kinds += [CLIPTokenizer.from_pretrained(clip_folder), CLIPTokenizerFast.from_pretrained(clip_folder)]
    return kinds


def test_a_batch_by_hand(clip_folder: Path, processor: Any) -> None:
    for tokenizer in tokenizers(clip_folder, processor):
        bos, eot, a = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a")["input_ids"][1]
        collator = CaptionCollator(tokenizer, processor.image_processor, 7)
        rows = [
            row_of(words(2), 10, (1, 0, 0, 2, 0), short=words(1)),
            row_of(words(5), 20),
            row_of(words(6), 30, (1, 1, 0, 0, 0), short=words(3)),
            row_of(words(50), 40),
        ]
        assert collator.pixels.side == collator(rows)["pixel_values"].shape[-1]
        batch = collator(rows)
        assert next(iter(batch)) == "pixel_values"  # the Trainer takes the batch size from the first
        assert batch["input_ids"].tolist() == [
            [bos, a, a, eot, eot, eot, eot],
            [bos, a, a, a, a, a, eot],
            [bos, a, a, a, a, a, eot],
            [bos, a, a, a, a, a, eot],
        ]
        assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 3] + [[1] * 7] * 3
        assert batch["short_input_ids"].tolist() == [
            [bos, a, eot, eot, eot],
            [bos, a, eot, eot, eot],
            [bos, a, a, a, eot],
            [bos, a, eot, eot, eot],
        ]
        assert batch["short_attention_mask"].sum(1).tolist() == [3, 3, 5, 3]
        assert batch["truncated"].tolist() == [0, 0, 1, 1]
        assert batch["bad_rows"].tolist() == [[1, 0, 0, 2, 0], [0] * 5, [1, 1, 0, 0, 0], [0] * 5]
        assert batch["lengths"].tolist() == [4, 7, 7, 7] and batch["short_lengths"].tolist() == [3, 3, 5, 3]
        tensors = {name: value for name, value in batch.items() if name.endswith(("ids", "mask"))}
        assert {value.dtype for value in tensors.values()} == {torch.long} and len(tensors) == 4
        for row, pixels in zip(rows, batch["pixel_values"], strict=True):
            assert torch.equal(pixels, collator.pixels(row["image"]))
        assert batch["pixel_values"].shape == (4, 3, 32, 32)


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.integers(3, 20))
def test_tokens_are_those_of_the_tokenizer(processor: Any, captions: list[str], max_length: int) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, max_length)
    input_ids, attention_mask, cut = collator.tokens(captions)
    expected = processor.tokenizer(captions, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    assert torch.equal(input_ids, expected["input_ids"])
    assert torch.equal(attention_mask, expected["attention_mask"])
    full = processor.tokenizer(captions, verbose=False)["input_ids"]
    assert cut.tolist() == [len(ids) > max_length for ids in full]


def test_pixels_may_be_made_beforehand_and_of_any_mode(processor: Any) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, 7)
    row = row_of("a b c")
    made = collator([row | {"image": collator.pixels(row["image"])}])
    assert torch.equal(made["pixel_values"], collator([row])["pixel_values"])
    numbers = torch.randn(3, 32, 32)
    own = collator([row | {"image": numbers}])
    assert torch.equal(own["pixel_values"][0], numbers) and "pixel_levels" not in own
    with pytest.raises(DataError, match=r"of one type and size, got torch.float32 of shape .*, torch.uint8 of shape"):
        collator([row, row | {"image": numbers}])
    for mode in ("P", "LA", "CMYK", "I;16", "1", "RGBA"):
        image = Image.new(mode, (50, 40))
        assert torch.equal(collator.pixels(image), collator.pixels(to_rgb(image))), mode


@pytest.mark.parametrize("size", [(3, 3), (64, 3), (3, 64), (1, 1), (1, 40), (40, 1)])
def test_tiny_images_keep_their_channels(size: tuple[int, int], processor: Any) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, 7)
    colour = (250, 120, 10)
    pixels = normalised(collator.pixels(Image.new("RGB", size, colour))[None], collator.pixels.levels)[0]
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    expected = (torch.tensor(colour) / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(pixels, expected[:, None, None].expand(3, 32, 32), atol=1e-5)


def test_a_tokenizer_without_padding(processor: Any) -> None:
    class NoPadding:
        pad_token_id = None

    with pytest.raises(ValueError, match="no pad_token"):
        CaptionCollator(NoPadding(), processor.image_processor, 7)


def test_counts_through_workers_and_collator(processor: Any, tmp_path: Path) -> None:
    collator = CaptionCollator(processor.tokenizer, processor.image_processor, 8)
    setting = sharegpt4v(spoil(make_rows(), SPOILED), tmp_path)
    data = DataArguments(**setting, heldout_rows=0, max_image_pixels=20_000)
    train, _ = load_rows(data, transform=collator.pixels)
    batches = list(DataLoader(train, batch_size=4, num_workers=2, collate_fn=collator))
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4, 4, 1]
    counts = sum(batch["bad_rows"].sum(0) for batch in batches)
    assert isinstance(counts, np.ndarray)
    assert counts.shape == (len(BAD_ROW_CAUSES),)
    assert all(counts >= COUNTS)
    assert sum(int(batch["truncated"].sum()) for batch in batches) == ROWS  # every caption is longer than 8 tokens


# Groups of similar length


def padded_tokens(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    ends = list(itertools.accumulate(sizes))
    return sum(size * max(lengths[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def least_tokens(lengths: Sequence[int], groups: int) -> int:
    """By trying every way to cut the sorted lengths."""
    batch = len(lengths)
    return min(
        padded_tokens(sorted(lengths), np.diff([0, *cuts, batch]).tolist())
        for count in range(min(groups, batch))
        for cuts in itertools.combinations(range(1, batch), count)
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 10))
def test_length_groups_are_the_best(lengths: list[int], groups: int) -> None:
    order, sizes = length_groups(torch.tensor(lengths), groups)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert len(sizes) <= groups
    assert min(sizes) >= 1
    assert sum(sizes) == len(lengths)
    along = [lengths[i] for i in order.tolist()]
    assert along == sorted(lengths)
    assert padded_tokens(along, sizes) == least_tokens(lengths, groups)


def test_length_groups_by_hand() -> None:
    order, sizes = length_groups(torch.tensor([248, 10, 12, 240, 11, 12]), 2)
    assert order.tolist() == [1, 4, 2, 5, 3, 0]
    assert sizes == [4, 2]  # 4 x 12 + 2 x 248; [3, 3] would take 3 x 12 + 3 x 248
    assert length_groups(torch.tensor([7, 7, 7]), 4)[1] == [3]
    assert length_groups(torch.tensor([3, 9]), 1)[1] == [2]


def test_length_groups_restore_the_batch_and_suit_a_large_one() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 249, (2048,), generator=generator)
    totals = []
    for groups in (1, 2, 4, 8, 300):
        order, sizes = length_groups(lengths, groups)
        assert torch.equal(torch.cat(lengths[order].split(sizes))[order.argsort()], lengths)
        totals.append(padded_tokens(lengths[order].tolist(), sizes))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 2048 * int(lengths.max())
    assert totals[-1] == int(lengths.sum())


@pytest.mark.parametrize(("lengths", "groups"), [([], 2), ([1, 2], 0), ([[1, 2]], 2)])
def test_length_groups_of_nothing(lengths: Any, groups: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        length_groups(torch.tensor(lengths), groups)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 10))
def test_even_groups_do_not_depend_on_the_lengths(lengths: list[int], groups: int) -> None:
    order, sizes = even_groups(torch.tensor(lengths), groups)
    assert torch.tensor(lengths)[order].tolist() == sorted(lengths)
    assert sizes == even_groups(torch.ones(len(lengths)), groups)[1]
    assert len(sizes) == min(groups, len(lengths)) and max(sizes) - min(sizes) <= 1
