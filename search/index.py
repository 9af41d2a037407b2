"""Makes a large table of embeddings fast to search, and measures what that costs in recall.

    longclip-index DIR                  # after longclip-embed
    longclip-index DIR --compact        # after rows were added: merges small files, adds the new rows to the index

Below 50,000 rows every search compares with all of them, which is exact and fast enough. Above, an index is made
(LanceDB's IVF_PQ, on disk): its partitions and codes by the size of the table, then as many probes as recall@10 of at
least --recall needs, measured against exact search on a sample, also under a filter. Rows that are added later are
found without a new index.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from longclip_hf.command import CommandParser, consoles, guarded


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a table or settings that the user can mend."""
    parser = CommandParser(prog="longclip-index", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what longclip-embed wrote")
    parser.add_argument("--force", action="store_true", help="make an index below 50,000 rows too")
    parser.add_argument("--compact", action="store_true", help="merge small files, and add new rows to the index")
    parser.add_argument("--recall", type=_share, default=0.95, help="that is wanted at least, %(default)s")
    parser.add_argument(
        "--sample", type=int, default=100, metavar="N", help="queries that recall is measured with, %(default)s"
    )
    parser.add_argument("--partitions", type=int, metavar="N", help="default: one for 4,096 rows")
    parser.add_argument("--sub_vectors", type=int, metavar="N", help="bytes of a code; default: dimension / 8")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of a code's parts; default: 8")
    options = parser.parse_args(args)
    return guarded(lambda: run(options), lambda: "the table is as it was")


def run(options: Any) -> None:
    """Builds, compacts and measures.

    Raises:
        ValueError: for a folder without a table, or one that cannot be written.
        ImportError: without the extra `search`.
    """
    from longclip_hf.errors import FileError
    from longclip_hf.files import only_writer
    from longclip_hf.search.indexing import EXACT_BELOW, build, index_bytes, measure, plan
    from longclip_hf.search.lookup import read_indices, write_indices
    from longclip_hf.search.settings import Settings
    from longclip_hf.search.tables import open_lance

    out, err = consoles(options.quiet)
    folder: Path = options.folder
    settings = Settings.read(folder)
    with only_writer(folder):
        table = open_lance(folder)
        indices = read_indices(folder)
        rows = table.count_rows()
        if options.compact:
            files = table.stats()["fragment_stats"]["num_fragments"]
            try:
                table.optimize()
                table.optimize()  # files that were indexed apart are merged only now
            except (OSError, RuntimeError, ValueError) as error:
                raise FileError(f"{folder} cannot be compacted: {error}. The table is as it was.") from error
            left = table.stats()["fragment_stats"]["num_fragments"]
            out.print(f"{folder}: {files} files of rows are {left} now.", soft_wrap=True)
        elif rows < EXACT_BELOW and not options.force:
            out.print(
                f"{folder}: {rows:,} rows need no index: below {EXACT_BELOW:,}, search is exact.", soft_wrap=True
            )
            return
        for column in settings.vectors:
            if options.compact and column not in indices:
                continue
            index = indices.get(column)
            if index is None or not options.compact:
                index = plan(rows, settings.dim)
                given = {name: getattr(options, name) for name in ("partitions", "sub_vectors", "bits")}
                index = index.tuned(**{name: value for name, value in given.items() if value})
                began = time.perf_counter()
                build(table, column, index)
                out.print(
                    f"{column}: {rows:,} vectors of {settings.dim} in {index.partitions:,} partitions, codes of "
                    f"{index.sub_vectors} x {index.bits} bits, built in {time.perf_counter() - began:,.1f} s.",
                    soft_wrap=True,
                )
            say = err.print
            index = measure(table, column, index, target=options.recall, sample=options.sample, say=say)
            indices[column] = index
            write_indices(folder, indices)
            out.print(
                f"{column}: recall@10 {index.recall:.3f}, under a filter {index.filtered_recall:.3f}, at "
                f"{index.tuning.probes} probes and {index.tuning.refine} x 10 rows compared; "
                f"{index.milliseconds:,.1f} ms a search.",
                soft_wrap=True,
            )
            if min(index.recall, index.filtered_recall) < options.recall:
                out.print(
                    f"  less than {options.recall}: fewer --partitions, or more --sub_vectors, find more.",
                    soft_wrap=True,
                )
        if indices:
            out.print(f"The indices take {index_bytes(folder) / 1e6:,.1f} MB on disk.")


def _share(word: str) -> float:
    if not 0 < float(word) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {word}")
    return float(word)


if __name__ == "__main__":
    sys.exit(main())
