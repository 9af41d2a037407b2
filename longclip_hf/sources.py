"""Any source of images with captions -> its rows and its columns: one reader, of training, evaluation and search.

What a source is, its layout says (`kind_of`). Columns are guessed where there is one obvious answer. Files of JSON,
tars and images beside texts are `row_files.py`'s, everything else is opened by the library `datasets`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longclip_hf.errors import DataError
from longclip_hf.image_files import IMAGE_SUFFIXES, Access, ImageFiles, Kind
from longclip_hf.row_files import (
    JSONRows,
    TarRows,
    folder_rows,
    json_rows,
    json_stream,
    peek,
    tar_rows,
    tar_stream,
)

# The first is taken whatever else there is, the others where one alone is there.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "file_name", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "conversations")
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
_SUFFIXES: dict[str, Kind] = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset",
}  # fmt: skip
_PACKED = (".gz", ".zst")
_TEXTS = (".jsonl", ".csv", ".tsv")
METADATA = (*(f"metadata{text}{packed}" for text in _TEXTS for packed in ("", *_PACKED)), "metadata.parquet")


@dataclass(frozen=True)
class Source:
    """Rows, undecoded.

    Args:
        name: what the user called it.
        kind: what it is.
        rows: a table by index, which has a length (a `datasets.Dataset`, `JSONRows` or `TarRows`), or a stream with
            `num_shards` (a `datasets.IterableDataset` or a `FileStream`).
        columns: their names.
        files: what an image column may name.
    """

    name: str
    kind: Kind
    rows: Any
    columns: Sequence[str]
    files: ImageFiles

    @property
    def is_stream(self) -> bool:
        return not hasattr(self.rows, "__len__")

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        return self.rows.place(index) if isinstance(self.rows, JSONRows | TarRows) else f"row {index} of {self.name}"


def open_source(
    source: str,
    kind: Kind = "auto",
    *,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    image_root: str | Path | None = None,
    image_access: Access = "root",
    captions: bool = True,
) -> Source:
    """Opens a folder, a file, a pattern of files, an address or a Hub id.

    Args:
        source: which.
        kind: how to read it; by default as its layout says.
        split: or None, where there is only one.
        config: of a Hub dataset that has several.
        streaming: rows as they come, instead of a table.
        image_root, image_access: see `ImageFiles`.
        captions: whether a folder of images without any is an error.

    Raises:
        DataError: if it is not there, is nothing that is read here, or has another layout than it seems, with the
            remedy.
        ImportError: if `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Sources are read with the package `datasets`, of the extras "train", "evaluate" and "search": '
            'pip install "longclip-hf[train]"'
        ) from error
    path = Path(source).expanduser()
    place = str(path) if path.exists() else source
    if kind == "auto":
        kind = kind_of(path, captions)
    home: str | Path | None = image_root
    if kind == "sharegpt4v" and not path.is_file():
        raise DataError(f"There is no file {path}; sharegpt4v needs its JSON file.")
    if image_root is not None and "://" not in str(image_root) and not Path(image_root).expanduser().is_dir():
        raise DataError(f"--image_root {image_root} is not a folder.")
    if kind == "imagefolder":
        file = _metadata(path, split)
        home, split = image_root or file.parent, None
        source_of_rows, kind_of_rows = str(file), _SUFFIXES[_suffix(file)]
    else:
        source_of_rows, kind_of_rows = place, kind
    if kind_of_rows in ("json", "sharegpt4v", "webdataset", "pairs"):
        _only_train(source, split)
        rows = _own(path, source_of_rows, kind_of_rows, streaming)
    else:
        rows = _of_datasets(datasets, source, source_of_rows, kind_of_rows, split, config, streaming)
    columns = list(rows.column_names or ()) if hasattr(rows, "column_names") else peek(rows)
    if not columns and hasattr(rows, "shard"):  # a stream of `datasets` that does not know its columns
        columns = list(next(iter(rows), {}))
    files = ImageFiles.of(place, home, image_access)
    return Source(source, kind, rows, columns, files)


def kind_of(path: Path, captions: bool = True) -> Kind:
    """What a source is, by its layout; what is not on this machine is left to `datasets`.

    Args:
        path: of it.
        captions: whether a folder of images without any is an error.

    Raises:
        DataError: for what is nothing that is read here, or has no captions, with the remedy.
    """
    if not path.is_dir():
        suffix = _suffix(path)
        if path.is_file() and suffix not in _SUFFIXES:
            raise DataError(f"{path} is none of the files that are read here: {', '.join(_SUFFIXES)}.")
        named = path.is_file() or "*" in str(path) or ":/" in str(path)  # of an address, `Path` leaves one slash
        return _SUFFIXES.get(suffix, "datasets") if named else "datasets"
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "datasets"
    splits = [entry for entry in path.iterdir() if entry.is_dir() and entry.name.lower() in SPLITS]
    if any((folder / name).is_file() for folder in (path, *splits) for name in METADATA):
        return "imagefolder"
    suffixes = {_suffix(file) for file in path.iterdir() if file.is_file()}
    if ".tar" in suffixes:  # of img2dataset too, beside its tables of what was downloaded
        return "webdataset"
    images = _images(path)
    if images and any(image.with_suffix(".txt").is_file() for image in images):
        return "pairs"
    if suffixes & (_SUFFIXES.keys() - {".json"}):
        return "datasets"
    if images and captions:
        raise DataError(_without_captions(path, images))
    return "pairs" if images else "datasets"


def _without_captions(path: Path, images: Sequence[Path]) -> str:
    folders = {image.parent for image in images}
    line = '{"file_name": "' + str(images[0].relative_to(path)) + '", "caption": "..."}'
    if len(folders) > 1 and path not in folders:
        return (
            f"{path} holds {len(images)} images in {len(folders)} folders, such as classes, and no captions. Write a "
            f"metadata.jsonl into it with a line {line} for each image; folders of classes are read for zero-shot "
            "classification: --benchmark imagefolder --data DIR."
        )
    return (
        f"{path} holds {len(images)} images and no captions. Write a metadata.jsonl into it with a line {line} for "
        "each image, or a text file beside each, with its name and .txt."
    )


def _images(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in _PACKED else path).suffix.lower()


def _metadata(path: Path, split: str | None) -> Path:
    """The file of a split's captions."""
    here = [path / name for name in METADATA if (path / name).is_file()]
    splits: dict[str, list[Path]] = {}
    below: dict[str, Path] = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.is_dir() and entry.name.lower() in SPLITS:
            below[SPLITS[entry.name.lower()]] = entry
            if files := [entry / name for name in METADATA if (entry / name).is_file()]:
                splits[SPLITS[entry.name.lower()]] = files
    if here and len(below) > 1:
        raise DataError(
            f"{here[0]} stands above the folders {', '.join(entry.name for entry in below.values())}: nothing says "
            "which of its rows belong to which split. Put a metadata.jsonl into each of them, with the names of its "
            "own images."
        )
    if here:
        _only_train(str(path), split)
        return here[0]
    if not splits:
        raise DataError(f"There is no metadata.jsonl in {path}, nor .csv, .tsv or .parquet of that name.")
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))[0]
    wanted = SPLITS.get(split or "", split)
    if wanted not in splits:
        raise DataError(f"{path} has no split {split!r}: name one of {', '.join(splits)}.")
    return splits[wanted][0]


def _only_train(source: str, split: str | None) -> None:
    if split not in (None, "train"):
        raise DataError(f"{source} has no splits, so there is no {split!r} in it: leave it out.")


def _own(path: Path, source: str, kind: Kind, streaming: bool) -> Any:
    if kind == "pairs":
        return folder_rows(path, _images(path))
    suffixes = (".tar",) if kind == "webdataset" else tuple(s for s, of in _SUFFIXES.items() if of == "json")
    files = _expanded(source, suffixes)
    if kind == "webdataset":
        return tar_stream(files) if streaming else tar_rows(files)
    return json_stream(files) if streaming else json_rows(files, kind == "sharegpt4v")


def _expanded(source: str, suffixes: Sequence[str]) -> list[str]:
    """The files of a folder, a pattern or an address, in the order of their names."""
    path = Path(source)
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if _suffix(file) in suffixes and file.is_file())
    elif path.is_file():
        return [source]
    else:
        import fsspec

        files = [file.full_name for file in fsspec.open_files(source)]
    if not files:
        raise DataError(f"{source} holds no files that end in {' or '.join(suffixes)}.")
    return files


def _of_datasets(
    datasets: Any, name: str, source: str, kind: Kind, split: str | None, config: str | None, streaming: bool
) -> Any:
    path = Path(source)
    try:
        if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(source)
        elif kind == "datasets":
            rows = datasets.load_dataset(source, config, streaming=streaming)
        else:
            options: dict[str, Any] = {}
            if kind in ("csv", "tsv"):  # "NA" is a caption, and bytes that are not UTF-8 are U+FFFD
                options = {
                    "keep_default_na": False,
                    "encoding_errors": "replace",
                    "sep": "," if kind == "csv" else "\t",
                }
            files = {"data_dir": source} if path.is_dir() else {"data_files": source}
            reader = "csv" if kind == "tsv" else kind
            rows = datasets.load_dataset(reader, config, streaming=streaming, **files, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{name} cannot be read by `datasets`: {type(cause).__name__}: {cause}") from error
    if isinstance(rows, dict):  # DatasetDict, IterableDatasetDict
        if split not in rows and (split is not None or len(rows) > 1):
            raise DataError(f"{name} has no split {split!r}: name one of {', '.join(map(str, rows))}.")
        rows = rows[split or next(iter(rows))]
    else:
        _only_train(name, split)
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


# Columns


@dataclass(frozen=True)
class Columns:
    """Where a source keeps what.

    Args:
        image: of images, encoded images, or paths.
        captions: one column or several, of texts, lists of texts, or conversations.
        short: of short captions, or None.
    """

    image: str
    captions: Sequence[str]
    short: str | None = None


def find_columns(
    source: Source,
    image: str | None,
    captions: Sequence[str],
    short: str | None = None,
    settings: tuple[str, str, str] = ("--image_column", "--caption_column", "--short_column"),
) -> Columns:
    """The columns asked for, and guessed where none is.

    Args:
        source: whose.
        image, captions, short: as asked for; None or empty to guess. A dot leads into a structure: `meta.caption`.
        settings: what errors call the three.

    Raises:
        DataError: for a column that is not there, or no obvious guess, with those that are there.
    """
    there = source.columns

    def find(column: str, setting: str) -> str:
        if column in there or column.partition(".")[0] in there:
            return column
        if column == "image" and "file_name" in there:  # what `datasets` calls it
            return "file_name"
        raise DataError(
            f"{source.name} has no column {column!r} but {', '.join(there)}: name the right one with {setting}."
        )

    def guess(names: Sequence[str], what: str, setting: str) -> str:
        found = [name for name in names if name in there]
        if found[:1] == [names[0]] or len(found) == 1:
            return found[0]
        said = f"may have its {what} in {' or '.join(found)}" if found else f"has no obvious column of {what}"
        raise DataError(f"{source.name} {said}; its columns are {', '.join(there)}: name one with {setting}.")

    return Columns(
        find(image, settings[0]) if image else guess(IMAGE_COLUMNS, "images", settings[0]),
        [find(column, settings[1]) for column in captions] or [guess(CAPTION_COLUMNS, "captions", settings[1])],
        find(short, settings[2]) if short else None,
    )


def only(source: Source, columns: Columns, also: Sequence[str] = ()) -> Source:
    """`source` without the columns other than these and `also`, where leaving them out saves reading them."""
    if not hasattr(source.rows, "select_columns"):
        return source
    wanted = [columns.image, *columns.captions, *([columns.short] if columns.short else []), *also]
    names = [name if name in source.columns else name.partition(".")[0] for name in wanted]
    kept = list(dict.fromkeys([*names, *(name for name in ("__key__", "__url__") if name in source.columns)]))
    return replace(source, rows=source.rows.select_columns(kept), columns=kept)
