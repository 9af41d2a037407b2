"""The rows whose vectors are nearest to one: exactly, or by an index with what it was measured to need."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.errors import SearchError
from longclip_hf.files import load_json, write_atomically

if TYPE_CHECKING:
    import numpy as np

MEASURED_K = 10  # recall@10
INDEX_FILE = "index.json"
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")


@dataclass(frozen=True)
class Tuning:
    """What a search by an index needs for its recall.

    Args:
        probes: partitions that are read at least; under a filter more, until there are enough rows.
        refine: so many times the wanted rows, and at least so many times ten, are compared by their whole vectors.
    """

    probes: int
    refine: int


@dataclass(frozen=True)
class Index:
    """An index of one column, `IVF_PQ`, and what was measured of it.

    Args:
        rows: that it was trained on.
        partitions, sub_vectors, bits: how it is built.
        tuning: for searching.
        recall, filtered_recall: recall@10 against exact search, over all rows and over a tenth of them.
        milliseconds: of one search.
    """

    rows: int
    partitions: int
    sub_vectors: int
    bits: int
    tuning: Tuning = Tuning(1, 1)
    recall: float = 0.0
    filtered_recall: float = 0.0
    milliseconds: float = 0.0

    def tuned(self, **found: Any) -> "Index":
        return replace(self, **found)


def read_indices(folder: Path) -> dict[str, Index]:
    """What `longclip-index` wrote, by column.

    Raises:
        FileError, SearchError: if it is damaged.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        return {}
    try:
        return {
            name: Index(**{**index, "tuning": Tuning(**index["tuning"])}) for name, index in load_json(file).items()
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise SearchError(f"{file} was not written by this version: {error}. Run longclip-index again.") from error


def write_indices(folder: Path, indices: dict[str, Index]) -> None:
    """See `read_indices`."""
    content = {name: asdict(index) for name, index in indices.items()}
    write_atomically(folder / INDEX_FILE, (json.dumps(content, indent=2) + "\n").encode())


def nearest(
    table: Any, column: str, vector: "np.ndarray", k: int, where: str | None = None, tuning: Tuning | None = None
) -> Any:
    """The nearest rows by cosine, a `pyarrow.Table` with `_distance`, which is 1 less the cosine.

    Args:
        table: of lancedb.
        column: of vectors; rows without one are not found.
        vector: of shape `(dim,)`.
        k: how many.
        where: an SQL condition on other columns; what does not meet it is left out before the search.
        tuning: of an index; without, the search is exact.

    Raises:
        SearchError: if `where` is no condition, or the table is damaged.
    """
    query = table.search(vector, vector_column_name=column).distance_type("cosine").limit(k)
    if where is not None:
        query = query.where(checked(where), prefilter=True)
    if tuning is None:
        query = query.bypass_vector_index()
    else:
        # No upper limit: a filter can leave few rows of the nearest partitions.
        query = query.minimum_nprobes(tuning.probes).maximum_nprobes(0)
        query = query.refine_factor(-(-tuning.refine * max(k, MEASURED_K) // k))
    shown = [name for name in table.schema.names if not name.endswith("_vector")]
    try:
        return query.select([*shown, "_distance"]).to_arrow()
    except (ValueError, RuntimeError, OSError) as error:
        said = str(error).strip().splitlines()[0][:300]
        if where is not None and isinstance(error, ValueError):
            raise SearchError(
                f"The condition {where!r} cannot be used: {said} The columns are {', '.join(shown)}."
            ) from error
        raise SearchError(
            f"The table cannot be read: {said}. It may be damaged: put it back from a copy, or embed again."
        ) from error


def checked(where: str) -> str:
    """
    Raises:
        SearchError: if it is empty or goes on behind a semicolon, which the parser would not read.
    """
    if not where.strip() or ";" in _QUOTED.sub("", where):
        raise SearchError(f"{where!r} is no condition: write one like \"price < 20 and text like '%dog%'\".")
    return where
