"""Files of rows that one bad row must not end: JSON in lines or as a list, tars, and images beside texts.

The library `datasets` reads these too, and gives up a whole file for a byte that is not UTF-8, for half of a surrogate
pair, for a caption that is a list where others are texts. Here every row is kept as it is written, and is looked at
when it is asked for: what is wrong with one is a `BadRow` in its place. The tables are `datasets`', mapped from disk,
so that any number of workers share one copy.
"""

import codecs
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longclip_hf.errors import DataError, JSONListError
from longclip_hf.image_files import IMAGE_SUFFIXES
from longclip_hf.json_list import json_entries
from longclip_hf.rows import BadRow

TEXT_SUFFIXES = (".txt", ".json")
_KEY = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # of webdataset: all extensions are the field's name
_PEEKED = 100
_JSON_COLUMNS = {"json": "string", "place": "string", "file": "string"}


def open_file(path: str) -> Any:
    """The bytes of a file or an address; `.gz` and `.zst` unpacked."""
    import fsspec

    return fsspec.open(path, "rb", compression="zstd" if path.endswith(".zst") else "infer")


# JSON


class JSONRows:
    """A table of objects of JSON, by index.

    Args:
        table: a `datasets.Dataset` with columns `json`, `place` and `file`.
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        self._texts = table.select_columns(["json"])  # a column costs as much as all the rest

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        """The object, or the `BadRow` that says why there is none."""
        row = parsed(self._texts[index]["json"], "")
        return parsed(self.table[index]["json"], self.place(index)) if isinstance(row, BadRow) else row

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        row = self.table[index]
        return f"{row['place']} of {row['file']}"


def parsed(text: str, place: str) -> Any:
    """An object of JSON, or the `BadRow` that says why it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("unreadable", f"{place} is not JSON: {error}")
    return value if isinstance(value, dict) else BadRow("unreadable", f"{place} is no object but {value!r:.40}")


def json_rows(files: Sequence[str], are_lists: bool = False) -> JSONRows:
    """Files of JSON in lines, or of one list each.

    Raises:
        JSONListError: for a list that is broken, or none where `are_lists` is set.
    """
    return JSONRows(_table(partial(_json_entries, are_lists), files, _JSON_COLUMNS))


def _json_entries(are_lists: bool, files: Sequence[str], stamps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for file in files:
        for place, text in _json_texts(file, are_lists):
            yield {"json": text, "place": place, "file": file}


def _json_texts(file: str, is_list: bool = False) -> Iterator[tuple[str, str]]:
    """With their places: lines are numbered from 1, as editors do, and the objects of a list likewise."""
    with open_file(file) as content:
        is_list |= content.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    with open_file(file) as content:
        if is_list:
            with io.TextIOWrapper(content, encoding="utf-8-sig", errors="replace") as text:
                for number, (_, written) in enumerate(json_entries(text, file), 1):
                    yield f"object {number}", written
            return
        # As bytes, whose lines end at \n alone: U+2028 and a lone \r can stand within a text.
        lines = io.BufferedReader(content) if file.endswith(".zst") else content  # zstandard's has no lines
        for number, line in enumerate(lines, 1):
            said = line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").strip()
            if said:
                yield f"line {number}", said


def folder_rows(folder: Path, images: Sequence[Path]) -> JSONRows:
    """Images with texts beside them (`a.jpg`, `a.txt`, `a.json`), as img2dataset writes folders."""
    names = sorted(str(image.relative_to(folder)) for image in images)
    return JSONRows(_table(partial(_beside, str(folder)), names, _JSON_COLUMNS, folder))


def _beside(folder: str, files: Sequence[str], stamps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for name in files:
        row: dict[str, Any] = {"image": name}
        for suffix in TEXT_SUFFIXES:
            file = Path(folder, name).with_suffix(suffix)
            if file.is_file():
                text = file.read_text(encoding="utf-8", errors="replace")
                value: Any = text
                if suffix == ".json":
                    value = parsed(text, str(file))
                    value = None if isinstance(value, BadRow) else value
                row[suffix[1:]] = value
        yield {"json": json.dumps(row), "place": name, "file": folder}


# Tars


@dataclass(frozen=True)
class FileStream:
    """Rows of files that are read from their beginning, each a shard.

    Args:
        files: paths or addresses.
        read: the rows of one of them, in order.
    """

    files: Sequence[str]
    read: Callable[[str], Iterator[Any]]

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def shard_name(self, shard: int) -> str:
        return self.files[shard]

    def read_shard(self, shard: int) -> Iterator[Any]:
        return self.read(self.files[shard])


def json_stream(files: Sequence[str]) -> FileStream:
    """Files of JSON, one row after the other."""
    return FileStream(files, _json_objects)


def _json_objects(file: str) -> Iterator[Any]:
    return (parsed(text, f"{place} of {file}") for place, text in _json_texts(file))


def tar_stream(files: Sequence[str]) -> FileStream:
    """Tars of webdataset, one row after the other."""
    return FileStream(files, _tar_rows)


def _tar_rows(file: str) -> Iterator[dict[str, Any]]:
    with open_file(file) as content, tarfile.open(fileobj=content, mode="r|") as tar:
        key: str | None = None
        row: dict[str, Any] = {}
        for member, name, extension in _members(tar):
            if name != key and row:
                yield {**row, "__key__": key, "__url__": file}
                row = {}
            key = name
            data = tar.extractfile(member)
            assert data is not None
            row[extension] = _value(extension, data.read(), f"{name}.{extension} in {file}")
        if row:
            yield {**row, "__key__": key, "__url__": file}


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    for member in tar:
        match = _KEY.match(member.name) if member.isfile() else None
        if match is not None:
            yield member, match[1], match[2].lower()


def _value(extension: str, data: bytes, place: str) -> Any:
    if extension.endswith("json"):
        return parsed(data.decode("utf-8", "replace"), place)
    return {"bytes": data, "path": place.partition(" in ")[0]} if f".{extension}" in IMAGE_SUFFIXES else data


class TarRows:
    """A table of the rows in tars, which stay where they are: an index of what lies where.

    Args:
        table: a `datasets.Dataset` with columns `key`, `file` and `members`, the place and size of each part.
    """

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        parts = {
            name: _value(name, read_part(row["file"], *where), f"{row['key']}.{name} in {row['file']}")
            for name, where in json.loads(row["members"]).items()
        }
        return {**parts, "__key__": row["key"], "__url__": row["file"]}

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        row = self.table[index]
        return f"{row['key']} in {row['file']}"

    def sizes(self, column: str) -> Iterator[int]:
        """The bytes of one part of every row, or -1 where there is none."""
        return (json.loads(members).get(column, (0, -1))[1] for members in self.table["members"])


def tar_rows(files: Sequence[str]) -> TarRows:
    """Tars of webdataset on this machine.

    Raises:
        DataError: for a tar that breaks off or is compressed.
    """
    return TarRows(_table(_tar_entries, files, {"key": "string", "file": "string", "members": "string"}))


def _tar_entries(files: Sequence[str], stamps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for file in files:
        rows: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(file, "r:") as tar:
                for member, name, extension in _members(tar):
                    rows.setdefault(name, {})[extension] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise DataError(f"{file} breaks off or is no uncompressed tar: {error}. Fetch or unpack it.") from error
        for key, members in rows.items():
            yield {"key": key, "file": file, "members": json.dumps(members)}


def read_part(file: str, offset: int, size: int) -> bytes:
    """A part of a tar."""
    with Path(file).open("rb") as content:
        content.seek(offset)
        return content.read(size)


def peek(rows: Any) -> list[str]:
    """The names of the columns of the first rows of such a table or stream, in their order."""
    if isinstance(rows, FileStream):
        first = [row for row, _ in zip(rows.read_shard(0), range(_PEEKED), strict=False)]
    else:
        first = [rows[index] for index in range(min(len(rows), _PEEKED))]
    names: dict[str, None] = {}
    for row in first:
        if isinstance(row, Mapping):
            names.update(dict.fromkeys(row))
    if not names and first:
        raise DataError(f"None of the first {len(first)} rows can be read: {first[0]}.")
    return list(names)


def _table(entries: Any, files: Sequence[str], columns: Mapping[str, str], folder: Path | None = None) -> Any:
    """A `datasets.Dataset`, made once: its name holds what the files' sizes and times are."""
    import datasets

    paths = [Path(folder, file) if folder else Path(file) for file in files]
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None for path in paths]
    try:
        return datasets.Dataset.from_generator(
            entries,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()}),
            gen_kwargs={"files": list(files), "stamps": stamps},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, JSONListError | DataError):
            raise error.__cause__ from None
        raise DataError(f"{files[0]} cannot be read: {error.__cause__ or error}.") from error
