"""Bytes and the numbers they stand for, beside what the image processor makes of the same images."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from longclip_hf.errors import DataError
from longclip_hf.training.pixels import Pixels, normalised

SIDES = (20, 97, 223, 224, 225, 300, 451, 640)


def processor(**settings: Any) -> Any:
    # Transformers 5 has two of them, and says on stderr that it takes this one where there is no torchvision.
    import transformers

    return (getattr(transformers, "CLIPImageProcessorPil", None) or CLIPImageProcessor)(**settings)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_processor(made_by: Any, image: Image.Image, **options: Any) -> torch.Tensor:
    pixels: torch.Tensor = made_by(images=image, return_tensors="pt", **options)["pixel_values"][0]
    return pixels


@pytest.mark.parametrize(("width", "height"), list(itertools.product(SIDES, SIDES)))
def test_bytes_are_pillows_but_for_rounding(width: int, height: int) -> None:
    """Of noise, the hardest: not one of fifty differs; one level, where the image is not enlarged."""
    clips, image = processor(), noise(width, height)
    ours = Pixels(clips)(image)
    theirs = by_processor(clips, image, do_rescale=False, do_normalize=False)
    assert ours.dtype == theirs.dtype == torch.uint8 and ours.shape == theirs.shape == (3, 224, 224)
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= (1 if min(width, height) >= 224 else 2)
    assert (difference > 0).float().mean() < 0.02
    if min(width, height) == 224 or height > 2 * width:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.3, 1.0, 2.0]},
        {"do_normalize": False},
        {"rescale_factor": 0.5},
    ],
)
def test_a_byte_stands_for_the_processors_number(settings: dict[str, Any]) -> None:
    """To the last bit, all 256 of every channel."""
    clips = processor(**settings)
    image = noise(224, 224)
    pixels = Pixels(clips)
    assert len(np.unique(np.asarray(image))) == 256
    found = normalised(pixels(image)[None], pixels.levels)
    assert torch.equal(found[0], by_processor(clips, image))


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 2},
        {"size": {"height": 40, "width": 30}, "do_center_crop": False},
        {"do_resize": False, "crop_size": {"height": 24, "width": 40}},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 50, "width": 50}},
    ],
)
def test_other_processors_make_their_own_bytes(settings: dict[str, Any]) -> None:
    other, image = processor(**settings), noise(90, 61)
    pixels = Pixels(other)
    assert torch.equal(normalised(pixels(image)[None], pixels.levels)[0], by_processor(other, image))


def test_the_side() -> None:
    assert Pixels(processor()).side == 224
    assert Pixels(processor(size={"height": 40, "width": 30})).side == 40


def test_numbers_stay_and_bytes_need_levels() -> None:
    numbers = torch.randn(2, 3, 4, 4)
    assert normalised(numbers, None) is numbers
    with pytest.raises(DataError, match="no pixel_levels"):
        normalised(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None)
