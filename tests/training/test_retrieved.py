"""The table of what is retrieved, worked by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from trainer_runs import BATCH, make_rows, make_trainer

from longclip_hf.errors import TrainingError
from longclip_hf.training.retrieved import as_table, examples

ROWS = [{"caption": f"caption {row}\nof | two lines"} for row in range(6)]


def test_examples_by_hand() -> None:
    """Six images along the axes; text 2 lies between images 2 and 4 and nearer to 4, text 4 is its own image."""
    image = torch.eye(6)
    text = torch.eye(6)
    text[2] = torch.tensor([0.1, 0.0, 0.5, 0.0, 0.8, 0.2])
    found = examples(image, text, ROWS, 3)
    assert [(example.row, example.rank) for example in found] == [(0, 1), (2, 2), (4, 1)]
    assert found[1].returned[:4] == [4, 2, 5, 0]
    table = as_table(found).splitlines()
    assert table[3].startswith("| 2 | 2 | 4, 2, 5, 0, ") and table[3].endswith("| caption 2 of \\| two lines |")


def test_an_image_that_is_like_the_right_one_ranks_before_it() -> None:
    image = torch.eye(6)
    image[1] = image[0]
    assert examples(image, torch.eye(6), ROWS, 1)[0].rank == 2


@pytest.mark.parametrize(
    ("count", "rows"), [(1, [0]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4, 5]), (50, [0, 1, 2, 3, 4, 5])]
)
def test_which_rows(count: int, rows: list[int]) -> None:
    assert [example.row for example in examples(torch.eye(6), torch.eye(6), ROWS, count)] == rows


def test_every_evaluation_writes_a_table(longclip_folder: Path, tmp_path: Path) -> None:
    """And the same to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"eval_strategy": "steps", "eval_steps": 1, "report_to": "tensorboard", "log_retrieved": 2}
    heldout = make_rows(5, seed=1)
    trainer = make_trainer(longclip_folder, tmp_path / "run", make_rows(BATCH), heldout, **settings)
    trainer.train()
    tables = sorted((tmp_path / "run" / "retrieved").iterdir())
    assert [file.name for file in tables] == ["eval-1.md", "eval-2.md"]
    lines = tables[1].read_text().splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 0 | ") and lines[3].startswith("| 2 | ")
    assert " ".join(heldout[2]["caption"].split()) in lines[3]
    (events,) = {file.parent for file in (tmp_path / "run").rglob("events.*")}
    seen = EventAccumulator(str(events)).Reload()
    name = next(tag for tag in seen.Tags()["tensors"] if tag.startswith("eval/retrieved"))
    assert [event.tensor_proto.string_val[0].decode() for event in seen.Tensors(name)] == [
        file.read_text() for file in tables
    ]


def test_streams_cannot_be_read_again(longclip_folder: Path, tmp_path: Path) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    trainer = make_trainer(longclip_folder, tmp_path, make_rows(BATCH), Stream(), log_retrieved=2)
    with pytest.raises(TrainingError, match="log_retrieved reads captions again"):
        trainer.evaluate()
