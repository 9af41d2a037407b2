"""Batches of rows, and their captions in groups of similar length."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image

from longclip_hf.errors import DataError
from longclip_hf.image_files import ImageFiles
from longclip_hf.images import MAX_PIXELS
from longclip_hf.rows import BAD_ROW_CAUSES, BadRow, read_image
from longclip_hf.sentences import first_sentence, sentences
from longclip_hf.training.pixels import Pixels

# What `sentences` leaves at the end of a sentence, or at its end within a quotation.
_ENDINGS = "!?…\"'”’»)]"


class CaptionCollator:
    """Makes one batch of rows.

    A row is a mapping with an `image` (a PIL image, a path, the bytes of a file, what `datasets` makes of one, or
    pixels of shape `(3, height, width)`: what `pixels` made, or numbers of your own), a `caption` and, if there is
    one, a `short_caption`, by default the first sentence of the caption. Everything else in it is left aside, but the
    `bad_rows` of `CaptionRow`.

    Args:
        tokenizer: CLIP's, of any kind that transformers has.
        image_processor: CLIP's; see `Pixels`.
        max_length: positions of the text tower; what is longer is cut there and keeps its EOT.
        files: what paths of images may name; by default any file of this machine, and no address.
        sentences: whether batches hold the sentences of the long captions, from which `drawing` makes others.

    Raises:
        ValueError: if the tokenizer has no padding token.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        max_length: int,
        files: ImageFiles | None = None,
        sentences: bool = False,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no pad_token. CLIP's own pads with its end-of-text token.")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_length = max_length
        self.files = files or ImageFiles(None, access="local")
        self.sentences = sentences

    @functools.cached_property
    def pixels(self) -> Pixels:
        """What makes bytes of an image."""
        return Pixels(self.image_processor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch:

        - `pixel_values`, `torch.ByteTensor` of shape `(batch_size, 3, height, width)`, and `pixel_levels`, what each
          byte stands for: `normalised` makes numbers of both, on the device. Numbers of your own come as they are;
        - `input_ids` and `attention_mask`, `torch.LongTensor` of shape `(batch_size, sequence_length)`: the long
          captions, padded on the right to the longest of them;
        - `short_input_ids` and `short_attention_mask`: the same of the short captions, padded to their own longest;
        - `lengths` and `short_lengths`, `np.ndarray` of shape `(batch_size,)`: tokens of each. They stay on the CPU
          when the tensors go to a device, so that nothing waits for them there;
        - `bad_rows`, `np.ndarray` of shape `(batch_size, len(BAD_ROW_CAUSES))`: rows skipped on the way to each;
        - `truncated`, `np.ndarray` of shape `(batch_size,)`: 1 where the long caption was cut at `max_length`.

        and with `sentences`, see `sentence_tokens`, `sentence_ids` and `sentence_numbers`.

        Raises:
            DataError: for a row that cannot be trained on, by its number in the batch.
        """
        captions = [_caption(row, number) for number, row in enumerate(rows)]
        input_ids, attention_mask, truncated = self.tokens([long for long, _ in captions])
        short_input_ids, short_attention_mask, _ = self.tokens([short for _, short in captions])
        none = [0] * len(BAD_ROW_CAUSES)
        return {
            **self._images(rows),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "short_input_ids": short_input_ids,
            "short_attention_mask": short_attention_mask,
            "lengths": attention_mask.sum(dim=1).numpy(),
            "short_lengths": short_attention_mask.sum(dim=1).numpy(),
            "bad_rows": np.array([row.get("bad_rows", none) for row in rows]),
            "truncated": truncated,
            **(self.sentence_tokens([long for long, _ in captions]) if self.sentences else {}),
        }

    def _images(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images = [self._image(row, number) for number, row in enumerate(rows)]
        kinds = {(image.dtype, tuple(image.shape)) for image in images}
        if len(kinds) > 1:
            named = ", ".join(sorted(f"{dtype} of shape {shape}" for dtype, shape in kinds))
            raise DataError(f"The images of a batch must be of one type and size, got {named}.")
        pixel_values = torch.stack(images)
        if pixel_values.dtype != torch.uint8:
            return {"pixel_values": pixel_values}
        return {"pixel_values": pixel_values, "pixel_levels": self.pixels.levels}

    def _image(self, row: Mapping[str, Any], number: int) -> torch.Tensor:
        image = row.get("image")
        if isinstance(image, torch.Tensor):
            return image
        try:
            return self.pixels(image if isinstance(image, Image.Image) else read_image(image, self.files, MAX_PIXELS))
        except BadRow as bad:
            raise DataError(f"Row {number} of a batch cannot be trained on: {bad}. Mend or remove it.") from bad

    def tokens(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """`(input_ids, attention_mask, which captions were cut)`, the first two of shape `(batch_size, longest)`.

        Raises:
            DataError: if the tokenizer ends a caption with anything but EOT, at which CLIP pools.
        """
        encoded = self.tokenizer(list(captions), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        if any(ids[-1:] != [self.tokenizer.eos_token_id] for ids in encoded):
            raise DataError(
                f"The tokenizer ends captions without its EOT ({self.tokenizer.eos_token!r}), at which CLIP pools: "
                "take the checkpoint's own."
            )
        cut = [ids if len(ids) <= self.max_length else ids[: self.max_length - 1] + ids[-1:] for ids in encoded]
        truncated = np.array([int(len(ids) > self.max_length) for ids in encoded])
        return *padded(cut, self.tokenizer.pad_token_id), truncated

    def sentence_tokens(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """`sentence_ids`, the uncut captions from BOS to EOT, padded with EOT to one more than the longest, and
        `sentence_numbers`, which sentence each token is of, -1 for none. On the CPU, where they are drawn.

        Sentences get back the full stop that `sentences` takes. CLIP's tokens do not reach across white space, so that
        those of sentences, joined, are those of the joined sentences.
        """
        divided = [[f"{s}." if s[-1] not in _ENDINGS else s for s in sentences(text)] or [text] for text in captions]
        flat = [sentence for row in divided for sentence in row]
        encoded = iter(self.tokenizer(flat, add_special_tokens=True, truncation=False, verbose=False)["input_ids"])
        rows = [[next(encoded) for _ in row] for row in divided]
        (begin, *_, end), width = rows[0][0], 3 + max(sum(len(ids) - 2 for ids in row) for row in rows)
        sentence_ids = np.full((len(rows), width), end)
        sentence_numbers = np.full((len(rows), width), -1)
        sentence_ids[:, 0] = begin
        for number, row in enumerate(rows):
            tokens = [(token, of) for of, ids in enumerate(row) for token in ids[1:-1]]
            sentence_ids[number, 1 : len(tokens) + 1] = [token for token, _ in tokens]
            sentence_numbers[number, 1 : len(tokens) + 1] = [of for _, of in tokens]
        return {"sentence_ids": sentence_ids, "sentence_numbers": sentence_numbers}


def padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(input_ids, attention_mask)` of shape `(rows, longest)`, filled with `pad` on the right."""
    input_ids = torch.full((len(rows), max(map(len, rows))), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask


def _caption(row: Mapping[str, Any], number: int) -> tuple[str, str]:
    """The long and the short caption."""
    long = row.get("caption")
    short = row.get("short_caption")
    if short is None and isinstance(long, str):
        short = first_sentence(long)
    for name, text in (("caption", long), ("short_caption", short)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"Row {number} of a batch cannot be trained on: its {name} must be a text that is not empty, got "
                f"{text!r:.40} (the row holds {', '.join(map(str, row))})."
            )
    return str(long), str(short)


def length_groups(lengths: ArrayLike, groups: int) -> tuple[np.ndarray, list[int]]:
    """Splits a batch into at most `groups` groups of similar length, each to be padded to its own longest.

    Of all such splits it is one with the fewest tokens in all, padding included: `sum(size * longest)`. It takes
    `O(groups * distinct_lengths ** 2)` operations, whatever the batch size.

    Args:
        lengths: token counts, of shape `(batch_size,)`, on the CPU.
        groups: how many groups at most.

    Returns:
        `(order, sizes)`: a permutation of shape `(batch_size,)`, shortest first, and the sizes of the groups along it.
        `ids[order].split(sizes)` are the groups, and `torch.cat(features)[order.argsort()]` restores the batch.

    Raises:
        ValueError: if `lengths` is not a vector with at least one element, or `groups` is below 1.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not len(lengths) or groups < 1:
        raise ValueError(f"Expected lengths of shape (batch_size,) and groups >= 1, got {lengths.shape}, {groups}.")
    longest, counts = np.unique(lengths, return_counts=True)
    ends = counts.cumsum()
    # tokens[i, j]: of one group from distinct length i to j.
    tokens = ((ends - (ends - counts)[:, None]) * longest).astype(float)
    tokens[np.tri(len(longest), k=-1, dtype=bool)] = math.inf
    best, begins = tokens[0], []  # best[j]: of all up to distinct length j, in one group, then in two, and so on
    for _ in range(min(groups, len(longest)) - 1):  # one more group always saves, as long as lengths differ
        sums = best[:-1, None] + tokens[1:]
        best = sums.min(axis=0)
        begins.append(sums.argmin(axis=0) + 1)  # the last group begins there
    boundaries = [len(longest)]
    for begin in reversed(begins):
        boundaries.append(int(begin[boundaries[-1] - 1]))
    boundaries.append(0)
    sizes = [int(counts[first:end].sum()) for end, first in itertools.pairwise(boundaries)]
    return np.argsort(lengths, kind="stable"), sizes[::-1]


def even_groups(lengths: ArrayLike, groups: int) -> tuple[np.ndarray, list[int]]:
    """Like `length_groups`, of sizes that depend on the batch size alone, not on what it holds.

    Under FSDP every process must encode equally many groups: each begins by collecting the weights from all.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    return order, [len(part) for part in np.array_split(order, min(groups, len(order)))]
