"""A safetensors file that is written tensor by tensor, of tensors that need not be in memory together."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

# The names of the safetensors format for what CLIP checkpoints hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header_of(layout: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """What a file begins with whose tensors have these types and shapes, one behind the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Of a tensor on any device, as they stand in a file."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_in_turn(
    file: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Writes `tensors`, in the order of `layout`, to `file`; each is let go before the next is asked for."""
    with file.open("wb") as stream:
        stream.write(header_of(layout))
        for tensor in tensors:
            stream.write(bytes_of(tensor))
