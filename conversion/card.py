"""The card of a folder that is published: what is known of how it was made, and no figure but of results files."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.errors import HFValidationError

from longclip_hf.conversion.folder import render_card
from longclip_hf.conversion.hub import CARD_RECORD
from longclip_hf.errors import ConversionError
from longclip_hf.files import read_json
from longclip_hf.results import DIRECTIONS, METRICS, Model, Results, Score, Value, is_rank, is_share, read_results
from modeling_longclip.defaults import CLIP_LENGTH, KEEP, LENGTH

RELATIONS = ("finetune", "merge", "quantized")  # the Hub's words for how a model comes from its base model
# What training leaves in its folder. A card that was there before no longer says how the weights were made.
TRACES_OF_TRAINING = (
    "training_args.bin", "trainer_state.json", "optimizer.pt", "all_results.json", "adapters", "checkpoint-*",
)  # fmt: skip
# Metric of a results file, the direction aside -> how the Hub's index calls it.
_METRIC_TYPES = {
    "r1": "recall_at_1",
    "r5": "recall_at_5",
    "r10": "recall_at_10",
    "map": "mean_average_precision",
    "median_rank": "median_rank",
    "mean_rank": "mean_rank",
    "top1": "accuracy",
    "top5": "top_5_accuracy",
    "mean_per_class_recall": "mean_per_class_recall",
    "r1_first_dropped": "recall_at_1_without_first_sentence",
    "r1_first_moved": "recall_at_1_with_first_sentence_last",
    "r1_half_drawn": "recall_at_1_of_half_of_the_sentences",
    "himo": "himo_at_k",
    "himo_rises": "himo_at_k_rises",
    "text_score": "text_score",
    "image_score": "image_score",
    "group_score": "group_score",
    "choice": "accuracy",
}
_TASKS = {
    "retrieval": "image-text-retrieval",
    "choice": "image-text-retrieval",
    "classification": "zero-shot-image-classification",
}


@dataclass(frozen=True)
class Measure:
    """A metric with its 95 % interval, in the units of a card: percent, or ranks."""

    key: str
    value: float
    low: float | None  # None where one image has no interval
    high: float | None

    def __str__(self) -> str:
        correlation = not is_share(self.key) and not is_rank(self.key)
        return _with_interval(self.value, self.low, self.high, 2 if correlation else 1)


@dataclass(frozen=True)
class Evaluation:
    """What a results file says of one model on one benchmark."""

    file: Path
    benchmark: str
    kind: str
    definition: str
    size: str
    home: str
    licence: str
    data_fingerprint: str
    notes: list[str]
    model: str
    revision: str | None
    fingerprint: str
    dtype: str
    date: str
    versions: str
    hardware: str
    measures: list[Measure]
    rows: list[tuple[str, str]]  # of the card's table: the measures, and what was counted


@dataclass(frozen=True)
class Origin:
    """How the weights of a folder came to be, as far as the folder says it.

    Attributes:
        trained: whether they were trained after they were stretched or converted.
        record: what the command that made the folder wrote into its card; empty where none did, or training followed.
        stated: the other metadata of that card.
        own_card: whether the folder's card, if it has one, is of this project.
        steps: of the training, where its state is in the folder.
    """

    trained: bool
    record: dict[str, Any]
    stated: dict[str, Any]
    own_card: bool
    steps: int | None

    @property
    def known(self) -> bool:
        """Whether there is anything to say."""
        return self.trained or "source" in self.record

    def command(self) -> str | None:
        """The command that makes the folder again, where the record determines it."""
        record = self.record
        if self.trained or not self.known or record.get("made_with"):
            return record.get("made_with")
        cast = ["--dtype", record["dtype"]] if record.get("dtype") else []
        if not record.get("converted"):
            words = ["conversion/stretch.py", record["source"], "--method", record["method"]]
            words += [f"--{name}={record[name]}" for name in ("keep", "ratio", "length", "arithmetic")]
        elif record.get("two_tables"):
            words = ["conversion/original.py", *filter(None, [record.get("repository")]), record["source"]]
            words += [f"--keep={record['keep']}", f"--precision={record['precision']}"]
        else:
            return None  # options that such a source needs are not recorded
        return shlex.join(["python", *words, *cast, "--output", "DIR"])


@dataclass(frozen=True)
class Card:
    text: str
    unstated: list[str]  # what it does not say, with the option that does


def check_hub_id(name: str) -> None:
    """
    Raises:
        ConversionError: if nothing on the Hub can be called `name`.
    """
    try:
        hf_hub_url(name, "README.md")  # its arguments are validated
    except HFValidationError as error:
        raise ConversionError(f"{name} is no Hub id (USER/NAME): {error}") from error


def stock_class(config: Mapping[str, Any]) -> str:
    """The name of the class that loads a folder without custom code, from its `config.json`."""
    default = "CLIPModel" if "vision_config" in config else "CLIPTextModel"
    return str((config.get("architectures") or [default])[0]).removeprefix("Long")


def read_origin(folder: Path, fine_tuned: bool = False) -> Origin:
    """
    Args:
        folder: a checkpoint.
        fine_tuned: it was, whether the folder shows it or not.

    Raises:
        ConversionError: for a card whose metadata cannot be read.
    """
    stated: dict[str, Any] = {}
    if (folder / "README.md").is_file():
        try:
            stated = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
        except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise ConversionError(f"{folder / 'README.md'} has metadata that are no YAML: {error}") from error
    own_card = CARD_RECORD in stated
    record = stated.pop(CARD_RECORD, None) or {}
    traces = fine_tuned or any(next(folder.glob(trace), None) for trace in TRACES_OF_TRAINING)
    trained = bool(traces or record.get("trained"))
    if trained and not record.get("trained"):
        record = {}
    steps = read_json(folder / "trainer_state.json").get("global_step") or record.get("steps")
    return Origin(trained, record, stated, own_card, steps)


def make_card(
    folder: Path,
    repo_id: str,
    origin: Origin,
    evaluations: Sequence[Evaluation] = (),
    *,
    base_model: str | None = None,
    relation: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    made_with: str | None = None,
) -> Card:
    """The card of `folder` as `repo_id` on the Hub.

    Args:
        folder: a checkpoint; `config.json` says its sizes.
        repo_id: `USER/NAME`.
        origin: of `read_origin`.
        evaluations: all figures that the card will have.
        base_model, license, datasets: by default what the folder's own card states.
        relation: to the base model, one of `RELATIONS`. By default `"finetune"`, also the Hub's word for a stretched
            copy, and `"quantized"`, its word for the same weights in another format, for a converted one.
        made_with: the command that made the weights, by default as the folder's record determines it.

    Raises:
        ConversionError: for a base model or dataset that is no Hub id.
    """
    base_model = base_model or origin.stated.get("base_model")
    datasets = list(datasets or origin.stated.get("datasets") or ())
    for name in filter(None, [base_model, *datasets]):
        check_hub_id(name)
    if relation is not None and (relation not in RELATIONS or base_model is None):
        raise ConversionError(
            f"The relation {relation!r} is one of {', '.join(RELATIONS)}, to a base model, which is {base_model}."
        )
    license = license or origin.stated.get("license")
    config = read_json(folder / "config.json")
    has_image_tower = "vision_config" in config
    text = config.get("text_config") or config
    record = {
        "trained": origin.trained or None,
        "long_class": f"Long{stock_class(config)}",
        "has_image_tower": has_image_tower,
        "rows": CLIP_LENGTH,
        "length": text.get("max_position_embeddings", LENGTH),
        "keep": text.get("keep", KEEP),
        "steps": origin.steps,
        **origin.record,
        "made_with": made_with or origin.record.get("made_with"),
    }
    made_with = made_with or origin.command()
    data = ModelCardData(
        model_name=repo_id.split("/")[-1] if evaluations else None,
        base_model=base_model,
        base_model_relation=base_model and (relation or ("quantized" if record.get("converted") else "finetune")),
        license=license,
        language="en",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if has_image_tower else "feature-extraction",
        tags=["clip", "long-clip"],
        datasets=datasets or None,
        eval_results=[result for evaluation in evaluations for result in _index(evaluation)] or None,
    )
    data[CARD_RECORD] = {name: value for name, value in record.items() if value is not None}
    shown = {
        "repo_id": repo_id,
        "base_model": base_model,
        "datasets": datasets,
        "evaluations": evaluations,
        "made_with": made_with,
        "unrecorded": not origin.known,
    }
    options = {
        "the licence (--license)": license,
        "the base model (--base-model)": base_model,
        "the command that made it (--made-with)": made_with,
        "a measured figure (--results)": evaluations,
    }
    return Card(render_card(data, **record | shown), [name for name, said in options.items() if not said])


def read_evaluations(
    files: Sequence[Path], names: Sequence[str], positions: int, chosen: str | None = None
) -> list[Evaluation]:
    """What results files say of one model.

    Args:
        files: `results.json` of an evaluation, in the format of `longclip_hf.results`.
        names: how the model may be called in them.
        positions: that the model has.
        chosen: its name or the fingerprint of its weights in the files, where that is none of `names`.

    Raises:
        ResultsError: for a file that is not there, of another format, or with impossible numbers.
        ConversionError: for a file in which the model is not found or stands more than once, or that repeats a
            benchmark of another file.
    """
    found: dict[str, Evaluation] = {}
    for file in files:
        results = read_results(file)
        model = _find_model(results, file, names, chosen)
        if model.positions != positions:
            raise ConversionError(
                f"{file}: {model.name} reads {model.positions} tokens, and the folder {positions}. "
                "These are the figures of another model."
            )
        scores = [score for score in results.scores if score.model == model.name]
        if not scores:
            raise ConversionError(f"{file} has no scores of {model.name}.")
        for score in scores:
            evaluation = _evaluation(file, results, model, score)
            if evaluation.benchmark in found:
                raise ConversionError(
                    f"{evaluation.benchmark} is in {found[evaluation.benchmark].file} and in {file}. Give one of them."
                )
            found[evaluation.benchmark] = evaluation
    return list(found.values())


def _find_model(results: Results, file: Path, names: Sequence[str], chosen: str | None) -> Model:
    wanted = list(names) if chosen is None else [chosen]
    matches = [
        model
        for model in results.models
        if model.name in wanted or (chosen is not None and model.fingerprint == chosen)
    ]
    if len(matches) != 1:
        there = ", ".join(f"{model.name} ({model.fingerprint[:12]})" for model in results.models)
        raise ConversionError(
            f"{file}: {len(matches)} of its models are {' or '.join(wanted)}. It has {there}: say which one with "
            "--results-model NAME or its whole fingerprint."
        )
    return matches[0]


def _evaluation(file: Path, results: Results, model: Model, score: Score) -> Evaluation:
    benchmark = next(info for info in results.benchmarks if info.name == score.benchmark)
    # In the order of the tables.
    measures = [_measure(score.metrics[key], key) for key in METRICS if key in score.metrics]
    rows = [(METRICS[measure.key], str(measure)) for measure in measures]
    if score.effective_length is not None:
        for side, direction in DIRECTIONS.items():
            if (tokens := score.effective_length.effective.get(side)) is not None:
                shown = _with_interval(tokens.value, tokens.low, tokens.high, 0)
                rows.append((f"{direction}, effective length in tokens", shown))
    counted = "classes" if benchmark.kind == "classification" else "captions"
    if counted == "captions":
        rows.append(("Captions cut at the model's length", f"{score.truncated:,}"))
    if score.ties:
        rows.append(("Ties, counted against the model", f"{score.ties:,}"))
    return Evaluation(
        file=file,
        benchmark=_on_one_line(benchmark.name),
        kind=benchmark.kind,
        definition=_on_one_line(benchmark.definition).rstrip(".") + ".",
        size=f"{benchmark.images:,} images, {getattr(benchmark, counted):,} {counted}",
        home=_on_one_line(benchmark.home),
        licence=_on_one_line(benchmark.licence),
        data_fingerprint=_on_one_line(benchmark.fingerprint),
        notes=[_on_one_line(note) for note in benchmark.notes],
        model=_on_one_line(model.name),
        revision=None if model.revision is None else _on_one_line(model.revision),
        fingerprint=_on_one_line(model.fingerprint),
        dtype=_on_one_line(model.dtype),
        date=_on_one_line(results.date),
        versions=", ".join(_on_one_line(f"{name} {version}") for name, version in results.versions.items()),
        hardware=_on_one_line(results.hardware),
        measures=measures,
        rows=rows,
    )


def _on_one_line(text: str) -> str:
    """As texts of results are written into a card."""
    return " ".join(text.split())


def _measure(value: Value, key: str) -> Measure:
    scale = 100 if is_share(key) else 1
    low, high = (None if end is None else round(scale * end, 4) for end in (value.low, value.high))
    return Measure(key, round(scale * value.value, 4), low, high)


def _with_interval(value: float, low: float | None, high: float | None, digits: int) -> str:
    interval = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{interval}"


def _metric_type(metric: str) -> str:
    return _METRIC_TYPES[metric.removeprefix("i2t_").removeprefix("t2i_")]


def _index(evaluation: Evaluation) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASKS[evaluation.kind],
            dataset_type=evaluation.benchmark.lower().replace(" ", "-"),
            dataset_name=evaluation.benchmark,
            dataset_args={"definition": evaluation.definition, "fingerprint": evaluation.data_fingerprint},
            metric_type=_metric_type(measure.key),
            metric_name=METRICS[measure.key],
            metric_value=measure.value,
            metric_args=None if measure.low is None else {"interval_95": [measure.low, measure.high]},
        )
        for measure in evaluation.measures
    ]
