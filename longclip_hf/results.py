"""results.json: what an evaluation measured, and of what. The table, the plots, the page and the card all read it."""

import json
import math
import re
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from longclip_hf.errors import ResultsError
from longclip_hf.files import write_atomically

FORMAT = 1

Direction = Literal["i2t", "t2i"]
DIRECTIONS: dict[Direction, str] = {"i2t": "Image to text", "t2i": "Text to image"}

# Every metric there is, in the order of the tables.
METRICS: dict[str, str] = {
    **{
        f"{key}_{metric}": f"{direction}, {name}"
        for key, direction in DIRECTIONS.items()
        for metric, name in {
            "r1": "R@1",
            "r5": "R@5",
            "r10": "R@10",
            "map": "mAP",
            "median_rank": "median rank",
            "mean_rank": "mean rank",
            "r1_first_dropped": "R@1 without the first sentence",
            "r1_first_moved": "R@1 with the first sentence last",
            "r1_half_drawn": "R@1 of half of the sentences",
        }.items()
    },
    "himo": "HiMo@K",
    "himo_rises": "HiMo@K, sentences that raise the similarity",
    "text_score": "Text score",
    "image_score": "Image score",
    "group_score": "Group score",
    "choice": "Right caption chosen",
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "mean_per_class_recall": "Mean per-class recall",
}


def is_rank(metric: str) -> bool:
    """Whether a metric counts from 1, the lower the better."""
    return metric.endswith("_rank")


def is_share(metric: str) -> bool:
    """Whether a metric lies within 0 ... 1, the higher the better. Beside ranks there is HiMo@K, a correlation within
    -1 ... 1."""
    return not is_rank(metric) and metric != "himo"


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval; `low` and `high` are None where one query or image has none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Model:
    name: str  # unique; the other tables refer to it
    revision: str | None  # a commit of the Hub; None for a folder
    fingerprint: str  # of the weights
    model_class: str
    positions: int  # tokens that it reads, start and end of text among them
    dtype: str


@dataclass(frozen=True)
class BenchmarkInfo:
    name: str  # unique; the other tables refer to it
    kind: Literal["retrieval", "classification", "choice"]
    images: int
    captions: int | None  # of retrieval and choices
    classes: int | None  # of classification
    fingerprint: str  # of the data
    definition: str
    licence: str
    home: str
    notes: list[str] = field(default_factory=list)
    # Entry n: how many captions have n tokens, start and end of text among them. Empty where nobody counted.
    lengths: list[int] = field(default_factory=list)
    groups: int | None = None  # of images that are alike, where the source says so: intervals resample groups


@dataclass(frozen=True)
class EffectiveLength:
    lengths: list[int]  # tokens kept, ascending
    recall: dict[Direction, list[Value]]  # R@1 at each of them
    effective: dict[Direction, Value | None]  # in tokens; None where R@1 does not rise


@dataclass(frozen=True)
class Score:
    model: str
    benchmark: str
    metrics: dict[str, Value]  # keys of METRICS
    ties: int
    truncated: int  # captions cut at the model's length
    seconds: float
    effective_length: EffectiveLength | None = None


@dataclass(frozen=True)
class Difference:
    """`model` minus `reference`, from a paired bootstrap: the interval is the difference's own."""

    model: str
    reference: str
    benchmark: str
    metric: str
    value: Value
    p: float | None = None  # of the paired test, not corrected for the number of tests; None where it was not made


@dataclass(frozen=True)
class Failure:
    """A model that could not be evaluated, on one benchmark or (None) on any."""

    model: str
    benchmark: str | None
    error: str


@dataclass(frozen=True)
class Run:
    """One of several runs whose figures stand together."""

    date: str  # ISO 8601
    command: str
    versions: dict[str, str]
    hardware: str


@dataclass(frozen=True)
class Results:
    format: int = field(default=FORMAT, kw_only=True)
    date: str  # ISO 8601
    command: str
    versions: dict[str, str]
    hardware: str
    models: list[Model]  # the first one is what the others are compared with
    benchmarks: list[BenchmarkInfo]
    scores: list[Score]
    differences: list[Difference]
    # How texts were prepared; see longclip_hf/cleaning.py.
    clean_captions: bool = False
    neutralise_special_tokens: bool = False
    failures: list[Failure] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # written with it, in its folder
    earlier: list[Run] = field(
        default_factory=list
    )  # whose figures these are too; date, command ... are the last one's


def read_results(path: Path) -> Results:
    """Reads a results.json.

    Raises:
        ResultsError: for a file that is not there or no results, with the file and the field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path} could not be read as results: {error}") from error
    return _validated(data, path)


def write_results(results: Results, path: Path) -> None:
    """Writes `results` whole or not at all: equal results make equal files, numbers have six digits at most.

    Raises:
        ResultsError: for results that `read_results` would refuse; nothing is written then.
    """
    data = json.dumps(asdict(_validated(asdict(results), path)))
    rounded = json.loads(data, parse_float=lambda number: round(float(number), 6))
    text = json.dumps(rounded, indent=2, ensure_ascii=False)
    # A list of numbers and a value with its interval take one line. Strings hold no line breaks in JSON.
    text = re.sub(r"\[\n[\d\s,.e+-]+\]|\{\n\s*\"value\": [\d.e+-]+,[^{}]*\}", _on_one_line, text)
    write_atomically(path, (text + "\n").encode())


def _validated(data: Any, path: Path) -> Results:
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ResultsError(f"{path}: format is {found!r}, and this version reads {FORMAT}. Run the evaluation again.")
    try:
        results: Results = _build(Results, data, "")
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None
    if problems := list(_problems(results)):
        raise ResultsError(f"{path}: {'; '.join(problems[:5])}")
    return results


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as the type `kind`; strict, for a wrong type is a wrong number somewhere."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _build_object(kind, value, where)
    if origin is list:
        _expect(isinstance(value, list), where, value, "a list")
        return [_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), where, value, "an object")
        items = sorted(value.items(), key=str)  # equal results make equal files
        return {_build(args[0], key, where): _build(args[1], item, f"{where}.{key}") for key, item in items}
    if origin is types.UnionType:  # `T | None`
        return None if value is None else _build(args[0], value, where)
    if origin is Literal:
        _expect(value in args, where, value, " or ".join(map(repr, args)))
        return value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and math.isfinite(value), where, value, "a finite number")
        return float(value)
    if kind is bool:
        _expect(isinstance(value, bool), where, value, "true or false")
    elif kind is int:
        _expect(type(value) is int and value >= 0, where, value, "a count")
    else:
        _expect(isinstance(value, kind), where, value, "a text")
    return value


def _build_object(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, value, f"an object ({kind.__name__})")
    needed = {f.name for f in fields(kind) if f.default is f.default_factory}  # both MISSING
    if lacking := sorted(needed - value.keys()):
        raise ResultsError(f"{where or 'the file'} lacks {', '.join(lacking)}")
    hints = get_type_hints(kind)
    if unknown := sorted(value.keys() - hints.keys(), key=str):
        raise ResultsError(f"{where or 'the file'} has the unknown {', '.join(map(str, unknown))}")
    return kind(**{name: _build(hints[name], item, f"{where}.{name}".strip(".")) for name, item in value.items()})


def _expect(is_right: bool, where: str, value: Any, expected: str) -> None:
    if not is_right:
        raise ResultsError(f"{where or 'the file'} is {value!r:.80}, expected {expected}")


def _problems(results: Results) -> Iterator[str]:
    """What the types cannot say: names that refer to nothing, and numbers that are impossible."""
    models, benchmarks = [m.name for m in results.models], {b.name: b for b in results.benchmarks}
    for where, date in (
        ("date", results.date),
        *((f"earlier[{i}].date", r.date) for i, r in enumerate(results.earlier)),
    ):
        try:
            datetime.fromisoformat(date)
        except ValueError:
            yield f"{where} is {date!r}, expected ISO 8601"
    if not models or len(set(models)) < len(models):
        yield f"models are named {models}, expected one or more, each named once"
    if len(benchmarks) < len(results.benchmarks):
        yield f"benchmarks are named {[b.name for b in results.benchmarks]}, expected each named once"
    for i, info in enumerate(results.benchmarks):
        counted = "classes" if info.kind == "classification" else "captions"
        if (getattr(info, counted) or 0) < 1 or info.images < 1:
            yield f"benchmarks[{i}] ({info.name}) has no number of images and {counted}"
        if info.captions and info.lengths and sum(info.lengths) != info.captions:
            yield f"benchmarks[{i}].lengths counts {sum(info.lengths)} captions, not {info.captions}"
    pairs = [(score.model, score.benchmark) for score in results.scores]
    if len(set(pairs)) < len(pairs):
        yield "scores hold a pair of model and benchmark twice"
    for i, score in enumerate(results.scores):
        where = f"scores[{i}]"
        if score.model not in models or score.benchmark not in benchmarks:
            yield f"{where} is of {score.model!r} on {score.benchmark!r}, which are not both listed"
        for metric, value in score.metrics.items():
            yield from _impossible(f"{where}.metrics.{metric}", metric, value)
        if effective := score.effective_length:
            kept, sides = effective.lengths, effective.recall.keys() | effective.effective.keys()
            if kept != sorted(set(kept)) or not kept:
                yield f"{where}.effective_length.lengths is {kept}, expected ascending numbers of tokens"
            if effective.recall.keys() != effective.effective.keys():
                yield f"{where}.effective_length has only one of recall and effective for {sorted(sides)}"
            for side, values in effective.recall.items():
                if len(values) != len(kept):
                    yield f"{where}.effective_length.recall.{side} has {len(values)} values for {len(kept)} lengths"
                for n, value in enumerate(values):
                    yield from _impossible(f"{where}.effective_length.recall.{side}[{n}]", f"{side}_r1", value)
    for i, difference in enumerate(results.differences):
        names = {difference.model, difference.reference}
        if not names <= set(models) or difference.benchmark not in benchmarks:
            yield f"differences[{i}] is of {sorted(names)} on {difference.benchmark!r}, which are not all listed"
        yield from _impossible(f"differences[{i}]", difference.metric, difference.value, difference=True)
        if difference.p is not None and not 0 <= difference.p <= 1:
            yield f"differences[{i}].p is {difference.p}, expected a share within 0 ... 1"


def _impossible(where: str, metric: str, value: Value, difference: bool = False) -> Iterator[str]:
    if metric not in METRICS:
        yield f"{where} is the unknown metric {metric!r}, expected one of {', '.join(METRICS)}"
        return
    numbers = [number for number in (value.value, value.low, value.high) if number is not None]
    if (value.low is None) != (value.high is None):
        yield f"{where} has the interval [{value.low}, {value.high}], of which one end is missing"
    elif value.low is not None and value.high is not None and value.low > value.high:
        yield f"{where} has the interval [{value.low}, {value.high}], whose ends are the wrong way round"
    lowest, highest = (-1 if difference else 0, 1) if is_share(metric) else (-1 - difference, 1 + difference)
    if not is_rank(metric) and not all(lowest <= number <= highest for number in numbers):
        kind = "shares within 0 ... 1, not percent" if is_share(metric) else "correlations within -1 ... 1"
        yield f"{where} is {tuple(numbers)}, expected {kind}"
    if is_rank(metric) and not difference and min(numbers) < 1:
        yield f"{where} is {tuple(numbers)}, and ranks count from 1"


def _on_one_line(match: re.Match[str]) -> str:
    return re.sub(r"(?<=[\[{])\s+|\s+(?=[\]}])", "", re.sub(r"\s+", " ", match[0]))
