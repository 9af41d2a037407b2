"""Images as a model sees them: resized and cut to bytes here, and made numbers of on the device.

Bytes are a quarter of what travels from worker to process to device. Each stands for a number of a table that the
image processor itself fills, 256 for a channel, so that the numbers are its own, to the last bit.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from longclip_hf.errors import DataError
from longclip_hf.images import to_rgb


class Pixels:
    """What a CLIP image processor makes of an image, less its arithmetic.

    Where the processor scales the short side by bicubic interpolation and cuts out the middle, as CLIP's does, torch
    does it in a quarter of Pillow's time. Its bytes are Pillow's but for rounding: fewer than one of a hundred
    differs, by one level of 255, or by two where a small image is enlarged. Any other processor does it itself.

    Args:
        image_processor: CLIP's, of any kind that transformers has.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        size, crop = (getattr(image_processor, name, None) or {} for name in ("size", "crop_size"))
        # 0 where the processor has no such setting
        self._side: int = size.get("shortest_edge") or 0
        self._crop: tuple[int, int] = (crop.get("height") or 0, crop.get("width") or 0)
        self._is_clips = (
            image_processor.do_resize
            and image_processor.do_center_crop
            and image_processor.resample == Image.Resampling.BICUBIC
            and 0 < min(self._crop) <= max(self._crop) <= self._side
            and all(size.get(name) is None for name in ("longest_edge", "height", "width"))
        )
        # A row of all bytes, as a picture of one channel after the other.
        ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
        made = self._processed(Image.fromarray(ramp), do_resize=False, do_center_crop=False)
        self.levels: torch.Tensor = made.reshape(3, 256).float()  # byte -> the number that the model sees

    @property
    def side(self) -> int | None:
        """The short side that images are resized to, or None, where the processor has no such setting."""
        size = self.image_processor.size
        return max((size.get(name) or 0 for name in ("shortest_edge", "height", "width")), default=0) or None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """`image`, of any mode, as `torch.ByteTensor` of shape `(3, height, width)`.

        Raises:
            DataError: if the processor makes anything but bytes of it.
        """
        image = to_rgb(image)
        if self._is_clips:
            return self._resized(image)
        made = self._processed(image, do_rescale=False, do_normalize=False)
        if made.dtype != torch.uint8:
            raise DataError(
                f"The image processor ({type(self.image_processor).__name__}) makes {made.dtype} of an image before "
                "it rescales it, and bytes are expected. Give the collator a CLIP image processor."
            )
        return made

    def _processed(self, image: Image.Image, **options: Any) -> torch.Tensor:
        # Without its format, a picture 3 pixels high would be taken for one whose channels come first.
        made = self.image_processor(images=image, input_data_format="channels_last", return_tensors="pt", **options)
        pixels: torch.Tensor = made["pixel_values"][0]
        return pixels

    def _resized(self, image: Image.Image) -> torch.Tensor:
        width, height = image.size
        short = min(width, height)
        new = [self._side if side == short else int(self._side * side / short) for side in (height, width)]
        if new != [height, width] and height > 2 * width:
            # Newer Pillow scales tall images along their columns first, older ones never: left to the one at hand.
            image = image.resize((new[1], new[0]), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if new != [*pixels.shape[1:]]:
            # Channels stay last in memory: only for those torch has a path for bytes.
            pixels = F.interpolate(pixels[None], new, mode="bicubic", antialias=True)[0]
        top, left = ((side - cut) // 2 for side, cut in zip(new, self._crop, strict=True))
        return pixels[:, top : top + self._crop[0], left : left + self._crop[1]].contiguous()


def normalised(pixel_values: torch.Tensor, levels: torch.Tensor | None) -> torch.Tensor:
    """The numbers that a model sees.

    Args:
        pixel_values: bytes of shape `(batch_size, 3, height, width)`, or numbers, which stay as they are.
        levels: `Pixels.levels`, of shape `(3, 256)`.

    Returns:
        `torch.FloatTensor` of the same shape.

    Raises:
        DataError: for bytes without levels.
    """
    if pixel_values.dtype != torch.uint8:
        return pixel_values
    if levels is None:
        raise DataError(
            "The batch's pixel_values are bytes, and it has no pixel_levels that say what they stand for, as "
            "CaptionCollator gives. Bytes of your own: normalise them in the collator."
        )
    first = torch.arange(0, levels.numel(), levels.shape[1], device=levels.device, dtype=torch.int32)
    places = pixel_values.int() + first[:, None, None]
    return levels.flatten().index_select(0, places.flatten()).view(pixel_values.shape)
