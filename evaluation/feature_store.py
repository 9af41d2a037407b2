"""Features on disk, found again by the content that they were computed from.

A space holds the features of one tower of one model; within it, a feature is found by the hash of its text or image.
A shard is a safetensors file that is never changed: `keys` of shape `(rows, 32)` and `features` of shape
`(rows, dim)`, with the space and a checksum. It is written beside its place and renamed, under a name of its own: a
run that is killed keeps its finished shards, and any number of processes write at once. A file whose name begins with
a dot was never finished, and may be deleted; so may a whole space.
"""

import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longclip_hf.errors import FileError

logger = logging.getLogger(__name__)

FORMAT = "longclip-features-1"
Write = Callable[[Sequence[bytes], torch.Tensor], None]


class FeatureStore:
    """A folder of features.

    Args:
        folder: is made if it does not exist.
        shard_seconds: a shard is written when its first row is as old as this: what a killed run loses at most.
    """

    def __init__(self, folder: str | Path, shard_seconds: float = 30) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard_seconds = shard_seconds
        self._named: set[Path] = set()

    def read(self, space: str, keys: Sequence[bytes]) -> tuple[list[int], torch.Tensor]:
        """What is stored of `keys`. A file that is no whole shard of this space is named in a warning and not used.

        Args:
            space: the hash, in hexadecimal, of what computes the features.
            keys: SHA-256 of each row's content, all different.

        Returns:
            `(found, features)`: the positions in `keys` of those that are stored, and their features of shape
            `(len(found), dim)` in that order, or of shape `(0, 0)`.
        """
        wanted = {key: position for position, key in enumerate(keys)}
        found: list[int] = []
        parts = [torch.empty(0, 0)]
        for file in sorted(self._place(space).glob("[!.]*")):
            try:
                positions, features = _read_shard(file, space, wanted)
            except (OSError, SafetensorError, ValueError) as error:
                if file not in self._named:
                    logger.warning(
                        "%s is not used and can be deleted: it is no shard of this cache (%s).", file, error
                    )
                self._named.add(file)
                continue
            if positions:
                parts.append(features)
                found += positions
        return found, torch.cat(parts[1:] or parts)

    @contextmanager
    def writer(self, space: str) -> Iterator[Write]:
        """Gives `write(keys, features)`, which collects rows and writes a shard now and then, and one at the end.

        The last shard is also written when the block ends with an exception: what was computed is not lost.
        """
        keys: list[bytes] = []
        parts: list[torch.Tensor] = []
        began = time.monotonic()

        def flush() -> None:
            if keys:
                rows, features = list(keys), torch.cat(parts)
                keys.clear()  # before they are written: a full disk is not tried again at the end
                parts.clear()
                self._write_shard(space, rows, features)

        def write(new_keys: Sequence[bytes], features: torch.Tensor) -> None:
            nonlocal began
            if not keys:
                began = time.monotonic()
            keys.extend(new_keys)
            parts.append(features)
            if time.monotonic() - began >= self.shard_seconds:
                flush()

        try:
            yield write
        finally:
            flush()

    def _place(self, space: str) -> Path:
        return self.folder / space[:32]

    def _write_shard(self, space: str, keys: Sequence[bytes], features: torch.Tensor) -> None:
        place = self._place(space)
        name = f"{uuid.uuid4().hex}.safetensors"
        beside = place / f".{name}"
        key_rows = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
        features = features.float().contiguous()
        metadata = {"format": FORMAT, "space": space, "crc32": _checksum(key_rows, features)}
        try:
            place.mkdir(exist_ok=True)
            save_file({"keys": key_rows, "features": features}, beside, metadata)
            with beside.open("rb") as stream:
                os.fsync(stream.fileno())
            beside.rename(place / name)
        except (OSError, SafetensorError) as error:
            raise FileError(
                f"Features cannot be written to {place}: {error}. What was written before stays, and the same command "
                "goes on from it: make room, or name another --cache."
            ) from error
        finally:
            beside.unlink(missing_ok=True)


def _read_shard(file: Path, space: str, wanted: dict[bytes, int]) -> tuple[list[int], torch.Tensor]:
    """Takes the shard's keys out of `wanted`: positions, and features of shape `(len(positions), dim)`.

    Raises:
        OSError, SafetensorError, ValueError: if it is no whole shard of `space`.
    """
    with safe_open(file, framework="pt") as shard:
        metadata = shard.metadata() or {}
        if (metadata.get("format"), metadata.get("space")) != (FORMAT, space):
            raise ValueError("it has another format, or belongs to another model")
        key_rows = shard.get_tensor("keys")
        keys = [bytes(key) for key in key_rows.numpy()]
        rows = [row for row, key in enumerate(keys) if key in wanted]
        if not rows:
            return [], torch.empty(0, 0)
        features = shard.get_tensor("features")
        if _checksum(key_rows, features) != metadata.get("crc32"):
            raise ValueError("its checksum does not fit its content")
    return [wanted.pop(keys[row]) for row in rows], features[rows]


def _checksum(keys: torch.Tensor, features: torch.Tensor) -> str:
    return f"{zlib.crc32(features.numpy().data, zlib.crc32(keys.numpy().data)):08x}"
