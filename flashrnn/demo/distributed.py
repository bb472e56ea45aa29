"""One process, or as many as ``torchrun`` started, by the same code.

All processes draw the whole batch from one seed, and each computes its share. So their number
changes the speed of a run, and its results only by the rounding of sums.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flashrnn.demo.errors import DemoError


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this process.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints, plots and writes."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's part of ``total`` rows, as even as it gets."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, made to start from rank 0's parameters and to average gradients."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Each value's sum over the processes, with the same bits on all of them.

        So all processes take the same decisions by it.
        """
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def from_leader(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        carrier = [value]
        dist.broadcast_object_list(carrier, device=self.device)
        return carrier[0]


@contextmanager
def join(device: str | None) -> Iterator[World]:
    """Find the other processes, if ``torchrun`` started any, and leave them at the end.

    A process on the CPU computes with one thread meanwhile: a step is too little work for several
    threads, which wait for each other long if other programs use the cores.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; ``None``: a GPU if there is one.

    Raises:
        DemoError: a device that is not there, or on which nothing can be trained.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    found = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if size > 1:
        # Optimizers import it. If the processes' group is there by then, it holds the group to the
        # interpreter's end (PyTorch 2.13), where the group's threads sometimes abort the process.
        importlib.import_module("torch._dynamo")
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    threads = torch.get_num_threads()
    if found.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield World(rank, size, found)
    finally:
        torch.set_num_threads(threads)
        if size > 1:
            dist.destroy_process_group()


def _device(name: str | None, local_rank: int) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            # torchrun's processes on one machine take a GPU each.
            device = torch.device("cuda", local_rank)
        # An operation of training: some devices allocate memory but cannot compute.
        x = torch.ones(1, device=device, requires_grad=True)
        torch.autograd.grad((2 * x).sum(), x)[0].item()
    except Exception as error:
        # Each kind of device has an error of its own.
        count = torch.cuda.device_count()
        reason = str(error).partition("\n")[0]
        raise DemoError(
            f"--device {name}: this machine offers cpu and {count} CUDA GPUs, and process "
            f"{local_rank} found nothing to train on ({reason}); use --device cpu"
            + (f", or torchrun --nproc-per-node {count}" if local_rank and count else "")
        ) from error
    return device
