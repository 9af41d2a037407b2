"""The demo runs to its end, goes on where it was stopped, and what it claims is so."""

import json
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fork_server
import pytest

from examples.demo import REAL_USE, draw_ranking, figures, main, shown_command
from longclip_hf.evaluation.benchmarks import BENCHMARKS
from longclip_hf.files import read_json
from longclip_hf.results import read_results
from longclip_hf.training.checkpoints import COMPLETE
from longclip_hf.training.train import parse

ROOT = Path(__file__).parents[2]
# Of the whole demo, so much that its claims can be seen.
REDUCED = ("--steps", "30", "--rows", "3000", "--test_rows", "120")


# Points, by less than what was measured: see examples/scenes/README.md for the whole demo's.
LONG_GAIN, HARD_GAIN, ZERO_SHOT_LOSS = 25, 10, 3


def start(folder: Path) -> fork_server.Fork:
    line = [sys.executable, "-m", "examples.demo", "--output", str(folder / "out"), *REDUCED]
    return fork_server.Fork(line, cwd=ROOT, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder and the output of a demo that was killed in the middle of training and started again."""
    folder = tmp_path_factory.mktemp("demo")
    with start(folder) as first:
        deadline = time.monotonic() + 240
        while not list((folder / "out" / "longclip").glob(f"checkpoint-*/{COMPLETE}")):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
    with start(folder) as again:
        printed, errors = again.communicate(timeout=500)
        assert again.returncode == 0, errors
    yield folder / "out", printed


@pytest.mark.slow
def test_a_killed_demo_goes_on(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    assert "examples.scenes.write" not in printed and "conversion/stretch.py examples" not in printed  # done before
    assert re.search(r"Going on from .*checkpoint-25", " ".join(printed.split()))
    assert read_json(folder / "longclip" / "trainer_state.json") == {}  # of checkpoints only
    for name in ("longclip/README.md", "longclip/curves.png", "evaluation/report.html", "ranking.png"):
        assert (folder / name).stat().st_size > 1000


@pytest.mark.slow
def test_what_the_demo_claims(demo: tuple[Path, str]) -> None:
    """Margins in points: what was measured is in examples/scenes/README.md, at full size."""
    folder, printed = demo
    results = read_results(folder / "evaluation" / "results.json")
    of = {(score.model, Path(score.benchmark).name): score.metrics for score in results.scores}

    def gain(benchmark: str, metric: str, before: str = "stretched") -> float:
        return 100 * (of["longclip", benchmark][metric].value - of[before, benchmark][metric].value)

    for metric in ("i2t_r1", "t2i_r1"):
        assert gain("long", metric) > LONG_GAIN
        assert gain("long", metric, "clip") > LONG_GAIN
        assert gain("hard", metric, "clip") > HARD_GAIN
    assert gain("Image folder", "top1", "clip") > -ZERO_SHOT_LOSS
    # The table is of these figures, and so is the card.
    card = (folder / "longclip" / "README.md").read_text(encoding="utf-8")
    for row, cells in figures(results).items():
        line = next(line for line in printed.splitlines() if row in line)
        assert all(cell in line for cell in cells)
    assert f"{100 * of['longclip', 'hard']['t2i_r1'].value:.1f}" in card


def test_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 7, "rows": 13_000, "test_rows": 500, "start": "f"}))
    assert main(["--output", str(tmp_path), "--steps", "8"]) == 2
    said = capsys.readouterr().err
    assert "'steps': 7" in said and "'steps': 8" in said and "another --output" in said


def test_ranking_is_drawn_with_the_right_picture_framed(tmp_path: Path) -> None:
    from PIL import Image

    images = [Image.new("RGB", (72, 72), (10 * n, 0, 0)) for n in range(8)]
    orders = {"first": [3, 1, 2, 0, 4, 5, 6, 7], "second": [1, 2, 0, 4, 5, 6, 7, 3]}
    draw_ranking("A caption. " * 30, 150, 3, images, orders, tmp_path / "ranking.png")
    with Image.open(tmp_path / "ranking.png") as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert (0, 158, 115) in colours  # the frame
    assert (138, 138, 138) in colours  # the half that the original does not read
    assert {(10 * n, 0, 0) for n in range(7)} <= colours and (70, 0, 0) not in colours


def test_the_commands_that_are_shown_are_there() -> None:
    modules = re.findall(r'_step\(console, "([\w.]+)"', (ROOT / "examples" / "demo.py").read_text(encoding="utf-8"))
    assert len(modules) == 4
    shown = [shown_command(module).split() for module in modules]
    assert all((ROOT / path[-1]).is_file() or path[:2] == ["python", "-m"] for path in shown)
    assert shown_command("longclip_hf.training.train") == "python training/train.py"


def test_the_commands_for_real_use_are_understood(tmp_path: Path) -> None:
    lines = REAL_USE.replace("\\\n", " ").splitlines()
    scripts = {words[1]: words[2:] for words in map(shlex.split, lines)}
    assert all((ROOT / script).is_file() for script in scripts)
    settings = parse([*scripts["training/train.py"], "--fp16", "False", "--use_cpu"])
    assert settings.model.model == scripts["conversion/stretch.py"][-1] and settings.data.data_format == "sharegpt4v"
    words = scripts["evaluation/run.py"]
    assert set(words[words.index("--benchmark") + 1 :]) <= set(BENCHMARKS)
    assert words[1] == settings.model.model and words[2] == settings.training.output_dir
    assert scripts["conversion/publish.py"][0] == settings.training.output_dir
