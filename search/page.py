"""The page of `longclip-serve`: a question of any length, what of it is read, and what is found."""

import io
from typing import Any

import gradio as gr
from PIL import Image

from longclip_hf.errors import ImageError, LongCLIPError
from longclip_hf.images import MAX_PIXELS, decode_image
from longclip_hf.search.search_index import Answer, Hit, SearchIndex

STOCK = 77  # tokens that a stock CLIP reads
MOST = 100  # rows that are shown


def read_and_cut(index: SearchIndex, text: str, limit: int) -> tuple[str, str, int]:
    """`text` in two, what a model of `limit` tokens reads and what it does not; and all its tokens.

    Start and end of text are tokens too, so that `limit - 2` are the text's own.
    """
    found = index.encoder.tokenizer(text, truncation=False, return_offsets_mapping=True, verbose=False)
    offsets = found["offset_mapping"][1:-1]
    at = len(text) if len(offsets) <= limit - 2 else offsets[limit - 3][1]
    return text[:at], text[at:], len(offsets) + 2


def make_page(index: SearchIndex) -> gr.Blocks:
    """The page, which shows rows of `index` and serves no other file."""
    positions = index.encoder.positions
    with gr.Blocks(title="Long-CLIP search", analytics_enabled=False) as page:
        gr.Markdown(f"## {index.table.count_rows():,} rows, searched with up to {positions} tokens")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                text = gr.Textbox(label="A text of any length", lines=5, elem_id="question")
                read = gr.HighlightedText(
                    label="What is read", color_map={_beyond(STOCK): "orange", _beyond(positions): "red"},
                    elem_id="read",
                )  # fmt: skip
            image = gr.Image(label="or an image", type="pil", height=200, min_width=200)
        with gr.Row():
            where = gr.Textbox(label="Condition (SQL)", placeholder="price < 20")
            count = gr.Slider(1, MOST, value=12, step=1, label="Rows")
            beside = gr.Checkbox(label=f"beside what the first {STOCK} tokens alone find")
        button = gr.Button("Search", variant="primary", elem_id="search")
        said = gr.Markdown(elem_id="said")
        gallery = gr.Gallery(label="Found", columns=4, object_fit="contain", height="auto", elem_id="found")
        with gr.Column(visible=False) as other:
            cut = gr.Gallery(
                label=f"Found by the first {STOCK} tokens", columns=4, object_fit="contain", height="auto"
            )

        def ask(text: str, image: Any, where: str, count: float, beside: bool) -> tuple[Any, ...]:
            options: dict[str, Any] = {"k": int(min(max(count, 1), MOST)), "where": where.strip() or None}
            beside = beside and bool(text.strip())
            try:
                if text.strip():
                    answer = index.search(text, **options)
                elif image is not None:
                    answer = index.search(image=_encoded(image), **options)
                else:
                    return "Write a text, or choose an image.", [], [], gr.update(visible=False)
                stock = index.search(text, max_length=STOCK, **options) if beside else None
            except LongCLIPError as error:
                return f"**{error}**", [], [], gr.update(visible=False)
            return (
                _summary(answer), _shown(answer), _shown(stock) if stock is not None else [],
                gr.update(visible=beside),
            )  # fmt: skip

        def count_tokens(text: str) -> list[tuple[str, str | None]]:
            return _marked(index, text)

        asked = [text, image, where, count, beside]
        text.change(count_tokens, text, read, show_progress="hidden")
        gr.on([button.click, text.submit, where.submit], ask, asked, [said, gallery, cut, other])
    return page


def _beyond(tokens: int) -> str:
    return f"beyond {tokens} tokens"


def _marked(index: SearchIndex, text: str) -> list[tuple[str, str | None]]:
    """The text, marked behind what a stock CLIP reads, and behind what this one does; and how many tokens it has."""
    if not text.strip():
        return []
    inside, beyond, tokens = read_and_cut(index, text, min(STOCK, index.encoder.positions))
    reached = len(read_and_cut(index, text, index.encoder.positions)[0]) - len(inside)
    parts = [
        (f"[{tokens} tokens] {inside}", None),
        (beyond[:reached], _beyond(STOCK)),
        (beyond[reached:], _beyond(index.encoder.positions)),
    ]
    return [part for part in parts if part[0]]


def _summary(answer: Answer) -> str:
    if not answer.hits:
        return "Nothing was found."
    read = f"{answer.read} of {answer.tokens} tokens were read. " if answer.tokens else ""
    missing = sum(hit.image() is None for hit in answer)
    return read + (f"{missing} of these rows have no image here, and are not shown." if missing else "")


def _shown(answer: Answer) -> list[tuple[Image.Image, str]]:
    pictures = ((_picture(hit), f"{hit.score:.3f}  {hit.text or hit.location or ''}") for hit in answer)
    return [(picture, text) for picture, text in pictures if picture is not None]


def _picture(hit: Hit) -> Image.Image | None:
    content = hit.image()
    try:
        found = None if content is None else decode_image(content, "an image", MAX_PIXELS)
    except ImageError:
        return None
    if found is not None:
        found.thumbnail((512, 512))
    return found


def _encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG")
    return data.getvalue()
