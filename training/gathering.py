"""The only module that knows the process group. Without one, every function is the identity of one process.

The convention, which the losses and their gradients rely on: the objective is the MEAN over processes of each one's
loss, and whoever trains averages the parameters' gradients over processes, as DDP and FSDP do. A collective's backward
pass must therefore SUM what the processes' losses say of its input, without dividing:

    gradient that DDP ends with = 1/W sum_p (d x_p / d theta)^T [sum_q d L_q / d x_p] = d (1/W sum_q L_q) / d theta,

where x_p are the features of process p, L_q is the loss of process q, which sees all of them, and the bracket is what
the backward pass below returns on process p. The gradient is summed in the tensor's own type: gather in float32.

Every process must reach the same collectives in the same order, forward and backward. The sum in the backward passes
is an all-reduce, of which the gather's keeps its own rows: every backend has it, and embeddings are a few megabytes.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from longclip_hf.errors import TrainingError


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def check_processes(accelerate_says: int) -> None:
    """
    Raises:
        TrainingError: where launcher, torch and accelerate count differently: each process would train on its own.
    """
    said = {
        "accelerate": accelerate_says,
        "torch's process group": world_size(),
        "the launcher (WORLD_SIZE)": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if len(set(said.values())) > 1:
        counts = ", ".join(f"{name} says {count}" for name, count in said.items())
        raise TrainingError(
            f"How many processes train together? {counts}. Their gradients would not be averaged. On the CPU, give "
            "--use_cpu (LongCLIPTrainingArguments(use_cpu=True)); otherwise let every process see its GPU."
        )


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all processes in the order of ranks; the gradient of all of them comes back to each row's owner.

    Args:
        tensor: of shape `(local, ...)`, equal on all processes: see `check_equal_rows`.

    Returns:
        `torch.Tensor` of shape `(world_size * local, ...)`; this process's rows begin at `rank() * local`.
    """
    if world_size() == 1:
        return tensor
    gathered: torch.Tensor = _AllGather.apply(tensor)
    return gathered


class Gathered(dict[torch.Tensor, torch.Tensor]):
    """`gathered[tensor]` is `all_gather_with_grad(tensor)`, which is done once for a tensor. By identity."""

    def __missing__(self, tensor: torch.Tensor) -> torch.Tensor:
        self[tensor] = all_gather_with_grad(tensor)
        return self[tensor]


def check_equal_rows(rows: int, device: torch.device) -> None:
    """Refuses batches of different sizes, of which `all_gather_with_grad` would make anything or wait for ever.

    It waits for the device, so it is for the first batch of a loader whose batches are all of one size.

    Raises:
        ValueError: on every process, when their numbers of rows differ. Such a batch has no mean over processes that
            equals the mean over rows.
    """
    sizes = [rows] if world_size() == 1 else _gather(torch.tensor([rows], device=device)).tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"Every process must bring equally many rows, got {sizes} in the order of ranks. Drop the last, "
            "smaller batch (dataloader_drop_last) or give every process its share of it."
        )


def all_reduce_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; the gradient is the sum of their gradients.

    Args:
        tensor: of the same shape on all processes.

    Returns:
        `torch.Tensor` of the same shape.
    """
    if world_size() == 1:
        return tensor
    reduced: torch.Tensor = _AllReduce.apply(tensor)
    return reduced


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    gathered = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    # One tensor would do, but torch 2.13 renamed that function: this one exists in every release.
    dist.all_gather(list(gathered.split(len(tensor))), tensor.contiguous())
    return gathered


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor)
    return tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = slice(rank() * len(tensor), (rank() + 1) * len(tensor))
        return _gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _sum(grad)[ctx.rows]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _sum(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _sum(grad)
