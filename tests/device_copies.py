"""Counts what would be copied from a GPU to the host, or waited for, on a machine that has none."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

# What Python asks of a tensor, and what a tensor's operators need to know of its values.
ASKED = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__}
WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "repeat_interleave")
# Where tensors lie on the CPU anyway: in the collator, the optimizer's counts of steps, what a generator drew.
ON_THE_CPU = ("/torch/utils/data/", "/torch/optim/", " in with_mixed_captions")


class Copies(TrainerCallback):
    """By step: `within` it, from its first forward pass to the optimizer's step, and `after` it, where it is logged.

    Every copy is the place in the code that asks for it, `file.py:line in function`.
    """

    def __init__(self) -> None:
        self.within: list[list[str]] = []
        self.after: list[list[str]] = []
        self._modes = (_Functions(self), _Operators(self))
        self._into: list[str] | None = None

    def add(self, what: str) -> None:
        frame, places = sys._getframe(2), []
        while frame is not None:
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
            frame = frame.f_back
        if self._into is None or any(part in place for place in places for part in ON_THE_CPU):
            return
        outside = (place for place in places if "/torch/" not in place and Path(__file__).name not in place)
        self._into.append(f"{what} at {next(outside)}")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for mode in self._modes:
            mode.__enter__()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.within.append([])
        self.after.append([])
        self._into = self.within[-1]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._into = self.after[-1]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)


class _Functions(TorchFunctionMode):
    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED:
            self.copies.add(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if name in WAITING or by_mask:
            self.copies.add(name)
        return func(*args, **(kwargs or {}))
