"""Pictures of every kind that data sets hold, as pixels; one error for those that cannot be used."""

import io

import numpy as np
import pytest
from PIL import Image

from longclip_hf.errors import ImageError
from longclip_hf.images import decode_image, to_rgb


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pixels_in_rgb() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    decoded = decode_image(encoded(Image.fromarray(pixels)), "a.png")
    assert decoded.mode == "RGB"
    assert (np.asarray(decoded) == pixels).all()


def test_upright() -> None:
    """Orientation 6: the picture was taken with the camera turned, and is shown turned by 90 degrees clockwise."""
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encoded(image, exif=exif), "turned.png")
    assert decoded.size == (1, 2)
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 7, (7, 7, 7)),
        ("1", 255, (255, 255, 255)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("LA", (9, 128), (9, 9, 9)),
        ("I;16", 40000, (156, 156, 156)),  # 40000 // 256
        ("I", 300, (1, 1, 1)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_modes(mode: str, value: object, expected: tuple[int, ...]) -> None:
    assert to_rgb(Image.new(mode, (2, 2), value)).getpixel((1, 1)) == expected


def test_palette_with_transparency() -> None:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(image, transparency=0), "p.png").getpixel((0, 0)) == (10, 20, 30)


def test_what_cannot_be_used_is_named() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), "JPEG")
    for content in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(ImageError, match=r"^broken\.jpg is unreadable: "):
            decode_image(content, "broken.jpg")
    with pytest.raises(ImageError, match="its 10 bytes are of no format that Pillow reads"):
        decode_image(b"no picture", "broken.jpg")
    with pytest.raises(ImageError, match=r"^big\.jpg is oversized: 32 x 32; at most 1,023 pixels, and 1:200$"):
        decode_image(whole, "big.jpg", max_pixels=1023)
    with pytest.raises(ImageError, match="thin is oversized: 201 x 1"):
        decode_image(encoded(Image.new("RGB", (201, 1))), "thin")
    assert decode_image(encoded(Image.new("RGB", (200, 1))), "thin").size == (200, 1)


def test_pillows_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning of Pillow's is no error; beyond twice its limit it refuses, and so do we."""
    content = encoded(Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert decode_image(content, "large").size == (10, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)
    with pytest.raises(ImageError, match="bomb is oversized: Image size"):
        decode_image(content, "bomb")
