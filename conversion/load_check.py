"""Loads a folder as whoever finds it on the Hub does. `publish.py` runs this file in a process of its own.

    python -P load_check.py FOLDER POSITIONS STOCK_CLASS HAS_IMAGE_TOWER

It ends with 1 and one line on stderr if the folder does not load, or its own code and stock transformers differ.
"""

import sys
from typing import Any

# Whoever loads it from the Hub has only the code in the folder.
sys.modules["modeling_longclip"] = sys.modules["longclip_hf"] = None  # type: ignore[assignment]


def check(folder: str, positions: int, stock: str, has_image_tower: bool) -> None:
    """
    Args:
        folder: with the files that would be sent, and no others.
        positions: that the model reads, and at which the tokenizer must cut.
        stock: the class of transformers that loads it without custom code.
        has_image_tower: whether it is a whole CLIP.

    Raises:
        Exception: of any class, for what does not load; ValueError and AssertionError for what is not as it should be.
    """
    import numpy
    import torch
    import transformers
    from PIL import Image

    texts = ["a photo of a dog", "a photo of a dog " * positions]
    call: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
    if has_image_tower:
        image = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=numpy.uint8))
        inputs = transformers.AutoProcessor.from_pretrained(folder)(text=texts, images=[image], **call)
    else:
        inputs = transformers.AutoTokenizer.from_pretrained(folder)(texts, **call)
    length = inputs["input_ids"].shape[1]
    if length != positions:
        raise ValueError(f"the tokenizer cuts texts at {length} tokens, and the model reads {positions}")
    found = []
    for model_class, trust in ((transformers.AutoModel, True), (getattr(transformers, stock), False)):
        options = {"trust_remote_code": True} if trust else {}
        model = model_class.from_pretrained(folder, dtype=torch.float32, **options).eval()
        if trust and type(model).__name__ != f"Long{stock}":
            raise ValueError(f"AutoModel with its own code gives a {type(model).__name__}, not a Long{stock}")
        with torch.inference_mode():
            output = model(**inputs)
        # Of both towers the logits, which depend on all weights; NaN is equal to nothing.
        found.append(output.logits_per_image if has_image_tower else output[0])
        del model
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    try:
        check(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True")
    except Exception as error:
        print(type(error).__name__ + ": " + " ".join(str(error).split())[:600], file=sys.stderr)
        sys.exit(1)
