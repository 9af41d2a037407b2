"""Where a converted checkpoint came from: published models, their tokenizers and licences, and the card."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PretrainedConfig

from longclip_hf.conversion.checkpoint import stated_license
from longclip_hf.conversion.encoders import KINDS
from longclip_hf.conversion.folder import write_card
from longclip_hf.errors import ConversionError
from modeling_longclip.defaults import CLIP_LENGTH

# What Long-CLIP's authors released: file name -> repository on the Hub, all under this licence.
RELEASED = {
    "longclip-B.pt": "BeichenZhang/LongCLIP-B",
    "longclip-B-32.pt": "BeichenZhang/LongCLIP-B-32",
    "longclip-L.pt": "BeichenZhang/LongCLIP-L",
    "longclip-L@336px.pt": "BeichenZhang/LongCLIP-L-336px",
}
RELEASED_LICENSE = "apache-2.0"
# Image width, patch and side in pixels -> where the tokenizer and image settings of that size are.
BASES = {
    (768, 32, 224): "openai/clip-vit-base-patch32",
    (768, 16, 224): "openai/clip-vit-base-patch16",
    (1024, 14, 224): "openai/clip-vit-large-patch14",
    (1024, 14, 336): "openai/clip-vit-large-patch14-336",
    (1280, 14, 224): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    (1408, 14, 224): "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    (1664, 14, 224): "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}


def base_of(source: str, config: PretrainedConfig) -> str:
    """The Hub id of the base model of that size, for its tokenizer and image settings.

    Raises:
        ConversionError: if none of that size is known.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        kind = KINDS.get(config.hidden_size)
        base = kind.base if kind else None
        size = f"a text tower of width {config.hidden_size}"
        files = "its tokenizer"
    else:
        base = BASES.get((vision.hidden_size, vision.patch_size, vision.image_size))
        size = f"images of {vision.image_size} px in patches of {vision.patch_size} and width {vision.hidden_size}"
        files = "its tokenizer and image settings"
    if base is None:
        raise ConversionError(
            f"{source} has {size}: no base model of that size is known. Name a Hub id or folder of {files} with "
            "--tokenizer."
        )
    return base


def write_long_card(
    work: Path,
    config: PretrainedConfig,
    *,
    source: str,
    long_class: str,
    repository: str | None,
    license: str | None,
    two_tables: bool = False,
    precision: str = "exact",
    dtype: str | None = None,
    proofs: dict[str, str],
) -> None:
    """The card of a Long-CLIP that was converted, not stretched.

    Args:
        work: the new folder.
        config: of the whole model, or of its text tower alone.
        source: the file or folder that it was made of.
        long_class: the class that loads it.
        repository: the Hub id that holds `source`, if one does.
        license: of the weights, where it is known.
        two_tables: whether `source` is in the layout of Long-CLIP's authors.
        precision: `"exact"` or `"as-released"`.
        dtype: what all tensors were cast to, if they were.
        proofs: claim to result.
    """
    has_image_tower = hasattr(config, "vision_config")
    text: Any = getattr(config, "text_config", config)
    data = ModelCardData(
        base_model=repository,
        library_name="transformers",
        license=license,
        pipeline_tag="zero-shot-image-classification" if has_image_tower else "feature-extraction",
        tags=["clip", "long-clip"],
    )
    write_card(
        work,
        data,
        converted=True,
        two_tables=two_tables,
        repository=repository,
        precision=precision,
        source=source,
        long_class=long_class,
        dtype=dtype,
        has_image_tower=has_image_tower,
        rows=CLIP_LENGTH,
        length=text.max_position_embeddings,
        keep=text.keep,
        proofs=proofs,
    )


def carry_card(work: Path, card: Path) -> str | None:
    """The source's own card, for a plain CLIP: what stretches it reads the licence there. Returns the licence."""
    license_ = stated_license(card.parent)
    if license_ and card.is_file():
        shutil.copyfile(card, work / "README.md")
    return license_
