"""Runs of many steps, each a launch of one kernel that depends on the step before.

A launch from Python takes longer than such a step, so runs are recorded and replayed. What differs
from call to call (addresses, strides, the batch, the step that a run begins with) the kernel reads
from a block of device memory, which a launch of its own writes before each run; and so a recording
depends neither on T nor on where the tensors are, and serves many sizes of a batch.

A recording's block must not be written before the run that reads it is through. So a recording
belongs to one stream, whose order sees to that, and is used by one thread at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashrnn.jit import context, launch

LONGEST = 128
"""Steps of the longest recording."""

_MOST_STEPPERS = 64


@dataclass(frozen=True, eq=False)
class Stepper:
    """A kernel that computes a step, and how it is launched.

    Attributes:
        program: on its device, two kernels: ``(block, *fields)`` writes the block, and ``(block,
            ahead, *sizes)`` is the step number ``done + ahead``, where ``done`` is the last of the
            fields.
        fields: how many fields the block has, each of 8 bytes.
        grid: thread blocks of a step.
        threads: threads of a block.
        sizes: the step's further arguments.
        overlaps: whether a step's launch may start before the one before is complete.
    """

    program: launch.Program
    fields: int
    grid: int
    threads: int
    sizes: tuple[int, ...]
    overlaps: bool

    @property
    def device(self) -> int:
        """The device's index."""
        return self.program.device

    def call(self, block: int, fields: Sequence[int]) -> launch.Launch:
        """The launch that writes the block."""
        set_call, _ = self.program.kernels
        return launch.Launch(set_call, launch.configure(1, 1), (block, *fields))

    def steps(self, block: int, count: int) -> list[launch.Launch]:
        """The launches of the next steps. The first one waits for what wrote the block."""
        _, step = self.program.kernels
        first = launch.configure(self.grid, self.threads)
        others = launch.configure(self.grid, self.threads, overlaps=self.overlaps)
        return [
            launch.Launch(step, others if ahead else first, (block, ahead, *self.sizes))
            for ahead in range(count)
        ]


def lengths(count: int) -> list[int]:
    """How a run is cut into recordings: as many of the longest as fit, then powers of two.

    Example:
        >>> lengths(300)
        [128, 128, 32, 8, 4]
    """
    rest = count % LONGEST
    powers = [1 << i for i in reversed(range(LONGEST.bit_length())) if rest >> i & 1]
    return [LONGEST] * (count // LONGEST) + powers


def run(stepper: Stepper, fields: Sequence[int], count: int) -> None:
    """Enqueue steps on PyTorch's current stream of the stepper's device.

    Args:
        stepper: the step.
        fields: the block's, without the last one, ``done``.
        count: how many steps.
    """
    device = stepper.device
    with context.on_device(device):
        stream = context.current_stream(device)
        if not torch.cuda.is_current_stream_capturing():
            _recorded(stepper, stream, context.number(stream)).run(fields, count)
            return
        # The steps become part of the graph that is being captured, and so does the block.
        stepper.program.keep_for_graphs()
        block = _new_block(stepper)
        call = stepper.call(block.data_ptr(), (*fields, 0))
        launch.enqueue([call, *stepper.steps(block.data_ptr(), count)], stream, device)


class _Recorded:
    """A stepper's block and recordings on one stream."""

    def __init__(self, stepper: Stepper, stream: int) -> None:
        self.stepper = stepper
        self.stream = stream
        self.block = _new_block(stepper)
        # By length, of which there are few: the longest, and the powers of two below it.
        self.recordings: dict[int, launch.Recording] = {}
        self.seen: set[int] = set()
        self.lock = threading.Lock()

    def run(self, fields: Sequence[int], count: int) -> None:
        stepper, stream, device = self.stepper, self.stream, self.stepper.device
        block = self.block.data_ptr()
        done = 0
        for length in lengths(count):
            with self.lock:
                launch.enqueue([stepper.call(block, (*fields, done))], stream, device)
                # A recording costs more than the launches that it is made of: worth it only for
                # what comes again, within a long run already.
                if length in self.seen and length not in self.recordings:
                    steps = stepper.steps(block, length)
                    self.recordings[length] = launch.Recording(steps, stream)
                if length in self.recordings:
                    self.recordings[length].replay(stream, device)
                else:
                    launch.enqueue(stepper.steps(block, length), stream, device)
                    self.seen.add(length)
            done += length


def _new_block(stepper: Stepper) -> torch.Tensor:
    return torch.empty(stepper.fields, dtype=torch.int64, device=f"cuda:{stepper.device}")


# By stepper, stream and the number of its context; the least recently used first.
_steppers: OrderedDict[tuple[Stepper, int, int], _Recorded] = OrderedDict()
_lock = threading.Lock()


def _recorded(stepper: Stepper, stream: int, number: int) -> _Recorded:
    key = (stepper, stream, number)
    with _lock:
        found = _steppers.pop(key, None) or _Recorded(stepper, stream)
        _steppers[key] = found
        while len(_steppers) > _MOST_STEPPERS:
            _steppers.popitem(last=False)
        return found
