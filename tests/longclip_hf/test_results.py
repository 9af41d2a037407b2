"""The results file: what is written is read, and what cannot be is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_results import sample_results

from longclip_hf.errors import ResultsError
from longclip_hf.results import METRICS, Results, Value, is_rank, is_share, read_results, write_results


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_results(sample_results(), tmp_path / "results.json")
    return tmp_path / "results.json"


def rounded(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_float=lambda number: round(float(number), 6))


def test_what_is_written_is_read(file: Path) -> None:
    results = read_results(file)
    sample = sample_results()
    assert results.models == sample.models and results.benchmarks == sample.benchmarks
    assert results.versions == sample.versions and results.format == 1
    for read, made in zip(results.scores, sample.scores, strict=True):
        assert (read.model, read.benchmark, read.truncated) == (made.model, made.benchmark, made.truncated)
        assert read.metrics.keys() == made.metrics.keys()
        for metric, value in made.metrics.items():
            assert read.metrics[metric].low == pytest.approx(value.low, abs=1e-6)
    assert results.scores[2].effective_length is not None
    assert results.scores[2].effective_length.effective["t2i"] == Value(150, 120, 190)


def test_equal_results_make_equal_files(file: Path, tmp_path: Path) -> None:
    write_results(read_results(file), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    first = sample_results().scores[0]
    turned = replace(first, metrics=dict(reversed(first.metrics.items())))
    write_results(replace(sample_results(), scores=[turned, *sample_results().scores[1:]]), tmp_path / "turned.json")
    assert (tmp_path / "turned.json").read_bytes() == file.read_bytes()


def test_a_person_can_read_the_file(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[1] == '  "format": 1,'
    assert '        "i2t_r1": {"value": 0.681, "low": 0.652112, "high": 0.709888},' in lines
    assert '        "lengths": [5, 10, 15, 20, 30, 40, 50, 60, 77, 100, 125, 150, 200, 248],' in lines


def test_text_that_looks_like_numbers_stays(tmp_path: Path) -> None:
    """One-line lists are made in the text of the file; a string is not to be changed by that."""
    hostile = '[\n1,\n  2]  {\n "value": 1,  \n "low": 2}'
    write_results(replace(sample_results(), command=hostile), tmp_path / "results.json")
    assert read_results(tmp_path / "results.json").command == hostile


def test_nothing_is_left_of_a_file_that_could_not_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(replace(sample_results(), command="another"), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_shares_and_ranks() -> None:
    assert len(METRICS) == 27
    assert is_share("i2t_r1") and is_share("t2i_map") and is_share("top1")
    assert not is_share("t2i_median_rank") and not is_share("i2t_mean_rank")
    assert is_rank("t2i_median_rank") and not is_rank("himo") and not is_share("himo") and is_share("himo_rises")


BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "correlation": (
        lambda data: data["scores"][0]["metrics"].update(himo={"value": -1.5, "low": None, "high": None}),
        r"metrics\.himo is \(-1\.5,\), expected correlations within -1 \.\.\. 1",
    ),
    "p": (lambda data: data["differences"][0].update(p=1.5), r"differences\[0\]\.p is 1\.5"),
    "earlier": (
        lambda data: data.update(earlier=[{"date": "monday", "command": "", "versions": {}, "hardware": ""}]),
        r"earlier\[0\]\.date is 'monday', expected ISO 8601",
    ),
    "format": (lambda data: data.update(format=2), "format is 2, and this version reads 1"),
    "missing": (lambda data: data["models"][1].pop("positions"), r"models\[1\] lacks positions"),
    "unknown": (lambda data: data.update(extra=1), "the file has the unknown extra"),
    "type": (
        lambda data: data["scores"][0]["metrics"]["i2t_r1"].update(low="0.5"),
        r"scores\[0\]\.metrics\.i2t_r1\.low is '0\.5', expected a finite number",
    ),
    "nan": (
        lambda data: data["scores"][0]["metrics"]["i2t_r1"].update(low=float("nan")),
        r"i2t_r1\.low is nan, expected a finite number",
    ),
    "bool": (lambda data: data["scores"][0].update(ties=True), r"scores\[0\]\.ties is True, expected a count"),
    "negative": (lambda data: data["scores"][0].update(truncated=-1), r"truncated is -1, expected a count"),
    "list": (lambda data: data.update(scores={}), r"scores is \{\}, expected a list"),
    "kind": (
        lambda data: data["benchmarks"][0].update(kind="other"),
        r"benchmarks\[0\]\.kind is 'other', expected 'retrieval' or 'classification'",
    ),
    "direction": (
        lambda data: data["scores"][0]["effective_length"]["effective"].update(t2t={"value": 1, "low": 1, "high": 1}),
        r"scores\[0\]\.effective_length\.effective is 't2t', expected 'i2t' or 't2i'",
    ),
    "percent": (
        lambda data: data["scores"][0]["metrics"].update(i2t_r1={"value": 68.1, "low": 65.0, "high": 71.0}),
        "i2t_r1 is .* not percent",
    ),
    "rank": (
        lambda data: data["scores"][0]["metrics"].update(i2t_mean_rank={"value": 0.0, "low": 0.0, "high": 1.0}),
        "ranks count from 1",
    ),
    "ends": (
        lambda data: data["scores"][0]["metrics"].update(i2t_r1={"value": 0.5, "low": 0.6, "high": 0.4}),
        r"the interval \[0\.6, 0\.4\], whose ends are the wrong way round",
    ),
    "end": (
        lambda data: data["scores"][0]["metrics"].update(i2t_r1={"value": 0.5, "low": 0.4, "high": None}),
        r"the interval \[0\.4, None\], of which one end is missing",
    ),
    "metric": (
        lambda data: data["scores"][0]["metrics"].update(i2t_r3={"value": 0.5, "low": 0.4, "high": 0.6}),
        "unknown metric 'i2t_r3', expected one of i2t_r1, i2t_r5",
    ),
    "model": (lambda data: data["scores"][0].update(model="nobody"), r"scores\[0\] is of 'nobody' on 'Urban1k'"),
    "twice": (lambda data: data["scores"].append(data["scores"][0]), "a pair of model and benchmark twice"),
    "names": (lambda data: data["models"].append(data["models"][0]), "each named once"),
    "date": (lambda data: data.update(date="yesterday"), "date is 'yesterday', expected ISO 8601"),
    "captions": (lambda data: data["benchmarks"][0].update(captions=None), "no number of images and captions"),
    "lengths": (lambda data: data["benchmarks"][0]["lengths"].append(1), "counts 1001 captions, not 1000"),
    "curve": (
        lambda data: data["scores"][0]["effective_length"]["recall"]["i2t"].pop(),
        r"recall\.i2t has 13 values for 14 lengths",
    ),
    "difference": (lambda data: data["differences"][0].update(reference="nobody"), "differences.0. is of .*'nobody'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_the_field(file: Path, case: str) -> None:
    change, message = BROKEN[case]
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ResultsError, match=message) as error:
        read_results(file)
    assert str(error.value).startswith(f"{file}: ")


def test_what_has_no_interval_and_no_length(tmp_path: Path) -> None:
    results = sample_results()
    score = results.scores[0]
    assert score.effective_length is not None
    bare = Value(0.5, None, None)
    curve = replace(score.effective_length, effective={"i2t": None, "t2i": None})
    score = replace(score, metrics={"t2i_r1": bare}, effective_length=curve)
    write_results(replace(results, scores=[score, *results.scores[1:]]), tmp_path / "results.json")
    read = read_results(tmp_path / "results.json").scores[0]
    assert read.metrics == {"t2i_r1": bare} and read.effective_length is not None
    assert read.effective_length.effective == {"i2t": None, "t2i": None}


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"none\.json could not be read as results"):
        read_results(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": 1, ')
    with pytest.raises(ResultsError, match=r"half\.json could not be read as results"):
        read_results(tmp_path / "half.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ResultsError, match=r"deep\.json could not be read as results"):
        read_results(tmp_path / "deep.json")


def test_what_would_be_refused_is_not_written(tmp_path: Path) -> None:
    results: Results = replace(sample_results(), scores=[replace(sample_results().scores[0], model="nobody")])
    with pytest.raises(ResultsError, match="nobody"):
        write_results(results, tmp_path / "results.json")
    assert not list(tmp_path.iterdir())
