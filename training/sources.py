"""The rows to train on and those held out, of one source or several; `longclip_hf/sources.py` opens them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from longclip_hf.cleaning import preparation
from longclip_hf.errors import DataError
from longclip_hf.rows import RowLog
from longclip_hf.sentences import first_sentence, released_first_sentence
from longclip_hf.sources import find_columns, kind_of, only, open_source
from longclip_hf.training.captions import CaptionRows, RowReader
from longclip_hf.training.heldout import first_of, good_ones, held_out, is_stream, keys_of, other_images
from longclip_hf.training.joined import Joined, JoinedReader, JoinedStream
from longclip_hf.training.settings import DataArguments
from longclip_hf.training.streams import CaptionStream

SETTINGS = ("--image_column", "--long_column", "--short_column")


def load_rows(
    data: DataArguments,
    *,
    transform: Callable[[Image.Image], Any] | None = None,
    image_side: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    log: Path | None = None,
) -> tuple[CaptionRows | CaptionStream, CaptionRows | None]:
    """The rows to train on, and those held out, less the bad ones among them.

    Held out are the first `heldout_rows` of their split, or with `heldout_shuffle` as many drawn from all of it. Other
    rows with one of their images are not trained on.

    Args:
        data: which rows, and how to read them.
        transform: applied to every image as it is read, such as `CaptionCollator.pixels`.
        image_side: of the images that the model sees, which `data.reduced_decoding` needs.
        seed: of the order of a stream, of the rows held out by `heldout_shuffle`, and of captions that are drawn. The
            order of a table is its sampler's affair.
        rank, world_size: this process and how many there are, for a stream. A table is divided by its sampler. The
            held-out rows are the same on every process.
        log: where bad rows are written down, such as `bad_rows.jsonl`; beside it, images of more than 8 bits.

    Raises:
        DataError: if the rows or columns that `data` names are not there.
        ImportError: if `datasets` is not installed.
    """
    rows, read, place_of = _open(data, data.train_split, transform, image_side, log)
    written = RowLog(log) if log is not None else None
    same = data.heldout_split in (None, data.train_split)
    others, read_heldout, heldout_place_of = (
        (rows, read, place_of) if same else _open(data, str(data.heldout_split), transform, image_side, log)
    )
    heldout, places, end = held_out(others, data, seed)
    keys = keys_of(heldout, places, read_heldout)
    train: CaptionRows | CaptionStream
    if is_stream(rows):
        begin = end if same else first_of(rows, 0)[1]
        if begin is not None:
            train = CaptionStream(
                rows, read, data.on_bad_row, begin=begin, heldout=keys, shuffle_buffer=data.shuffle_buffer, seed=seed,
                rank=rank, world_size=world_size, log=written,
            )  # fmt: skip
    else:
        left = other_images(rows, read, places if same else (), keys)
        begin = (0, 0) if len(left) else None
        train = CaptionRows(rows, read, data.on_bad_row, places=left, place_of=place_of, seed=seed, log=written)
    if begin is None:
        raise DataError(
            f"{data.data} has no rows in {data.train_split!r} beyond the {len(places)} held out: hold out fewer than "
            f"--heldout_rows {data.heldout_rows}, or rows of another --heldout_split."
        )
    if not len(places):
        return train, None
    if data.on_bad_row == "skip":
        # Decoded only: what the model would see of them is made again at every evaluation.
        checked = read_heldout.without_transform()
        places = good_ones(heldout, places, checked, heldout_place_of, written)
    return train, CaptionRows(heldout, read_heldout, "error", places=places, place_of=heldout_place_of, seed=seed)


def _open(
    data: DataArguments, split: str, transform: Callable[[Image.Image], Any] | None, side: int | None, log: Path | None
) -> tuple[Any, Any, Callable[[int], str]]:
    """Rows with images undecoded, what reads them, and where one of them stands, for errors."""
    opened, readers = [], []
    for number, name in enumerate([data.data, *(data.more_data or ())]):
        first = number == 0
        kind = data.data_format if first else "auto"
        if kind == "auto":
            kind = kind_of(Path(name).expanduser())
        source = open_source(
            name,
            kind,
            split=split,
            config=data.data_config if first else None,
            streaming=data.streaming or kind == "webdataset",
            image_root=data.image_root if first else None,
            image_access=data.image_access,
        )
        asked = (data.image_column, data.long_column, data.short_column)
        if not first:  # its columns may have other names
            there = {*source.columns}
            kept = [name if name and name.partition(".")[0] in there else None for name in asked]
            asked = (kept[0], kept[1], kept[2])
        columns = find_columns(source, asked[0], [asked[1]] if asked[1] else [], asked[2], SETTINGS)
        source = only(source, columns)
        opened.append(source)
        readers.append(
            RowReader(
                columns.image,
                columns.captions[0],
                columns.short,
                source.files,
                data.max_image_pixels,
                transform,
                side if data.reduced_decoding else None,
                first_sentence if data.first_sentence == "punctuation" else released_first_sentence,
                preparation(data.clean_captions, data.neutralise_special_tokens),
                RowLog(log.with_name("rescaled_images.jsonl")) if log is not None else None,
            )
        )
    if len(opened) == 1:
        return opened[0].rows, readers[0], opened[0].place
    streams = [source.is_stream for source in opened]
    if any(streams) and not all(streams):
        raise DataError(
            f"{opened[streams.index(False)].name} is a table and {opened[streams.index(True)].name} a stream: "
            "--streaming reads all of them as streams."
        )
    if all(streams):
        return JoinedStream([source.rows for source in opened]), JoinedReader(readers), opened[0].place
    joined = Joined(opened)
    return joined, JoinedReader(readers), joined.place
