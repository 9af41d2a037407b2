"""What a card claims: the folder's own record, what the user says, and figures of results files."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from sample_results import sample_results

from longclip_hf import results as evaluation_results
from longclip_hf.conversion import card
from longclip_hf.conversion.card import make_card, read_evaluations, read_origin
from longclip_hf.errors import ConversionError, LongCLIPError, ResultsError

Copy = Callable[[Path], Path]
NAME = "long-clip-vit-base-patch16"  # in the sample


@pytest.fixture
def results() -> dict[str, Any]:
    """The sample with one benchmark whose numbers are easy to follow."""
    data = copy.deepcopy(asdict(sample_results()))
    score = next(s for s in data["scores"] if (s["model"], s["benchmark"]) == (NAME, "Urban1k"))
    score["metrics"] = {
        "t2i_r1": {"value": 0.5, "low": 0.475, "high": 0.525},
        "i2t_r5": {"value": 0.8755, "low": 0.875, "high": 0.876},
        "i2t_median_rank": {"value": 2, "low": 1, "high": 3.5},
    }
    score["ties"], score["truncated"] = 3, 1234
    data["scores"] = [s for s in data["scores"] if s["benchmark"] == "Urban1k"]
    return data


@pytest.fixture
def file(results: dict[str, Any], tmp_path: Path) -> Path:
    return write(results, tmp_path / "results.json")


def write(results: Any, path: Path) -> Path:
    path.write_text(json.dumps(results))
    return path


def measured(key: str, value: Any, low: float = 0, high: float = 1) -> Callable[[Any], None]:
    """Gives the model a metric."""
    return lambda results: results["scores"][1]["metrics"].update({key: {"value": value, "low": low, "high": high}})


def metadata(text: str) -> dict[str, Any]:
    return dict(ModelCard(text).data.to_dict())


class TestOrigin:
    def test_of_a_stretched_folder_is_what_the_stretch_wrote(self, longclip_folder: Path) -> None:
        origin = read_origin(longclip_folder)
        assert not origin.trained
        assert (origin.record["source"], origin.record["rows"], origin.record["length"]) == ("tiny-clip", 77, 248)
        assert origin.record["proofs"]["kept rows"] == "rows 0 ... 19 bit-identical"
        command = (
            "python conversion/stretch.py tiny-clip --method knowledge-preserving --keep=20 --ratio=4 --length=248 "
            "--arithmetic=float32 --output DIR"
        )
        assert origin.command() == command

    @pytest.mark.parametrize(
        "trace",
        ["training_args.bin", "trainer_state.json", "optimizer.pt", "all_results.json", "adapters/x", "checkpoint-3/"],
    )
    def test_training_leaves_traces_that_outweigh_an_older_card(
        self, trace: str, longclip_folder: Path, copy_of: Copy
    ) -> None:
        folder = copy_of(longclip_folder)
        (folder / trace).parent.mkdir(exist_ok=True)
        (folder / trace).mkdir() if trace.endswith("/") else (folder / trace).write_text("{}")
        origin = read_origin(folder)
        assert origin.trained and origin.record == {} and origin.command() is None

    def test_the_user_knows_too(self, longclip_folder: Path) -> None:
        assert read_origin(longclip_folder, fine_tuned=True).trained

    def test_of_no_card_is_unknown(self, longclip_folder: Path, copy_of: Copy) -> None:
        folder = copy_of(longclip_folder)
        (folder / "README.md").unlink()
        origin = read_origin(folder)
        assert (origin.trained, origin.record, origin.stated, origin.command()) == (False, {}, {}, None)
        assert not origin.own_card

    def test_a_card_that_cannot_be_read_is_named(self, longclip_folder: Path, copy_of: Copy) -> None:
        folder = copy_of(longclip_folder)
        (folder / "README.md").write_text("---\na: [\n---\n")
        with pytest.raises(ConversionError, match=r"README.md has metadata that are no YAML"):
            read_origin(folder)

    def test_the_command_of_a_converted_folder(self) -> None:
        record = {
            "converted": True, "two_tables": True, "repository": "BeichenZhang/LongCLIP-B", "source": "longclip B.pt",
            "keep": 20, "precision": "as-released", "dtype": "float16",
        }  # fmt: skip
        command = (
            "python conversion/original.py BeichenZhang/LongCLIP-B 'longclip B.pt' --keep=20 --precision=as-released "
            "--dtype float16 --output DIR"
        )
        assert card.Origin(False, record, {}, True, None).command() == command
        # Others need options that are not recorded.
        assert card.Origin(False, record | {"two_tables": False}, {}, True, None).command() is None


class TestCard:
    def test_of_a_stretched_folder(self, longclip_folder: Path) -> None:
        made = make_card(
            longclip_folder, "user/long", read_origin(longclip_folder), base_model="user/clip", license="mit",
            datasets=["user/captions"],
        )  # fmt: skip
        said = metadata(made.text)
        assert said.pop("longclip") == read_origin(longclip_folder).record
        assert said == {
            "base_model": "user/clip",
            "base_model_relation": "finetune",
            "datasets": ["user/captions"],
            "language": "en",
            "library_name": "transformers",
            "license": "mit",
            "pipeline_tag": "zero-shot-image-classification",
            "tags": ["clip", "long-clip"],
        }
        assert made.unstated == ["a measured figure (--results)"]
        assert "It has not been fine-tuned" in made.text
        assert "| proven: kept rows | rows 0 ... 19 bit-identical |" in made.text
        assert "\n    python conversion/stretch.py tiny-clip --method" in made.text
        assert 'AutoModel.from_pretrained("user/long", trust_remote_code=True)  # LongCLIPModel' in made.text
        assert "THIS_FOLDER_OR_REPO" not in made.text and "{{" not in made.text and "{%" not in made.text
        assert "## Measured" not in made.text

    def test_of_a_fine_tuned_folder_claims_nothing_of_the_stretch(self, longclip_folder: Path, copy_of: Copy) -> None:
        folder = copy_of(longclip_folder)
        (folder / "trainer_state.json").write_text('{"global_step": 600, "log_history": [{"eval_i2t_r1": 0.987}]}')
        made = make_card(folder, "user/tuned", read_origin(folder), datasets=["user/captions"])
        text = " ".join(made.text.split())
        assert "fine-tuned on user/captions." in text and "Fine-tuning changed its features" in text
        assert "not been fine-tuned" not in text and "bit-identical" not in text and "exactly the features" not in text
        assert "| trained for | 600 steps |" in text
        assert "0.987" not in text and "98.7" not in text  # a figure of no results file
        assert "Nothing was measured for this card" in text
        assert made.unstated == [
            "the licence (--license)", "the base model (--base-model)", "the command that made it (--made-with)",
            "a measured figure (--results)",
        ]  # fmt: skip
        assert "license" not in metadata(made.text) and "base_model_relation" not in metadata(made.text)

    def test_of_an_unknown_folder_claims_nothing(self, longclip_folder: Path, copy_of: Copy) -> None:
        folder = copy_of(longclip_folder)
        (folder / "README.md").unlink()
        made = make_card(folder, "user/long", read_origin(folder), made_with="make `it`\nagain")
        assert "How these weights came to be is not recorded" in made.text
        assert "\n    make `it`\n    again\n" in made.text
        assert "fine-tun" not in made.text.lower() and "bit-identical" not in made.text
        (folder / "README.md").write_text(made.text)
        assert make_card(folder, "user/long", read_origin(folder)).text == made.text

    @pytest.mark.parametrize("kind", ["stretched", "trained"])
    def test_what_was_published_is_published_again(self, kind: str, longclip_folder: Path, copy_of: Copy) -> None:
        """Its own card states what the options stated, also where nothing else of the training is left."""
        folder = copy_of(longclip_folder)
        said = {"base_model": "user/clip", "license": "mit", "datasets": ["user/captions"], "made_with": "python it"}
        first = make_card(folder, "user/long", read_origin(folder, kind == "trained"), **said)
        (folder / "README.md").write_text(first.text)
        assert make_card(folder, "user/long", read_origin(folder)).text == first.text

    @pytest.mark.parametrize(
        ("record", "relation", "said"),
        [({}, None, "finetune"), ({"converted": True}, None, "quantized"), ({}, "merge", "merge")],
    )
    def test_the_relation(self, record: Any, relation: str | None, said: str, longclip_folder: Path) -> None:
        origin = read_origin(longclip_folder)
        origin.record.update(record)
        made = make_card(longclip_folder, "user/long", origin, base_model="user/clip", relation=relation)
        assert metadata(made.text)["base_model_relation"] == said

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"base_model": "./long-clip"}, r"^\./long-clip is no Hub id"),
            ({"base_model": "a/b/c"}, "^a/b/c is no Hub id"),
            ({"datasets": ["/data/captions"]}, "^/data/captions is no Hub id"),
            ({"relation": "merge"}, "'merge' is one of finetune, merge, quantized, to a base model, which is None"),
            ({"base_model": "a/b", "relation": "cousin"}, "'cousin' is one of finetune, merge, quantized"),
        ],
    )
    def test_what_is_no_name_on_the_hub(self, options: Any, message: str, longclip_folder: Path) -> None:
        with pytest.raises(ConversionError, match=message):
            make_card(longclip_folder, "user/long", read_origin(longclip_folder), **options)


class TestEvaluations:
    def test_worked_by_hand(self, file: Path, longclip_folder: Path) -> None:
        [evaluation] = read_evaluations([file], [NAME], 248)
        made = make_card(longclip_folder, "user/long", read_origin(longclip_folder), [evaluation])
        [result] = metadata(made.text)["model-index"]
        assert result["name"] == "long"
        [task] = result["results"]
        assert task["task"] == {"type": "image-text-retrieval"}
        assert (task["dataset"]["name"], task["dataset"]["type"]) == ("Urban1k", "urban1k")
        assert task["dataset"]["args"]["fingerprint"] == "9c1e77aa02b4d3f0"
        assert [(m["type"], m["value"], m["name"], m["args"]) for m in task["metrics"]] == [
            ("recall_at_5", 87.55, "Image to text, R@5", {"interval_95": [87.5, 87.6]}),
            ("median_rank", 2.0, "Image to text, median rank", {"interval_95": [1.0, 3.5]}),
            ("recall_at_1", 50.0, "Text to image, R@1", {"interval_95": [47.5, 52.5]}),
        ]
        for line in (
            "| Image to text, R@5 | 87.5 [87.5, 87.6] |",
            "| Image to text, median rank | 2.0 [1.0, 3.5] |",
            "| Text to image, R@1 | 50.0 [47.5, 52.5] |",
            "| Image to text, effective length in tokens | 27 [22, 34] |",
            "| Captions cut at the model's length | 1,234 |",
            "| Ties, counted against the model | 3 |",
            "- 2 captions occur twice.",
        ):
            assert f"{line}\n" in made.text
        text = " ".join(made.text.split())
        assert "the first line of its file. 1,000 images, 1,000 captions. Data: https://github.com" in text
        assert f"Measured 2025-03-01T12:00:00+00:00 as `{NAME}` in float32 (weights `1f3a9c0d41b27e65`)" in text
        assert "python 3.11.2, torch 2.13.0, transformers 5.23.0, on 2 CPU cores." in text
        assert made.unstated == ["the licence (--license)", "the base model (--base-model)"]

    def test_every_metric_of_an_evaluation_has_its_name(self) -> None:
        """In the Hub's index; those of tables are the results' own."""
        types = {key: card._metric_type(key) for key in evaluation_results.METRICS}
        assert len(set(types.values())) == 17 and types["i2t_r1"] == types["t2i_r1"] == "recall_at_1"
        assert (types["top1"], types["t2i_map"]) == ("accuracy", "mean_average_precision")

    def test_of_the_whole_sample(self, tmp_path: Path, longclip_folder: Path) -> None:
        evaluation_results.write_results(sample_results(), tmp_path / "results.json")
        found = read_evaluations([tmp_path / "results.json"], [NAME], 248)
        assert [(e.benchmark, e.kind, len(e.measures)) for e in found] == [
            ("Urban1k", "retrieval", 8), ("COCO 2017 5k", "retrieval", 8), ("CIFAR-10", "classification", 2),
        ]  # fmt: skip
        made = make_card(longclip_folder, "user/long", read_origin(longclip_folder), found)
        assert len(metadata(made.text)["model-index"][0]["results"]) == 3

    def test_the_model_by_name_or_fingerprint(self, file: Path) -> None:
        for chosen in (NAME, "1f3a9c0d41b27e65"):
            assert read_evaluations([file], ["other"], 248, chosen)[0].model == NAME
        with pytest.raises(ConversionError, match=r"0 of its models are other\. It has openai/clip.*--results-model"):
            read_evaluations([file], ["other"], 248)
        with pytest.raises(ConversionError, match=f"2 of its models are {NAME} or runs/urban"):
            read_evaluations([file], [NAME, "runs/urban/checkpoint-600"], 248)
        with pytest.raises(ConversionError, match="clip-vit-base-patch16 reads 77 tokens, and the folder 248"):
            read_evaluations([file], [], 248, "openai/clip-vit-base-patch16")

    def test_several_files_do_not_repeat_a_benchmark(self, file: Path, tmp_path: Path) -> None:
        again = shutil.copy(file, tmp_path / "again.json")
        with pytest.raises(ConversionError, match=r"Urban1k is in .*results\.json and in .*again\.json"):
            read_evaluations([file, Path(again)], [NAME], 248)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda r: r.update(format=2), "format is 2, and this version reads 1"),
            (lambda r: r.pop("hardware"), "the file lacks hardware"),
            (lambda r: r.update(hardware=None), "hardware is None, expected a text"),
            (lambda r: r.update(models="x"), "models is 'x', expected a list"),
            (lambda r: r.update(models=[1]), r"models\[0\] is 1, expected an object"),
            (lambda r: r["scores"].clear(), "has no scores of long-clip"),
            (lambda r: r["benchmarks"].clear(), "on 'Urban1k', which are not both listed"),
            (measured("i2t_r1", 67.4, 60, 70), r"metrics\.i2t_r1 is \(67\.4, 60\.0, 70\.0\), expected shares"),
            (measured("i2t_r1", 0.5, 0.6, 0.4), "whose ends are the wrong way round"),
            (measured("i2t_mean_rank", 0.5), "ranks count from 1"),
            (measured("i2t_r1", True), "value is True, expected a finite number"),
            (measured("i2t_r1", float("nan")), "value is nan, expected a finite number"),
            (lambda r: r["scores"][1]["metrics"].update(i2t_r1=0.5), "i2t_r1 is 0.5, expected an object"),
            (measured("bleu", 0.5), "is the unknown metric 'bleu'"),
        ],
    )  # fmt: skip
    def test_files_that_are_wrong(
        self, spoil: Callable[[Any], Any], message: str, results: dict[str, Any], tmp_path: Path
    ) -> None:
        spoil(results)
        with pytest.raises(LongCLIPError, match=message) as caught:
            read_evaluations([write(results, tmp_path / "results.json")], [NAME], 248)
        assert str(tmp_path / "results.json") in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"results\.json could not be read as results: .*No such file"),
            ("{", r"results\.json could not be read as results"),
            ("[]", "format is None"),
        ],
    )
    def test_files_that_are_none(self, content: str | None, message: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "results.json").write_text(content)
        with pytest.raises(ResultsError, match=message):
            read_evaluations([tmp_path / "results.json"], [NAME], 248)
