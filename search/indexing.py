"""Builds an index of vectors by the size of the table, and measures what searching it needs."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longclip_hf.errors import FileError
from longclip_hf.search.lookup import MEASURED_K as K
from longclip_hf.search.lookup import Index, Tuning, nearest

EXACT_BELOW = 50_000
_ROWS_A_PARTITION = 4096
# LanceDB's own are 256 rows for a centre and 50 rounds. It learns codes in the vectors' precision, and in float16 four
# times as slowly as in float32: 10 rounds over 6,000 vectors of 512 took 16 s of CPU and 4.
_SAMPLE_RATE, _ITERATIONS = 64, 15
_MANY = 10_000_000
_FILTER = ("row % 10 = 3", lambda row: row % 10 == 3)  # a tenth of the rows


def plan(rows: int, dim: int) -> Index:
    """Partitions of some 4,096 rows, so that their centres are few beside the rows of those that are read; a byte for
    8 numbers of a vector, above 10 million rows for 16. Codes of 8 bits need thousands of rows to be learned.
    """
    wanted = max(1, dim // (8 if rows <= _MANY else 16))
    sub_vectors = next(count for count in range(wanted, 0, -1) if dim % count == 0)
    bits = 8 if rows >= _ROWS_A_PARTITION or sub_vectors % 2 else 4
    return Index(rows, max(1, rows // _ROWS_A_PARTITION), sub_vectors, bits)


def build(table: Any, column: str, index: Index) -> None:
    """Trains and writes the index, in the place of one that is there.

    Raises:
        FileError: if it cannot be written.
    """
    from lancedb.index import IvfPq

    config = IvfPq(
        distance_type="cosine", num_partitions=index.partitions, num_sub_vectors=index.sub_vectors,
        num_bits=index.bits, sample_rate=_SAMPLE_RATE, max_iterations=_ITERATIONS,
    )  # fmt: skip
    try:
        table.create_index(column, config=config, replace=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"The index of {column} cannot be written: {error}. The table is as it was.") from error


def measure(
    table: Any,
    column: str,
    index: Index,
    *,
    target: float = 0.95,
    sample: int = 100,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Index:
    """`index` with the least probes and comparisons that reach the recall, with and without a filter; or, where none
    does, the most.

    Args:
        table: of lancedb, with an index of `column`.
        column: of vectors.
        index: what was built.
        target: of recall@10, both over all rows and over a tenth of them.
        sample: how many queries; texts of the table where it has them, else its own vectors.
        seed: of the sample.
        say: told of every step.
    """
    queries, own = _queries(table, column, sample, seed)
    exact, filtered = _exact(table, column, queries, own)
    found = index
    for refine in (10, 30, 100):
        for probes in _ladder(index.partitions):
            tuning = Tuning(probes, refine)
            began = time.perf_counter()
            recall = _recall(table, column, queries, own, exact, None, tuning)
            milliseconds = (time.perf_counter() - began) * 1000 / len(queries)
            under = _recall(table, column, queries, own, filtered, _FILTER[0], tuning)
            found = index.tuned(tuning=tuning, recall=recall, filtered_recall=under, milliseconds=milliseconds)
            say(f"{column}: {probes} probes, refine {refine}: recall@{K} {recall:.3f}, filtered {under:.3f}")
            if min(recall, under) >= target:
                return found
    return found


def _ladder(partitions: int) -> Iterator[int]:
    probes = max(4, partitions // 16)
    while probes < partitions:
        yield probes
        probes *= 2
    yield partitions


def _queries(table: Any, column: str, sample: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of shape `(sample, dim)`: texts look for images as users do. And the rows that do not count as found:
    where the vectors are the table's own, each finds itself, which is no merit of the index. -1 for none.
    """
    other = "text_vector" if column == "image_vector" and "text_vector" in table.schema.names else column
    count = table.count_rows(f"{other} is not null")
    rows = np.sort(np.random.default_rng(seed).choice(count, min(sample, count), replace=False))
    found, own, begin = [], [], 0
    for vectors, numbers in _batches(table, other):
        wanted = rows[(rows >= begin) & (rows < begin + len(vectors))] - begin
        found.append(vectors[wanted])
        own.append(numbers[wanted] if other == column else np.full(len(wanted), -1))
        begin += len(vectors)
    return np.concatenate(found), np.concatenate(own)


def _batches(table: Any, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vectors that are there, of shape `(rows, dim)` in float32, and the numbers of their rows in the source."""
    query = table.search().where(f"{column} is not null").select([column, "row"])
    for batch in query.to_batches(8192):
        vectors = batch[column]
        flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        yield flat.reshape(len(batch), vectors.type.list_size), batch["row"].to_numpy()


def _exact(table: Any, column: str, queries: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each query's `K`th nearest among all rows, and among those of the filter, in one pass."""
    best = [np.full((len(queries), K), -np.inf, np.float32) for _ in range(2)]
    for vectors, numbers in _batches(table, column):
        scores = queries @ (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).T
        scores[own[:, None] == numbers] = -np.inf
        for which, chosen in enumerate((scores, scores[:, _FILTER[1](numbers)])):
            best[which] = -np.sort(-np.concatenate([best[which], chosen], axis=1), axis=1)[:, :K]
    norms = np.linalg.norm(queries, axis=1)
    return best[0][:, -1] / norms, best[1][:, -1] / norms


def _recall(
    table: Any,
    column: str,
    queries: np.ndarray,
    own: np.ndarray,
    least: np.ndarray,
    where: str | None,
    tuning: Tuning,
) -> float:
    """The share of the `K` nearest that are found: those no farther than the `K`th, so that equal rows count alike."""
    hits = 0
    for query, itself, bound in zip(queries, own, least, strict=True):
        found = nearest(table, column, query, K + 1, where, tuning)
        scores = 1 - found["_distance"].to_numpy()[found["row"].to_numpy() != itself][:K]
        hits += int((scores >= bound - 1e-5).sum())
    return hits / (K * len(queries))


def unindexed(table: Any, column: str) -> int | None:
    """Rows that were added since; they are searched one by one. None without an index."""
    for entry in table.list_indices():
        if entry.columns == [column]:
            found: int = table.index_stats(entry.name).num_unindexed_rows
            return found
    return None


def index_bytes(folder: Path) -> int:
    """What the indices of a table take on disk."""
    return sum(file.stat().st_size for file in (folder / "rows.lance" / "_indices").rglob("*") if file.is_file())
