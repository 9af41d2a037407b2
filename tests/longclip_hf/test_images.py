"""Pictures of every kind that data sets hold, as pixels; one error for those that cannot be used."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longclip_hf import images
from longclip_hf.errors import ImageError
from longclip_hf.images import KEPT_SIDE, RESCALED, decode_image, to_rgb


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
        ("I", 300, (18, 18, 18)),  # of 12 bits: 300 // 16
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_modes(mode: str, value: object, expected: tuple[int, ...]) -> None:
    assert to_rgb(Image.new(mode, (2, 2), value)).getpixel((1, 1)) == expected


# (values, what they become, what is said)
DEEP: dict[str, tuple[Any, list[int], str]] = {
    "16 bits": (np.array([[0, 256, 65535]], np.uint16), [0, 1, 255], "0 ... 65535 of I;16"),
    "12 in 16 bits": (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255], "0 ... 4095 of I;16"),
    "8 in 16 bits": (np.array([[0, 128, 255]], np.uint16), [0, 128, 255], "0 ... 255 of I;16"),
    "8 in 32 bits": (np.array([[0, 128, 255]], np.int32), [0, 128, 255], "0 ... 255 of I"),
    "16 in 32 bits": (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255], "0 ... 65535 of I"),
    "32 bits": (np.array([[0, 10**9, 2 * 10**9]], np.int32), [0, 128, 255], "0 ... 2e+09 of I"),
    "signed": (np.array([[-1000, 0, 3000]], np.int32), [0, 64, 255], "-1000 ... 3000 of I"),
    "floats of 0 ... 1": (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255], "0 ... 1 of F"),
    "floats of -1 ... 1": (np.array([[-1, 0, 1]], np.float32), [0, 128, 255], "-1 ... 1 of F"),
    "floats of 0 ... 255": (np.array([[0, 128, 254.6]], np.float32), [0, 128, 255], "0 ... 254.6 of F"),
    "floats with holes": (np.array([[np.nan, 0.5, 1]], np.float32), [128, 128, 255], "0.5 ... 1 of F"),
    "floats, all zero": (np.zeros((1, 3), np.float32), [0, 0, 0], "0 ... 0 of F"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_are_scaled_by_their_range(kind: str) -> None:
    values, expected, said = DEEP[kind]
    decoded = decode_image(encoded(Image.fromarray(values), "TIFF"), "deep.tif")
    assert np.asarray(decoded).tolist() == [[[level] * 3 for level in expected]]
    assert decoded.info[RESCALED] == said
    assert RESCALED not in decode_image(encoded(Image.new("L", (2, 2))), "a.png").info


def test_an_image_without_a_value() -> None:
    empty = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ImageError, match="no finite value") as caught:
        decode_image(encoded(empty, "TIFF"), "empty.tif")
    assert caught.value.cause == "unreadable"


# EXIF data as they are found: https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf, table 1 of types
TYPES = {
    1: b"\x07", 2: b"x\0", 3: struct.pack("<H", 7), 4: struct.pack("<L", 7), 5: struct.pack("<LL", 7, 0), 6: b"\xff",
    7: b"abcd", 8: struct.pack("<h", -7), 9: struct.pack("<l", -7), 10: struct.pack("<ll", -7, 1),
    11: struct.pack("<f", 1.5), 12: struct.pack("<d", 1.5),
}  # fmt: skip
# Texts, numbers, dates, the resolution, the maker's and the user's notes; sub-folders of EXIF, GPS, interoperability.
TAGS = (0x010E, 0x010F, 0x011A, 0x0128, 0x0132, 0x0213, 0x8769, 0x8825, 0x9286, 0x927C, 0x9003, 0xA002, 0xA005)


def exif_of(orientation: tuple[int, bytes], tag: int = 0, kind: int = 3) -> bytes:
    """EXIF data of an orientation, `(type, value)`, and of another tag."""
    entries = sorted([(0x0112, *orientation), (tag, kind, TYPES[kind])][: 1 + bool(tag)])
    folder, behind = struct.pack("<H", len(entries)), b""
    for name, type_, value in entries:
        count = len(value) if type_ in (2, 7) else 1
        inline = value.ljust(4, b"\0")
        if len(value) > 4:
            inline = struct.pack("<L", 8 + 2 + 12 * len(entries) + 4 + len(behind))
            behind += value
        folder += struct.pack("<HHL", name, type_, count) + inline
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + folder + struct.pack("<L", 0) + behind


@pytest.mark.parametrize("tag", TAGS, ids=hex)
def test_no_exif_data_cost_a_picture(tag: int) -> None:
    """Writing the data anew without the orientation, as ImageOps.exif_transpose does, fails for many of these."""
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    for kind in TYPES:
        exif = exif_of((3, struct.pack("<H", 6)), tag, kind)
        for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})):
            decoded = decode_image(encoded(image, form, exif=exif, **options), "a")
            assert decoded.size == (1, 2), (form, kind)
            assert form == "JPEG" or decoded.getpixel((0, 0)) == (255, 0, 0)


def test_orientations_of_every_value_and_type() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
    }  # fmt: skip
    for value in range(10):
        right = upright.get(value, pixels)
        for orientation in ((3, struct.pack("<H", value)), (4, struct.pack("<L", value)), (1, bytes([value])),
                            (2, f"{value}\0".encode()), (11, struct.pack("<f", value))):  # fmt: skip
            decoded = decode_image(encoded(Image.fromarray(pixels), exif=exif_of(orientation)), "a.png")
            assert np.asarray(decoded).tolist() == right.tolist(), (value, orientation)
        if value in upright:
            turned = encoded(Image.fromarray(pixels), "TIFF", tiffinfo={0x0112: value})
            assert np.asarray(decode_image(turned, "a.tif")).tolist() == right.tolist(), value
    for strange in ((2, b"upside down\0"), (5, struct.pack("<LL", 1, 0)), (12, struct.pack("<d", 1e300))):
        decoded = decode_image(encoded(Image.fromarray(pixels), exif=exif_of(strange)), "a.png")
        assert np.asarray(decoded).tolist() == pixels.tolist()


def test_only_formats_that_photographs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript would be given to Ghostscript, a program of its own."""
    for form in ("EPS", "PCX", "TGA", "ICO", "DDS", "PDF"):
        with pytest.raises(ImageError, match=r"its .* bytes are none of JPEG"):
            decode_image(encoded(Image.new("RGB", (4, 4)), form), "a")
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000"):
        assert decode_image(encoded(Image.new("RGB", (4, 4), (9, 9, 9)), form), "a").getpixel((1, 1)) == (9, 9, 9)


def waves(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    levels = np.stack([np.sin(across), np.cos(down), np.sin(across + down)], -1)
    return Image.fromarray((127.5 + 127.5 * levels).astype(np.uint8))


def test_large_images_are_reduced_as_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "KEPT_PIXELS", 100 * 100)
    monkeypatch.setattr(images, "KEPT_SIDE", 40)
    image = waves(300, 204)
    for form, options, off in (("PNG", {}, 0.51), ("JPEG", {"quality": 95}, 4)):
        decoded = decode_image(encoded(image, form, **options), "large")
        # 1 of 3 x 3 pixels; JPEG decodes 1 of 2 x 2, and 150 x 102 are still too many.
        assert decoded.size == ((100, 68) if form == "PNG" else (75, 51))
        exact = np.asarray(image.resize(decoded.size, Image.Resampling.BOX), float)
        assert np.abs(np.asarray(decoded) - exact).mean() < off
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I;16", "F"):
        flat = Image.new("L", (300, 204), 255).convert(mode if mode != "I;16" else "I")
        decoded = decode_image(encoded(flat, "TIFF"), mode)
        assert (decoded.mode, decoded.size) == ("RGB", (100, 68))
        assert decoded.getpixel((9, 9)) == (255, 255, 255)
        assert (RESCALED in decoded.info) == (mode in ("I;16", "F"))
    assert decode_image(encoded(waves(1000, 79)), "flat").size == (1000, 79), "the short side keeps 40"
    assert decode_image(encoded(waves(100, 100)), "small").size == (100, 100)
    turned = decode_image(encoded(image, exif=exif_of((3, struct.pack("<H", 6)))), "turned")
    assert turned.size == (68, 100)


def test_for_a_target_twice_its_pixels_are_enough() -> None:
    image = waves(900, 700)
    for form, options in (("PNG", {}), ("JPEG", {"quality": 95})):
        content = encoded(image, form, **options)
        decoded = decode_image(content, "a", target=64)
        assert min(decoded.size) >= 128
        assert min(decoded.size) < 3 * 64 or form == "JPEG"
        small, whole = (np.asarray(each.resize((64, 64), Image.Resampling.BICUBIC), float)
                        for each in (decoded, decode_image(content, "a")))  # fmt: skip
        assert np.abs(small - whole).mean() < 0.5
    assert decode_image(encoded(image), "a", target=400).size == (900, 700)
    assert KEPT_SIDE >= 2 * 512


def test_warnings_of_damaged_exif_are_not_passed_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken = exif_of((3, struct.pack("<H", 6)))[:-3]
        assert decode_image(encoded(Image.new("RGB", (2, 1)), exif=broken), "a").size in ((1, 2), (2, 1))


def test_palette_with_transparency() -> None:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(image, transparency=0), "p.png").getpixel((0, 0)) == (10, 20, 30)


def test_what_cannot_be_used_is_named() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), "JPEG")
    for content in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(ImageError, match=r"^broken\.jpg is unreadable: "):
            decode_image(content, "broken.jpg")
    with pytest.raises(ImageError, match="its 10 bytes are none of JPEG, PNG, WEBP, "):
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
