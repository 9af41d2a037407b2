"""A folder of diffusers that is converted: its CLIP text encoders, and the files that stay as they are."""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from longclip_hf.conversion.checkpoint import Checkpoint, read_files
from longclip_hf.conversion.hub import fetched
from longclip_hf.conversion.settings import read_settings
from longclip_hf.errors import ConversionError
from longclip_hf.files import inside
from modeling_longclip.defaults import CLIP_LENGTH

INDEX = "model_index.json"
# Pipelines that read `tokenizer.model_max_length` in every release of diffusers that was read, for where it is not
# installed. A test reads the installed one.
READ_LENGTH = re.compile(
    r"(StableDiffusion|Flux|LatentConsistencyModel|AnimateDiff|PIA|CycleDiffusion|I2VGenXL|TextToVideo|VideoToVideo)\w*"
    r"Pipeline"
)
# Components with a table of positions for CLIP's 77 states, or a tensor of that shape.
_FIXED = ("PriorTransformer", "UniDiffuserModel", "LearnedClassifierFreeSamplingEmbeddings")
CLIP_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
# model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, pytorch_model.fp16.bin
_WEIGHTS = re.compile(
    r"(?:model|pytorch_model)(?:\.(?P<variant>\w+))?(?P<shard>-\d{5}-of-\d{5})?\.(?P<format>safetensors|bin)"
)
# What a text encoder must share with the one that it replaces: the rest of the pipeline was trained on it.
_SAME_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "vocab_size")


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder of a pipeline.

    Attributes:
        name: its folder, `text_encoder` or `text_encoder_2`.
        tokenizer: the folder of its tokenizer.
        variants: what stands in its weights files, by variant (`"fp16"`; empty for the plain one).
        left_out: files of its folder that are not carried over: other formats of the weights, which would not fit.
    """

    name: str
    tokenizer: str
    variants: dict[str, Checkpoint]
    left_out: list[str]


def find_pipeline(source: str, revision: str | None, variant: str | None) -> Path:
    """The pipeline's folder: `source` itself, or what diffusers would download of a Hub id to load it.

    Raises:
        ConversionError: if there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None or variant is not None:
            raise ConversionError(
                f"{source} is a folder, and --revision and --variant are for Hub ids: a folder is converted with all "
                "its variants. Leave them out."
            )
        return path
    if path.is_file():
        raise ConversionError(
            f"{source} is a file. Name a folder in diffusers' layout; diffusers makes one of a single file: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)."
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConversionError(f"{source}: no such folder.")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ConversionError(
            'diffusers downloads pipelines from the Hub: pip install "longclip-hf[diffusion]", or name a folder.'
        ) from error

    def snapshot(local_files_only: bool) -> str:
        return str(
            DiffusionPipeline.download(source, revision=revision, variant=variant, local_files_only=local_files_only)
        )

    return fetched(source, revision, "pipeline", snapshot)


def read_encoders(source: str, folder: Path) -> tuple[str, list[TextEncoder]]:
    """The class of the pipeline and its CLIP text encoders, in order.

    Raises:
        ConversionError: if it is no pipeline that is converted, or one of its components has code of its own.
    """
    index = inside(folder, INDEX)
    if not index.is_file():
        raise ConversionError(f"{source} holds no {INDEX}: a folder in diffusers' layout is needed.")
    components = read_settings(folder, INDEX)
    pipeline = str(components.get("_class_name"))
    _check_reads_length(source, pipeline)
    for name, entry in components.items():
        if isinstance(entry, list) and entry and (folder / name / f"{entry[0]}.py").exists():
            raise ConversionError(
                f"{source}: {name} is loaded by code of its own, {name}/{entry[0]}.py, and only stock components are "
                "converted."
            )
        if isinstance(entry, list) and entry and entry[-1] in _FIXED:
            raise ConversionError(f"{source}: {name}, a {entry[-1]}, has {CLIP_LENGTH} positions of its own.")
    named = {name: entry for name, entry in sorted(components.items()) if name.startswith("text_encoder")}
    names = [name for name, entry in named.items() if isinstance(entry, list) and entry and entry[-1] in CLIP_CLASSES]
    if not names:
        found = ", ".join(f"{name}: {entry}" for name, entry in named.items()) or "none at all"
        raise ConversionError(f"{source} has no CLIP text encoder in its {INDEX} (text encoders: {found}).")
    return pipeline, [_read_encoder(source, folder, name) for name in names]


def reads_length(code: str) -> bool:
    """Whether a pipeline's code cuts prompts at the length that its tokenizer states, and counts no 77 of its own.

    SD3's and FLUX's stands there for a pipeline without a tokenizer.
    """
    own = re.sub(rf"tokenizer is not None\s+else {CLIP_LENGTH}\b", "", code)
    return ".model_max_length" in code and re.search(rf"\b{CLIP_LENGTH}\b", own) is None


def code_of(pipeline: str) -> str | None:
    """The file of the installed diffusers that defines a pipeline, as text: nothing is imported, and nothing run."""
    if not re.fullmatch(r"\w+", pipeline) or (spec := importlib.util.find_spec("diffusers")) is None:
        return None
    for place in spec.submodule_search_locations or ():
        for file in sorted(Path(place, "pipelines").rglob("pipeline_*.py")):
            code = file.read_text(encoding="utf-8")
            if f"\nclass {pipeline}(" in code:
                return code
    return None


def _check_reads_length(source: str, pipeline: str) -> None:
    """
    Raises:
        ConversionError: if longer prompts would be cut at 77 tokens all the same, or nothing tells.
    """
    code = code_of(pipeline)
    if code is None and READ_LENGTH.fullmatch(pipeline) is None:
        raise ConversionError(
            f"{source} is a {pipeline}, of which it is not known whether it reads the tokenizer's length. Install the "
            "diffusers that has it, whose code tells."
        )
    if code is not None and not reads_length(code):
        raise ConversionError(
            f"{source} is a {pipeline}, which counts {CLIP_LENGTH} tokens in its own code or does not read the "
            "tokenizer's length: longer prompts would be cut all the same."
        )


def _read_encoder(source: str, folder: Path, name: str) -> TextEncoder:
    place, tokenizer = folder / name, name.replace("text_encoder", "tokenizer")
    for part in (name, tokenizer):
        if not inside(folder, part).is_dir():
            raise ConversionError(f"{source}: the folder {part} is missing. Download the pipeline whole.")
    weights = [match for file in sorted(place.iterdir()) if (match := _WEIGHTS.fullmatch(file.name))]
    variants, read = {}, {"config.json"}
    for variant in sorted({match["variant"] or "" for match in weights}):
        files = [match for match in weights if (match["variant"] or "") == variant]
        # As transformers chooses: safetensors before .bin, one file before shards.
        files = [match for match in files if match["format"] == "safetensors"] or files
        files = [match for match in files if match["shard"] is None] or files
        label = f"{source}/{name}" + f" ({variant})" * bool(variant)
        checkpoint = read_files(label, place, [inside(place, match.string) for match in files])
        if checkpoint.has_image_tower:
            raise ConversionError(f"{label} is a whole CLIP, and a pipeline holds a text tower: {CLIP_CLASSES}.")
        variants[variant] = checkpoint
        read |= {match.string for match in files}
    if not variants:
        raise ConversionError(
            f"{source}/{name} holds no weights: no model.safetensors, no pytorch_model.bin and no variant of them."
        )
    return TextEncoder(name, tokenizer, variants, sorted({file.name for file in place.iterdir()} - read))


def check_replacement(replacement: Checkpoint, encoder: TextEncoder, source: str) -> None:
    """Whether `replacement` is the same network as `encoder`, with more positions."""

    ours = replacement.text_config
    if ours.max_position_embeddings <= CLIP_LENGTH:
        raise ConversionError(
            f"{replacement.source} has {ours.max_position_embeddings} positions, so it is no Long-CLIP. Stretch it "
            f"first: python conversion/stretch.py {replacement.source} --output DIR"
        )
    for checkpoint in encoder.variants.values():
        theirs = checkpoint.text_config
        complaints = [
            f"{size} {getattr(ours, size)}, not {getattr(theirs, size)}"
            for size in _SAME_SIZES
            if getattr(ours, size) != getattr(theirs, size)
        ]
        # Stable Diffusion 2 leaves out the last layer of its ViT-H/14.
        if ours.num_hidden_layers - theirs.num_hidden_layers not in (0, 1):
            complaints.append(f"num_hidden_layers {ours.num_hidden_layers}, not {theirs.num_hidden_layers}")
        if not complaints:
            shapes = {name: tensor.shape for name, tensor in replacement.tensors.items()}
            complaints = [f"{name} is missing" for name in checkpoint.tensors if name not in shapes]
            name = "text_projection.weight"
            if not complaints and name in checkpoint.tensors and shapes[name] != checkpoint.tensors[name].shape:
                complaints.append(f"{name} has shape {shapes[name]}, not {checkpoint.tensors[name].shape}")
        if complaints:
            raise ConversionError(
                f"The text tower of {replacement.source} is another than {encoder.name} of {source}: "
                f"{'; '.join(complaints)}. Name a Long-CLIP of the same size (Stable Diffusion 1.x, XL and 3: "
                "ViT-L/14; 2.x: ViT-H/14), or leave --text-encoder out to stretch the pipeline's own."
            )


def unchanged_files(folder: Path, rewritten: set[str]) -> tuple[list[str], list[str]]:
    """The files below `folder` that are carried over, as paths in it, and what is not, in words.

    Hidden folders (.git, a download's .cache) and Python files stay behind: no component is loaded by code of its own.

    Args:
        folder: of the pipeline, or of a part of it.
        rewritten: folders in it that are left out.

    Raises:
        ConversionError: for a link to a folder, of which several could make a circle, or something that is no file.
        FileError: for a link that leads out of `folder`.
    """
    files, left_out = [], []
    for root, folders, names in os.walk(folder):
        place = Path(root)
        inner = [(place / name).relative_to(folder).as_posix() for name in sorted(folders)]
        left_out += [path for path in inner if Path(path).name.startswith(".")]
        inner = [path for path in inner if not Path(path).name.startswith(".") and path not in rewritten]
        for path in inner:
            if (folder / path).is_symlink():
                raise ConversionError(f"{folder / path} is a link to a folder. Replace the link by the folder itself.")
        folders[:] = [Path(path).name for path in inner]
        for name in sorted(names):
            path = (place / name).relative_to(folder).as_posix()
            if name.endswith(".py"):
                left_out.append(f"{path}, which is code")
            elif inside(folder, path).is_file():
                files.append(path)
            else:
                raise ConversionError(f"{folder / path} is no file, and leads to none. Download the pipeline whole.")
    return files, left_out
