"""Where embeddings are kept: a Lance table, or parts of parquet or npy. A chunk is there whole or not at all."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from longclip_hf.errors import FileError, SearchError
from longclip_hf.files import write_atomically
from longclip_hf.search.settings import Format, Settings

TABLE = "rows"
_FOLDERS = {"image_vector": "img_emb", "text_vector": "text_emb"}  # of clip-retrieval


class Table(Protocol):
    """What a chunk of rows is written to."""

    schema: Any  # `pyarrow.Schema`, or None before the first chunk

    def numbers(self, source: str) -> set[int]:
        """The numbers of the source's rows that are there."""

    def add(self, rows: Any) -> None:
        """Adds a `pyarrow.Table`, in one step."""


def open_table(folder: Path, format: Format) -> Table:
    """A table that is there, or will be with its first rows."""
    if format == "lance":
        return LanceTable(folder)
    return ParquetParts(folder) if format == "parquet" else NumpyParts(folder)


def open_lance(folder: Path) -> Any:
    """The `lancedb` table in a folder of embeddings.

    Raises:
        SearchError: if it holds none, or one of another format.
        ImportError: without the extra `search`.
    """
    settings = Settings.read(folder)
    if settings.format != "lance":
        raise SearchError(f"{folder} was written with --format {settings.format}: only a Lance table is searched.")
    table = LanceTable(folder).table
    if table is None:
        raise SearchError(f"{folder} holds no rows yet: longclip-embed SOURCE --output {folder}")
    return table


def _lancedb() -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise ImportError('Lance tables need lancedb: pip install "longclip-hf[search]"') from error
    return lancedb


class LanceTable:
    """`rows.lance`, through lancedb; each chunk is a commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = _lancedb().connect(str(folder))
        # By its commits: a run that was killed before the first leaves a folder.
        there = any((folder / f"{TABLE}.lance" / "_versions").glob("*.manifest"))
        with _read(folder):
            self.table = self.database.open_table(TABLE) if there else None
            self.schema = None if self.table is None else self.table.schema

    def numbers(self, source: str) -> set[int]:
        if self.table is None:
            return set()
        quoted = source.replace("'", "''")
        with _read(self.folder):
            found = self.table.search().where(f"source = '{quoted}'").select(["row"]).to_arrow()
        return set(found["row"].to_pylist())

    def add(self, rows: Any) -> None:
        with _written(self.folder):
            if self.table is None:
                self.table = self.database.create_table(TABLE, rows)
                self.schema = self.table.schema
            else:
                self.table.add(rows)


class ParquetParts:
    """`part-000000.parquet` and on."""

    pattern = "part-*.parquet"

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet

        self.folder = folder
        with _read(folder):
            self.parts = len(self._files())
            self.schema = pyarrow.parquet.read_schema(self._files()[0]) if self.parts else None

    def _files(self) -> Sequence[Path]:
        return sorted(self.folder.glob(self.pattern))

    def numbers(self, source: str) -> set[int]:
        import pyarrow.parquet

        found: set[int] = set()
        with _read(self.folder):
            for file in self._files():
                columns = pyarrow.parquet.read_table(file, columns=["source", "row"])
                theirs = zip(columns["source"].to_pylist(), columns["row"].to_pylist(), strict=True)
                found.update(number for name, number in theirs if name == source)
        return found

    def add(self, rows: Any) -> None:
        with _written(self.folder):
            self._write(f"{self.parts:06}", rows)
        self.parts += 1
        self.schema = rows.schema if self.schema is None else self.schema

    def _write(self, number: str, rows: Any) -> None:
        write_atomically(self.folder / f"part-{number}.parquet", _parquet(rows))


class NumpyParts(ParquetParts):
    """As clip-retrieval lays them out: `img_emb/`, `text_emb/` and, written last, `metadata/`.

    Row i of a part is row i of each of its files. Where a row has no text, its vector is zero.
    """

    pattern = "metadata/metadata_*.parquet"

    def _write(self, number: str, rows: Any) -> None:
        import numpy as np

        for column in [name for name in rows.column_names if name in _FOLDERS]:
            vectors = rows[column].combine_chunks()
            flat = vectors.fill_null([0.0] * vectors.type.list_size).flatten()
            data = io.BytesIO()
            np.save(data, flat.to_numpy().reshape(len(rows), -1))
            place = _FOLDERS[column]
            write_atomically(self.folder / place / f"{place}_{number}.npy", data.getvalue())
        left = [name for name in rows.column_names if name not in _FOLDERS]
        write_atomically(self.folder / "metadata" / f"metadata_{number}.parquet", _parquet(rows.select(left)))


def _parquet(rows: Any) -> bytes:
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(rows, data)
    return data.getvalue()


@contextmanager
def _read(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # of lancedb and pyarrow
        raise FileError(
            f"The table in {folder} cannot be read: {error}. What lies in it may be damaged: put it back from a copy, "
            "or embed into another --output."
        ) from error


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # of lancedb and pyarrow
        raise FileError(
            f"Rows cannot be written to {folder}: {error}. What was written before stays, and the same command goes "
            "on from it."
        ) from error
