"""A CLIP of any official size with random weights, and a CLIP-style tokenizer: offline stand-ins for the real ones.

python -m examples.random_clip ViT-B/16 folder
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

# Width, MLP width, layers, heads of both towers; side and patch of the image in pixels; width of the joint space.
SIZES: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"text": (512, 2048, 12, 8), "vision": (768, 3072, 12, 12), "image": (224, 32), "projection": 512},
    "ViT-B/16": {"text": (512, 2048, 12, 8), "vision": (768, 3072, 12, 12), "image": (224, 16), "projection": 512},
    "ViT-L/14": {"text": (768, 3072, 12, 12), "vision": (1024, 4096, 24, 16), "image": (224, 14), "projection": 768},
    "ViT-L/14-336": {
        "text": (768, 3072, 12, 12),
        "vision": (1024, 4096, 24, 16),
        "image": (336, 14),
        "projection": 768,
    },
    "ViT-H/14": {"text": (1024, 4096, 24, 16), "vision": (1280, 5120, 32, 16), "image": (224, 14), "projection": 1024},
    "ViT-bigG/14": {
        "text": (1280, 5120, 32, 20),
        "vision": (1664, 8192, 48, 16),
        "image": (224, 14),
        "projection": 1280,
    },
    "tiny": {"text": (32, 64, 2, 4), "vision": (32, 64, 2, 4), "image": (32, 16), "projection": 24},
}

SENTENCES = (
    "a photo of a dog on the beach",
    "a red bicycle leans against a white wall next to a wooden door with a small window",
    "two people walk across a busy street while a yellow taxi waits at the traffic light",
    "on the left there is a tall green tree and behind it a house with a blue roof",
    "the sky is cloudy and the street is wet from the rain that fell in the morning",
    "a woman in a long coat holds an umbrella and looks at her phone",
    "a market stall sells apples oranges bananas and fresh bread in brown paper bags",
    "an old man sits on a bench and reads a newspaper beside a sleeping cat",
)


def clip_config(size: str, vocab_size: int = 49408, layers: int | None = None, **text: Any) -> Any:
    """A `CLIPConfig` with 77 positions at an official size; `layers` shortens both towers."""
    from transformers import CLIPConfig

    shape = SIZES[size]
    activation = "gelu" if size in ("ViT-H/14", "ViT-bigG/14") else "quick_gelu"

    def tower(numbers: tuple[int, int, int, int]) -> dict[str, Any]:
        width, mlp, depth, heads = numbers
        return {
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers or depth,
            "num_attention_heads": heads,
            "hidden_act": activation,
            "projection_dim": shape["projection"],
        }

    ids = {"vocab_size": vocab_size, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    image_size, patch_size = shape["image"]
    return CLIPConfig(
        text_config=tower(shape["text"]) | ids | text,
        vision_config=tower(shape["vision"]) | {"image_size": image_size, "patch_size": patch_size},
        projection_dim=shape["projection"],
    )


def write_tokenizer(folder: Path) -> int:
    """Writes a byte-pair tokenizer of CLIP's kind that has a token for every word of `SENTENCES`.

    The merges are made here: the trainer of `tokenizers` breaks ties by chance, and figures that are printed must not
    differ from run to run.

    Returns:
        The size of its vocabulary; the last two ids are BOS and EOT, as in CLIP.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], str] = {}
    for word in sorted({word for sentence in SENTENCES for word in sentence.split()}):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            # What comes first in the list of merges is merged first, in this word too.
            known = [pair for pair in merges if pair in itertools.pairwise(parts)]
            pair = known[0] if known else (parts[0], parts[1])
            merges[pair] = "".join(pair)
            at = list(itertools.pairwise(parts)).index(pair)
            parts[at : at + 2] = ["".join(pair)]
    # As in CLIP: every byte alone and at the end of a word, what was merged, and the two special tokens last.
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *merges.values(), "<|startoftext|>", "<|endoftext|>"]
    tokens = list(dict.fromkeys(tokens))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
        ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
    )
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return len(tokens)


def write_image_settings(folder: Path, image_size: int) -> None:
    """`preprocessor_config.json` in the form of OpenAI's own checkpoints."""
    config = {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": image_size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_checkpoint(
    folder: Path,
    size: str,
    dtype: str = "float32",
    layers: int | None = None,
    full_vocabulary: bool = True,
    seed: int = 0,
) -> None:
    """A stock CLIP checkpoint with 77 positions: random weights, tokenizer, image settings.

    Args:
        folder: where to write.
        size: a key of `SIZES`.
        dtype: of all weights.
        layers: of each tower, where the official number is too much.
        full_vocabulary: 49,408 rows of token embeddings, as in the real ones, or only those that the tokenizer uses.
        seed: of the weights.
    """
    import torch
    from transformers import CLIPModel

    vocab_size = write_tokenizer(folder)
    config = clip_config(size, 49408 if full_vocabulary else vocab_size, layers)
    config.text_config.bos_token_id, config.text_config.eos_token_id = vocab_size - 2, vocab_size - 1
    write_image_settings(folder, SIZES[size]["image"][0])
    torch.manual_seed(seed)
    CLIPModel(config).to(getattr(torch, dtype)).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    options = parser.parse_args()
    write_checkpoint(options.folder, options.size, options.dtype)
