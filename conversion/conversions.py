"""What both directions between layouts share: the names of the layouts, and the report."""

from dataclasses import dataclass, field
from pathlib import Path

LAYOUTS = ("original", "open_clip")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did: facts about the result and proofs, in words, by name; what to do with it next."""

    output: Path
    facts: dict[str, str]
    proofs: dict[str, str]
    advice: str
    left_out: list[str] = field(default_factory=list)
