"""The ablation: its rows are the paper's, its arithmetic is right, and one run goes through."""

import math
import subprocess
from pathlib import Path

import fork_server
import pytest

from examples.scenes import ablation
from examples.scenes.ablation import Commands, main
from examples.scenes.ablation_rows import COLUMNS, ORIGINAL, OURS, ROWS, STRETCHING_ONLY, TABLES
from examples.scenes.ablation_summary import command_lines, curve, difference, markdown
from longclip_hf.results import BenchmarkInfo, EffectiveLength, Model, Results, Score, Value


def test_rows_are_the_papers() -> None:
    assert len({row.slug for row in ROWS}) == len(ROWS) == 18
    assert sum(row.train is not None and row.part == "tables" for row in ROWS) == 7
    assert sum(row.part == "sweeps" for row in ROWS) == 8
    kept = TABLES["Rows kept as they are"]
    assert [label for label, _ in kept] == [
        "0 (308 positions)", "10 (278 positions)", "20 (248 positions)", "30 (218 positions)"
    ]  # fmt: skip
    assert [label for label, _ in TABLES["Ratio"]] == ["2 (134 positions)", "4 (248 positions)", "8 (476 positions)"]
    for rows in list(TABLES.values())[1:]:
        assert OURS in [row for _, row in rows]


def test_difference_is_paired_by_seed() -> None:
    mean, half = difference({0: 5.0, 1: 7.0, 2: 6.0}, {0: 4.0, 1: 5.0, 2: 3.0})
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert difference({0: 5.0}, {0: 4.0, 1: 3.0}) == (pytest.approx(1.5), pytest.approx(12.706 * 0.5))
    assert difference({0: 4.0, 1: 3.0}, {0: 5.0})[0] == pytest.approx(-1.5)
    assert difference({0: 5.0, 1: 1.0}, {1: 3.0, 2: 9.0})[0] == -2.0  # of the one seed that both have
    assert difference({0: 5.0}, {0: 4.0}) == (1.0, math.inf)  # nothing is known of the spread


def results(zero_shot: float, hard: float) -> Results:
    value, curve_of = Value(hard, hard, hard), [Value(hard / 2, 0, 1), Value(hard, 0, 1)]
    lengths = EffectiveLength(
        [10, 20], {"i2t": curve_of, "t2i": curve_of}, {"i2t": Value(20, 20, 20), "t2i": Value(20, 20, 20)}
    )
    scores = [
        Score("model", f"data/{name}", {"i2t_r1": value, "t2i_r1": value}, 0, 0, 1.0, lengths)
        for name in ("short", "long", "hard")
    ]
    scores.append(Score("model", "Image folder", {"top1": Value(zero_shot, zero_shot, zero_shot)}, 0, 0, 1.0))
    models = [Model("model", None, "f", "LongCLIPModel", 248, "float32")]
    return Results(
        "2026-11-21T00:00:00+00:00", "command", {}, "two cores", models,
        [BenchmarkInfo(score.benchmark, "retrieval", 4, 4, None, "f", "", "", "") for score in scores], scores, [],
    )  # fmt: skip


def test_tables_hold_mean_and_spread_and_claims_their_interval() -> None:
    ours = {0: results(0.90, 0.50), 1: results(0.92, 0.52), 2: results(0.91, 0.54)}
    long_only = {0: results(0.60, 0.51), 1: results(0.61, 0.52), 2: results(0.62, 0.53)}
    found = {OURS.name: ours, STRETCHING_ONLY.name: long_only}
    text = markdown(found)
    assert f"| {OURS.name} | 91.0 ± 1.0 | 52.0 ± 2.0 |" in text and "| 20.0 ± 0.0 | 20.0 ± 0.0 | 3 |" in text
    assert "| PCM keeps more than training on long captions only | zero-shot | +30.0 ± 2.5 | holds |" in text
    assert "| ″ | hard T2I | +0.0 ± 2.5 | undecided |" in text
    assert "| Direct" not in text  # its row is missing
    assert curve(found, OURS, "hard") == {10: 26.0, 20: 52.0}


def test_commands_name_every_run_once() -> None:
    found = {OURS.name: {0: results(1, 1), 1: results(1, 1)}, ORIGINAL.name: {0: results(1, 1)}}
    lines = command_lines(Commands(Path("out"), 2), found).splitlines()
    assert len(lines) == len(set(lines)) == 5 + 1 + 2 * 2 + 1
    assert lines[5].startswith("python conversion/stretch.py ")
    assert set(COLUMNS) >= {"zero-shot", "hard T2I"}


@pytest.mark.slow
def test_one_run_goes_through_and_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "TRAIN_ROWS", 400)
    monkeypatch.setattr(ablation, "TEST_ROWS", {"short": 40, "long": 40, "hard": 40, "classes": 84})
    monkeypatch.setattr(ablation, "ROWS", [ORIGINAL, OURS])
    monkeypatch.setattr(subprocess, "run", fork_server.run)
    monkeypatch.chdir(Path(__file__).parents[3])
    given = ["--output", str(tmp_path / "out"), "--seeds", "0", "--jobs", "1", "--", "--max_steps", "1"]
    assert main(given) == 0
    summary = tmp_path / "out" / "summary"
    text = (summary / "tables.md").read_text()
    assert "| original, 77 tokens | " in text and "| stretching and PCM | " in text
    assert "| Long retrieval rises above the original | long I2T | " in text
    assert all(
        (summary / name).stat().st_size > 5000 for name in ("effective_length.png", "sweeps.png", "trade_off.png")
    )
    lines = (summary / "commands.sh").read_text().splitlines()
    assert sum("training/train.py" in line for line in lines) == 1
    assert sum("evaluation/run.py" in line for line in lines) == 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("everything is done")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert main(given) == 0
    assert (summary / "tables.md").read_text() == text
