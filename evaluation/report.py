"""Renders the results of any runs as one report: Markdown, CSV, LaTeX, plots, and with --html a page.

    python evaluation/report.py A/results.json B/results.json --output DIR
    python evaluation/report.py runs/one runs/two runs/three --output DIR --html        # folders of evaluations

Models and benchmarks stand side by side, the first model of the first file is what the others are compared with. The
differences have paired intervals where the folders have what each model gave query by query (`queries/`).
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_hf.command import CommandParser, guarded
from longclip_hf.errors import FileError

if TYPE_CHECKING:
    from longclip_hf.results import Results

PROGRAM = "longclip-report"

EPILOG = """\
Models, or benchmarks, that have one name and are not the same (other weights, data or definitions) are never mixed:
each has the beginning of its fingerprint behind its name, and that is said. Results whose texts were prepared
differently (--clean_captions, --neutralise_special_tokens) are refused. Nothing is encoded, and no file that is given
is changed unless it lies in --output.
"""


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for files or settings that the user can mend."""
    parser = CommandParser(prog=PROGRAM, description=__doc__, epilog=EPILOG)
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="results.json, or the folder it is in")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the report is written")
    parser.add_argument("--html", action="store_true", help="write report.html too")
    parser.add_argument("--misses", type=int, default=6, metavar="N", help="shown of a model, if kept; %(default)s")
    parser.add_argument("--reference", metavar="MODEL", help="what the others are compared with; default: the first")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap, %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap, %(default)s")
    given = sys.argv[1:] if args is None else args
    options = parser.parse_args(given)
    return guarded(lambda: render(options, shlex.join([PROGRAM, *given])))


def render(options: Any, command: str) -> None:
    """Reads, joins and writes.

    Raises:
        ResultsError: for a file that is no results, or files that cannot stand together.
        FileError: if `--output` has other results, or files that no evaluation wrote.
        ImportError: naming the extra that is missing.
    """
    from longclip_hf.evaluation.joining import join, told_apart, with_differences, with_reference
    from longclip_hf.evaluation.outputs import RESULTS, Outputs
    from longclip_hf.evaluation.query_store import FOLDER, QueryStore
    from longclip_hf.evaluation.scores import Bootstrap
    from longclip_hf.evaluation.tables import markdown_table
    from longclip_hf.results import read_results

    files = [file / RESULTS if file.is_dir() else file for file in options.results]
    parts, said = told_apart([read_results(file) for file in files])
    outputs = Outputs(options.output, options.html)
    joined = join(parts)
    if outputs.earlier is not None and (lost := _measured(outputs.earlier) - _measured(joined)):
        raise FileError(
            f"{options.output / RESULTS} has {len(lost)} figures of models on benchmarks that none of the given files "
            "has, and they would be lost: give it too, or name another --output."
        )
    for line in said:
        print(line, file=sys.stderr)
    if options.reference:
        joined = with_reference(joined, options.reference)
    store = QueryStore(*(file.parent / FOLDER for file in files))
    joined = with_differences(joined, store, Bootstrap(options.resamples, options.seed))
    outputs.write_results(joined)
    outputs.write_all(joined, store.read_misses(joined) if options.html else (), options.misses)
    if not options.quiet:
        print(markdown_table(joined))
        print(f"Wrote {', '.join(str(options.output / name) for name in outputs.written)}.")


def _measured(results: "Results") -> set[tuple[str, str]]:
    """What was measured on what, by fingerprints: names can be changed."""
    models = {model.name: model.fingerprint for model in results.models}
    benchmarks = {info.name: info.fingerprint for info in results.benchmarks}
    return {(models[score.model], benchmarks[score.benchmark]) for score in results.scores}


if __name__ == "__main__":
    sys.exit(main())
