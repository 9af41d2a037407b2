"""Two processes equal one process with twice the batch, in loss and in every gradient."""

import contextlib
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import torch

from longclip_hf.training.gathering import (
    all_gather_with_grad,
    all_reduce_with_grad,
    check_equal_rows,
    rank,
    world_size,
)

ROOT = Path(__file__).resolve().parents[2]
Results = tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]
CASES = [
    *(f"primary-component-{scope}{share}" for scope in ("local", "global") for share in ("", "-share")),
    "undistinguished", "mixed-length", "bounded", "long-only", "himo-local", "himo-global", "margin-undistinguished",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Results]:
    """By (rank, processes): one process with the whole batch, and two of half of it, all at once."""
    folder = tmp_path_factory.mktemp("processes")
    env = {"PYTHONPATH": str(ROOT)}
    started = {}
    for index, processes in ((0, 1), (0, 2), (1, 2)):
        output = folder / f"{index}-of-{processes}.pt"
        command = [Path(__file__).with_name("processes.py"), folder / "store", index, processes, output]
        started[index, processes] = (
            output,
            fork_server.Fork([sys.executable, "-W", "error", *map(str, command)], env=env, stderr=subprocess.STDOUT),
        )
    with contextlib.ExitStack() as stack:
        for _, process in started.values():
            stack.enter_context(process)
        for _, process in started.values():
            printed, _ = process.communicate(timeout=120)
            assert process.returncode == 0, printed
            assert printed == ""
    return {key: torch.load(output) for key, (output, _) in started.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(runs: dict[tuple[int, int], Results], case: str) -> None:
    """To 1e-10 relative in float64, under DDP; the one process of the local scope decomposes its halves apart."""
    expected = runs[0, 1][0][case]
    assert set(expected) == {"loss", "vision.weight", "vision.bias", "text.weight", "text.bias", "logit_scale"}
    for index in range(2):
        got = runs[index, 2][0][case]
        assert set(got) == set(expected)
        for name in expected:
            assert expected[name].norm() > 1e-3
            assert (got[name] - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def test_every_case_ran_and_no_two_are_the_same(runs: dict[tuple[int, int], Results]) -> None:
    results = runs[0, 1][0]
    assert set(results) == set(CASES)
    assert len({round(result["loss"].item(), 9) for result in results.values()}) == len(CASES)


@pytest.mark.parametrize("index", [0, 1])
def test_uneven_batches_are_refused_by_every_process(runs: dict[tuple[int, int], Results], index: int) -> None:
    said = runs[index, 2][1]["uneven"]
    assert said.startswith("Every process must bring equally many rows, got [3, 4] in the order of ranks.")


def test_every_process_stops_at_nan_of_one(runs: dict[tuple[int, int], Results]) -> None:
    """The one names its rows; none is left waiting in a collective."""
    assert "another process's features" in runs[0, 2][1]["not finite"]
    assert "1 of 8 rows: 5." in runs[1, 2][1]["not finite"]


def test_without_a_process_group_nothing_happens() -> None:
    tensor = torch.ones(3, 2)
    assert (rank(), world_size()) == (0, 1)
    assert all_gather_with_grad(tensor) is tensor
    assert all_reduce_with_grad(tensor) is tensor
    check_equal_rows(3, tensor.device)
