"""Runs that add to each other, and reports of any collection of results."""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_files import imagefolder, make_rows
from safetensors.torch import load_file, save_file
from sample_results import sample_results

from longclip_hf.errors import ResultsError
from longclip_hf.evaluation import report, run
from longclip_hf.evaluation.data import ImageFile
from longclip_hf.evaluation.exports import csv_table, latex_tables
from longclip_hf.evaluation.joining import join, told_apart, with_reference
from longclip_hf.evaluation.query_store import QueryStore
from longclip_hf.evaluation.scores import Measured
from longclip_hf.results import Results, Value, read_results, write_results

QUICK = ["--resamples", "100", "--device", "cpu", "--no_effective_length"]


def evaluate(output: Path, *words: object) -> Results:
    assert run.main([str(word) for word in [*words, "--output", output, *QUICK]]) == 0
    return read_results(output / "results.json")


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    """They are tested elsewhere, and take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("outputs", "page"):
            patch.setattr(f"longclip_hf.evaluation.{place}.plots", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for begin in (0, 20):
        folder = tmp_path_factory.mktemp(f"photos{begin}")
        rows = make_rows(begin + 8)[begin:]
        for number, row in enumerate(rows):
            row["caption"] = f"A sign shows number {number + begin}."
        imagefolder(rows, folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def at_once(
    photos: list[Path], clip_folder: Path, longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("at-once")
    evaluate(output, clip_folder, longclip_folder, "--benchmark", *photos)
    return output


class TestRuns:
    def test_one_after_the_other_are_one(
        self, at_once: Path, photos: list[Path], clip_folder: Path, longclip_folder: Path, tmp_path: Path
    ) -> None:
        """A model, then a benchmark, then the other model: the same figures and differences as in one run."""
        cache = ["--cache", at_once / "features"]
        evaluate(tmp_path, clip_folder, "--benchmark", photos[0], *cache)
        first = evaluate(tmp_path, clip_folder, "--benchmark", photos[1], *cache)
        assert [info.name for info in first.benchmarks] == [str(folder) for folder in photos]
        joined = evaluate(tmp_path, longclip_folder, "--benchmark", *photos, *cache)
        expected = read_results(at_once / "results.json")
        assert [model.name for model in joined.models] == [model.name for model in expected.models]
        of = {(score.model, score.benchmark): score.metrics for score in expected.scores}
        assert {(score.model, score.benchmark): score.metrics for score in joined.scores} == of
        assert joined.differences and sorted(map(str, joined.differences)) == sorted(map(str, expected.differences))
        assert len(joined.earlier) == 2 and str(clip_folder) in joined.earlier[0].command
        text = (tmp_path / "report.md").read_text()
        assert text.count("    longclip-evaluate ") == 3 and f"Differences to {clip_folder.name}" in text

    @pytest.mark.parametrize("kind", ["model", "benchmark", "preparation"])
    def test_a_conflict_is_said_before_anything_is_encoded(
        self, kind: str, at_once: Path, photos: list[Path], longclip_folder: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        model, source, output = tmp_path / "model", tmp_path / "photos", tmp_path / "out"
        shutil.copytree(longclip_folder, model)
        shutil.copytree(photos[0], source)
        before = evaluate(output, model, "--benchmark", source, "--cache", at_once / "features")
        given: list[object] = [model, "--benchmark", source]
        if kind == "model":
            weights = load_file(model / "model.safetensors")
            weights["text_projection.weight"] += 0.1
            save_file(weights, model / "model.safetensors", {"format": "pt"})
            words = "the model 'model' has other weights or settings in each: "
        elif kind == "benchmark":
            (source / "metadata.jsonl").write_text((source / "metadata.jsonl").read_text().replace("sign", "board"))
            words = f"the benchmark '{source}' has other data in each: "
        else:
            given.append("--clean_captions")
            words = "texts were read with --clean_captions in one of them"
        with monkeypatch.context() as patch:
            patch.setattr("longclip_hf.evaluation.encoding.Encoder.forward", lambda *_: pytest.fail("late"))
            assert run.main([str(word) for word in [*given, "--output", output, *QUICK]]) == 2
        said = capsys.readouterr().err
        assert words in said and "Name another --output, or replace what is there with --replace." in said
        assert read_results(output / "results.json") == before
        if kind == "model":
            replaced = evaluate(output, *given, "--replace")
            assert replaced.earlier == [] and len(replaced.scores) == 1

    def test_a_run_of_all_models_decides_their_order(
        self, at_once: Path, photos: list[Path], clip_folder: Path, longclip_folder: Path, tmp_path: Path
    ) -> None:
        """The first had failed, say: what the others are compared with is the first again."""
        cache = ["--benchmark", photos[0], "--cache", at_once / "features"]
        evaluate(tmp_path, longclip_folder, *cache)
        joined = evaluate(tmp_path, clip_folder, longclip_folder, *cache)
        assert [model.name for model in joined.models] == [clip_folder.name, longclip_folder.name]
        assert {difference.reference for difference in joined.differences} == {clip_folder.name}

    def test_images_are_hashed_once_not_for_every_model(
        self, at_once: Path, photos: list[Path], clip_folder: Path, longclip_folder: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Each is read once for its digest, and once more by each model that decodes it."""
        reads: list[str] = []
        load = run._load_benchmarks

        def counted(options: Any) -> Any:
            def counting(image: ImageFile) -> ImageFile:
                return ImageFile(image.name, lambda: reads.append(image.name) or image.read())

            benchmarks, left_out = load(options)
            return [
                replace(found, images=[counting(image) for image in found.images]) for found in benchmarks
            ], left_out

        monkeypatch.setattr(run, "_load_benchmarks", counted)
        given = [clip_folder, longclip_folder, "--benchmark", *photos, "--workers", 0]
        evaluate(tmp_path / "stored", *given, "--cache", at_once / "features")
        assert len(reads) == len(set(reads)) == 16
        reads.clear()
        evaluate(tmp_path / "new", *given)
        assert len(reads) == 3 * 16


@pytest.fixture(scope="module")
def folders(
    photos: list[Path], clip_folder: Path, longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    evaluate(folder / "a", clip_folder, "--benchmark", photos[0])
    evaluate(folder / "b", longclip_folder, "--benchmark", *photos)
    return folder / "a", folder / "b"


class TestReports:
    def test_a_collection(
        self, folders: tuple[Path, Path], clip_folder: Path, longclip_folder: Path, tmp_path: Path
    ) -> None:
        """Its differences are those of a run of both models, as both left what they gave query by query."""
        given = [folders[0] / "results.json", folders[1], "--resamples", "100", "--quiet", "--output"]
        output = tmp_path / "report"
        assert report.main([str(word) for word in [*given, output, "--html"]]) == 0
        found = read_results(output / "results.json")
        assert [model.name for model in found.models] == [clip_folder.name, longclip_folder.name]
        assert len(found.scores) == 3
        assert {(d.model, d.reference) for d in found.differences} == {(longclip_folder.name, clip_folder.name)}
        once = found.differences[0]
        values = {score.model: score.metrics[once.metric].value for score in found.scores[:2]}
        assert once.value.value == pytest.approx(values[longclip_folder.name] - values[clip_folder.name], abs=2e-6)
        assert once.value.low is not None
        names = {file.name for file in output.iterdir()}
        assert names == {"results.json", "report.md", "report.html", "report.csv", "report.tex"}
        turned = [*given, tmp_path / "turned", "--reference", longclip_folder.name]
        assert report.main([str(word) for word in turned]) == 0
        found = read_results(tmp_path / "turned" / "results.json")
        assert found.differences[0].reference == longclip_folder.name
        assert found.differences[0].value.value == -once.value.value

    def test_results_that_would_be_lost(self, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        before = (folders[1] / "results.json").read_bytes()
        assert report.main([str(folders[0]), "--output", str(folders[1])]) == 2
        assert "2 figures of models on benchmarks that none of the given files has" in capsys.readouterr().err
        assert (folders[1] / "results.json").read_bytes() == before
        # Its own results are rendered again, and stay as they are.
        assert report.main([str(folders[1]), "--output", str(folders[1]), "--quiet"]) == 0
        assert (folders[1] / "results.json").read_bytes() == before

    def test_bad_input_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert report.main([str(tmp_path / "none.json"), "--output", str(tmp_path / "out")]) == 2
        assert "none.json could not be read as results" in capsys.readouterr().err
        write_results(sample_results(), tmp_path / "results.json")
        assert report.main([str(tmp_path), "--output", str(tmp_path / "out"), "--reference", "nobody"]) == 2
        assert "There is no model 'nobody'" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestJoin:
    def test_other_weights_under_one_name_are_told_apart(self) -> None:
        first, second = sample_results(), sample_results()
        models = [replace(second.models[0], fingerprint="e" * 64), *second.models[1:]]
        second = replace(second, models=models, date="2025-03-02T12:00:00+00:00")
        with pytest.raises(ResultsError, match="'openai/clip-vit-base-patch16' has other weights or settings in each"):
            join([first, second])
        parts, said = told_apart([first, second])
        joined = join(parts)
        assert [model.name for model in joined.models] == [
            "openai/clip-vit-base-patch16 (0f3a9c0)", *[model.name for model in first.models[1:]],
            "openai/clip-vit-base-patch16 (eeeeeee)",
        ]  # fmt: skip
        assert len(joined.scores) == 12 and len(said) == 1
        assert said[0].startswith("the model 'openai/clip-vit-base-patch16' has other weights or settings in each")

    def test_other_data_or_definitions_are_told_apart(self) -> None:
        first = sample_results()
        other = replace(first.benchmarks[0], fingerprint="d" * 64, definition="whole captions")
        parts, said = told_apart([first, replace(first, benchmarks=[other, *first.benchmarks[1:]])])
        assert [info.name for info in join(parts).benchmarks] == [
            "Urban1k (9c1e77a)", "COCO 2017 5k", "CIFAR-10", "Urban1k (ddddddd)",
        ]  # fmt: skip
        assert "another definition in each" in said[0]

    def test_texts_that_were_prepared_differently(self) -> None:
        first = sample_results()
        with pytest.raises(ResultsError, match="--clean_captions in one of them and without it in the other"):
            join([first, replace(first, clean_captions=True)])

    def test_the_later_metric_counts_and_the_others_stay(self) -> None:
        first = sample_results()
        newer = replace(first.scores[0], metrics={"i2t_r1": Value(0.5, 0.4, 0.6)}, effective_length=None)
        joined = join([first, replace(first, scores=[newer], differences=[])])
        assert joined.scores[0].metrics == {**first.scores[0].metrics, "i2t_r1": Value(0.5, 0.4, 0.6)}
        assert joined.scores[0].effective_length == first.scores[0].effective_length
        # Those of the two other models were to it, on that benchmark.
        assert {d.benchmark for d in joined.differences} == {"COCO 2017 5k", "CIFAR-10"}

    def test_the_reference_is_the_first_model(self) -> None:
        name = sample_results().models[2].name
        assert with_reference(sample_results(), name).models[0].name == name


def test_queries_are_kept_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = sample_results()
    model, info = results.models[0], results.benchmarks[0]
    hits, precision = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor([1 / 3, 0.1, 1.0]).double()
    of = torch.tensor([0, 0, 300])
    first = Measured({"t2i_r1": hits, "t2i_map": precision}, {"t2i_r1": of, "t2i_map": of}, {}, 0)
    store = QueryStore(tmp_path / "queries")
    assert store.read(model, info, (False,)) is None
    store.write(model, info, (False,), first)
    store.write(model, info, (False,), Measured({"i2t_r1": hits}, {"i2t_r1": None}, {}, 0))
    found = QueryStore(tmp_path / "elsewhere", tmp_path / "queries").read(model, info, (False,))
    assert found is not None and found.queries.keys() == {"t2i_r1", "t2i_map", "i2t_r1"}
    assert torch.equal(found.queries["t2i_map"], precision) and torch.equal(found.queries["t2i_r1"], hits)
    assert found.groups["i2t_r1"] is None and found.groups["t2i_map"].tolist() == [0, 0, 300]
    assert store.read(model, info, (True,)) is None and store.read(results.models[1], info, (False,)) is None
    (file,) = (tmp_path / "queries").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert store.read(model, info, (False,)) is None
    assert "can be deleted" in caplog.text


def test_csv_has_every_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(sample_results()))))
    of = {(row["benchmark"], row["model"], row["metric"]): row for row in rows}
    assert len(of) == len(rows)
    tuned = of["Urban1k", "runs/urban/checkpoint-600", "i2t_r1"]
    assert (tuned["value"], tuned["difference"], tuned["difference_low"]) == ("0.789", "0.108", "0.096")
    assert tuned["reference"] == "openai/clip-vit-base-patch16"
    first = of["Urban1k", "openai/clip-vit-base-patch16", "i2t_r1"]
    assert (first["reference"], first["difference"]) == ("", "")
    assert of["Urban1k", "runs/urban/checkpoint-600", "t2i_effective_length"]["value"] == "150"
    assert of["Urban1k", "long-clip-vit-base-patch16", "ties"]["value"] == "3"


def test_latex_is_whole_and_escaped() -> None:
    results = sample_results()
    name = r"a_b & 50% \x{$^~#}"
    models = [replace(results.models[0], name=name), *results.models[1:]]
    scores = [replace(s, model=name) if s.model == results.models[0].name else s for s in results.scores]
    differences = [replace(d, reference=name) for d in results.differences]
    text = latex_tables(replace(results, models=models, scores=scores, differences=differences))
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\begin{tabular}") == 7
    assert r"a\_b \& 50\% \textbackslash{}x\{\$\textasciicircum{}\textasciitilde{}\#\}" in text
    assert r"    Image to text, R@1 & 68.1 {\scriptsize [65.2, 71.0]} & 67.4 {\scriptsize [64.5, 70.3]}" in text
    assert r"\textbf{+10.8} {\scriptsize [+9.6, +12.0]}" in text and "$-$0.7" in text
    depth = 0
    for i, character in enumerate(text):
        if text[i - 1] != "\\":
            depth += {"{": 1, "}": -1}.get(character, 0)
    assert depth == 0


def test_results_of_before_are_read(tmp_path: Path) -> None:
    """A file without what was added to the schema."""
    write_results(sample_results(), tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    del data["earlier"]
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert read_results(tmp_path / "results.json").earlier == []
