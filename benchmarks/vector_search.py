"""An index of vectors as `longclip-index` makes it, beside faiss's IVF_PQ and exact search: time, disk, recall.

    python -m benchmarks.vector_search [--sizes 10000 100000] [--kinds random clustered] [--dim 512]

Unit vectors: noise, which has no neighbourhoods and is the worst case, and 1,000 clusters. Queries are others of the
same kind. Recall@10 is against exact search by numpy, over all rows and over a tenth of them (`row % 10 = 3`).

- lance: float16 on disk, partitions, codes, probes and comparisons as `longclip_hf.search.indexing` chooses them.
- faiss: float32 in memory, with the same partitions, codes, probes and comparisons (`IndexRefineFlat`).
- exact: the Lance table without an index.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

K, QUERIES = 10, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--kinds", nargs="+", choices=("random", "clustered"), default=["random", "clustered"])
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    print("| vectors | way | build s | disk MB | recall@10 | filtered | ms a query |")
    print("|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                compare(kind, size, options.dim, Path(folder))


def vectors(kind: str, count: int, dim: int, seed: int) -> Any:
    """Of unit length and shape `(count, dim)`, float32, rounded to float16's numbers."""
    import numpy as np

    rng = np.random.default_rng(seed)
    found = rng.standard_normal((count, dim), dtype=np.float32)
    if kind == "clustered":
        centres = np.random.default_rng(99).standard_normal((1000, dim), dtype=np.float32)
        found = centres[rng.integers(0, 1000, count)] + 0.7 * found
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def compare(kind: str, size: int, dim: int, folder: Path) -> None:
    """Prints a row for each way."""
    import lancedb
    import numpy as np
    import pyarrow as pa

    from longclip_hf.search.indexing import build, index_bytes, measure, plan
    from longclip_hf.search.lookup import nearest

    rows, queries = vectors(kind, size, dim, 0), vectors(kind, QUERIES, dim, 1)
    scores = queries @ rows.T
    wanted = [np.argsort(-line)[:K] for line in scores]
    tenth = np.arange(size) % 10 == 3
    wanted_of_tenth = [np.argsort(-np.where(tenth, line, -2))[:K] for line in scores]
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float16).ravel()), dim)
    content = pa.table({"row": np.arange(size), "image_vector": column})
    table = lancedb.connect(str(folder)).create_table("rows", content)
    disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6

    def say(way: str, seconds: float, megabytes: float, ask: Callable[[Any, bool], Any], filters: bool) -> None:
        began = time.perf_counter()
        found = [ask(query, False) for query in queries]
        each = (time.perf_counter() - began) * 1000 / QUERIES
        recall = _share(found, wanted)
        under = f"{_share([ask(query, True) for query in queries], wanted_of_tenth):.3f}" if filters else ""
        print(
            f"| {size:,} {kind} | {way} | {seconds:.1f} | {megabytes:.1f} | {recall:.3f} | {under} | {each:.1f} |",
            flush=True,
        )

    def lance(tuning: Any) -> Callable[[Any, bool], Any]:
        return lambda query, filtered: nearest(
            table, "image_vector", query, K, "row % 10 = 3" if filtered else None, tuning
        )["row"].to_pylist()

    say("exact", 0, disk, lance(None), True)
    index = plan(size, dim)
    began = time.perf_counter()
    build(table, "image_vector", index)
    seconds = time.perf_counter() - began
    index = measure(table, "image_vector", index, sample=QUERIES)
    said = f"{index.partitions} partitions, {index.tuning.probes} probes, refine {index.tuning.refine}"
    say(f"lance, {said}", seconds, index_bytes(folder) / 1e6, lance(index.tuning), True)
    say_faiss(say, rows, index)


def say_faiss(say: Any, rows: Any, index: Any) -> None:
    """The same numbers in faiss, or a line that it is not there."""
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu")
        return
    dim = rows.shape[1]
    flat = faiss.IndexFlatIP(dim)
    inner = faiss.IndexIVFPQ(flat, dim, index.partitions, index.sub_vectors, index.bits, faiss.METRIC_INNER_PRODUCT)
    whole = faiss.IndexRefineFlat(inner)
    began = time.perf_counter()
    whole.train(rows)
    whole.add(rows)
    seconds = time.perf_counter() - began
    inner.nprobe = index.tuning.probes
    whole.k_factor = index.tuning.refine
    size = len(faiss.serialize_index(inner)) / 1e6
    say("faiss", seconds, size, lambda query, _: whole.search(query[None], K)[1][0].tolist(), False)


def _share(found: Any, wanted: Any) -> float:
    hits = sum(len({*map(int, mine)} & {*map(int, right)}) for mine, right in zip(found, wanted, strict=True))
    return hits / (K * len(wanted))


if __name__ == "__main__":
    main()
