"""Features by a checkout of the original's code, which the user names: the one place where foreign code runs."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch

from longclip_hf.errors import ConversionError, ProofError
from modeling_longclip import LongCLIPModel
from modeling_longclip.compat import features

MODULE = "model/model_longclip.py"
TOLERANCE = 1e-5  # of features in float32; of their largest one, where that is above 1


def prove_features(folder: Path, checkout: Path, tensors: Mapping[str, torch.Tensor], rounded: bool) -> str:
    """The model in `folder` has the features of the original's code, both in float32.

    Random texts of 3 tokens to the whole length, padded with 0 as the original pads, and random images.

    Args:
        folder: the written checkpoint.
        checkout: of the repository that Long-CLIP's authors released.
        tensors: of the source, in the original's layout, with both tables.
        rounded: whether `folder` has what the original's loader rounds through float16 rounded so. The comparison with
            that loader must then hold, and otherwise the one with the loader that is kept from rounding; the other one
            says how much the rounding matters.

    Returns:
        The largest differences of both, in words.

    Raises:
        ProofError: if the comparison that must hold does not, to `TOLERANCE`.
        ConversionError: if there is no such code, or it fails.
    """
    model = LongCLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    text, vision = model.config.text_config, model.config.vision_config
    draw = torch.Generator().manual_seed(0)
    length = text.max_position_embeddings
    counts = [3, length // 8, length // 2, length]
    input_ids = torch.randint(0, text.eos_token_id - 1, (len(counts), length), generator=draw)
    for row, count in enumerate(counts):
        input_ids[row, count - 1] = text.eos_token_id
        input_ids[row, count:] = 0
    pixel_values = torch.randn(2, 3, vision.image_size, vision.image_size, generator=draw)
    with torch.inference_mode():
        ours = features(model.get_text_features(input_ids)), features(model.get_image_features(pixel_values))
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    said = []
    for theirs_rounded, name in ((False, "without its rounding"), (True, "with it")):
        theirs = original_features(checkout, floats, input_ids, pixel_values, theirs_rounded)
        worst = [(one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True)]
        limits = [TOLERANCE * max(1.0, one.abs().max().item()) for one in theirs]
        figures = f"{name} text {worst[0]:.1e}, image {worst[1]:.1e}"
        if theirs_rounded == rounded and not all(map(float.__le__, worst, limits)):
            raise ProofError(
                f"The features differ from the original's in {checkout}: {figures}; {max(limits):.1e} is allowed."
            )
        said.append(figures)
    return f"largest differences of features: {'; '.join(said)}"


def original_features(
    checkout: Path,
    tensors: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image features by the released code in `checkout`, in float32.

    Its model is loaded from its own file, not from its package, which would need torchvision.

    Args:
        checkout: of the repository that Long-CLIP's authors released.
        tensors: in its layout, with both tables.
        input_ids: of shape `(batch_size, 248)`: the released code knows no other length.
        pixel_values: of shape `(batch_size, 3, image_size, image_size)`.
        rounded: whether its loader rounds weights through float16, as it does unless it is kept from it.

    Returns:
        Two tensors of shape `(batch_size, projection_dim)`, not normalised.

    Raises:
        ConversionError: if there is no such code, or it fails.
    """
    file = checkout.expanduser() / MODULE
    spec = importlib.util.spec_from_file_location("original_longclip", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ConversionError(f"{checkout} is no checkout of the original: it has no {MODULE}.")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not rounded:
            module.convert_weights = lambda model: None  # type: ignore[attr-defined]
        model = module.build_model(dict(tensors), load_from_clip=False).float()
        with torch.inference_mode():
            return model.encode_text(input_ids), model.encode_image(pixel_values)
    except Exception as error:  # code of another project may raise anything
        raise ConversionError(f"The original in {checkout} failed: {type(error).__name__}: {error}") from error
