"""Examples of what is retrieved, as a table: the same queries at every evaluation, so that a run can be read along."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longclip_hf.evaluation.retrieval import ranks_among
from longclip_hf.evaluation.scores import most_similar

RETURNED = 5  # images of a query that are named
FOLDER = "retrieved"  # of an output folder


class Retrieved(NamedTuple):
    """What a long caption finds among all held-out images; images are named by their rows."""

    caption: str
    row: int
    rank: int  # of the right image, from 1
    returned: list[int]


def examples(image: torch.Tensor, text: torch.Tensor, rows: Any, count: int) -> list[Retrieved]:
    """
    Args:
        image: features of all held-out images, of shape `(rows, projection_dim)`.
        text: of their long captions, of the same shape.
        rows: the held-out rows by index; `count` of them are read, evenly spaced.
        count: how many.
    """
    chosen = torch.arange(len(image))[:: max(1, len(image) // count)][:count]
    ranks = (1 + ranks_among(text[chosen], image, chosen).best).tolist()
    return [
        Retrieved(str(rows[row]["caption"]), row, rank, most_similar(text[row], image, RETURNED))
        for row, rank in zip(chosen.tolist(), ranks, strict=True)
    ]


def as_table(found: Sequence[Retrieved]) -> str:
    """In Markdown, which TensorBoard shows."""
    lines = ["| row of the query | rank of its image | rows returned | query |", "|---|---|---|---|"]
    for example in found:
        caption = " ".join(example.caption.split()).replace("|", "\\|")
        lines.append(f"| {example.row} | {example.rank} | {', '.join(map(str, example.returned))} | {caption} |")
    return "\n".join(lines) + "\n"


def log_examples(found: Sequence[Retrieved], output_dir: str, name: str, step: int, callbacks: Sequence[Any]) -> None:
    """Writes `retrieved/NAME-STEP.md`, and a text to TensorBoard, if it is one of `callbacks`."""
    file = Path(output_dir, FOLDER, f"{name}-{step}.md")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_table(found), encoding="utf-8")
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text(f"{name}/retrieved", as_table(found), step)
