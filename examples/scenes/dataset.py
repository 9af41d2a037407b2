"""The world as a table of the library `datasets`, rendered when a row is read."""

from typing import Any

from PIL import Image

from examples.scenes.captions import long_caption, main_sentence, pretraining_caption
from examples.scenes.world import SPLITS, Draws, check_index, draw_scene, render


def example(split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """Row `index` of `split`.

    Returns:
        image: in RGB, `IMAGE_SIZE` pixels square.
        caption: what the split is read by: a short text in "pretrain", the main sentence in "short" and "classes", and
            in all others the long caption.
        short_caption: the main sentence; where `caption` is long, its first.
        label: the class of the main object, a place in `CLASS_NAMES`.

    Raises:
        ValueError: for a split that is not there, or an index outside it.
    """
    scene = draw_scene(split, index, seed)
    key = (seed, split, index, "caption")
    short = main_sentence(scene, Draws(*key))
    if split == "pretrain":
        caption = pretraining_caption(scene, Draws(*key, "pretrain"))
    elif split in ("short", "classes"):
        caption = short
    else:
        caption = long_caption(scene, Draws(*key))
    return {
        "image": Image.fromarray(render(scene)),
        "caption": caption,
        "short_caption": short,
        "label": scene.label,
    }


def row_count(split: str, count: int | None) -> int:
    """`count`, or how many rows `split` has by default.

    Raises:
        ValueError: for a split that is not there or has no `count` rows.
    """
    count = SPLITS.get(split, 1) if count is None else count
    check_index(split, count - 1)
    return count


def scenes(split: str, count: int | None = None, seed: int = 0) -> Any:
    """A `datasets.Dataset` of the first `count` rows of `split`, as `example` makes them, by default `SPLITS[split]`.

    Nothing is stored: rows are made when they are read, in whichever process reads them.

    Raises:
        ValueError: for a split that is not there or has no `count` rows.
        ImportError: if `datasets` is not installed.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(
            'Scenes are served by `datasets`, of the extra "train": pip install -e ".[train]"'
        ) from error
    return Dataset.from_dict({"index": range(row_count(split, count))}).with_transform(_Rows(split, seed))


class _Rows:
    """Makes of a batch of indices a batch of rows. A class, so that other processes can unpickle it."""

    def __init__(self, split: str, seed: int) -> None:
        self.split, self.seed = split, seed

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [example(self.split, index, self.seed) for index in batch["index"]]
        return {name: [row[name] for row in rows] for name in rows[0]}
