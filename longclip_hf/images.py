"""An encoded image -> pixels, upright and in RGB, or one error that says why not."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from longclip_hf.errors import ImageError

# Of the largest image that is decoded; Pillow warns beyond it, and refuses twice as many.
MAX_PIXELS = 89_478_485
# The processor scales the short side to 224 before it crops: 10 million pixels at 1:200, a billion at 1:20,000.
LARGEST_ASPECT_RATIO = 200


def decode_image(content: bytes | Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file: the one decoder, of training and of evaluation.

    Args:
        content: the file's bytes, of any format that Pillow reads, or an image that Pillow has opened.
        name: what the user calls it, for errors.
        max_pixels: of the largest image that is decoded; the size is checked before.

    Returns:
        The image in RGB, turned as its EXIF data say.

    Raises:
        ImageError: if it is unreadable or oversized.
    """
    try:
        # Pillow warns of large images on opening. Their size is checked here, before anything is decoded.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            width, height = image.size
            if width * height > max_pixels or max(width, height) > LARGEST_ASPECT_RATIO * min(width, height):
                limits = f"at most {max_pixels:,} pixels, and 1:{LARGEST_ASPECT_RATIO}"
                raise ImageError("oversized", f"{name} is oversized: {width} x {height}; {limits}")
            return to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        size = len(content) if isinstance(content, bytes) else 0
        raise ImageError(
            "unreadable", f"{name} is unreadable: its {size} bytes are of no format that Pillow reads"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError("oversized", f"{name} is oversized: {error}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError("unreadable", f"{name} is unreadable: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB whatever its mode. Transparency is dropped, as transformers' image processors do; 16 bits of grey
    are scaled to 8, where `convert` alone would turn nearly all of them white.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    elif image.mode == "P":  # to RGB at once, Pillow warns where the palette has transparency
        image = image.convert("RGBA")
    return image.convert("RGB")
