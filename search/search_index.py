"""Search in Python: `SearchIndex("DIR").search("a paragraph ...")`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from longclip_hf.cleaning import preparation
from longclip_hf.errors import ImageError, SearchError
from longclip_hf.evaluation.encoding import Encoder, image_inputs
from longclip_hf.image_files import ImageFiles
from longclip_hf.images import decode_image
from longclip_hf.search.lookup import nearest, read_indices
from longclip_hf.search.settings import Settings
from longclip_hf.search.source_rows import OWN
from longclip_hf.search.tables import open_lance

_LOCAL = ImageFiles(None, access="local")  # regular files alone are opened
COLUMNS = {"images": "image_vector", "texts": "text_vector"}


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        score: cosine of its vector and the question's, -1 ... 1.
        source, row: which row of which source.
        location: path or URL of its image, or None where it has none of its own.
        text: its caption.
        columns: everything else that stands in the row.
        thumbnail: a small JPEG, or None.
    """

    score: float
    source: str
    row: int
    location: str | None
    text: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = field(default=None, repr=False)

    def image(self) -> bytes | None:
        """The encoded image: its file, or else the thumbnail; None where there is neither. No address is opened."""
        if self.location is not None and "://" not in self.location:
            try:
                return _LOCAL.read(self.location)
            except ImageError:
                return self.thumbnail
        return self.thumbnail

    @property
    def is_moved(self) -> bool:
        """Whether its image is no longer where it was embedded from."""
        return self.location is not None and "://" not in self.location and not Path(self.location).is_file()


@dataclass(frozen=True)
class Answer:
    """What was found, the best first.

    Attributes:
        hits: rows.
        tokens: of the question, start and end of text among them; 0 for an image.
        read: those that the model read. Fewer than `tokens`: the rest was cut.
        exact: whether every row was compared, or an index asked.
    """

    hits: list[Hit]
    tokens: int
    read: int
    exact: bool

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)


class SearchIndex:
    """A folder that `longclip-embed` wrote, with its model.

    Args:
        folder: which.
        model: where the model is now, if not where it was; it must be the same one.
        device: by default an accelerator, if there is one.
        trust_remote_code: see `Encoder`.

    Attributes:
        settings: of the embeddings.
        encoder: of the questions.
        table: of lancedb.

    Raises:
        SearchError: if there are no embeddings, or those of another model or length.
        EncodingError: if the model cannot be loaded.
        ImportError: without the extra `search`.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | None = None,
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.settings = Settings.read(self.folder)
        self.table = open_lance(self.folder)
        self.indices = read_indices(self.folder)
        for name in self.settings.vectors:
            kind = self.table.schema.field(name).type if name in self.table.schema.names else None
            if kind is None or getattr(kind, "list_size", 0) != self.settings.dim:
                raise SearchError(
                    f"The table in {self.folder} has no column {name} of {self.settings.dim} numbers: its columns are "
                    f"{', '.join(self.table.schema.names)}. Embed again."
                )
        self.encoder = Encoder(
            model or self.settings.model,
            None if model else self.settings.revision,
            device=device, dtype=self.settings.dtype, trust_remote_code=trust_remote_code, quiet=True,
            prepare=preparation(self.settings.clean_captions, self.settings.neutralise_special_tokens),
        )  # fmt: skip
        self.settings.check_encoder(self.encoder, self.folder)

    def search(
        self,
        text: str | None = None,
        *,
        image: str | Path | bytes | None = None,
        k: int = 10,
        where: str | None = None,
        among: str | None = None,
        exact: bool = False,
        max_length: int | None = None,
    ) -> Answer:
        """
        Args:
            text: the question, of any length; what is beyond the model's is cut.
            image: instead, a path or the bytes of a file.
            k: how many rows.
            where: an SQL condition on the table's columns, such as `"price < 20"`.
            among: `"images"` or `"texts"`; by default images, where there are any.
            exact: compare every row, though there is an index.
            max_length: read no more tokens of the text than so many.

        Raises:
            SearchError: for a question that is none, a condition that is none, or vectors that are not there.
            EncodingError: for a text without a word.
            ImageError: for an image that cannot be read.
        """
        if (text is None) == (image is None):
            raise SearchError("Ask with a text or with an image.")
        if k < 1:
            raise SearchError(f"{k} rows cannot be found: ask for 1 or more.")
        column = self._column(among)
        tokens = read = 0
        if text is not None:
            found = self.encoder.encode_texts([text], max_length)
            features, tokens = found.embeds, int(found.lengths[0])
            read = min(tokens, max_length or tokens, self.encoder.positions)
        else:
            features = self._image_features(image)
        vector = F.normalize(features[0], dim=0).numpy().astype(np.float32)
        index = None if exact else self.indices.get(column)
        rows = nearest(self.table, column, vector, k, where, index.tuning if index else None)
        return Answer([_hit(row) for row in rows.to_pylist()], tokens, read, index is None)

    def _column(self, among: str | None) -> str:
        if among is None:
            return self.settings.vectors[0]
        column = COLUMNS.get(among)
        if column not in self.settings.vectors:
            there = [name for name, vectors in COLUMNS.items() if vectors in self.settings.vectors]
            raise SearchError(f"{self.folder} has no vectors of {among!r}: search among {' or '.join(there)}.")
        return column

    def _image_features(self, image: Any) -> torch.Tensor:
        name = "the image" if isinstance(image, bytes) else str(image)
        content = image if isinstance(image, bytes) else _LOCAL.read(str(Path(image).expanduser()))
        decoded = decode_image(content, name, self.encoder.max_pixels)
        return self.encoder.forward("image", image_inputs(self.encoder.image_processor, [decoded]))


def _hit(row: dict[str, Any]) -> Hit:
    others = {name: value for name, value in row.items() if name not in (*OWN, "_distance")}
    return Hit(1 - row["_distance"], row["source"], row["row"], row["location"], row["text"], others, row["thumbnail"])
