"""Runs of many steps, each a launch of the same kernel that depends on the launch before.

A launch from Python takes longer than a step. So runs of launches are recorded as CUDA graphs and
replayed. The kernel reads what differs from call to call (addresses, strides, the batch, the first
step of a run) from the record of the call (:mod:`flashrnn.kernels.call`) in device memory. A
separate launch writes that record before each run. So a recording depends neither on T nor on the
tensors' addresses, and serves batches of many sizes.

A record must not be overwritten before the run that reads it has ended. So a record and the
recordings that read it belong to one stream, which runs its launches in order, and only one thread
at a time enqueues them.
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
        program: two kernels on a device. ``set_call(record, fields)`` writes a record;
            ``step(record, ahead, *sizes)`` computes step ``done + ahead``, where ``done`` is the
            record's last field.
        fields: how many fields the record has, each of 8 bytes.
        grid: CTAs of a step.
        threads: threads of a CTA.
        sizes: the step's further arguments.
        overlaps: whether a step's launch may start before the launch before it is complete.
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

    def set_call(self, record: int, fields: Sequence[int]) -> launch.Launch:
        """The launch that writes the record at an address."""
        set_call, _ = self.program.kernels
        return launch.Launch(set_call, launch.Shape(1, 1), (record, *fields))

    def steps(self, record: int, count: int) -> list[launch.Launch]:
        """The launches of the next steps. The first one starts once the record is written."""
        _, step = self.program.kernels
        first = launch.Shape(self.grid, self.threads)
        others = launch.Shape(self.grid, self.threads, overlaps=self.overlaps)
        return [
            launch.Launch(step, others if ahead else first, (record, ahead, *self.sizes))
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
        fields: the record's, without the last one, ``done``.
        count: how many steps.
    """
    device = stepper.device
    with context.on_device(device):
        stream = context.current_stream(device)
        if not torch.cuda.is_current_stream_capturing():
            _recorded(stepper, stream, context.number(stream)).run(fields, count)
            return
        # The steps become part of the graph that is being captured. So does their record: PyTorch
        # allocates it from the graph's memory.
        stepper.program.keep_for_graphs()
        record = _new_record(stepper).data_ptr()
        first = stepper.set_call(record, (*fields, 0))
        launch.enqueue([first, *stepper.steps(record, count)], stream, device)


class _Recorded:
    """A stepper's record and recordings on one stream."""

    def __init__(self, stepper: Stepper, stream: int) -> None:
        self.stepper = stepper
        self.stream = stream
        self.record = _new_record(stepper)
        # By length, of which there are few: the longest, and the powers of two below it.
        self.recordings: dict[int, launch.Recording] = {}
        self.seen: set[int] = set()
        self.lock = threading.Lock()

    def run(self, fields: Sequence[int], count: int) -> None:
        stepper, stream, device = self.stepper, self.stream, self.stepper.device
        record = self.record.data_ptr()
        done = 0
        for length in lengths(count):
            with self.lock:
                launch.enqueue([stepper.set_call(record, (*fields, done))], stream, device)
                # Recording launches costs more than enqueuing them. So a length is recorded when it
                # is needed for the second time, which may be within one call.
                if length in self.seen and length not in self.recordings:
                    steps = stepper.steps(record, length)
                    self.recordings[length] = launch.Recording(steps, stream)
                if length in self.recordings:
                    self.recordings[length].replay(stream, device)
                else:
                    launch.enqueue(stepper.steps(record, length), stream, device)
                    self.seen.add(length)
            done += length


def _new_record(stepper: Stepper) -> torch.Tensor:
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
