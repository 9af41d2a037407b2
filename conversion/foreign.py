"""What people call a CLIP checkpoint and this project does not read: each format by name, with what to do about it."""

from collections.abc import Callable, Iterable
from pathlib import Path

from longclip_hf.errors import ConversionError

_AGAIN = "Take the safetensors version of the model"
_STOCK = "Load it with transformers 4 (CLIPModel.from_pretrained(DIR, {option}=True)) and save it with save_pretrained"
# How a file begins -> what it is, and the remedy.
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git-LFS pointer, a few lines that stand for the file",
     "Fetch the file itself: `git lfs pull` in its folder, or `hf download`"),
    (b"GGUF", "a GGUF file, quantised for llama.cpp and its kin", _AGAIN),
    (b"\x89HDF", "TensorFlow's weights (HDF5)", _STOCK.format(option="from_tf")),
    (b"<!DOCTYPE", "a web page, not a file of weights", "Download it again, logged in if the model asks for it"),
    (b"<html", "a web page, not a file of weights", "Download it again, logged in if the model asks for it"),
)  # fmt: skip
_ENDINGS = {
    ".msgpack": ("Flax's weights", _STOCK.format(option="from_flax")),
    ".h5": ("TensorFlow's weights (HDF5)", _STOCK.format(option="from_tf")),
    ".onnx": ("an ONNX graph, a program made of a checkpoint", "Convert the checkpoint that it was made of"),
    ".npz": ("an archive of numpy's, as MLX writes", _AGAIN),
    ".gguf": ("a GGUF file, quantised for llama.cpp and its kin", _AGAIN),
    ".tflite": ("a TensorFlow Lite graph", "Convert the checkpoint that it was made of"),
}


def _starts(*beginnings: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(beginnings)


def _holds(*parts: str) -> Callable[[str], bool]:
    return lambda name: any(part in name for part in parts)


# A tensor's name that only one kind of model has -> what it is, and why it is refused.
_NAMES: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (_holds("lora_up.", "lora_down.", "lora_A.", "lora_B."), "a LoRA, which is added to a model",
     "Merge it into its model first"),
    (_holds("visual.layer1.", "visual.attnpool."), "a CLIP with a ResNet (RN50 and others)",
     "Hugging Face's CLIP has a ViT: take a ViT model"),
    (_holds("visual.trunk."), "a CLIP with an image tower of timm", "Take one with OpenCLIP's own ViT"),
    (_holds("text.transformer.embeddings.", "roberta.embeddings.", "bert.embeddings.", "embeddings.word_embeddings."),
     "a CLIP with a text tower of the BERT family (XLM-RoBERTa, Chinese-CLIP)",
     "Its positions are not CLIP's, and it is not stretched here"),
    (_holds("logit_bias", "vision_model.head.attention", "text_model.head."), "a SigLIP",
     "In a folder with its config.json, stretch.py stretches it; one file does not say all that is needed"),
    (_holds("encoder.block.0.layer.0.SelfAttention"), "a T5 encoder", "T5 has no table of positions to stretch"),
)  # fmt: skip


def refuse_file(file: Path) -> None:
    """
    Raises:
        ConversionError: if `file` is of a format that is known and not read, by its first bytes or its name.
    """
    with file.open("rb") as stream:
        begins = stream.read(64)
    for beginning, what, remedy in _BEGINNINGS:
        if begins.startswith(beginning):
            raise ConversionError(f"{file} is {what}. {remedy}.")
    if file.suffix.lower() in _ENDINGS:
        what, remedy = _ENDINGS[file.suffix.lower()]
        raise ConversionError(f"{file} is {what}. {remedy}.")


def refuse_names(source: str, names: Iterable[str]) -> None:
    """
    Raises:
        ConversionError: if `names` are of a model that is known and not converted.
    """
    names = list(names)
    for is_its, what, remedy in _NAMES:
        if found := next((name for name in names if is_its(name)), None):
            raise ConversionError(f"{source} is {what}, by its tensor {found}. {remedy}.")
