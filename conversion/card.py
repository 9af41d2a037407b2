"""The card of a folder that is published: what is known of how it was made, and no figure but of results files."""

import json
import math
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
from modeling_longclip.defaults import CLIP_LENGTH, KEEP, LENGTH

RESULTS_FORMAT = 1  # of evaluation/results.py, which says what a results file holds
RELATIONS = ("finetune", "merge", "quantized")  # the Hub's words for how a model comes from its base model
# What training leaves in its folder. A card that was there before no longer says how the weights were made.
TRACES_OF_TRAINING = (
    "training_args.bin", "trainer_state.json", "optimizer.pt", "all_results.json", "adapters", "checkpoint-*",
)  # fmt: skip
# Of results files: key -> how tables call it, and how the Hub's index does.
METRICS = {
    **{
        f"{side}_{key}": (f"{direction}, {name}", metric_type)
        for side, direction in {"i2t": "Image to text", "t2i": "Text to image"}.items()
        for key, name, metric_type in (
            ("r1", "R@1", "recall_at_1"),
            ("r5", "R@5", "recall_at_5"),
            ("r10", "R@10", "recall_at_10"),
            ("map", "mAP", "mean_average_precision"),
            ("median_rank", "median rank", "median_rank"),
            ("mean_rank", "mean rank", "mean_rank"),
        )
    },
    "top1": ("Top-1 accuracy", "accuracy"),
    "top5": ("Top-5 accuracy", "top_5_accuracy"),
}
_TASKS = {"retrieval": "image-text-retrieval", "classification": "zero-shot-image-classification"}


@dataclass(frozen=True)
class Measure:
    """A metric with its 95 % interval, in the units of a card: percent, or ranks."""

    key: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


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
        files: `results.json` of an evaluation, in the format of `evaluation/results.py`.
        names: how the model may be called in them.
        positions: that the model has.
        chosen: its name or the fingerprint of its weights in the files, where that is none of `names`.

    Raises:
        ConversionError: for a file of another format, with impossible numbers, in which the model is not found or
            stands more than once, or that repeats a benchmark of another file.
    """
    found: dict[str, Evaluation] = {}
    for file in files:
        results = _read_results(file)
        model = _find_model(results, file, names, chosen)
        if model.integer("positions") != positions:
            raise ConversionError(
                f"{file}: {model.text('name')} reads {model.integer('positions')} tokens, and the folder {positions}. "
                "These are the figures of another model."
            )
        scores = [score for score in results.items("scores") if score.text("model") == model.text("name")]
        if not scores:
            raise ConversionError(f"{file} has no scores of {model.text('name')}.")
        for score in scores:
            evaluation = _evaluation(file, results, model, score)
            if evaluation.benchmark in found:
                raise ConversionError(
                    f"{evaluation.benchmark} is in {found[evaluation.benchmark].file} and in {file}. Give one of them."
                )
            found[evaluation.benchmark] = evaluation
    return list(found.values())


@dataclass(frozen=True)
class _Object:
    """An object of a results file, whose fields have the types that they are asked for, or are an error."""

    data: Mapping[str, Any]
    where: str

    def _get(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.data.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConversionError(f"{self.where}.{name} is {value!r:.80}, expected {expected}. Evaluate again.")
        return value

    def text(self, name: str) -> str:
        # On one line: it is written into a card.
        return " ".join(self._get(name, str, "a text").split())

    def integer(self, name: str) -> int:
        return int(self._get(name, int, "a count"))

    def number(self, name: str) -> float:
        value = float(self._get(name, (int, float), "a number"))
        if not math.isfinite(value):
            raise ConversionError(f"{self.where}.{name} is {value}, and no figure of a card. Evaluate again.")
        return value

    def object(self, name: str) -> "_Object":
        return _Object(self._get(name, dict, "an object"), f"{self.where}.{name}")

    def items(self, name: str) -> list["_Object"]:
        values = self._get(name, list, "a list")
        if not all(isinstance(value, dict) for value in values):
            raise ConversionError(f"{self.where}.{name} holds something else than objects. Evaluate again.")
        return [_Object(value, f"{self.where}.{name}[{number}]") for number, value in enumerate(values)]


def _read_results(file: Path) -> _Object:
    if not file.is_file():
        raise ConversionError(f"{file}: no such results file. It is written by evaluation/run.py.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file} is no results file: {error}.") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != RESULTS_FORMAT:
        raise ConversionError(f"{file}: its format is {found!r}, and {RESULTS_FORMAT} is read. Evaluate again.")
    return _Object(data, str(file))


def _find_model(results: _Object, file: Path, names: Sequence[str], chosen: str | None) -> _Object:
    models = results.items("models")
    wanted = list(names) if chosen is None else [chosen]
    matches = [
        model
        for model in models
        if model.text("name") in wanted or (chosen is not None and model.text("fingerprint") == chosen)
    ]
    if len(matches) != 1:
        there = ", ".join(f"{model.text('name')} ({model.text('fingerprint')[:12]})" for model in models)
        raise ConversionError(
            f"{file}: {len(matches)} of its models are {' or '.join(wanted)}. It has {there}: say which one with "
            "--results-model NAME or its whole fingerprint."
        )
    return matches[0]


def _evaluation(file: Path, results: _Object, model: _Object, score: _Object) -> Evaluation:
    name = score.text("benchmark")
    benchmark = next((item for item in results.items("benchmarks") if item.text("name") == name), None)
    if benchmark is None or benchmark.text("kind") not in _TASKS:
        raise ConversionError(f"{score.where} is on {name!r}, of which {file} does not say what it is.")
    metrics = score.object("metrics")
    if unknown := [key for key in metrics.data if key not in METRICS]:
        raise ConversionError(f"{metrics.where} has the unknown {', '.join(unknown)}. Evaluate again.")
    measures = [_measure(metrics.object(key), key) for key in METRICS if key in metrics.data]
    rows = [(METRICS[measure.key][0], str(measure)) for measure in measures]
    if score.data.get("effective_length") is not None:
        effective = score.object("effective_length").object("effective")
        for side, direction in (("i2t", "Image to text"), ("t2i", "Text to image")):
            if side in effective.data:
                value, low, high = (effective.object(side).number(part) for part in ("value", "low", "high"))
                rows.append((f"{direction}, effective length in tokens", f"{value:.0f} [{low:.0f}, {high:.0f}]"))
    counted = "captions" if benchmark.text("kind") == "retrieval" else "classes"
    if counted == "captions":
        rows.append(("Captions cut at the model's length", f"{score.integer('truncated'):,}"))
    if score.integer("ties"):
        rows.append(("Ties, counted against the model", f"{score.integer('ties'):,}"))
    notes = benchmark.data.get("notes", [])
    versions = results.object("versions")
    return Evaluation(
        file=file,
        benchmark=name,
        kind=benchmark.text("kind"),
        definition=benchmark.text("definition").rstrip(".") + ".",
        size=f"{benchmark.integer('images'):,} images, {benchmark.integer(counted):,} {counted}",
        home=benchmark.text("home"),
        licence=benchmark.text("licence"),
        data_fingerprint=benchmark.text("fingerprint"),
        notes=[" ".join(str(note).split()) for note in notes],
        model=model.text("name"),
        revision=None if model.data.get("revision") is None else model.text("revision"),
        fingerprint=model.text("fingerprint"),
        dtype=model.text("dtype"),
        date=results.text("date"),
        versions=", ".join(f"{name} {versions.text(name)}" for name in versions.data),
        hardware=results.text("hardware"),
        measures=measures,
        rows=rows,
    )


def _measure(value: _Object, key: str) -> Measure:
    value_low_high = tuple(value.number(part) for part in ("value", "low", "high"))
    number, low, high = value_low_high
    is_rank = key.endswith("_rank")
    if low > high or (
        min(value_low_high) < 1 if is_rank else not 0 <= min(value_low_high) <= max(value_low_high) <= 1
    ):
        expected = "a rank from 1" if is_rank else "a share within 0 ... 1"
        raise ConversionError(f"{value.where} is {number} [{low}, {high}], expected {expected} with its interval.")
    scale = 1 if is_rank else 100
    return Measure(key, *(round(scale * part, 4) for part in value_low_high))


def _index(evaluation: Evaluation) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASKS[evaluation.kind],
            dataset_type=evaluation.benchmark.lower().replace(" ", "-"),
            dataset_name=evaluation.benchmark,
            dataset_args={"definition": evaluation.definition, "fingerprint": evaluation.data_fingerprint},
            metric_type=METRICS[measure.key][1],
            metric_name=METRICS[measure.key][0],
            metric_value=measure.value,
            metric_args={"interval_95": [measure.low, measure.high]},
        )
        for measure in evaluation.measures
    ]
