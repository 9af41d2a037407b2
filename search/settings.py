"""What a folder of embeddings was made with: `longclip.json`, which everything that reads it is checked against."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longclip_hf.errors import SearchError
from longclip_hf.files import load_json, write_atomically

if TYPE_CHECKING:
    from longclip_hf.evaluation.encoding import Encoder

Format = Literal["lance", "parquet", "npy"]
FORMATS: tuple[Format, ...] = ("lance", "parquet", "npy")
FILE = "longclip.json"
LAYOUT = 1


@dataclass(frozen=True)
class Settings:
    """
    Args:
        model: a folder or a Hub id.
        revision: the commit of a Hub id.
        fingerprint: see `Encoder`.
        length: tokens that the model reads.
        dim: of the vectors.
        dtype: of computation.
        precision: of the vectors as they are kept, `"float16"` or `"float32"`.
        vectors: the columns that hold them: `"image_vector"`, `"text_vector"`.
        chunk_rows: rows of the source that are committed together.
        clean_captions, neutralise_special_tokens: see `longclip_hf.cleaning.preparation`.
        format: of the table.
        layout: of this file and the table's own columns.
    """

    model: str
    revision: str | None
    fingerprint: str
    length: int
    dim: int
    dtype: str
    precision: str
    vectors: tuple[str, ...]
    chunk_rows: int
    clean_captions: bool = False
    neutralise_special_tokens: bool = False
    format: Format = "lance"
    layout: int = LAYOUT

    def write(self, folder: Path) -> None:
        """Into a folder that exists."""
        write_atomically(folder / FILE, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """
        Raises:
            SearchError: if `folder` holds no embeddings, or those of another version of this project.
        """
        file = folder / FILE
        if not file.is_file():
            raise SearchError(f"{folder} holds no embeddings (no {FILE}): longclip-embed SOURCE --output {folder}")
        found = load_json(file)
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.get("layout") != LAYOUT or found.keys() != names:
            layout = found.get("layout") if isinstance(found, dict) else None
            raise SearchError(
                f"{file} is of layout {layout!r}, and {LAYOUT} is read here. Embed again with this version."
            )
        return cls(**{**found, "vectors": tuple(found["vectors"])})

    def check_encoder(self, encoder: "Encoder", folder: Path) -> None:
        """
        Raises:
            SearchError: if `encoder` computes other vectors than those in `folder`.
        """
        if encoder.positions != self.length:
            raise SearchError(
                f"{folder} was made with a model of {self.length} tokens, and {encoder.name} reads "
                f"{encoder.positions}. Take {self.model}, or embed again."
            )
        if encoder.fingerprint != self.fingerprint:
            raise SearchError(
                f"{folder} was made with {self.model} (fingerprint {self.fingerprint[:12]}), and {encoder.name} has "
                f"another one, {encoder.fingerprint[:12]}: their vectors cannot be compared. Take the same model, or "
                "embed again."
            )

    def check_same(self, other: "Settings", folder: Path) -> None:
        """
        Raises:
            SearchError: if what is to be added, `other`, differs in more than the model's name.
        """
        wanted = replace(other, model=self.model, revision=self.revision, vectors=self.vectors)
        differing = [(name, value, asdict(wanted)[name]) for name, value in asdict(self).items()]
        said = [
            f"{name} {_short(mine)} and not {_short(theirs)}" for name, mine, theirs in differing if mine != theirs
        ]
        if said:
            raise SearchError(f"{folder} was made with {', '.join(said)}. Do as before, or name another --output.")


def _short(value: Any) -> str:
    return f"{value:.12}" if isinstance(value, str) else str(value)
