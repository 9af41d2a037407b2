"""What was found as one picture: the images in the order of their scores, each with its score and its text."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from longclip_hf.errors import ImageError
from longclip_hf.files import write_atomically
from longclip_hf.images import MAX_PIXELS, decode_image
from longclip_hf.search.search_index import Hit

SIDE, LINES, MARGIN = 240, 3, 8
_LINE = 16  # pixels


def contact_sheet(hits: Sequence[Hit], columns: int = 5) -> Image.Image:
    """A picture of all hits; one whose image is not there is a frame that says so."""
    font = ImageFont.load_default(12)
    wide, high = SIDE + 2 * MARGIN, SIDE + (LINES + 1) * _LINE + 2 * MARGIN
    columns = max(1, min(columns, len(hits)))
    sheet = Image.new("RGB", (wide * columns, high * max(1, -(-len(hits) // columns))), "white")
    draw = ImageDraw.Draw(sheet)
    for number, hit in enumerate(hits):
        left, top = number % columns * wide + MARGIN, number // columns * high + MARGIN
        picture = _picture(hit)
        if picture is None:
            draw.rectangle((left, top, left + SIDE, top + SIDE), outline="gray")
            draw.text((left + MARGIN, top + SIDE // 2), "the image is not there", "gray", font)
        else:
            picture.thumbnail((SIDE, SIDE))
            sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        lines = [f"{number + 1}.  {hit.score:.3f}", *_wrapped(hit.text or hit.location or "", font)]
        for line, words in enumerate(lines):
            draw.text((left, top + SIDE + MARGIN // 2 + line * _LINE), words, "black", font)
    return sheet


def write_sheet(hits: Sequence[Hit], file: Path) -> None:
    """`contact_sheet` as a PNG."""
    data = io.BytesIO()
    contact_sheet(hits).save(data, "PNG")
    write_atomically(file, data.getvalue())


def _picture(hit: Hit) -> Image.Image | None:
    content = hit.image()
    if content is None:
        return None
    try:
        return decode_image(content, hit.location or "a thumbnail", MAX_PIXELS)
    except ImageError:
        return None


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The first lines of `text`, as wide as an image; the last ends in dots where there is more."""
    lines, words = [""], text.split()
    while words:
        longer = f"{lines[-1]} {words[0]}".strip()
        if font.getlength(longer) <= SIDE or not lines[-1]:
            lines[-1] = longer
            words.pop(0)
        elif len(lines) == LINES:
            lines[-1] = lines[-1][:-3] + " ..."
            break
        else:
            lines.append("")
    return lines
