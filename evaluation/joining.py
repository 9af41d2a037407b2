"""Results of several runs as one: models and benchmarks side by side, and what cannot stand together said."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from longclip_hf.errors import ResultsError
from longclip_hf.evaluation.query_store import QueryStore, prepared_of
from longclip_hf.evaluation.scores import Bootstrap, differences
from longclip_hf.results import BenchmarkInfo, Difference, Model, Results, Run, Score, is_rank


def model_conflict(first: Model, second: Model) -> str | None:
    """In what two models of one name differ, or None: figures of both must not stand under that name."""
    facts = {"fingerprint": "other weights or settings", "dtype": "another type", "positions": "other positions"}
    return _differing("model", first, second, facts)


def benchmark_conflict(first: BenchmarkInfo, second: BenchmarkInfo) -> str | None:
    """In what two benchmarks of one name differ, or None."""
    facts = {"definition": "another definition", "groups": "other groups", "fingerprint": "other data"}
    return _differing("benchmark", first, second, facts)


def _differing(
    kind: str, first: Model | BenchmarkInfo, second: Model | BenchmarkInfo, facts: dict[str, str]
) -> str | None:
    for field, words in facts.items():
        one, other = (_short(getattr(of, field)) for of in (first, second))
        if getattr(first, field) != getattr(second, field):
            return f"the {kind} {first.name!r} has {words} in each: {one}, and {other}"
    return None


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def preparation_conflict(first: Results, second: Results) -> str | None:
    """In what the texts of two runs were prepared differently, or None."""
    for field in ("clean_captions", "neutralise_special_tokens"):
        if getattr(first, field) != getattr(second, field):
            return f"texts were read with --{field} in one of them and without it in the other"
    return None


def join(parts: Sequence[Results]) -> Results:
    """All of `parts`, the earliest first: models and benchmarks in the order in which they appear.

    A model measured twice on a benchmark has the metrics of both times, the later ones where both measured them. A
    difference stays unless one of its two scores is newer; see `with_differences`.

    Raises:
        ResultsError: if something of one name is not the same in all parts, or texts were prepared differently.
    """
    joined = parts[0]
    for part in parts[1:]:
        joined = _join_two(joined, part)
    return joined


def _join_two(first: Results, second: Results) -> Results:
    models = {model.name: model for model in first.models}
    benchmarks = {info.name: info for info in first.benchmarks}
    problems = [preparation_conflict(first, second)]
    problems += [model_conflict(models[new.name], new) for new in second.models if new.name in models]
    problems += [benchmark_conflict(benchmarks[new.name], new) for new in second.benchmarks if new.name in benchmarks]
    if said := [problem for problem in problems if problem]:
        raise ResultsError(f"These results cannot stand together: {'; '.join(said)}.")
    models |= {model.name: model for model in second.models}
    for info in second.benchmarks:
        counted = benchmarks.get(info.name, info).lengths
        benchmarks[info.name] = info if info.lengths else replace(info, lengths=counted)
    scores = {(score.model, score.benchmark): score for score in first.scores}
    fresh = {(score.model, score.benchmark): score for score in second.scores}
    for pair, score in fresh.items():
        scores[pair] = _both(scores[pair], score) if pair in scores else score
    kept = {
        _what(d): d for d in first.differences if not {(d.model, d.benchmark), (d.reference, d.benchmark)} & set(fresh)
    }
    kept |= {_what(d): d for d in second.differences}
    tried = {model.name for model in second.models} | {failure.model for failure in second.failures}
    runs = [*first.earlier, run_of(first), *second.earlier]
    return replace(
        second, models=list(models.values()), benchmarks=list(benchmarks.values()), scores=list(scores.values()),
        differences=list(kept.values()),
        failures=[*(failure for failure in first.failures if failure.model not in tried), *second.failures],
        earlier=[run for i, run in enumerate(runs) if run not in [*runs[:i], run_of(second)]],
    )  # fmt: skip


def _both(old: Score, new: Score) -> Score:
    metrics = {**old.metrics, **new.metrics}
    return replace(new, metrics=metrics, effective_length=new.effective_length or old.effective_length)


def run_of(results: Results) -> Run:
    """The latest run of `results`."""
    return Run(results.date, results.command, results.versions, results.hardware)


def _what(difference: Difference) -> tuple[str, ...]:
    return difference.model, difference.reference, difference.benchmark, difference.metric


def told_apart(parts: Sequence[Results]) -> tuple[list[Results], list[str]]:
    """The same with names by which everything can be told apart, and what was renamed, in words.

    Of models or benchmarks of one name that are not the same, each has the beginning of its fingerprint behind it.
    """
    said: list[str] = []
    renamed: list[dict[str, str]] = []
    kinds: dict[str, Callable[[Any, Any], str | None]] = {
        "models": model_conflict,
        "benchmarks": benchmark_conflict,
    }
    for kind, conflict in kinds.items():
        known: dict[str, list[Model | BenchmarkInfo]] = {}
        for part in parts:
            for item in getattr(part, kind):
                known.setdefault(item.name, []).append(item)
        names: dict[str, str] = {}
        for name, items in known.items():
            if problem := next(filter(None, (conflict(items[0], item) for item in items[1:])), None):
                said.append(f"{problem}. They are told apart by their fingerprints.")
                names[name] = name
        renamed.append(names)
    return [_renamed(part, *renamed) for part in parts], said


def _renamed(part: Results, models: dict[str, str], benchmarks: dict[str, str]) -> Results:
    model = {m.name: f"{m.name} ({m.fingerprint[:7]})" if m.name in models else m.name for m in part.models}
    data = {b.name: f"{b.name} ({b.fingerprint[:7]})" if b.name in benchmarks else b.name for b in part.benchmarks}
    return replace(
        part,
        models=[replace(m, name=model[m.name]) for m in part.models],
        benchmarks=[replace(b, name=data[b.name]) for b in part.benchmarks],
        scores=[replace(s, model=model[s.model], benchmark=data[s.benchmark]) for s in part.scores],
        differences=[
            replace(d, model=model[d.model], reference=model[d.reference], benchmark=data[d.benchmark])
            for d in part.differences
        ],
        failures=[
            replace(f, model=model.get(f.model, f.model), benchmark=data.get(f.benchmark or "", f.benchmark))
            for f in part.failures
        ],
    )


def with_reference(results: Results, name: str) -> Results:
    """The same with that model first.

    Raises:
        ResultsError: if there is none of that name.
    """
    if name not in [model.name for model in results.models]:
        there = ", ".join(model.name for model in results.models)
        raise ResultsError(f"There is no model {name!r} to compare the others with, but {there}.")
    return replace(results, models=sorted(results.models, key=lambda model: model.name != name))


def with_differences(results: Results, store: QueryStore, bootstrap: Bootstrap) -> Results:
    """The same with every difference to the first model that `store` has both sides of, in the order of scores.

    What is there stays. A difference to another model goes where there is one to the first.
    """
    reference = results.models[0]
    models = {model.name: model for model in results.models}
    infos = {info.name: info for info in results.benchmarks}
    prepared = prepared_of(results)
    there: dict[tuple[str, str], list[Difference]] = {}
    for difference in results.differences:
        there.setdefault((difference.model, difference.benchmark), []).append(difference)
    of_first = {score.benchmark: score.metrics for score in results.scores if score.model == reference.name}
    found: list[Difference] = []
    for score in results.scores:
        known = there.pop((score.model, score.benchmark), [])
        to_first = [d for d in known if d.reference == reference.name]
        both = score.metrics.keys() & of_first.get(score.benchmark, {}).keys()
        lacking = {metric for metric in both if not is_rank(metric)} - {d.metric for d in to_first if d.p is not None}
        if score.model != reference.name and lacking:
            info = infos[score.benchmark]
            sides = [store.read(model, info, prepared) for model in (models[score.model], reference)]
            if sides[0] is not None and sides[1] is not None:
                to_first = differences(score.model, sides[0], reference.name, sides[1], info.name, bootstrap)
        found += to_first or known
    return replace(results, differences=found)
