"""What rows are read from, and what stands in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_hf.errors import DataError, ImageError, LongCLIPError
from longclip_hf.image_files import IMAGE_SUFFIXES, Access, ImageFiles
from longclip_hf.images import decode_image

# The first is taken whatever else there is, the others where one alone is there.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "file_name", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "conversations")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow",
    ".tar": "webdataset",
}  # fmt: skip
_ANSWERS = frozenset({"gpt", "assistant"})


class BadRow(LongCLIPError):
    """One row that cannot be used."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause} ({detail})")
        self.cause = cause
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return type(self), (self.cause, self.detail)


@dataclass(frozen=True)
class Source:
    """Rows, undecoded: a `datasets.Dataset`, the names of its columns, and what an image column may name."""

    name: str
    rows: Any
    columns: Sequence[str]
    files: ImageFiles

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        return f"row {index} of {self.name}"


def open_source(
    name: str,
    *,
    split: str | None = None,
    config: str | None = None,
    image_root: str | None = None,
    image_access: Access = "root",
) -> Source:
    """Opens a folder, a file, a pattern of files or a Hub id.

    Raises:
        DataError: if it is not there or is nothing that is read here.
        ImportError: if `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Sources are read with the package `datasets`: pip install "longclip-hf[search]"') from error
    path = Path(name).expanduser()
    files = ImageFiles.of(str(path) if path.exists() else name, image_root, image_access)
    try:
        rows = _load(datasets, name, path, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{name} cannot be read by `datasets`: {type(cause).__name__}: {cause}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows and (split is not None or len(rows) > 1):
            raise DataError(f"{name} has no split {split!r}: name one of {', '.join(map(str, rows))}.")
        rows = rows[split or next(iter(rows))]
    elif split is not None:
        raise DataError(f"{name} has no splits, so there is no {split!r} in it: leave it out.")
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return Source(name, rows, rows.column_names, files)


def _load(datasets: Any, name: str, path: Path, config: str | None) -> Any:
    if path.is_file() and path.suffix.lower() not in _FORMATS:
        raise DataError(f"{name} is none of the files that are read here: {', '.join(_FORMATS)}.")
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(path))
    metadata = [path / file for file in METADATA if (path / file).is_file()]
    if path.is_dir() and not metadata:
        suffixes = {file.suffix.lower() for file in path.iterdir() if file.is_file()}
        if ".tar" in suffixes:
            return _of_files(datasets, [str(file) for file in sorted(path.glob("*.tar"))], ".tar")
        images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if images:
            return _beside(datasets, path, images)
    if metadata or path.is_file():
        file = metadata[0] if metadata else path
        return _of_files(datasets, [str(file)], file.suffix.lower())
    if "*" in name:
        return _of_files(datasets, [name], Path(name).suffix.lower())
    return datasets.load_dataset(str(path) if path.is_dir() else name, config)


def _of_files(datasets: Any, files: list[str], suffix: str) -> Any:
    options: dict[str, Any] = {}
    if _FORMATS.get(suffix) == "csv":  # "NA" is a caption
        options = {"keep_default_na": False, "encoding_errors": "replace", "sep": "\t" if suffix == ".tsv" else ","}
    rows = datasets.load_dataset(_FORMATS.get(suffix, "parquet"), data_files=files, **options)
    return rows["train"]


def _beside(datasets: Any, folder: Path, images: Sequence[Path]) -> Any:
    """Images, and the texts beside them if there are any."""
    columns: dict[str, list[str | None]] = {"image": [str(image.relative_to(folder)) for image in images]}
    texts = [image.with_suffix(".txt") for image in images]
    if any(text.is_file() for text in texts):
        columns["txt"] = [
            text.read_text(encoding="utf-8", errors="replace") if text.is_file() else None for text in texts
        ]
    return datasets.Dataset.from_dict(columns)


def field_of(row: Mapping[str, Any], column: str) -> Any:
    """`row[column]`, or what lies within a structure, `"json.caption"`, or None."""
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    return field_of(row[outer], inner) if inner and isinstance(row.get(outer), Mapping) else None


def texts_of(cell: Any, column: str) -> list[str]:
    """The captions in a cell: a text, a list of them, or the answers of a conversation. None is an empty list.

    Raises:
        DataError: if the cell holds something else.
    """
    if cell is None:
        return []
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "replace")
    if isinstance(cell, str):
        return [cell]
    if isinstance(cell, Mapping):  # as `datasets` before 4 gives lists of structures: a structure of lists
        cell = [dict(zip(cell, values, strict=False)) for values in zip(*cell.values(), strict=False)]
    if isinstance(cell, list):
        if cell and all(isinstance(part, Mapping) for part in cell):
            values = [part.get("value") for part in cell if part.get("from") in _ANSWERS]
            return [value for value in values[:1] if isinstance(value, str)]
        if all(part is None or isinstance(part, str) for part in cell):
            return [part or "" for part in cell]
    raise DataError(f"Column {column!r} must hold texts or lists of texts, found {type(cell).__name__}: {cell!r:.60}")


def read_image(value: Any, files: ImageFiles, max_pixels: int) -> Any:
    """Opens, checks and decodes an image, upright and in RGB.

    Args:
        value: a path, the bytes of a file, or the `{"bytes", "path"}` of an undecoded `datasets.Image`.
        files: what paths may name.
        max_pixels: of the largest image that is decoded.

    Raises:
        BadRow: if it is missing, unreadable, oversized or refused.
        DataError: if `value` is nothing of that kind.
    """
    name = "an image without a path"
    if isinstance(value, Mapping):
        name = value.get("path") or name
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        raise BadRow("missing", "no path is given")
    if not isinstance(value, str | bytes):
        raise DataError(f"The image column must hold images, files or paths, found {type(value).__name__}.")
    try:
        if isinstance(value, str):
            name, value = value, files.read(value)
        return decode_image(value, name, max_pixels)
    except ImageError as error:
        raise BadRow(error.cause, str(error)) from error
