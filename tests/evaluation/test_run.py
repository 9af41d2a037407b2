"""The command: checkpoints side by side, on a source of one's own and on a named benchmark."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import fork_server
import pytest
import torch
from caption_files import imagefolder, make_rows, png, write_images
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from longclip_hf.evaluation import run
from longclip_hf.evaluation.benchmarks import load_benchmark
from longclip_hf.evaluation.encoding import Encoder
from longclip_hf.evaluation.intervals import bootstrap_interval
from longclip_hf.evaluation.misses import Text
from longclip_hf.evaluation.query_store import QueryStore
from longclip_hf.images import decode_image
from longclip_hf.results import Results, Value, is_share, read_results
from modeling_longclip.compat import features

QUICK = ["--resamples", "100", "--device", "cpu"]
ROWS = 12
FILES = {"recall": ("png", "svg"), "lengths": ("png", "svg"), "report": ("csv", "md", "tex")}  # without a curve
LONG = "It stands beside a wide road with trees, and people walk by. " * 8  # beyond 77 tokens, not beyond 248


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions that differ at their beginning, or for the last two only at their end."""
    folder = tmp_path_factory.mktemp("photos")
    rows = make_rows(ROWS)
    for number, row in enumerate(rows):
        row["caption"] = f"A sign shows number {number}. {LONG}" if number < ROWS - 2 else f"{LONG} Number {number}."
    imagefolder(rows, folder)
    return folder


@pytest.fixture(scope="module")
def output(photos: Path, clip_folder: Path, longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on one source, with the page."""
    folder = tmp_path_factory.mktemp("results")
    given = [clip_folder, longclip_folder, "--benchmark", photos, "--output", folder, "--html", *QUICK]
    assert run.main([str(word) for word in given]) == 0
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> Results:
    return read_results(output / "results.json")


def recall_by_hand(model_folder: Path, photos: Path, limit: int) -> dict[str, float]:
    """R@1 with stock transformers, one caption at a time."""
    model, processor = AutoModel.from_pretrained(model_folder).eval(), AutoProcessor.from_pretrained(model_folder)
    source: Any = load_benchmark(str(photos))
    with torch.inference_mode():
        texts = [
            features(
                model.get_text_features(
                    **processor.tokenizer([text], truncation=True, max_length=limit, return_tensors="pt")
                )
            )[0]
            for text in source.captions
        ]
        pictures = [decode_image(image.read(), image.name) for image in source.images]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        images = features(model.get_image_features(pixel_values=pixels))
    similarity = F.normalize(images.double(), dim=-1) @ F.normalize(torch.stack(texts).double(), dim=-1).T
    own = similarity.diagonal()
    first = {"i2t": similarity - own[:, None], "t2i": (similarity - own).T}
    return {way: float(((found > -1e-9).sum(1) == 1).float().mean()) for way, found in first.items()}


def test_figures_are_those_of_stock_transformers(
    results: Results, photos: Path, clip_folder: Path, longclip_folder: Path
) -> None:
    for score, folder, limit in zip(results.scores, (clip_folder, longclip_folder), (77, 248), strict=True):
        expected = recall_by_hand(folder, photos, limit)
        assert {way: score.metrics[f"{way}_r1"].value for way in expected} == pytest.approx(expected, abs=1e-6)


def test_what_is_counted(results: Results, clip_folder: Path) -> None:
    stock, long = results.scores
    assert (stock.truncated, long.truncated) == (ROWS, 0)
    assert stock.ties >= 2  # cut at 77, the last two captions are the same
    assert [model.positions for model in results.models] == [77, 248]
    assert next(model.name for model in results.models) == clip_folder.name
    (info,) = results.benchmarks
    assert (info.kind, info.images, info.captions, sum(info.lengths)) == ("retrieval", ROWS, ROWS, ROWS)
    for score in results.scores:
        assert score.effective_length is not None
        assert score.effective_length.lengths[-1] in (77, 248)
        for way, curve in score.effective_length.recall.items():
            assert curve[-1].value == score.metrics[f"{way}_r1"].value
        for value in score.metrics.values():
            assert value.low is not None and value.high is not None
            assert value.low <= value.value <= value.high
    assert {d.metric for d in results.differences} >= {"i2t_r1", "t2i_r10", "t2i_map"}
    for difference in results.differences:
        apart = long.metrics[difference.metric].value - stock.metrics[difference.metric].value
        assert difference.value.value == pytest.approx(apart, abs=2e-6)  # of figures with six digits


def test_misses_are_those_that_the_first_model_gets_right(
    output: Path, results: Results, photos: Path, clip_folder: Path
) -> None:
    """And what a model did not read of their texts is known: a stock CLIP reads 77 tokens, the other all."""
    store = QueryStore(output / "queries")
    groups = {(group.model, group.direction): group for group in store.read_misses(results)}
    models, (info,) = results.models, results.benchmarks
    measured = [store.read(model, info, (False, False)) for model in models]
    assert measured[0] is not None and measured[1] is not None
    for direction in ("i2t", "t2i"):
        hits = [found.queries[f"{direction}_r1"] for found in measured if found is not None]
        first, second = groups[models[0].name, direction], groups[models[1].name, direction]
        assert (first.reference, first.total) == (None, int((hits[0] == 0).sum()))
        assert second.reference == models[0].name
        assert second.total == int(((hits[0] == 1) & (hits[1] == 0)).sum())
        assert len(second.shown) == min(6, second.total) and all(miss.rank > 1 for miss in second.shown)
    captions = list(load_benchmark(str(photos)).captions)
    for miss in groups[clip_folder.name, "i2t"].shown:
        for text in (*miss.expected, *miss.returned):
            assert isinstance(text, Text) and text.read + text.unread in captions and text.unread
    for miss in groups[models[1].name, "i2t"].shown:
        assert all(isinstance(text, Text) and not text.unread for text in miss.returned)


def test_what_is_written(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {file.name for file in output.iterdir()}
    assert files >= {"results.json", "report.md", "report.html", "effective_length.png", "recall.png", "lengths.png"}
    assert "data:image/jpeg" in (output / "report.html").read_text()


def test_a_second_run_encodes_nothing(
    output: Path, results: Results, photos: Path, clip_folder: Path, longclip_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("longclip_hf.evaluation.encoding.Encoder.forward", never)
    given = [clip_folder, longclip_folder, "--benchmark", photos, "--output", tmp_path, *QUICK]
    assert run.main([str(word) for word in [*given, "--cache", output / "features"]]) == 0
    again = read_results(tmp_path / "results.json")
    assert [score.metrics for score in again.scores] == [score.metrics for score in results.scores]


def test_zero_shot_classification(photos: Path, longclip_folder: Path, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "shapes" / name / f"{number}.png").write_bytes(png(number + 10 * (name == "red")))
    (tmp_path / "templates.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    # The templates are the classification's, and nothing to the retrieval beside it.
    given = [longclip_folder, "--benchmark", "imagefolder", photos, "--data", tmp_path / "shapes", "--html"]
    given += ["--no_effective_length", "--templates", tmp_path / "templates.txt", "--output", tmp_path / "out", *QUICK]
    assert run.main([str(word) for word in given]) == 0
    results = read_results(tmp_path / "out" / "results.json")
    assert results.benchmarks[0].classes == 2 and results.benchmarks[0].images == 6
    assert results.scores[0].metrics["top5"].value == 1
    assert "2 templates (templates.txt: `a photo of a {}.`, `a drawing of a {}.`)" in results.benchmarks[0].definition
    right = 6 * results.scores[0].metrics["top1"].value
    assert right == pytest.approx(round(right), abs=1e-4)
    # Both classes have three images.
    assert results.scores[0].metrics["mean_per_class_recall"].value == results.scores[0].metrics["top1"].value


def test_equal_images_are_reported(longclip_folder: Path, tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[1]["bytes"] = rows[0]["bytes"]
    (tmp_path / "photos").mkdir()
    imagefolder(rows, tmp_path / "photos")
    given = [longclip_folder, "--benchmark", tmp_path / "photos", "--output", tmp_path / "out", *QUICK]
    assert run.main([str(word) for word in [*given, "--no_effective_length"]]) == 0
    results = read_results(tmp_path / "out" / "results.json")
    assert any("2 images are byte for byte the same" in note for note in results.benchmarks[0].notes)
    assert results.scores[0].effective_length is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{model}", "--benchmark", "urban1k"], "needs --data"),
        (["{model}", "--benchmark", "urban1k", "--data", "nowhere"], "nowhere"),
        (["nowhere", "--benchmark", "{photos}"], "nowhere"),
        (["{model}", "{model}", "--benchmark", "{photos}"], "Given twice"),
        (["{model}", "--benchmark", "{photos}", "--caption_column", "title2"], "title2"),
        (["{model}", "--benchmark", "{photos}", "{photos}"], "Name every benchmark once"),
        (["{model}", "{model}/", "--benchmark", "{photos}"], "Given twice"),
        (["{model}", "--benchmark", "urban1k", "--data", "x", "--caption_column", "c"], "no columns to choose"),
        (["{model}", "--benchmark", "{photos}", "--split", "nope"], "nope"),
        (["{model}", "--benchmark", "{photos}", "--templates", "t.txt"], "mean nothing to it"),
        (["{model}", "--benchmark", "{photos}", "--dtype", "foo"], "There is no dtype 'foo'"),
        (["{model}", "--benchmark", "{photos}", "--device", "foo"], "There is no device 'foo'"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str], message: str, photos: Path, longclip_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [word.format(model=longclip_folder, photos=photos) for word in given]
    assert run.main([*QUICK, *words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_an_earlier_run_left_is_not_taken_for_this_one(longclip_folder: Path, tmp_path: Path) -> None:
    rows = make_rows(3)
    (tmp_path / "photos").mkdir()
    imagefolder(rows, tmp_path / "photos")
    (tmp_path / "photos" / "unnamed.png").write_bytes(png(99))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    given = [longclip_folder, "--benchmark", tmp_path / "photos", "--output", tmp_path / "out", *QUICK]
    assert run.main([str(word) for word in [*given, "--html"]]) == 0
    assert run.main([str(word) for word in [*given, "--no_effective_length", "--replace"]]) == 0
    left = {file.name for file in (tmp_path / "out").iterdir() if file.is_file()}
    written = {f"{name}.{end}" for name, ends in FILES.items() for end in ends}
    assert left == {"mine.txt", "results.json"} | written
    notes = read_results(tmp_path / "out" / "results.json").benchmarks[0].notes
    assert "images in the folder that no row names, left out: 1" in notes, notes


class TestOutputs:
    @pytest.fixture
    def given(self, photos: Path, longclip_folder: Path, tmp_path: Path) -> list[str]:
        words = [longclip_folder, "--benchmark", photos, "--output", tmp_path / "out", "--no_effective_length", *QUICK]
        return [str(word) for word in words]

    @pytest.mark.parametrize("name", ["results.json", "report.md", "report.tex", "recall.png", "report.html"])
    def test_what_others_wrote_is_not_overwritten(
        self, name: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """It is said before anything is encoded."""
        monkeypatch.setattr("longclip_hf.evaluation.encoding.Encoder.__init__", lambda *_, **__: pytest.fail("late"))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text('{"mine": 1}')
        assert run.main([*given, "--html"]) == 2
        said = capsys.readouterr().err
        assert name in said and "name another --output" in said and said.count("\n") == 1
        assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [(name, '{"mine": 1}')]

    def test_what_an_earlier_run_wrote_is_replaced_and_the_rest_stays(self, given: list[str], tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "report.html").write_text("mine")  # this run writes none
        assert run.main(given) == 0
        first = read_results(out / "results.json")
        assert first.files == sorted(f"{name}.{end}" for name, ends in FILES.items() for end in ends)
        (out / "effective_length.png").write_text("mine")
        assert run.main(given) == 2  # it could be written: that depends on the data
        (out / "effective_length.png").rename(out / "another.png")
        (out / "report.md").write_text("old")
        assert run.main(given) == 0
        assert (out / "report.md").read_text() != "old"
        assert (out / "report.html").read_text() == (out / "another.png").read_text() == "mine"

    def test_a_results_file_names_no_files_of_others(self, given: list[str], tmp_path: Path) -> None:
        assert run.main(given) == 0
        file = tmp_path / "out" / "results.json"
        (tmp_path / "mine.txt").write_text("mine")
        data = json.loads(file.read_text()) | {"files": ["../mine.txt", *read_results(file).files]}
        file.write_text(json.dumps(data))
        assert run.main(given) == 0
        assert (tmp_path / "mine.txt").read_text() == "mine"


class TestFailures:
    @pytest.fixture
    def broken(self, longclip_folder: Path, tmp_path: Path) -> Path:
        """A model whose settings are whole and whose weights are not."""
        folder = tmp_path / "broken"
        shutil.copytree(longclip_folder, folder)
        weights = load_file(folder / "model.safetensors")
        save_file({key: weights[key] for key in list(weights)[1:]}, folder / "model.safetensors", {"format": "pt"})
        return folder

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_model_that_fails_does_not_cost_the_others(
        self, place: int, broken: Path, photos: Path, clip_folder: Path, longclip_folder: Path, results: Results,
        output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        models = [clip_folder, longclip_folder]
        models.insert(place, broken)
        given = [*models, "--benchmark", photos, "--output", tmp_path / "out", "--html", *QUICK]
        assert run.main([str(word) for word in [*given, "--cache", output / "features"]]) == 2
        # Some releases of transformers warn of such weights too.
        said, last = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert said.startswith("error: broken: ") and "are missing" in said
        assert last.startswith("error: Not evaluated, for what is said above: broken; the other figures are in")
        found = read_results(tmp_path / "out" / "results.json")
        assert [(failure.model, failure.benchmark) for failure in found.failures] == [("broken", None)]
        assert said.endswith(found.failures[0].error)
        assert [score.metrics for score in found.scores] == [score.metrics for score in results.scores]
        assert {difference.reference for difference in found.differences} == {
            clip_folder.name
        }  # the first of the rest
        assert (tmp_path / "out" / "report.html").exists()
        assert found.failures[0].error.split(":")[0] in (tmp_path / "out" / "report.md").read_text()

    def test_nor_a_benchmark_the_others(
        self, photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damaged = tmp_path / "damaged"
        shutil.copytree(photos, damaged)
        next(damaged.glob("*.png")).write_bytes(b"no image")
        given = [longclip_folder, "--benchmark", damaged, photos, "--output", tmp_path / "out"]
        assert run.main([str(word) for word in [*given, "--no_effective_length", *QUICK]]) == 2
        found = read_results(tmp_path / "out" / "results.json")
        assert [info.name for info in found.benchmarks] == [score.benchmark for score in found.scores] == [str(photos)]
        assert [failure.benchmark for failure in found.failures] == [str(damaged)]

    def test_where_all_fail_nothing_is_written(
        self, broken: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(broken, tmp_path / "other")
        given = [broken, tmp_path / "other", "--benchmark", photos, "--output", tmp_path / "out", *QUICK]
        assert run.main([str(word) for word in given]) == 2
        assert capsys.readouterr().err.endswith("broken, other; nothing was written.\n")
        assert not (tmp_path / "out" / "results.json").exists()

    @pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json"])
    def test_settings_are_checked_before_the_first_is_encoded(
        self, missing: str, photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("longclip_hf.evaluation.encoding.Encoder.__init__", lambda *_, **__: pytest.fail("late"))
        shutil.copytree(longclip_folder, tmp_path / "second")
        (tmp_path / "second" / missing).unlink()
        given = [longclip_folder, tmp_path / "second", "--benchmark", photos, "--output", tmp_path / "out", *QUICK]
        assert run.main([str(word) for word in given]) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "second") in said and said.count("\n") == 1

    def test_imports_are_checked_before_the_first_is_encoded(
        self, photos: Path, longclip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        find = importlib.util.find_spec
        monkeypatch.setattr("longclip_hf.evaluation.encoding.Encoder.__init__", lambda *_, **__: pytest.fail("late"))
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *of: None if name == "matplotlib" else find(name, *of)
        )
        given = [longclip_folder, "--benchmark", photos, "--output", tmp_path / "out", *QUICK]
        assert run.main([str(word) for word in given]) == 2
        assert "The report needs matplotlib" in capsys.readouterr().err

    def test_results_are_written_after_each_model(
        self, photos: Path, clip_folder: Path, longclip_folder: Path, output: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """A run that is ended in its second model leaves the figures of the first."""
        load = Encoder.__init__

        def ended(self: Encoder, name: str, *args: Any, **options: Any) -> None:
            if name == str(longclip_folder):
                raise KeyboardInterrupt
            load(self, name, *args, **options)

        monkeypatch.setattr(Encoder, "__init__", ended)
        given = [clip_folder, longclip_folder, "--benchmark", photos, "--output", tmp_path / "out", *QUICK]
        assert run.main([str(word) for word in [*given, "--cache", output / "features"]]) == 130
        found = read_results(tmp_path / "out" / "results.json")
        assert [model.name for model in found.models] == [score.model for score in found.scores] == [clip_folder.name]


def test_captions_are_prepared(longclip_folder: Path, tmp_path: Path) -> None:
    """As asked, and results.json says it."""
    (tmp_path / "photos").mkdir()
    rows = make_rows(2)
    rows[0]["caption"] = "&amp;amp; <|endoftext|> a dog"
    rows[1]["caption"] = "a dog"
    imagefolder(rows, tmp_path / "photos")
    given = [
        str(word) for word in (longclip_folder, "--benchmark", tmp_path / "photos", "--no_effective_length", *QUICK)
    ]
    lengths = []
    for name, options in (("raw", []), ("prepared", ["--clean_captions", "--neutralise_special_tokens"])):
        assert run.main([*given, "--output", str(tmp_path / name), *options]) == 0
        found = read_results(tmp_path / name / "results.json")
        assert (found.clean_captions, found.neutralise_special_tokens) == (bool(options), bool(options))
        assert ("captions cleaned" in (tmp_path / name / "report.md").read_text()) == bool(options)
        (benchmark,) = found.benchmarks
        assert [note for note in benchmark.notes if "literal <|endoftext|>" in note]
        lengths.append(len(benchmark.lengths) - 1)
    assert lengths[0] != lengths[1]


def test_groups_of_images_that_are_alike(
    photos: Path, longclip_folder: Path, results: Results, output: Path, tmp_path: Path
) -> None:
    """The figures stay, the intervals are those of groups; who measured without groups is not mixed with it."""
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    films = [{**row, "film": f"film {number // 4}"} for number, row in enumerate(rows)]

    def evaluated(listed: list[dict[str, Any]], *words: str) -> int:
        (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
        given = [longclip_folder, "--benchmark", source, "--output", tmp_path / "out", "--no_effective_length", *QUICK]
        return run.main([str(word) for word in [*given, "--cache", output / "features", *words]])

    assert evaluated(films, "--group_column", "film") == 0
    found = read_results(tmp_path / "out" / "results.json")
    assert found.benchmarks[0].groups == 3
    assert f"Retrieval, {ROWS} images in 3 groups, {ROWS} captions." in (tmp_path / "out" / "report.md").read_text()
    plain = results.scores[1].metrics
    measured = QueryStore(tmp_path / "out" / "queries").read(found.models[0], found.benchmarks[0], (False, False))
    assert measured is not None
    for metric, value in found.scores[0].metrics.items():
        assert value.value == plain[metric].value
        groups = measured.groups[metric]
        assert groups is not None and sorted(groups.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
        if is_share(metric):
            expected = bootstrap_interval(measured.queries[metric], groups, 100)
            assert (value.low, value.high) == pytest.approx((expected.low, expected.high), abs=2e-6)
    assert evaluated(films) == 2  # without groups, into the same results
    assert evaluated(films, "--group_column", "scene") == 2
    assert evaluated([*films[1:], {**films[0], "film": ""}], "--group_column", "film") == 2
    assert evaluated([*films, {**films[0], "film": "film 2"}], "--group_column", "film") == 2
    skipped = evaluated(
        [*films[1:], {**films[0], "film": ""}], "--group_column", "film", "--on_bad_row", "skip", "--replace"
    )
    assert skipped == 0
    found = read_results(tmp_path / "out" / "results.json")
    assert (found.benchmarks[0].groups, found.benchmarks[0].images) == (3, ROWS - 1)
    assert "no_group" in (tmp_path / "out" / "bad_rows.jsonl").read_text()


def test_figures_of_sentences(longclip_folder: Path, tmp_path: Path) -> None:
    """They join those that are there; R@1 without the first sentence is that of captions which have none."""
    rows = make_rows(6)
    for number, row in enumerate(rows):
        row["caption"] = (
            f"Sign {number}." if number == 5 else f"A sign. Its number is {number}. It is {number + 7} high."
        )
    dropped = [
        row | {"caption": row["caption"] if number == 5 else row["caption"].removeprefix("A sign. ")}
        for number, row in enumerate(rows)
    ]
    for name, listed in (("photos", rows), ("dropped", dropped)):
        (tmp_path / name).mkdir()
        imagefolder(listed, tmp_path / name)

    def evaluated(source: str, *words: str) -> Results:
        given = [longclip_folder, "--benchmark", tmp_path / source, "--output", tmp_path / f"{source}-out", *QUICK]
        assert run.main([str(word) for word in [*given, "--no_effective_length", *words]]) == 0
        return read_results(tmp_path / f"{source}-out" / "results.json")

    plain = evaluated("photos").scores[0].metrics
    results = evaluated("photos", "--sentences")
    found = results.scores[0].metrics
    assert {key: found[key] for key in plain} == plain and len(found) == len(plain) + 8
    expected = evaluated("dropped").scores[0].metrics
    for side in ("i2t", "t2i"):
        assert found[f"{side}_r1_first_dropped"] == expected[f"{side}_r1"]
    encoder = Encoder(longclip_folder, device="cpu")
    texts = [
        ["A sign.", f"A sign. Its number is {n}.", f"A sign. Its number is {n}. It is {n + 7} high."] for n in range(5)
    ]
    embeds = F.normalize(encoder.encode_texts([text for three in texts for text in three]).embeds.double(), dim=1)
    source: Any = load_benchmark(str(tmp_path / "photos"))
    images = F.normalize(encoder.encode_images(source.images[:5]).double(), dim=1)
    cosines = (embeds.view(5, 3, -1) * images[:, None]).sum(2)
    by_hand = [float(torch.corrcoef(torch.stack([torch.arange(3.0).double(), row]))[0, 1]) for row in cosines]
    assert found["himo"].value == pytest.approx(sum(by_hand) / 5, abs=1e-6)
    assert found["himo_rises"].value == pytest.approx(float((cosines.diff() > 0).double().mean()), abs=1e-6)
    assert "captions of one sentence, which has no HiMo@K and no first one to drop: 1" in results.benchmarks[0].notes
    assert "| HiMo@K " in (tmp_path / "photos-out" / "report.md").read_text()


def test_bad_rows_are_skipped_when_asked(longclip_folder: Path, tmp_path: Path) -> None:
    """They are counted in the notes and named in a file, and the 16 bits of another image are said too."""
    (tmp_path / "photos").mkdir()
    rows = make_rows(5)
    rows[1]["bytes"] = rows[1]["bytes"][:60]
    rows[2]["bytes"] = None
    imagefolder(rows, tmp_path / "photos")
    Image.new("I;16", (40, 32), 3000).save(tmp_path / "photos" / "0003.png")
    for number in range(2):
        (tmp_path / "classes" / f"class {number}").mkdir(parents=True)
        write_images(make_rows(3), tmp_path / "classes" / f"class {number}")
    broken = tmp_path / "classes" / "class 0" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    given = [*map(str, (longclip_folder, "--benchmark", tmp_path / "photos", "imagefolder", "--data"))]
    given += [str(tmp_path / "classes"), "--no_effective_length", *QUICK, "--output", str(tmp_path / "out")]
    assert run.main(given) == 2
    assert run.main([*given, "--on_bad_row", "skip"]) == 0
    benchmark, classes = read_results(tmp_path / "out" / "results.json").benchmarks
    assert classes.images == 5
    assert [note for note in classes.notes if "left out" in note] == ["rows left out, unreadable (bad_rows.jsonl): 1"]
    assert benchmark.images == 3
    assert "rows left out, missing (bad_rows.jsonl): 1" in benchmark.notes
    assert "rows left out, unreadable (bad_rows.jsonl): 1" in benchmark.notes
    assert "images of more than 8 bits, scaled to 8 by the range of their values: 1" in benchmark.notes
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["cause"] for row in bad] == ["missing", "unreadable", "unreadable"]
    assert bad[-1]["row"] == str(broken)


@pytest.mark.parametrize("captions", [1, 3])
def test_one_image_has_no_interval_and_no_curve(
    captions: int, clip_folder: Path, longclip_folder: Path, tmp_path: Path
) -> None:
    """Nor has any number of captions of one image."""
    (tmp_path / "photos").mkdir()
    imagefolder(make_rows(1), tmp_path / "photos")
    row = {"file_name": "0000.png", "caption": "A sign.", **{f"more{n}": f"{LONG} {n}" for n in range(captions - 1)}}
    (tmp_path / "photos" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    given = [clip_folder, longclip_folder, "--benchmark", tmp_path / "photos", "--output", tmp_path / "out", "--html"]
    given += ["--caption_column", "caption", *(f"more{number}" for number in range(captions - 1)), *QUICK]
    assert run.main([str(word) for word in given]) == 0
    results = read_results(tmp_path / "out" / "results.json")
    for score in results.scores:
        assert score.effective_length is None and score.metrics["t2i_r1"] == Value(1, None, None)
    assert {(d.value.low, d.value.high) for d in results.differences} == {(None, None)}
    assert "[" not in (tmp_path / "out" / "report.md").read_text().split("## Definitions")[0].replace("[95 %", "")


def test_fewer_than_100_resamples_are_refused(
    longclip_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main([str(longclip_folder), "--benchmark", str(photos), "--resamples", "99"])
    assert "--resamples: must be 100 or more" in capsys.readouterr().err


def test_rows_with_the_same_bytes_are_one_image(tmp_path: Path) -> None:
    rows = [row for row in make_rows(4) for _ in range(2)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {
        "image": [{"bytes": row["bytes"], "path": None} for row in rows],
        "caption": [f"{row['caption']} Once more {number}." for number, row in enumerate(rows)],
    }
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows.parquet")
    source: Any = load_benchmark(str(tmp_path / "rows.parquet"))
    assert (len(source.images), len(source.captions), list(source.image_of)) == (4, 8, [0, 0, 1, 1, 2, 2, 3, 3])


def test_names_and_revisions(tmp_path: Path) -> None:
    for folder in ("a/tuned", "b/tuned", "odd@name"):
        (tmp_path / folder).mkdir(parents=True)
    first, second = f"{tmp_path}/a/tuned", f"{tmp_path}/b/tuned"
    assert run.display_names([first, "org/clip"]) == ["tuned", "org/clip"]
    assert run.display_names([first, second]) == [first, second]
    assert run.split_revision("org/clip@v1") == ("org/clip", "v1")
    assert run.split_revision("org/clip") == ("org/clip", None)
    assert run.split_revision(f"{tmp_path}/odd@name") == (f"{tmp_path}/odd@name", None)


@pytest.mark.slow
def test_two_processes_give_the_same_figures(
    results: Results, photos: Path, clip_folder: Path, longclip_folder: Path, tmp_path: Path
) -> None:
    root = Path(run.__file__).parents[1]
    given = [clip_folder, longclip_folder, "--benchmark", photos, "--output", tmp_path, *QUICK]
    line = [sys.executable, str(root / "evaluation" / "run.py"), *map(str, given)]
    done = fork_server.run_ranks(line, 2, env={"ACCELERATE_USE_CPU": "1"})
    assert [process.returncode for process in done] == [0, 0], [process.stderr for process in done]
    found = read_results(tmp_path / "results.json")
    assert [score.metrics for score in found.scores] == [score.metrics for score in results.scores]
    assert [process.stdout.count("results.json") for process in done] == [1, 0]  # one process reports
