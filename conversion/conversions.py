"""What both directions between layouts share: names of layouts and of image statistics, and the report."""

from dataclasses import dataclass, field
from pathlib import Path

LAYOUTS = ("original", "open_clip", "comfyui")
# The mean and standard deviation of each channel, of values in 0 ... 1, by OpenCLIP's names (its constants.py).
IMAGE_STATISTICS = {
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did: facts about the result and proofs, in words, by name; what to do with it next."""

    output: Path
    facts: dict[str, str]
    proofs: dict[str, str]
    advice: str
    left_out: list[str] = field(default_factory=list)
