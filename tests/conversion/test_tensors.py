"""Reading and writing against the safetensors library and torch, and files that are not what they say."""

import errno
import json
import os
import random
import re
import resource
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from longclip_hf.conversion import tensors as tensors_module
from longclip_hf.conversion.tensors import (
    StoredTensor,
    read_safetensors,
    read_torch,
    target_dtype,
    write_safetensors,
)
from longclip_hf.errors import ConversionError
from longclip_hf.weights import DTYPE_NAMES, DTYPES

NAMES = ["bias", "weight", "scalar", "empty", "half", "brain", "double", "ids", "short_ids", "bytes", "mask"]


def examples() -> dict[str, torch.Tensor]:
    """One of everything that a checkpoint holds: every dtype, no dimension, no element, values without an equal."""
    draw = torch.Generator().manual_seed(0)
    values = [
        torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        torch.randn(3, 5, generator=draw),
        torch.tensor(2.6592),
        torch.zeros(0, 4),
        torch.randn(2, 3, generator=draw).half(),
        torch.randn(7, generator=draw).bfloat16(),
        torch.randn(2, 2, generator=draw, dtype=torch.float64),
        torch.arange(77)[None],
        torch.arange(3, dtype=torch.int32),
        torch.arange(5, dtype=torch.uint8),
        torch.tensor([True, False, True]),
    ]
    return dict(zip(NAMES, values, strict=True))


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def loaded(tensors: dict[str, StoredTensor]) -> dict[str, tuple[Any, ...]]:
    return {name: bits(tensor.load()) for name, tensor in tensors.items()}


def all_bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def by_hand(file: Path, header: dict[str, Any], data: bytes, padding: int = 0) -> Path:
    """A safetensors file of another writer: the header is not padded to eight bytes."""
    encoded = json.dumps(header).encode() + b" " * padding
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return file


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_file(examples(), tmp_path / "stored.safetensors")
    return tmp_path / "stored.safetensors"


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def torch_format(request: pytest.FixtureRequest) -> dict[str, bool]:
    return {"_use_new_zipfile_serialization": request.param}


def test_every_dtype_has_one_name() -> None:
    assert {DTYPE_NAMES[dtype]: dtype for dtype in DTYPE_NAMES} == DTYPES


class TestReadSafetensors:
    def test_reads_the_bits_that_the_library_reads(self, stored: Path) -> None:
        read = read_safetensors(stored)
        assert loaded(read) == all_bits(load_file(stored)) == all_bits(examples())
        assert {name: tensor.nbytes for name, tensor in read.items()} == {
            name: tensor.nbytes for name, tensor in examples().items()
        }

    @pytest.mark.parametrize("padding", range(8))
    def test_reads_headers_of_any_length(self, padding: int, tmp_path: Path) -> None:
        header = {
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        }
        file = by_hand(tmp_path / "odd.safetensors", header, b"\1\2\3" + struct.pack("<2f", 0.5, -2), padding)
        read = read_safetensors(file)
        assert {name: tensor.load().tolist() for name, tensor in read.items()} == {"a": [1, 2, 3], "b": [0.5, -2.0]}
        assert list(read) == ["a", "b"]  # in the order of the bytes

    def test_refuses_what_no_clip_has(self, tmp_path: Path) -> None:
        header = {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
        file = by_hand(tmp_path / "eight.safetensors", header, b"\0\0")
        with pytest.raises(ConversionError, match=r"eight.safetensors: tensor w is F8_E4M3, fp8, reduced for inf"):
            read_safetensors(file)
        assert read_safetensors(file, []) == {}
        header = {"w": {"dtype": "I16", "shape": [1], "data_offsets": [0, 2]}}
        file = by_hand(tmp_path / "sixteen.safetensors", header, b"\0\0")
        with pytest.raises(ConversionError, match=r"sixteen.safetensors: tensor w is I16; a CLIP is one of F64, F32"):
            read_safetensors(file)

    @pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
    def test_a_cut_file_says_its_size(self, size: int, stored: Path) -> None:
        size += stored.stat().st_size if size < 0 else 0
        os.truncate(stored, size)
        with pytest.raises(ConversionError, match=f"stored.safetensors is corrupt or was cut short .* {size} bytes"):
            read_safetensors(stored)

    def test_a_file_that_goes_on_is_refused(self, stored: Path) -> None:
        with stored.open("ab") as stream:
            stream.write(b"\0")
        with pytest.raises(ConversionError, match="is corrupt"):
            read_safetensors(stored)

    def test_a_file_that_shrinks_after_it_was_opened_is_an_error(self, stored: Path) -> None:
        read = read_safetensors(stored)
        os.truncate(stored, read["weight"].offset + 4)
        with pytest.raises(ConversionError, match="became shorter while it was read: weight is incomplete"):
            read["weight"].load()


class TestReadTorch:
    def test_reads_the_bits_that_torch_reads(self, tmp_path: Path, torch_format: dict[str, bool]) -> None:
        torch.save(examples(), tmp_path / "model.bin", **torch_format)
        assert loaded(read_torch(tmp_path / "model.bin")) == all_bits(examples())

    def test_reads_views_and_parameters(self, tmp_path: Path, torch_format: dict[str, bool]) -> None:
        linear = nn.Linear(3, 2)
        state = OrderedDict(weight=linear.weight, turned=linear.weight.detach().T, row=linear.weight.detach()[1])
        torch.save(state, tmp_path / "model.bin", **torch_format)
        read = read_torch(tmp_path / "model.bin")
        assert loaded(read) == all_bits(state)
        write_safetensors(tmp_path / "model.safetensors", read)
        assert all_bits(load_file(tmp_path / "model.safetensors")) == all_bits(state)

    def test_code_in_the_file_is_not_executed(self, tmp_path: Path, torch_format: dict[str, bool]) -> None:
        marker = tmp_path / "executed"
        state = {"weight": torch.zeros(2), "code": MakesFolder(marker)}
        torch.save(state, tmp_path / "model.bin", **torch_format)
        with pytest.raises(
            ConversionError, match=r"Nothing in it was executed. Download it again, or use a safetensors"
        ):
            read_torch(tmp_path / "model.bin")
        assert not marker.exists()
        torch.load(tmp_path / "model.bin", weights_only=False)
        assert marker.exists(), "the file above holds code indeed"

    def test_torchscript_is_refused_with_a_reason(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "model.bin"))
        with pytest.raises(ConversionError, match=r"is no plain state dict, or is corrupt: .*TorchScript"):
            read_torch(tmp_path / "model.bin")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([torch.zeros(2)], r"is no plain state dict \(name -> tensor\), but a list\."),
            (torch.zeros(2), r"is no plain state dict \(name -> tensor\), but a Tensor\."),
            ({"state_dict": {"w": torch.zeros(2)}}, r"is no plain state dict \(name -> tensor\), but a dict\."),
            ({"w": torch.zeros(2, dtype=torch.complex64)}, r"tensor w is torch.complex64; a CLIP is one of F64, F32"),
        ],
        ids=["list", "tensor", "nested", "complex"],
    )
    def test_refuses_what_is_no_state_dict(self, content: Any, message: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "model.bin")
        with pytest.raises(ConversionError, match=message):
            read_torch(tmp_path / "model.bin")


class MakesFolder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def damaged(data: bytes) -> Iterator[bytes]:
    """The file cut, with wrong bytes (mostly in the header), and without any sense."""
    dice = random.Random(0)
    yield from (data[: len(data) * part // 20] for part in range(20))
    for _ in range(150):
        wrong = bytearray(data)
        for _ in range(dice.choice([1, 3, 20])):
            wrong[dice.randrange(len(data) if dice.random() < 0.5 else min(400, len(data)))] = dice.randrange(256)
        yield bytes(wrong)
    yield from (dice.randbytes(size) for size in range(1, 30))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_is_a_conversion_error_or_still_reads(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "whole"
    if kind == "safetensors":
        save_file(examples(), file)
    else:
        torch.save(examples(), file, _use_new_zipfile_serialization=kind == "zip")
    refused = 0
    for number, data in enumerate(damaged(file.read_bytes())):
        (tmp_path / f"{number}").write_bytes(data)
        try:
            loaded((read_safetensors if kind == "safetensors" else read_torch)(tmp_path / f"{number}"))
        except ConversionError:
            refused += 1
    assert refused > 100


class TestWrite:
    def test_the_library_reads_what_was_written(self, tmp_path: Path) -> None:
        file = tmp_path / "new.safetensors"
        write_safetensors(file, examples())
        assert all_bits(load_file(file)) == all_bits(examples())
        _, header = header_of(file)
        assert header["__metadata__"] == {"format": "pt"}
        assert list(header) == ["__metadata__", *NAMES]

    @pytest.mark.parametrize("letters", range(1, 9))
    def test_the_data_starts_aligned(self, letters: int, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "new.safetensors", {"w" * letters: torch.ones(3)})
        assert header_of(tmp_path / "new.safetensors")[0] % 8 == 0

    def test_stored_mapped_and_new_tensors_in_any_order(self, stored: Path, tmp_path: Path) -> None:
        expected = examples() | {"mapped": torch.randn(4, 4), "new": torch.randn(3), "last": torch.ones(2).half()}
        torch.save({"mapped": expected["mapped"], "last": expected["last"]}, tmp_path / "model.bin")
        sources = read_safetensors(stored) | read_torch(tmp_path / "model.bin") | {"new": expected["new"]}
        for seed in range(5):
            names = random.Random(seed).sample(sorted(expected), len(expected))
            file = tmp_path / f"{seed}.safetensors"
            write_safetensors(file, {name: sources[name] for name in names})
            assert all_bits(load_file(file)) == {name: bits(expected[name]) for name in names}
            assert list(header_of(file)[1])[1:] == names

    def test_an_unaligned_file_is_copied(self, tmp_path: Path) -> None:
        header = {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
        odd = by_hand(tmp_path / "odd.safetensors", header, b"\1\2\3" + struct.pack("<2f", 0.5, -2), 1)
        write_safetensors(tmp_path / "new.safetensors", read_safetensors(odd))
        read = load_file(tmp_path / "new.safetensors")
        assert {name: tensor.tolist() for name, tensor in read.items()} == {"a": [1, 2, 3], "b": [0.5, -2.0]}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("from_disk", [True, False])
    def test_casts_floating_tensors_only(
        self, dtype: torch.dtype, from_disk: bool, stored: Path, tmp_path: Path
    ) -> None:
        sources = read_safetensors(stored) if from_disk else examples()
        write_safetensors(tmp_path / "cast.safetensors", sources, dtype)
        expected = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in examples().items()
        }
        assert all_bits(load_file(tmp_path / "cast.safetensors")) == all_bits(expected)

    @pytest.mark.parametrize("dtype", [None, torch.float16])
    def test_counts_every_byte_once(self, dtype: torch.dtype | None, stored: Path, tmp_path: Path) -> None:
        counts: list[int] = []
        sources = {**read_safetensors(stored), "new": torch.zeros(5)}
        write_safetensors(tmp_path / "new.safetensors", sources, dtype, counts.append)
        size, _ = header_of(tmp_path / "new.safetensors")
        assert sum(counts) == (tmp_path / "new.safetensors").stat().st_size - 8 - size

    def test_does_not_write_over_a_file(self, stored: Path) -> None:
        before = stored.read_bytes()
        with pytest.raises(FileExistsError):
            write_safetensors(stored, examples())
        assert stored.read_bytes() == before

    @pytest.mark.parametrize("why", ["missing", errno.EXDEV, errno.EOPNOTSUPP, "half-way"])
    def test_without_the_kernels_copy_the_bytes_are_the_same(
        self, why: str | int, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tensors_module, "CHUNK", 16)
        sources = {**read_safetensors(stored), "new": torch.ones(3)}
        write_safetensors(tmp_path / "kernel.safetensors", sources)
        in_kernel, calls = os.copy_file_range, []

        def copy(*args: Any, **kwargs: Any) -> int:
            calls.append(args)
            if why == "half-way" and len(calls) < 4:
                return in_kernel(*args, **kwargs)
            raise OSError(errno.EXDEV if why == "half-way" else why, "no")

        if why == "missing":
            monkeypatch.delattr(os, "copy_file_range")
        else:
            monkeypatch.setattr(os, "copy_file_range", copy)
        write_safetensors(tmp_path / "fallback.safetensors", sources)
        assert (tmp_path / "fallback.safetensors").read_bytes() == (tmp_path / "kernel.safetensors").read_bytes()
        assert len(calls) == {"missing": 0, "half-way": 4}.get(str(why), 1)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
    def test_a_disk_that_fails_is_an_error(
        self, code: int, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "copy_file_range", fail)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            write_safetensors(tmp_path / "new.safetensors", read_safetensors(stored))

    @pytest.mark.parametrize("in_kernel", [True, False])
    def test_a_file_that_may_not_grow_is_an_error(
        self, in_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_file({"weight": torch.zeros(5000)}, tmp_path / "big.safetensors")
        sources = read_safetensors(tmp_path / "big.safetensors")
        if not in_kernel:
            monkeypatch.delattr(os, "copy_file_range")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # Python ignores the signal, so that it is an error
        try:
            with pytest.raises(OSError, match="File too large"):
                write_safetensors(tmp_path / "new.safetensors", sources)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @pytest.mark.parametrize("in_kernel", [True, False])
    def test_a_source_that_shrinks_is_an_error(
        self, in_kernel: bool, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not in_kernel:
            monkeypatch.delattr(os, "copy_file_range")
        sources = read_safetensors(stored)
        os.truncate(stored, stored.stat().st_size - 1)
        with pytest.raises(ConversionError, match="became shorter while it was read: 1 bytes are missing"):
            write_safetensors(tmp_path / "new.safetensors", sources)


def header_of(file: Path) -> tuple[int, dict[str, Any]]:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return size, json.loads(data[8 : 8 + size])


@pytest.mark.parametrize("wanted", [None, torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", DTYPES.values())
def test_only_floats_are_cast(own: torch.dtype, wanted: torch.dtype | None) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    assert target_dtype(own, wanted) == (wanted if wanted is not None and own in floats else own)
