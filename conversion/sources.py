"""What a name on the command line means: a file, a folder, a Hub id, or a model of OpenCLIP's by its own name."""

from pathlib import Path
from typing import NamedTuple

from longclip_hf.conversion.checkpoint import download
from longclip_hf.conversion.open_clip_config import OPEN_CLIP_CONFIG
from longclip_hf.conversion.origin import RELEASED
from longclip_hf.errors import ConversionError
from longclip_hf.files import inside, notice

_OPEN_CLIP = "hf-hub:"  # how OpenCLIP writes a Hub id
# What OpenCLIP calls its weights, the present name first.
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# OpenCLIP's MODEL/TAG -> the repository that it reads (its pretrained.py): those with CLIP's own two towers.
_NAMED = {
    "ViT-B-32/laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "ViT-B-32/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "ViT-B-32-256/datacomp_s34b_b86k": "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
    "ViT-B-16/laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "ViT-B-16/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
    "ViT-L-14/laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "ViT-L-14/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
    "ViT-H-14/laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g-14/laion2b_s12b_b42k": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "ViT-g-14/laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "ViT-bigG-14/laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}


class Source(NamedTuple):
    """Where a checkpoint is.

    Attributes:
        source: a file, a folder or a Hub id.
        file: the file in it that is meant; None where `source` is the file, or a folder in Hugging Face's layout.
        is_folder: whether it is one in Hugging Face's layout.
    """

    source: str
    file: str | None
    is_folder: bool


def find_source(source: str, file: str | None = None, revision: str | None = None) -> Source:
    """What `source` means, where no file in it is named: of Long-CLIP's and OpenCLIP's repositories, it is known.

    What was taken is said on stderr.

    Raises:
        ConversionError: if a Hub id holds nothing that is known by its name.
    """
    name = source
    if source in _NAMED:
        source = _OPEN_CLIP + _NAMED[source]
    is_open_clip, source = source.startswith(_OPEN_CLIP), source.removeprefix(_OPEN_CLIP)
    path = Path(source).expanduser()
    if file is not None or path.is_file() or (source.startswith((".", "/", "~")) and not path.is_dir()):
        return Source(source, file, False)
    released = {repository: released for released, repository in RELEASED.items()}
    if not path.is_dir() and source in released:
        return _said(name, Source(source, released[source], False))
    folder = path if path.is_dir() else download(source, revision, ["config.json", OPEN_CLIP_CONFIG, "README.md"])
    if not is_open_clip and inside(folder, "config.json").is_file():
        return Source(source, None, True)
    if inside(folder, OPEN_CLIP_CONFIG).is_file():
        for weights in _OPEN_CLIP_FILES:
            there = folder if path.is_dir() else download(source, revision, [weights])
            if inside(there, weights).is_file():
                return _said(name, Source(source, weights, False))
    if path.is_dir():
        return Source(source, None, False)
    raise ConversionError(
        f"{name} holds neither config.json nor OpenCLIP's {OPEN_CLIP_CONFIG} with its weights. Name the file in it: "
        f"{source} FILE."
    )


def _said(name: str, found: Source) -> Source:
    notice(f"{name} is taken to mean {found.file} of {found.source}.")
    return found
