"""An encoded image -> pixels, upright and in RGB, or one error that says why not."""

import functools
import io
import math
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from longclip_hf.errors import ImageError

# Of the largest image that is decoded; Pillow warns beyond it, and refuses twice as many.
MAX_PIXELS = 89_478_485
# The processor scales the short side to 224 before it crops: 10 million pixels at 1:200, a billion at 1:20,000.
LARGEST_ASPECT_RATIO = 200
# Larger images are reduced by a whole factor while they are decoded: a processor makes several copies of what it gets.
# Their short side keeps this many pixels at least, which is beyond twice what any CLIP sees.
KEPT_PIXELS = 16_000_000
KEPT_SIDE = 1024
# Of photographs. Pillow reads forty others: PostScript, which starts Ghostscript, fonts, weather maps, movies.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM", "HEIF")
# `image.info[RESCALED]` is the range of values, such as "0 ... 4095 of I;16", where it had more than 8 bits.
RESCALED = "longclip_rescaled"

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    content: bytes | Image.Image, name: str, max_pixels: int = MAX_PIXELS, target: int | None = None
) -> Image.Image:
    """Decodes an image file: the one decoder, of training and of evaluation.

    Args:
        content: the file's bytes, of one of `FORMATS`, or an image that Pillow has opened.
        name: what the user calls it, for errors.
        max_pixels: of the largest image that is decoded; the size is checked before.
        target: of the short side that the image will be resized to, where it need not have more than twice that. It
            then comes reduced by a whole factor, JPEG without decoding the rest; docs/training.md says what that
            changes. Without it, only images of more than `KEPT_PIXELS` are reduced, to no less than `KEPT_SIDE`.

    Returns:
        The image in RGB, turned as its EXIF data say; see `to_rgb`.

    Raises:
        ImageError: if it is unreadable or oversized.
    """
    try:
        # Pillow warns of large images on opening. Their size is checked here, before anything is decoded.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # EXIF data of which Pillow can make nothing: what is needed of them is read tolerantly.
            warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
            image = (
                content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content), formats=_formats())
            )
            width, height = image.size
            if width * height > max_pixels or max(width, height) > LARGEST_ASPECT_RATIO * min(width, height):
                limits = f"at most {max_pixels:,} pixels, and 1:{LARGEST_ASPECT_RATIO}"
                raise ImageError("oversized", f"{name} is oversized: {width} x {height}; {limits}")
            image = _reduced(image, target)
            turn = _UPRIGHT.get(_orientation(image))  # of TIFF, Pillow has turned the pixels itself by then
            image = to_rgb(image)
            return image if turn is None else image.transpose(turn)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        size = len(content) if isinstance(content, bytes) else 0
        raise ImageError(
            "unreadable", f"{name} is unreadable: its {size} bytes are none of {', '.join(_formats())}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError("oversized", f"{name} is oversized: {error}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError("unreadable", f"{name} is unreadable: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB whatever its mode. Transparency is dropped, as transformers' image processors do.

    Integers and floats of more than 8 bits are scaled to 8 by the range that their values are of (`_eight_bits`), and
    `info[RESCALED]` says which; `convert` alone would turn nearly all of them white or black.

    Raises:
        ImageError: if no value is finite.
    """
    if image.mode == "RGB":
        image.load()
        return image
    rescaled = None
    if _is_deep(image.mode):
        image, rescaled = _eight_bits(image)
    elif image.mode == "P":  # to RGB at once, Pillow warns where the palette has transparency
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if rescaled is not None:
        image.info[RESCALED] = rescaled
    return image


def is_rescaled(content: bytes) -> bool:
    """Whether an image file has more than 8 bits of grey, by its header alone; see `to_rgb`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_formats()) as image:
                return _is_deep(image.mode)
    except Exception:  # nothing that is decoded either, which says why
        return False


def _is_deep(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that are at hand: AVIF depends on how Pillow was built, HEIF on a plugin of its own."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    """1 ... 8, of whatever type a camera or an editor wrote it; 1 where it makes no sense."""
    image.load()  # of TIFF it takes the tag away, and of PNG it can stand behind the pixels
    try:
        value: Any = image.getexif().get(_ORIENTATION, 1)
        return int(value[0] if isinstance(value, bytes | tuple) else value)
    except Exception:  # of damaged EXIF data, struct.error, SyntaxError, TypeError and more: the pixels are good
        return 1


def _reduced(image: Image.Image, target: int | None) -> Image.Image:
    """`image` with its sides divided by a whole number, each pixel the mean of a square; see `decode_image`."""
    width, height = image.size
    factor = _factor(width, height, target)
    if factor > 1:
        # By 2, 4 or 8 JPEG need not decode the rest. To other formats, and to what is loaded, this does nothing.
        image.draft(None, (-(-width // factor), -(-height // factor)))
        factor = _factor(*image.size, target)
    if factor > 1:
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode != "L":
            image = to_rgb(image)
        info = image.info
        image = image.reduce(factor)
        image.info = info
    return image


def _factor(width: int, height: int, target: int | None) -> int:
    if target is not None:
        return max(1, min(width, height) // (2 * target))
    wanted = math.ceil(math.sqrt(width * height / KEPT_PIXELS))
    return max(1, min(wanted, min(width, height) // KEPT_SIDE))


def _eight_bits(image: Image.Image) -> tuple[Image.Image, str]:
    """An image of integers or floats in 8 bits of grey, and the range of its values.

    The range is the least that holds them, of those that cameras, scanners and arrays have: 0 ... 1 (floats), 8, 12
    and 16 bits. So pictures keep their brightness. Others, with negative values or beyond 16 bits, are scaled from
    their least to their greatest value.
    """
    mode, values = image.mode, np.asarray(image)
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.any():
            raise ImageError("unreadable", "the image has no finite value")
        values = np.where(finite, values, values[finite].min())
    least, greatest = values.min().item(), values.max().item()
    said = f"{least:g} ... {greatest:g} of {mode}"
    if least < 0 or greatest > 65535:
        values = (values - least) * (255 / (greatest - least)) if greatest > least else np.zeros_like(values)
    elif values.dtype.kind == "f":
        values = values * (255 if greatest <= 1 else 1 if greatest <= 255 else 1 / 16 if greatest <= 4095 else 1 / 256)
    else:
        values = values // (1 if greatest <= 255 else 16 if greatest <= 4095 else 256)  # bits are dropped, not rounded
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)), said
