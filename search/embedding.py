"""Rows of a source -> rows of a table, in chunks: images as they are decoded, texts of a chunk by their length.

Which rows lie in a chunk, and which in a batch, follows from their numbers alone. Hence a run that was killed and
started again computes every row in the batch that it had in a run of one piece, and gets the same bits.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from longclip_hf.errors import SearchError
from longclip_hf.evaluation.encoding import Encoder, image_inputs
from longclip_hf.search.settings import Settings
from longclip_hf.search.source_rows import OWN, Row, SourceRows, column_of
from longclip_hf.search.tables import Table

_PRECISIONS = {"float16": pa.float16(), "float32": pa.float32()}
Batch = tuple[list[Row], dict[str, torch.Tensor]]


@dataclass
class Report:
    """What became of the rows.

    Attributes:
        added, present: rows that were written now, and before.
        bad: those that cannot be used.
        notes: what is out of the ordinary, with counts.
    """

    added: int = 0
    present: int = 0
    bad: list[Row] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


class RowBatches(Dataset[Batch]):
    """Batches of rows by their numbers, read and made ready for the model in a dataloader's workers."""

    def __init__(self, rows: SourceRows, image_processor: Any) -> None:
        self.rows = rows
        self.image_processor = image_processor

    def __getitem__(self, numbers: list[int]) -> Batch:
        read = [self.rows.read(number) for number in numbers]
        images = [row.image for row in read if row.bad is None and row.image is not None]
        for row in read:
            row.image = None  # decoded, it is larger than what the model sees of it
        return read, image_inputs(self.image_processor, images) if images else {}


def embed_rows(
    encoder: Encoder,
    rows: SourceRows,
    table: Table,
    settings: Settings,
    *,
    advance: Callable[[int], None] = lambda count: None,
    bad_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Embeds what the table does not have, and adds it.

    Args:
        encoder: of images and texts.
        rows: of a source.
        table: which knows what it has.
        settings: of the table. Without an image or a text, a row has null for its vector.
        advance: told how many rows are done.
        bad_row: told of every row that cannot be used.

    Raises:
        SearchError: if the table cannot take the source's columns.
        FileError: if it cannot be written.
        EncodingError: if features are not finite.
    """
    there = table.numbers(rows.name)
    kinds = _kinds(rows, table)
    missing = [number for number in range(len(rows)) if number not in there]
    report = Report(present=len(rows) - len(missing))
    advance(report.present)
    chunks = list(_parts(missing, settings.chunk_rows))
    batches = [batch for part in chunks for batch in _parts(part, encoder.batch_images)]
    loader = DataLoader(
        RowBatches(rows, encoder.image_processor), batch_size=None, sampler=batches,
        num_workers=min(encoder.workers, len(batches)),
    )  # fmt: skip
    loaded: Iterator[Batch] = iter(loader)
    for part in chunks:
        read: list[Row] = []
        images: dict[int, torch.Tensor] = {}
        while len(read) < len(part):
            batch, inputs = next(loaded)
            read += batch
            if inputs:
                images |= _image_vectors(encoder, batch, inputs)
            advance(len(batch))
        good = [row for row in read if row.bad is None]
        for row in read:
            if row.bad is not None:
                report.bad.append(row)
                bad_row(row)
        if good:
            table.add(_as_table(encoder, rows.name, good, images, settings, kinds, report.notes))
            report.added += len(good)
    return report


def _parts(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Neighbours whose number divided by `size` is the same."""
    part: list[int] = []
    for number in numbers:
        if part and number // size != part[0] // size:
            yield part
            part = []
        part.append(number)
    if part:
        yield part


def _kinds(rows: SourceRows, table: Table) -> dict[str, Any]:
    """The types of carried columns: the table's, where it has rows of another source or an earlier run."""
    if table.schema is None:
        return rows.kinds
    kinds = {field.name: field.type for field in table.schema if field.name not in OWN}
    if strange := [name for name in rows.kinds if name not in kinds]:
        raise SearchError(
            f"The table has no column {', '.join(map(repr, strange))}, which {rows.source.name} has: leave it out "
            "(--columns names those that are carried), or name another --output."
        )
    return kinds


def _image_vectors(encoder: Encoder, batch: Sequence[Row], inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    features = encoder.forward("image", inputs)
    # Every row has an image, or is bad, where any has.
    numbers = [row.number for row in batch if row.bad is None]
    return dict(zip(numbers, _unit(encoder, features, [str(number) for number in numbers]), strict=True))


def _text_vectors(encoder: Encoder, rows: Sequence[Row]) -> tuple[dict[int, torch.Tensor], dict[int, int], int]:
    """Vectors and tokens by the rows' numbers, and how many texts were cut."""
    texts = {row.number: row.text for row in rows if row.text is not None}
    if not texts:
        return {}, {}, 0
    found = encoder.encode_texts(list(texts.values()))
    vectors = _unit(encoder, found.embeds, [str(number) for number in texts])
    return (
        dict(zip(texts, vectors, strict=True)),
        dict(zip(texts, found.lengths.tolist(), strict=True)),
        found.truncated,
    )


def _unit(encoder: Encoder, features: torch.Tensor, numbers: Sequence[str]) -> torch.Tensor:
    good = features.isfinite().all(1)
    if not good.all():
        bad = [number for number, is_good in zip(numbers, good.tolist(), strict=True) if not is_good]
        raise SearchError(
            f"The features of row {', '.join(bad[:10])} are not finite, in {encoder.dtype}. Try --dtype float32."
        )
    return F.normalize(features, dim=1)


def _as_table(
    encoder: Encoder,
    source: str,
    rows: Sequence[Row],
    images: dict[int, torch.Tensor],
    settings: Settings,
    kinds: dict[str, Any],
    notes: Counter[str],
) -> Any:
    texts, tokens, truncated = _text_vectors(encoder, rows) if "text_vector" in settings.vectors else ({}, {}, 0)
    columns: dict[str, Any] = {
        "source": pa.array([source] * len(rows), pa.string()),
        "row": pa.array([row.number for row in rows], pa.int64()),
        "location": pa.array([row.location for row in rows], pa.string()),
        "text": pa.array([row.text for row in rows], pa.string()),
        "tokens": pa.array([tokens.get(row.number) for row in rows], pa.int32()),
        "thumbnail": pa.array([row.thumbnail for row in rows], pa.binary()),
    }
    for name, kind in kinds.items():
        columns[name], misfits = column_of([row.others.get(name) for row in rows], kind)
        notes[f"values of column {name!r} that are no {kind}, left empty"] += misfits
    for name in settings.vectors:
        found = {"image_vector": images, "text_vector": texts}[name]
        columns[name] = _vectors([row.number for row in rows], found, settings.dim, settings.precision)
    notes[f"texts longer than the model's {encoder.positions} tokens, cut there"] += truncated
    if "text_vector" in settings.vectors:
        notes["rows without a text"] += sum(row.text is None for row in rows)
        notes["rows with several texts, of which the first is embedded"] += sum(row.texts > 1 for row in rows)
    return pa.table(columns)


def _vectors(numbers: Sequence[int], vectors: dict[int, torch.Tensor], dim: int, precision: str) -> Any:
    flat = np.zeros((len(numbers), dim), precision)
    empty = np.array([number not in vectors for number in numbers])
    for at, number in enumerate(numbers):
        if number in vectors:
            flat[at] = vectors[number].numpy()
    values = pa.array(flat.ravel(), _PRECISIONS[precision])
    return pa.FixedSizeListArray.from_arrays(values, dim, mask=pa.array(empty))
