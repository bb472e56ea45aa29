"""Calls like one before, by what was prepared for that one.

A short call takes the host longer than the GPU. So all that follows from the tensors' sizes,
strides and dtypes is kept for each direction: what to allocate, and launches that lack addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.backends.launches import LaunchTemplate
from flashrnn.jit import launch
from flashrnn.jit.kernel import launch_in_turn
from flashrnn.kernels import call


class New(NamedTuple):
    """A tensor that a call allocates.

    Attributes:
        sizes: ...
        strides: ``None``: it is contiguous.
        dtype: ...
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: torch.dtype


class Repeated(NamedTuple):
    """What is kept of a direction of a call.

    Attributes:
        new: what it allocates, by the names that its launches have for it.
        launches: in order; their tensors are the given ones, then the new ones.
        scratch: global memory that they need besides.
        asked: whether what it rests on is as it was; ``None``: it rests on nothing else.
        begin: what PyTorch computes before: the tensors that the launches are given, out of the
            call's; ``None`` where all has to be worked out anew.
        finish: what PyTorch computes behind, of the call's tensors and those written.
    """

    new: tuple[tuple[str, New], ...]
    launches: tuple[LaunchTemplate, ...]
    scratch: call.Scratch
    asked: Callable[[], bool] | None
    begin: Callable[[Sequence[Tensor]], Sequence[Tensor] | None] | None = None
    finish: Callable[[Sequence[Tensor], dict[str, Tensor]], None] | None = None

    def is_current(self) -> bool:
        """See :class:`flashrnn.backends.protocols.Repeatable`."""
        return self.asked is None or self.asked()

    def run(self, given: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """What it allocates, written; ``None`` where all has to be worked out anew."""
        of_call = given
        if self.begin is not None:
            begun = self.begin(given)
            if begun is None:
                return None
            given = begun
        addresses = [tensor.data_ptr() for tensor in given]
        if reduce(or_, addresses) % 16:
            return None
        like, made = given[0], {}
        for name, (sizes, strides, dtype) in self.new:
            if strides is None:
                one = like.new_empty(sizes, dtype=dtype)
            else:
                one = like.new_empty_strided(sizes, strides, dtype=dtype)
            made[name] = one
            addresses.append(one.data_ptr())
        held, zeros = None, None
        if any(self.scratch):
            # Held until all is enqueued.
            held, of_scratch, zeros = scratch_memory(self.scratch, like)
            addresses += of_scratch
        launches = [(kernel, shape, pack(addresses)) for kernel, shape, pack in self.launches]
        launch_in_turn(launches, zeros)
        if self.finish is not None:
            del held
            self.finish(of_call, made)
        return made


def scratch_memory(
    scratch: call.Scratch, like: Tensor
) -> tuple[list[Tensor], list[int], launch.Zeros | None]:
    """The memory that launches need for themselves, its addresses, and what of it is to be zero."""
    packets, counters, *others = scratch
    memory, addresses, zeros = [], [], None
    if packets or counters:
        # Flags and counters count from 1, and h that nobody sends is zero.
        memory.append(like.new_empty(packets + counters, 4, dtype=torch.int32))
        first = memory[0].data_ptr()
        zeros = launch.Zeros(first, 4 * (packets + counters))
        addresses += [first] if packets else []
        addresses += [first + 16 * packets] if counters else []
    for size in others:
        if size:
            memory.append(like.new_empty(size, 4, dtype=torch.int32))
            addresses.append(memory[-1].data_ptr())
    return memory, addresses, zeros
