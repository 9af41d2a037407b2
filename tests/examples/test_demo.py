"""The demo runs to its end and says what it measured."""

import re
from pathlib import Path

import pytest
from conftest import run_python

from examples.demo import WANTED_LENGTHS


def test_demo_counts_what_77_tokens_would_have_cut(tmp_path: Path) -> None:
    code = "import sys; from examples.demo import main; sys.exit(main(['--size', 'tiny', '--output', 'out']))"
    root = str(Path(__file__).parents[2])
    printed = run_python(code, env={"PYTHONPATH": root, "COLUMNS": "200"}, cwd=tmp_path)
    rows = re.findall(r"│ a photo of a dog [^│]*│ (\d+)\s+│ (\d+) \(\d+%\)\s+│ (\d+) \(", printed)
    lengths = [int(length) for length, _, _ in rows]
    assert lengths == [pytest.approx(wanted, abs=3) for wanted in WANTED_LENGTHS]
    assert [int(lost) for _, lost, _ in rows] == [max(0, length - 77) for length in lengths]
    assert [int(lost) for _, _, lost in rows] == [max(0, length - 248) for length in lengths]
    assert "1 caption was cut, its EOT kept." in printed
    assert "LongCLIPModel and CLIPModel agree: largest difference 0.0" in printed
    assert (tmp_path / "out" / "longclip" / "model.safetensors").is_file()
