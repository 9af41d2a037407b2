"""What a run's captions are like, said before it begins: lengths, and short captions that cannot do their work."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longclip_hf.cleaning import SPECIAL_TOKEN
from longclip_hf.rows import BadRow
from longclip_hf.training.captions import CaptionRows, RowReader
from longclip_hf.training.streams import CaptionStream, shard_rows

# Of a table evenly spaced rows are looked at; of a stream the first, which are read with their images.
TABLE_ROWS, STREAM_ROWS = 10_000, 256
_SPECIAL = 2  # start and end of text


@dataclass(frozen=True)
class CaptionReport:
    """Counts of some rows with good captions.

    Args:
        rows: how many were looked at.
        of: of how many, or None where nobody knows.
        long, short: tokens of each caption, start and end of text among them.
        length: where captions are cut, in tokens.
        equal: short captions that are the long one, but for its full stop.
        repeated: short captions that another row has too.
        hiding: rows with a literal `<|endoftext|>` or `<|startoftext|>` in a caption.
    """

    rows: int
    of: int | None
    long: Sequence[int]
    short: Sequence[int]
    length: int
    equal: int
    repeated: int
    hiding: int

    def __str__(self) -> str:
        where = f"the first {self.rows:,} rows" if self.of is None else f"{self.rows:,} of {self.of:,} rows"
        cut = sum(tokens > self.length for tokens in self.long)
        few = sum(tokens - _SPECIAL < 3 for tokens in self.short)
        said = (
            f"Captions of {where}, in tokens: long {_spread(self.long)}, {cut:,} beyond {self.length}; short "
            f"{_spread(self.short)}. Of the short ones {self.equal:,} equal the long one, {few:,} have fewer than 3 "
            f"tokens, {self.repeated:,} repeat another row's."
        )
        if self.hiding:
            said += (
                f" {self.hiding:,} rows hold a literal <|endoftext|> or <|startoftext|>, which hides what follows: "
                "--neutralise_special_tokens."
            )
        return said


def report_captions(rows: CaptionRows | CaptionStream, tokenizer: Any, length: int) -> CaptionReport | None:
    """
    Args:
        rows: those to train on. No image is decoded.
        tokenizer: the model's.
        length: where captions are cut, in tokens.

    Returns:
        The counts, or None where no row that was looked at has good captions.
    """
    count = len(rows) if isinstance(rows, CaptionRows) else None
    pairs = list(_captions(rows))
    if not pairs:
        return None
    long, short = (list(texts) for texts in zip(*pairs, strict=True))
    times = Counter(short)
    return CaptionReport(
        rows=len(pairs),
        of=count,
        long=_lengths(long, tokenizer),
        short=_lengths(short, tokenizer),
        length=length,
        equal=sum(one.rstrip(" .") == " ".join(all_.split()).rstrip(" .") for all_, one in pairs),
        repeated=sum(times[one] > 1 for one in short),
        hiding=sum(bool(SPECIAL_TOKEN.search(f"{all_} {one}")) for all_, one in pairs),
    )


def _captions(rows: CaptionRows | CaptionStream) -> Iterator[tuple[str, str]]:
    for row in text_rows(rows, TABLE_ROWS) if isinstance(rows, CaptionRows) else _stream_rows(rows):
        try:
            yield rows.read.captions(row)
        except BadRow:
            continue


def text_rows(rows: CaptionRows, most: int | None = None) -> Iterable[Any]:
    """The rows of a table without their images, about `most` of them evenly spaced, or all."""
    texts, places = rows.rows, rows.places
    if isinstance(rows.read, RowReader) and hasattr(texts, "select_columns"):  # without the images in other columns
        columns = {column.partition(".")[0] for column in (rows.read.long_column, rows.read.short_column) if column}
        texts = texts.select_columns(sorted(columns & set(texts.column_names)))
    return (texts[int(places[at])] for at in range(0, len(rows), max(1, len(rows) // (most or len(rows)))))


def _stream_rows(rows: CaptionStream) -> Iterable[Mapping[str, Any]]:
    shard, row = rows.begin
    every = itertools.chain.from_iterable(shard_rows(rows.rows, at) for at in range(shard, rows.rows.num_shards))
    return itertools.islice(every, row, row + STREAM_ROWS)


def _lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    return (
        f"{sum(ordered) / len(ordered):.0f} in the mean, {ordered[(len(ordered) - 1) // 2]} the median, "
        f"{ordered[int(0.95 * (len(ordered) - 1))]} at 95 %, {ordered[-1]} the most"
    )
