"""Embeds images and texts of any source into a table that can be searched.

    longclip-embed SOURCE --model MODEL --output DIR
    longclip-embed photos --model long-clip --output photos.index            # a folder; captions are not needed
    longclip-embed products.csv --model long-clip --output products.index --image_root photos
    longclip-embed texts.parquet --model long-clip --output texts --embed texts --format npy

SOURCE is a folder of images, a folder that img2dataset wrote, a CSV, JSON or parquet file, tars of webdataset, or a
Hub id. A run that was interrupted, or killed, goes on with the same command, and so does one whose source has grown.
Another source can be added to the same --output.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, consoles, guarded
from longclip_hf.errors import SearchError

if TYPE_CHECKING:
    from longclip_hf.search.embedding import Report

EPILOG = """\
It writes to --output:
  rows.lance        one row for each of the source: source, row (its number there), location (path or URL of the
                    image), text, tokens, image_vector and text_vector (of unit length), thumbnail, all other columns
  longclip.json     the model, its fingerprint and length, and how it was embedded
  bad_rows.jsonl    what could not be read, with its cause; the next run tries again
"""


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a model, data or settings that the user can mend."""
    parser = CommandParser(prog="longclip-embed", description=__doc__, epilog=EPILOG)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--model", required=True, help="a folder or a Hub id (ID@REVISION pins one)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--format", choices=("lance", "parquet", "npy"), default="lance",
        help="parquet: parts with all columns; npy: img_emb/, text_emb/ and metadata/, as clip-retrieval, autofaiss "
        "and faiss read them; %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("float16", "float32"), default="float16", help="of the vectors as kept, %(default)s"
    )
    source = parser.add_argument_group("the source")
    source.add_argument(
        "--embed", nargs="+", choices=("images", "texts"), default=["images", "texts"],
        help="default: both, as far as there are columns of them",
    )  # fmt: skip
    source.add_argument("--image_column", metavar="NAME", help="default: the obvious one")
    source.add_argument("--caption_column", metavar="NAME", help="default: the obvious one")
    source.add_argument("--columns", nargs="*", metavar="NAME", help="other columns that are carried; default: all")
    source.add_argument(
        "--thumbnails", choices=("needed", "all", "none"), default="needed",
        help="kept of images that have no file of their own, of all, or of none; %(default)s",
    )  # fmt: skip
    source.add_argument("--split", metavar="NAME", help="where there are several")
    source.add_argument("--config", metavar="NAME", help="of a Hub data set that has several")
    source.add_argument("--image_root", metavar="DIR", help="where paths of images begin; default: beside the source")
    source.add_argument(
        "--image_access", choices=("root", "local", "any"), default="root",
        help="images outside it: none, any file of this machine, or any address too; %(default)s",
    )  # fmt: skip
    source.add_argument("--clean_captions", action="store_true", help="as CLIP's original tokenizer does")
    source.add_argument(
        "--neutralise_special_tokens", action="store_true",
        help="read a literal <|endoftext|> within a text as words; as a token it hides what follows",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--device", help="default: an accelerator, if there is one")
    how.add_argument("--dtype", default="float32", help="of weights and computation, %(default)s")
    how.add_argument("--batch_tokens", type=_positive, metavar="N", help="of a batch of texts; default: by the device")
    how.add_argument("--batch_images", type=_positive, metavar="N", help="default: by the device")
    how.add_argument("--workers", type=int, metavar="N", help="processes that read images; default: by the device")
    how.add_argument(
        "--chunk_rows", type=_positive, metavar="N",
        help="rows that are written together, and what a killed run loses at most; default: 256 on a CPU, else 8192",
    )  # fmt: skip
    how.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with a checkpoint, as AutoModel does"
    )
    options = parser.parse_args(args)
    return guarded(lambda: run(options), lambda: "the same command goes on from what was written")


def run(options: Any) -> "Report":
    """Embeds and says what became of the rows.

    Raises:
        ValueError: for a source, checkpoint or output folder that is not as it must be.
        ImportError: naming the extra that is missing.
    """
    import transformers

    from longclip_hf.cleaning import clean_caption, preparation
    from longclip_hf.evaluation.encoding import Encoder
    from longclip_hf.evaluation.loading import check_settings, find_device
    from longclip_hf.evaluation.run import split_revision
    from longclip_hf.files import only_writer
    from longclip_hf.images import MAX_PIXELS
    from longclip_hf.search.embedding import embed_rows
    from longclip_hf.search.progress import progress
    from longclip_hf.search.settings import FILE, Settings
    from longclip_hf.search.source_rows import absolute, open_rows
    from longclip_hf.search.tables import open_table

    transformers.utils.logging.disable_progress_bar()
    # All that can be wrong with what was asked for, before the model is loaded.
    output: Path = options.output
    if output.exists() and not output.is_dir():
        raise SearchError(f"{output} is a file, and a folder is to be written. Name another --output.")
    if output.is_dir() and any(output.iterdir()) and not (output / FILE).is_file():
        raise SearchError(f"{output} holds other files and no embeddings (no {FILE}). Name another --output.")
    find_device(options.device)
    place, revision = split_revision(options.model)
    check_settings(place, revision, options.trust_remote_code, options.dtype)
    if options.clean_captions:
        clean_caption("")  # needs ftfy
    rows = open_rows(
        options.source, image=options.image_column, caption=options.caption_column, embed=options.embed,
        columns=options.columns, split=options.split, config=options.config, image_root=options.image_root,
        image_access=options.image_access, max_pixels=MAX_PIXELS, thumbnails=options.thumbnails,
        prepare=preparation(options.clean_captions, options.neutralise_special_tokens),
    )  # fmt: skip
    if output.is_dir():
        open_table(output, options.format)  # what is damaged is said now
    encoder = Encoder(
        place, revision, trust_remote_code=options.trust_remote_code, device=options.device, dtype=options.dtype,
        batch_tokens=options.batch_tokens, batch_images=options.batch_images, workers=options.workers, quiet=True,
    )  # fmt: skip
    if encoder.processes.num_processes > 1:
        raise SearchError("Several processes would write the same rows: start longclip-embed once.")
    vectors = [name for name, column in (("image_vector", rows.image), ("text_vector", rows.caption)) if column]
    dim = encoder.encode_texts(["a"]).embeds.shape[1]
    asked = Settings(
        absolute(place), encoder.revision, encoder.fingerprint, encoder.positions, dim, encoder.dtype,
        options.precision, tuple(vectors),
        options.chunk_rows or (256 if encoder.device.type == "cpu" else 8192), options.clean_captions,
        options.neutralise_special_tokens, options.format,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    with only_writer(output):
        settings = _settings(asked, output, given_chunk=options.chunk_rows is not None)
        said = _BadRows(output / "bad_rows.jsonl", rows.name)
        began = time.perf_counter()
        with progress(options.source, len(rows), options.quiet) as advance:
            report = embed_rows(
                encoder, rows, open_table(output, options.format), settings, advance=advance, bad_row=said.add
            )
        said.write()
    _say(report, options, time.perf_counter() - began)
    if not report.added + report.present:
        raise SearchError(f"None of the {len(rows)} rows of {options.source} can be used; see {said.file}.")
    return report


def _settings(asked: Any, output: Path, given_chunk: bool) -> Any:
    """Those of the folder, which must be what was asked for, or else those that it gets."""
    from dataclasses import replace

    from longclip_hf.search.settings import FILE, Settings

    if not (output / FILE).is_file():
        asked.write(output)
        return asked
    there = Settings.read(output)
    there.check_same(asked if given_chunk else replace(asked, chunk_rows=there.chunk_rows), output)
    if more := [name for name in asked.vectors if name not in there.vectors]:
        raise SearchError(
            f"The table in {output} has no {more[0]}: embed only its kind (--embed), or name another --output."
        )
    return there


class _BadRows:
    """`bad_rows.jsonl`: written as rows are met, and made anew at the end, without those that are good by now."""

    def __init__(self, file: Path, source: str) -> None:
        self.file = file
        self.source = source
        self.lines: list[str] = []

    def add(self, row: Any) -> None:
        line = {"source": self.source, "row": row.number, "place": row.place}
        self.lines.append(json.dumps({**line, "cause": row.bad.cause, "detail": row.bad.detail}))
        with self.file.open("a", encoding="utf-8") as file:
            file.write(self.lines[-1] + "\n")

    def write(self) -> None:
        from longclip_hf.files import write_atomically

        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else ():
            try:
                if json.loads(line)["source"] != self.source:
                    kept.append(line)
            except (ValueError, KeyError):  # half a line of a run that was killed
                continue
        if kept or self.lines:
            write_atomically(self.file, "".join(f"{line}\n" for line in [*kept, *self.lines]).encode())
        else:
            self.file.unlink(missing_ok=True)


def _say(report: "Report", options: Any, seconds: float) -> None:
    out, _ = consoles(options.quiet)
    rate = f", {report.added / seconds:,.1f} a second" if report.added else ""
    before = f", {report.present:,} were there" if report.present else ""
    out.print(f"{options.output}: {report.added:,} rows of {options.source} added{rate}{before}.", soft_wrap=True)
    for note, count in report.notes.items():
        if count:
            out.print(f"  {note}: {count:,}", soft_wrap=True)
    if report.bad:
        causes = Counter(row.bad.cause for row in report.bad if row.bad is not None)
        named = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        lines = [f"{len(report.bad)} bad rows: {named}; {options.output / 'bad_rows.jsonl'} names them:"]
        lines += [f"  {row.place}: {row.bad}" for row in report.bad[:10]]
        print("\n".join(lines), file=sys.stderr)


def _positive(word: str) -> int:
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {word}")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
