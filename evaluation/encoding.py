"""Images and captions -> features, by any checkpoint: captions grouped by length, split over processes, kept on disk.

Batches are formed of all rows in one way, whatever the number of processes, and then dealt out whole. Hence a row is
computed in the same batch, and gets the same bits, with one process or with many, and in a run that was interrupted
and taken up again. Rows that were stored among other texts are left out of their batches: the last digit of the others
can then differ, as between any two batches.
"""

import hashlib
import logging
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPModel

from longclip_hf.errors import EncodingError, ImageError
from longclip_hf.evaluation.data import ImageFile
from longclip_hf.evaluation.digests import gathered, image_digests, raise_all
from longclip_hf.evaluation.feature_store import FeatureStore
from longclip_hf.evaluation.loading import (
    as_json,
    check_eot,
    code_of,
    commit_of,
    find_device,
    fingerprint_of,
    load_model,
    positions_of,
    some,
)
from longclip_hf.images import MAX_PIXELS, decode_image
from modeling_longclip.compat import features

logger = logging.getLogger(__name__)

Tower = Literal["text", "image"]
# Rows of a batch, the model's inputs for them, and what is wrong with rows that are left out.
Loaded = tuple[list[int], dict[str, torch.Tensor], list[str]]
_SHORTEST = 3  # start of text, one token, end of text
_WORD = re.compile(r"[\u2e80-\uffff]|[^\s\u2e80-\uffff]+")  # a letter where no spaces are: Chinese, Japanese, Korean


@dataclass(frozen=True)
class TextFeatures:
    """Captions as a model sees them.

    Attributes:
        embeds: not normalised, `torch.FloatTensor` of shape `(texts, dim)` on the CPU.
        lengths: tokens before truncation, start and end of text among them, `torch.LongTensor` of shape `(texts,)`.
        truncated: how many texts were cut.
    """

    embeds: torch.Tensor
    lengths: torch.Tensor
    truncated: int


class Encoder:
    """A checkpoint and its processor, ready to encode.

    With several processes (started by `accelerate launch` or `torchrun`), every one makes an encoder and calls it with
    the same texts and images; every one gets all features.

    Args:
        name: a folder or a Hub id, of any model that `AutoModel` loads and that has `get_text_features` and
            `get_image_features`.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run the code that comes with the checkpoint, as `AutoModel` does.
        device: by default an accelerator, if there is one.
        dtype: of weights and computation. Features are float32.
        store: where features are kept; without one, nothing is.
        batch_tokens: tokens of a batch of texts, padding included. By default 1,024 on the CPU, where larger batches
            do not fit into its cache and take longer, and 32,768 elsewhere.
        batch_images: images of a batch; in the same way, 8 and 128.
        workers: processes that decode images. By default none on the CPU, which the model keeps busy, and elsewhere
            one for every core, up to 16, shared among this machine's processes.
        max_pixels: of the largest image that is decoded.
        quiet: show no progress and no warnings.
        prepare: done to every text before it is tokenized; see `longclip_hf.cleaning.preparation`.

    Attributes:
        name, device: as above.
        revision: the commit of a Hub id; None for a folder.
        model_class: the name of the model's class.
        positions: tokens that the model reads, start and end of text among them.
        dtype: such as `"float32"`.
        fingerprint: SHA-256, in hexadecimal, of the weights as loaded and of the settings of tokenizer and processor.
        trims: whether a batch of texts is cut to its own longest. Of a CLIP it is: attention is causal and the feature
            is read at the first EOT, so what stands behind it changes nothing. Any other model may see its padding
            and may have been trained with it: its texts are padded to `positions`, as its tokenizer pads.
        encoded, stored: rows that were computed and rows that the store had, by tower, so far. Equal texts or images
            are one row.

    Raises:
        EncodingError: if there is no such checkpoint, its tensors are incomplete, it lacks one of the two methods, or
            its tokenizer is another model's.
        ImportError: without the extra `evaluate`.
    """

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        *,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        store: FeatureStore | None = None,
        batch_tokens: int | None = None,
        batch_images: int | None = None,
        workers: int | None = None,
        max_pixels: int = MAX_PIXELS,
        quiet: bool = False,
        prepare: Callable[[str], str] | None = None,
    ) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError('Encoding needs accelerate: pip install "longclip-hf[evaluate]"') from error
        self.name = str(name)
        asked = find_device(device)
        self.processes = PartialState(cpu=asked is not None and asked.type == "cpu")
        alone = self.processes.num_processes == 1
        self.device = asked if asked is not None and alone else self.processes.device
        self.model, processor = load_model(self.name, revision, trust_remote_code, dtype)
        self.revision = None if Path(self.name).expanduser().is_dir() else commit_of(self.name, revision)
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.trims = isinstance(self.model, CLIPModel)
        self.positions = positions_of(self.model, self.tokenizer)
        if self.trims:
            check_eot(self.name, self.model, self.tokenizer)
        elif self.processes.is_main_process and not quiet:
            logger.warning(
                "%s is no CLIP but a %s: every text is padded to %d tokens, which takes longer.",
                self.name, type(self.model).__name__, self.positions,
            )  # fmt: skip
        self.model_class = type(self.model).__name__
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.fingerprint = fingerprint_of(self.model, self.tokenizer, self.image_processor)
        self._code = code_of(self.model, self.tokenizer, self.image_processor)  # now: files can change later
        self.model.to(self.device).eval()
        self.store = store
        on_cpu = self.device.type == "cpu"
        self.batch_tokens = batch_tokens or (1024 if on_cpu else 32768)
        self.batch_images = batch_images or (8 if on_cpu else 128)
        if workers is None:
            workers = 0 if on_cpu else min(16, os.cpu_count() or 1) // self.processes.num_processes
        self.workers = workers
        self.max_pixels = max_pixels
        self.quiet = quiet
        self.prepare = prepare
        self.encoded: Counter[Tower] = Counter()
        self.stored: Counter[Tower] = Counter()

    def encode_texts(self, texts: Sequence[str], max_length: int | None = None) -> TextFeatures:
        """
        Args:
            texts: of any length; what is longer than the model's is cut there and keeps its EOT.
            max_length: cut to so many tokens instead, where that is shorter, also with the EOT at the end.

        Raises:
            EncodingError: for no texts, a text without a word, a `max_length` that leaves no token, or features that
                are not finite.
        """
        limit = self.positions if max_length is None else min(max_length, self.positions)
        if limit < _SHORTEST:
            raise EncodingError(f"Of {limit} tokens, none is the text's: {_SHORTEST} are the fewest.")
        if not texts:
            raise EncodingError("There are no texts to encode.")
        if self.prepare is not None:
            texts = [self.prepare(text) for text in texts]
        if empty := [index for index, text in enumerate(texts) if not text.strip()]:
            raise EncodingError(f"{len(empty)} of {len(texts)} texts are empty: {some(empty)}. Leave them out.")
        ids, lengths, truncated = self._tokenize(texts, limit)
        rows: dict[tuple[int, ...], int] = {}
        row_of = [rows.setdefault(tuple(text), len(rows)) for text in ids]
        sequences = list(rows)
        keys = [hashlib.sha256(" ".join(map(str, sequence)).encode()).digest() for sequence in sequences]
        first = dict(zip(reversed(row_of), reversed(texts), strict=True))

        def load(batches: Iterable[list[int]]) -> Iterator[Loaded]:
            return ((batch, self._pad([sequences[row] for row in batch]), []) for batch in batches)

        batches = self._text_batches([len(sequence) for sequence in sequences])
        embeds = self._features("text", keys, batches, load, lambda row: repr(first[row][:60]))
        return TextFeatures(embeds[row_of], lengths, truncated)

    def read_part(self, text: str) -> int:
        """How many characters of `text` the model reads: all, or those of the words that fit into its positions."""

        def too_long(end: int) -> bool:
            part = text[:end] if self.prepare is None else self.prepare(text[:end])
            return self._tokenize([part], self.positions)[2] > 0

        if not too_long(len(text)):
            return len(text)
        ends = [0, *(word.end() for word in _WORD.finditer(text))]
        return ends[bisect_left(ends, True, lo=1, key=too_long) - 1]

    def encode_images(self, images: Sequence[ImageFile], digests: Sequence[bytes] | None = None) -> torch.Tensor:
        """Features of shape `(images, dim)`, not normalised, `torch.FloatTensor` on the CPU.

        Args:
            images: to encode; those that the store has are not decoded.
            digests: of `image_digests(images)`, where they are known; otherwise every image is read for its own.

        Raises:
            EncodingError: for no images, images that cannot be read (all are named at once; the features of the others
                are in the store), or features that are not finite.
        """
        if not images:
            raise EncodingError("There are no images to encode.")
        rows: dict[bytes, int] = {}
        row_of = [rows.setdefault(digest, len(rows)) for digest in digests or image_digests(images)]
        first = dict(zip(reversed(row_of), reversed(images), strict=True))
        files = [first[row] for row in range(len(rows))]
        dataset = _ImageBatches(files, self.image_processor, self.max_pixels)

        def load(batches: list[list[int]]) -> Iterator[Loaded]:
            return iter(
                DataLoader(dataset, batch_size=None, sampler=batches, num_workers=min(self.workers, len(batches)))
            )

        size = self.batch_images
        batches = [list(range(begin, min(begin + size, len(rows)))) for begin in range(0, len(rows), size)]
        return self._features("image", list(rows), batches, load, lambda row: files[row].name)[row_of]

    def _tokenize(self, texts: Sequence[str], limit: int) -> tuple[list[list[int]], torch.Tensor, int]:
        """Ids, cut to `limit`; lengths before that; and how many were cut."""
        options = {"padding": False, "return_attention_mask": False, "verbose": False}
        ids = list(self.tokenizer(list(texts), truncation=False, **options)["input_ids"])
        lengths = torch.tensor([len(text) for text in ids])
        long = (lengths > limit).nonzero().flatten().tolist()
        if long:
            # By the tokenizer, which knows what must stand at the end.
            cut = self.tokenizer([texts[index] for index in long], truncation=True, max_length=limit, **options)
            for index, text in zip(long, cut["input_ids"], strict=True):
                ids[index] = text
        return ids, lengths, len(long)

    def _text_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows in batches of similar length, of at most `batch_tokens` tokens, the longest first."""
        batches: list[list[int]] = []
        room = 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if not room:
                batches.append([])
                room = max(1, self.batch_tokens // (lengths[row] if self.trims else self.positions))
            batches[-1].append(row)
            room -= 1
        return batches

    def _pad(self, sequences: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        if self.trims:
            # No mask is needed: attention is causal, and what is added stands behind the EOT.
            longest = max(map(len, sequences))
            return {"input_ids": torch.tensor([[*ids, *ids[-1:] * (longest - len(ids))] for ids in sequences])}
        ids = {"input_ids": [list(ids) for ids in sequences]}
        return dict(
            self.tokenizer.pad(
                ids, padding="max_length", max_length=self.positions, return_tensors="pt", verbose=False
            )
        )

    def _features(
        self,
        tower: Tower,
        keys: list[bytes],
        batches: list[list[int]],
        load: Callable[[list[list[int]]], Iterator[Loaded]],
        name: Callable[[int], str],
    ) -> torch.Tensor:
        """The features of all rows, of shape `(len(keys), dim)`, on every process.

        Args:
            keys: hash of each row's content.
            batches: all rows, in batches.
            load: the model's inputs of batches.
            name: what an error calls a row.
        """
        from accelerate.utils import broadcast_object_list

        space = self._space(tower)
        main, count = self.processes.is_main_process, self.processes.num_processes
        found: list[int] = []
        embeds: torch.Tensor | None = None
        # One process looks and tells the others: what is stored can change while they look one after the other.
        if main and self.store is not None:
            found, stored = self.store.read(space, keys)
            if found:
                embeds = torch.zeros(len(keys), stored.shape[1])
                embeds[found] = stored
        known = set(broadcast_object_list([found])[0])
        self.stored[tower] += len(known)
        self.encoded[tower] += len(keys) - len(known)
        missing = [rest for batch in batches if (rest := [row for row in batch if row not in known])]
        mine = missing[self.processes.process_index :: count]
        problems: list[str] = []
        console = Console(stderr=True)
        progress = Progress(console=console, disable=self.quiet or not (main and console.is_terminal))
        writer = nullcontext(lambda *_: None) if self.store is None else self.store.writer(space)
        with progress, writer as write:
            for rows, inputs, failed in progress.track(
                load(mine), len(mine), description=escape(f"{self.name}: {tower}s")
            ):
                problems += failed
                if not rows:
                    continue
                part = self.forward(tower, inputs)
                if bad := [name(row) for row, good in zip(rows, part.isfinite().all(1), strict=True) if not good]:
                    problems += [f"the {tower} features of {what} are not finite, in {self.dtype}" for what in bad]
                    break  # they all may be; the other processes' shares are not lost
                write([keys[row] for row in rows], part)
                if embeds is None:
                    embeds = torch.zeros(len(keys), part.shape[1])
                embeds[rows] = part
        raise_all(gathered(problems), f"{len(keys)} different {tower}s")
        return self._whole(embeds, len(keys))

    @torch.inference_mode()
    def forward(self, tower: Tower, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features of one batch, of shape `(rows, dim)`, float32 on the CPU; `inputs` as the processor gives them."""
        placed = {
            key: value.to(self.device, self.model.dtype if value.is_floating_point() else value.dtype)
            for key, value in inputs.items()
        }
        return features(getattr(self.model, f"get_{tower}_features")(**placed)).float().cpu()

    def _whole(self, embeds: torch.Tensor | None, rows: int) -> torch.Tensor:
        """The sum over processes of rows that are each one's own and zero elsewhere."""
        from accelerate.utils import reduce

        dim = max(gathered([0 if embeds is None else embeds.shape[1]]))
        if embeds is None:
            embeds = torch.zeros(rows, dim)
        if self.processes.num_processes == 1:
            return embeds
        # As integers, of which the sum with zero is exact to the last bit, also of -0.0.
        whole: torch.Tensor = reduce(embeds.view(torch.int32).to(self.processes.device), "sum")
        return whole.cpu().view(torch.float32)

    def _space(self, tower: Tower) -> str:
        """A hash of what features depend on beside a row's content. What differs in the last digits, and where code or
        a version changed in more, must not be mixed."""
        config = self.model.config.to_dict()
        parts = [
            tower, self.fingerprint, self._code, *(type(o).__qualname__ for o in (self.model, self.image_processor)),
            {key: value for key, value in config.items() if key != "_name_or_path"}, self.positions, self.device.type,
        ]  # fmt: skip
        return hashlib.sha256(as_json(parts)).hexdigest()


# A worker holds about so many decoded: of 128 photographs of 12 megapixels all at once would be 4.6 GB, and copies.
HELD_PIXELS = 1 << 26


class _ImageBatches(Dataset[Loaded]):
    """Batches of images by their rows, decoded in a dataloader's workers."""

    def __init__(self, files: Sequence[ImageFile], image_processor: Any, max_pixels: int) -> None:
        self.files = files
        self.image_processor = image_processor
        self.max_pixels = max_pixels

    def __getitem__(self, rows: list[int]) -> Loaded:
        decoded, failed, parts, images = [], [], [], []
        for row in rows:
            try:
                image = decode_image(self.files[row].read(), self.files[row].name, self.max_pixels)
            except ImageError as error:
                failed.append(str(error))
                continue
            decoded.append(row)
            images.append(image)
            if sum(image.width * image.height for image in images) > HELD_PIXELS:
                parts.append(image_inputs(self.image_processor, images))
                images = []
        if images:
            parts.append(image_inputs(self.image_processor, images))
        return decoded, {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}, failed


def image_inputs(image_processor: Any, images: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What a model reads of RGB images."""
    # Without its format, a picture 3 pixels high would be taken for one whose channels come first.
    return dict(image_processor(images=images, input_data_format="channels_last", return_tensors="pt"))
