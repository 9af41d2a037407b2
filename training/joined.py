"""Several sources as one: a row is the number of its source, and the row there, so that columns may differ."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from longclip_hf.sources import Source
from longclip_hf.training.captions import RowReader
from longclip_hf.training.streams import shard_name, shard_rows


class Joined:
    """Tables one after the other; a row is the number of its table and the row there."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.tables = [source.rows for source in sources]
        self.ends = list(itertools.accumulate(map(len, self.tables)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        number, at = _find(self.ends, index)
        return number, self.tables[number][at]

    def place(self, index: int) -> str:
        number, at = _find(self.ends, index)
        return self.sources[number].place(at)


class JoinedStream:
    """Streams, the shards of one after those of the other."""

    def __init__(self, streams: Sequence[Any]) -> None:
        self.streams = streams
        self.ends = list(itertools.accumulate(stream.num_shards for stream in streams))

    @property
    def num_shards(self) -> int:
        return self.ends[-1]

    def shard_name(self, shard: int) -> str:
        number, at = _find(self.ends, shard)
        return shard_name(self.streams[number], at)

    def read_shard(self, shard: int) -> Iterator[tuple[int, Any]]:
        number, at = _find(self.ends, shard)
        return ((number, row) for row in shard_rows(self.streams[number], at))


def _find(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The number of a part, and the place within it."""
    number = bisect.bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


class JoinedReader:
    """Reads a row of `Joined` by its own source's reader."""

    def __init__(self, readers: Sequence[RowReader]) -> None:
        self.readers = readers

    def __call__(self, row: tuple[int, Any], draw: int = 0) -> tuple[Any, str, str]:
        return self.readers[row[0]](row[1], draw)

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(map(str, self.readers)))

    @property
    def settings(self) -> dict[str, Any]:
        """See `RowReader.settings`: of each source, in a list."""
        of_each = [reader.settings for reader in self.readers]
        return {name: [settings[name] for settings in of_each] for name in of_each[0]}

    def without_transform(self) -> "JoinedReader":
        return JoinedReader([reader.without_transform() for reader in self.readers])

    def captions(self, row: tuple[int, Any], draw: int = 0) -> tuple[str, str]:
        return self.readers[row[0]].captions(row[1], draw)

    def short_captions(self, row: tuple[int, Any]) -> list[str]:
        return self.readers[row[0]].short_captions(row[1])

    def image(self, row: tuple[int, Any]) -> Any:
        return self.readers[row[0]].image(row[1])
