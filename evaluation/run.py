"""Evaluates checkpoints side by side: retrieval, zero-shot classification, effective length.

    python evaluation/run.py MODEL [MODEL ...] --benchmark NAME [NAME ...] --data DIR
    python evaluation/run.py openai/clip-vit-base-patch16 long-clip tuned --benchmark urban1k --data downloads --html
    python evaluation/run.py tuned --benchmark photos --caption_column title   # images beside a metadata.jsonl
    accelerate launch evaluation/run.py ...                      # encoding divided among processes, the same figures

MODEL is a folder or a Hub id (ID@REVISION pins one) of any model that AutoModel loads and that has get_text_features
and get_image_features; a stock CLIP reads 77 tokens, and what it does not read is counted. The first one is what the
others are compared with.
"""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from longclip_hf.command import CommandParser, guarded, is_first_process
from longclip_hf.errors import BenchmarkError, EncodingError
from longclip_hf.image_files import Kind

if TYPE_CHECKING:
    from longclip_hf.evaluation.choice_data import Choices
    from longclip_hf.evaluation.data import Classification, LeftOut, Retrieval

EPILOG = """\
It writes to --output:
  results.json       every figure with its 95 % interval, and what it was measured on and with; after each model
  report.md, *.png   tables with differences to the first model; recall, effective length, token lengths
  report.csv, .tex   every figure in a row of its own; the tables for a paper
  report.html        with --html: all of it in one page, and the hardest misses as pictures
  features/          what was encoded: an interrupted run goes on, another metric encodes nothing again
  queries/           what each model gave query by query: models of later runs are compared with it in pairs
What earlier runs left there is joined: run again with another model or benchmark, and both stand in one report
(longclip-report does so for the results of several folders). Another model, data or definition under a name that is
there is an error, and so are files of these names that no evaluation wrote. A model that fails does not cost the
others: its error is printed and in results.json, and the exit code is 2. Of several processes a failure ends the run.
"""


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for models, data or settings that the user can mend."""
    from longclip_hf.evaluation.benchmarks import BENCHMARKS

    parser = CommandParser(prog="longclip-evaluate", description=__doc__, epilog=EPILOG)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--benchmark", nargs="+", required=True, metavar="NAME",
        help=f"{', '.join(BENCHMARKS)} (docs/benchmarks.md: where each is downloaded and how it lies below --data); "
        "or any source of images with captions, for retrieval: a folder, a file of JSON, CSV, parquet or tar, a Hub "
        "id; or a JSON file of choices, as of Winoground, SugarCrepe and ARO",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that the benchmarks' files were unpacked in")
    parser.add_argument("--output", type=Path, default=Path("evaluation-results"), metavar="DIR", help="%(default)s")
    parser.add_argument(
        "--replace", action="store_true", help="replace what earlier runs left in --output, instead of joining it"
    )
    parser.add_argument("--html", action="store_true", help="write report.html too")
    parser.add_argument(
        "--misses",
        type=_positive,
        default=6,
        metavar="N",
        help="misses shown of a model in each direction, %(default)s",
    )
    parser.add_argument(
        "--no_effective_length", action="store_true", help="do not encode captions again at 10, 20, 30 ... tokens"
    )
    parser.add_argument(
        "--sentences", action="store_true",
        help="encode captions again without their first sentence, with it last, with half of their sentences, and "
        "sentence by sentence (HiMo@K)",
    )  # fmt: skip
    source = parser.add_argument_group("a source of your own")
    source.add_argument("--image_column", metavar="NAME", help="default: the obvious one, which is said")
    source.add_argument(
        "--caption_column", nargs="+", metavar="NAME",
        help="of texts, lists or conversations; a dot leads into a structure; default: the obvious one, which is said",
    )  # fmt: skip
    source.add_argument(
        "--data_format", choices=get_args(Kind), default="auto", help="how to read it; default: as its layout says"
    )
    source.add_argument(
        "--image_root", metavar="DIR", help="where paths of images begin; default: --data, or beside the source"
    )
    source.add_argument(
        "--image_access", choices=("root", "local", "any"), default="root",
        help="images outside it: none, any file of this machine, or any address too; %(default)s",
    )  # fmt: skip
    source.add_argument(
        "--group_column", metavar="NAME",
        help="of what images that are alike share, such as frames of a film: intervals resample groups",
    )  # fmt: skip
    source.add_argument("--split", metavar="NAME", help="where there are several")
    source.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error",
        help="at a missing, unreadable, oversized or refused image, of named benchmarks too: end with an error, or "
        "leave the row out, count it and name it in bad_rows.jsonl; %(default)s",
    )  # fmt: skip
    classes = parser.add_argument_group("classification")
    classes.add_argument("--class_names", type=Path, metavar="FILE", help="lines of class<TAB>name")
    classes.add_argument("--templates", type=Path, metavar="FILE", help="one template with {} a line")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--clean_captions", action="store_true",
        help="clean texts as CLIP's original tokenizer does (ftfy, HTML entities); transformers' fast one does not",
    )  # fmt: skip
    how.add_argument(
        "--neutralise_special_tokens", action="store_true",
        help="read a literal <|endoftext|> within a text as words; as a token it hides what follows",
    )  # fmt: skip
    how.add_argument("--cache", type=Path, metavar="DIR", help="where features are kept; default: OUTPUT/features")
    how.add_argument("--device", help="default: an accelerator, if there is one")
    how.add_argument("--dtype", default="float32", help="of weights and computation, %(default)s")
    how.add_argument("--batch_tokens", type=_positive, metavar="N", help="of a batch of texts; default: by the device")
    how.add_argument("--batch_images", type=_positive, metavar="N", help="default: by the device")
    how.add_argument("--workers", type=int, metavar="N", help="processes that decode images; default: by the device")
    how.add_argument(
        "--resamples", type=_resamples, default=1000, metavar="N", help="of the bootstrap, from 100 on; %(default)s"
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap, %(default)s")
    how.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with a checkpoint, as AutoModel does"
    )
    given = sys.argv[1:] if args is None else args
    options = parser.parse_args(given)
    return guarded(
        lambda: run(options, shlex.join(["longclip-evaluate", *given])),
        lambda: "the same command goes on from what is encoded",
    )


def run(options: Any, command: str) -> None:
    """Evaluates every model on every benchmark; the main process writes and prints the report.

    Raises:
        ValueError: for a benchmark, checkpoint, image, caption or output folder that is not as it must be; at the end,
            where others could be evaluated.
        ImportError: naming the extra that is missing.
    """
    import transformers

    from longclip_hf.cleaning import clean_caption, preparation
    from longclip_hf.evaluation.collected import Collected
    from longclip_hf.evaluation.encoding import Encoder
    from longclip_hf.evaluation.feature_store import FeatureStore
    from longclip_hf.evaluation.loading import check_settings, find_device
    from longclip_hf.evaluation.outputs import Outputs
    from longclip_hf.evaluation.tables import markdown_table

    transformers.utils.logging.disable_progress_bar()
    # All that can be wrong with what was asked for, before hours of encoding.
    outputs = Outputs(options.output, options.html, options.replace, options.on_bad_row == "skip")
    _check_extras(options.html)
    if options.clean_captions:
        clean_caption("")  # needs ftfy
    prepare = preparation(options.clean_captions, options.neutralise_special_tokens)
    benchmarks, outputs.left_out = _load_benchmarks(options)
    names = display_names(options.models)
    find_device(options.device)
    for place in options.models:
        check_settings(*split_revision(place), options.trust_remote_code, options.dtype)

    done = Collected(options, command, outputs.earlier, names, alone=len(names) * len(benchmarks) == 1)
    for place, name in zip(options.models, names, strict=True):
        source, revision = split_revision(place)
        with done.failing(name):
            encoder = Encoder(
                source, revision, trust_remote_code=options.trust_remote_code, device=options.device,
                dtype=options.dtype, store=FeatureStore(options.cache or options.output / "features"),
                batch_tokens=options.batch_tokens, batch_images=options.batch_images, workers=options.workers,
                quiet=options.quiet, prepare=prepare,
            )  # fmt: skip
            done.begin(encoder, name)
            for asked, benchmark in zip(options.benchmark, benchmarks, strict=True):
                with done.failing(name, benchmark.name):
                    done.evaluate(encoder, name, asked, benchmark)
            del encoder  # its memory is the next one's
        if is_first_process() and done.scores and name != names[-1]:
            outputs.write_results(done.results())
    if is_first_process() and done.scores:
        results = done.results()
        outputs.write_results(results)
        outputs.write_all(results, done.store.read_misses(results) if options.html else (), options.misses)
        if not options.quiet:
            print(markdown_table(results))
            print(f"Wrote {', '.join(str(options.output / name) for name in outputs.written)}.")
    if done.failures:
        failed = ", ".join(f"{f.model}{f' on {f.benchmark}' if f.benchmark else ''}" for f in done.failures)
        rest = f"the other figures are in {options.output / 'results.json'}" if done.scores else "nothing was written"
        raise EncodingError(f"Not evaluated, for what is said above: {failed}; {rest}.")


def _load_benchmarks(options: Any) -> "tuple[list[Retrieval | Classification | Choices], LeftOut]":
    """What is evaluated on, and what was left out of it."""
    from longclip_hf.evaluation.benchmarks import BENCHMARKS, Columns, LeftOut, load_benchmark

    given = Columns(
        options.image_column, options.caption_column or (), options.split, options.image_root, options.image_access,
        options.data_format, options.group_column,
    )  # fmt: skip
    columns = None if given == Columns() else given
    left_out = LeftOut()
    if len({name.lower() for name in options.benchmark}) < len(options.benchmark):
        raise BenchmarkError(f"Name every benchmark once: {', '.join(options.benchmark)}.")
    # Of the classifications; where there is none, retrieval refuses them.
    names_and_templates = {"class_names": options.class_names, "templates": options.templates}
    known = {name: BENCHMARKS.get(name.lower()) for name in options.benchmark}
    whose = {name for name, entry in known.items() if entry and entry.kind == "classification"} or known.keys()
    benchmarks = []
    for name in options.benchmark:
        own = LeftOut(skip=options.on_bad_row == "skip")
        texts = names_and_templates if name in whose else {}
        benchmarks.append(load_benchmark(name, options.data, columns, left_out=own, **texts))
        left_out.rows += own.rows
    return benchmarks, left_out


def _check_extras(html: bool) -> None:
    """What is imported only after everything was encoded."""
    for package in ("matplotlib", *(("jinja2",) if html else ())):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'The report needs {package}: pip install "longclip-hf[evaluate]".')


# Names and versions


def split_revision(model: str) -> tuple[str, str | None]:
    """`ID@REVISION` in two; a folder may hold an @ in its name."""
    if Path(model).expanduser().is_dir() or "@" not in model:
        return model, None
    name, _, revision = model.rpartition("@")
    return name, revision


def display_names(models: Sequence[str]) -> list[str]:
    """What tables call each model: the name of its folder, or all of its path where another has the same name.

    Raises:
        ValueError: for a model given twice.
    """
    folders = [Path(model).expanduser() for model in models]
    places = [
        str(folder.resolve()) if folder.is_dir() else model for folder, model in zip(folders, models, strict=True)
    ]
    if twice := [model for model, place in zip(models, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"Given twice: {', '.join(twice)}. Name every model once.")
    short = [
        Path(place).name if folder.is_dir() else model
        for place, folder, model in zip(places, folders, models, strict=True)
    ]
    return [model if short.count(name) > 1 else name for model, name in zip(models, short, strict=True)]


def _positive(word: str) -> int:
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {word}")
    return int(word)


def _resamples(word: str) -> int:
    if int(word) < 100:
        raise argparse.ArgumentTypeError(f"must be 100 or more, or a 95 % interval has no ends; got {word}")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
