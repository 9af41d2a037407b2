"""Tensors where they lie on disk, and a safetensors file made of them without loading what does not change.

The safetensors library writes a file from tensors in memory; copying ranges of bytes from file to file costs what `cp`
costs, whatever the size of the model. Reading goes through the library, which validates the header.
"""

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from longclip_hf.errors import ConversionError
from longclip_hf.weights import DTYPE_NAMES, DTYPES, bytes_of, header_of

CHUNK = 32 * 2**20  # bytes copied between two reports of progress
# Two file systems, or one that does not copy in the kernel.
_CANNOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: `file`'s bytes from `offset` on, or (`.bin`) a tensor mapped into memory from the file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    mapped: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """The tensor: read into memory, or as it is mapped from a `.bin` file."""
        if self.mapped is not None:
            return self.mapped
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        # Read, not mapped: a fault for every page of a large file costs more than copying, and counts as memory too.
        flat = np.empty(self.nbytes, dtype=np.uint8)  # numpy asks for huge pages, torch does not
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            buffer, done = flat.data, 0
            while done < self.nbytes:
                count = stream.readinto(buffer[done:])
                if not count:
                    raise ConversionError(f"{self.file} became shorter while it was read: {self.name} is incomplete.")
                done += count
        return torch.from_numpy(flat).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Entry:
    """A tensor in the header of a safetensors file: its dtype in the format's words, `nbytes` from `offset` on."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """What a `.safetensors` file says of its tensors, of whatever dtype, in the order of their bytes; its metadata.

    Raises:
        ConversionError: if the file is corrupt, cut short, or of MLX.
    """
    try:
        with safe_open(file, framework="pt"):
            pass  # the library checks the header against the file's length
    except SafetensorError as error:
        raise ConversionError(
            f"{file} is corrupt or was cut short ({error}): it has {file.stat().st_size} bytes. Download it again."
        ) from error
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
    metadata = header.pop("__metadata__", None) or {}
    if metadata.get("format") == "mlx":
        raise ConversionError(
            f"{file} is of MLX, whose convolutions have another order. Take the model that it was made of."
        )
    entries = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + header_size + begin, end - begin)
    return entries, metadata


def read_safetensors(file: Path, names: Iterable[str] | None = None) -> dict[str, StoredTensor]:
    """The tensors of a `.safetensors` file, in its order.

    Args:
        file: with tensors of any dtype.
        names: of those that are meant; by default all.

    Raises:
        ConversionError: if the file is corrupt, cut short, or one that is meant has a dtype that no CLIP has.
    """
    meant = None if names is None else set(names)
    tensors = {}
    for name, entry in read_header(file)[0].items():
        if meant is not None and name not in meant:
            continue
        if entry.dtype.startswith("F8_"):
            raise ConversionError(
                f"{file}: tensor {name} is {entry.dtype}, fp8, reduced for inference: what was rounded off does not "
                "come back. Take the float16 version of the file."
            )
        if entry.dtype not in DTYPES:
            raise ConversionError(f"{file}: tensor {name} is {entry.dtype}; a CLIP is one of {', '.join(DTYPES)}.")
        tensors[name] = StoredTensor(file, name, entry.shape, DTYPES[entry.dtype], entry.offset)
    return tensors


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.bin` file: a plain state dict, read with `weights_only=True` so that no code in it runs.

    Raises:
        ConversionError: if the file is no plain state dict of tensors, is corrupt, or would run code.
    """
    return as_stored(file, load_torch(file))


def load_torch(file: Path) -> Any:
    """What torch saved in `file`, read with `weights_only=True` so that no code in it runs; tensors are mapped.

    Raises:
        ConversionError: if the file is corrupt or would run code, with what was found in it.
    """
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format before torch 1.6 cannot be mapped.
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of every class: the bytes of a corrupt file are a program for the unpickler
        raise ConversionError(f"{file} is no plain state dict, or is corrupt: {_found(file, error)}") from error


def as_stored(file: Path, state_dict: Any) -> dict[str, StoredTensor]:
    """The tensors of a plain state dict that `load_torch` read from `file`.

    Raises:
        ConversionError: if it is none.
    """
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()
    ):
        raise ConversionError(f"{file} is no plain state dict (name -> tensor), but a {type(state_dict).__name__}.")
    for name, tensor in state_dict.items():
        if str(tensor.dtype).startswith("torch.float8"):
            raise ConversionError(
                f"{file}: tensor {name} is {tensor.dtype}, fp8, reduced for inference: what was rounded off does not "
                "come back. Take the float16 version of the file."
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise ConversionError(f"{file}: tensor {name} is {tensor.dtype}; a CLIP is one of {', '.join(DTYPES)}.")
    return {
        name: StoredTensor(file, name, tuple(tensor.shape), tensor.dtype, mapped=tensor)
        for name, tensor in state_dict.items()
    }


def _found(file: Path, error: Exception) -> str:
    """What is in a file that torch does not read safely, and the remedy; torch's own advice is to run its code."""
    remedy = "Nothing in it was executed. Download it again, or use a safetensors version of the checkpoint"
    if "TorchScript" in str(error):
        plain = f"torch.save(torch.jit.load({file.name!r}, 'cpu').state_dict(), {f'{file.stem}-plain.pt'!r})"
        return (
            f"it is a TorchScript archive, a program that holds weights. {remedy}; if you trust it, take the weights "
            f'out yourself: python -c "import torch; {plain}"'
        )
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it is a pickle that calls {code[1]}, and weights call nothing. {remedy}, or of its state_dict() alone."
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{reason} {remedy}."


def target_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor of dtype `own` is written as when floating-point ones are `wanted`."""
    return wanted if wanted is not None and own.is_floating_point else own


def write_safetensors(
    file: Path,
    tensors: Mapping[str, StoredTensor | torch.Tensor],
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `tensors` in their order: bytes of safetensors files are copied by the kernel, the rest one by one.

    Args:
        file: the new file.
        tensors: name to tensor, stored or in memory.
        dtype: cast floating-point tensors to it; by default each keeps its own.
        on_bytes: called with every number of bytes written.
    """
    layout = {name: (target_dtype(tensor.dtype, dtype), tensor.shape) for name, tensor in tensors.items()}
    with file.open("xb") as stream:
        stream.write(header_of(layout))
        stream.flush()
        for piece in _pieces(tensors, dtype):
            if isinstance(piece, torch.Tensor):
                stream.write(bytes_of(piece))
                stream.flush()
                on_bytes(piece.nbytes)
            else:
                copy_range(*piece, stream, on_bytes)


def _pieces(
    tensors: Mapping[str, StoredTensor | torch.Tensor], dtype: torch.dtype | None
) -> Iterator[torch.Tensor | tuple[Path, int, int]]:
    """What to write: tensors, and `(file, offset, count)` for neighbours in a file that are copied as they are."""
    run: tuple[Path, int, int] | None = None
    for tensor in tensors.values():
        target = target_dtype(tensor.dtype, dtype)
        if isinstance(tensor, StoredTensor) and tensor.mapped is None and tensor.dtype == target:
            if run is not None and run[0] == tensor.file and run[1] + run[2] == tensor.offset:
                run = (run[0], run[1], run[2] + tensor.nbytes)
                continue
            if run is not None:
                yield run
            run = (tensor.file, tensor.offset, tensor.nbytes)
            continue
        if run is not None:
            yield run
            run = None
        yield (tensor.load() if isinstance(tensor, StoredTensor) else tensor).to(target)
    if run is not None:
        yield run


def copy_range(
    source: Path, offset: int, count: int, stream: BinaryIO, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Appends `count` bytes of `source` from `offset` on to `stream`, in the kernel where it can.

    Raises:
        ConversionError: if `source` became shorter meanwhile.
    """
    in_kernel = hasattr(os, "copy_file_range")
    with source.open("rb") as origin:
        while count:
            if in_kernel:
                try:
                    copied = os.copy_file_range(origin.fileno(), stream.fileno(), min(count, CHUNK), offset_src=offset)
                except OSError as error:
                    if error.errno not in _CANNOT_IN_KERNEL:
                        raise
                    in_kernel = False
                    continue
            else:
                origin.seek(offset)
                copied = stream.write(origin.read(min(count, CHUNK)))
                stream.flush()
            if not copied:
                raise ConversionError(f"{source} became shorter while it was read: {count} bytes are missing.")
            offset, count = offset + copied, count - copied
            on_bytes(copied)
