"""A program of one kernel, launched on PyTorch's current stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flashrnn.jit import context, launch, nvrtc


@dataclass(frozen=True)
class Kernel:
    """A program of one kernel, and the shape of its launches but for their grid."""

    program: launch.Program
    shape: launch.Shape

    def kept(
        self, shape: launch.Shape, fields: Sequence[int], zeros: launch.Zeros | None = None
    ) -> launch.Kept:
        """A launch that stays, on PyTorch's current stream of the program's device.

        ``zeros`` is set to zero before it each time.
        """
        device, (kernel,) = self.program.device, self.program.kernels
        with context.on_device(device):
            stream = _stream_for([self], device)
            return launch.Kept(launch.Launch(kernel, shape, fields), stream, device, zeros)

    def launch(self, shape: launch.Shape, fields: Sequence[int]) -> None:
        """Enqueue a launch on PyTorch's current stream of the program's device."""
        launch_in_turn([(self, shape, fields)])


def launch_in_turn(
    launches: Sequence[tuple[Kernel, launch.Shape, Sequence[int]]],
    zeros: launch.Zeros | None = None,
) -> None:
    """Enqueue launches of kernels of one device on PyTorch's current stream, in order.

    ``zeros`` is set to zero before.
    """
    device = launches[0][0].program.device
    with context.on_device(device):
        stream = _stream_for((kernel for kernel, _, _ in launches), device)
        of_driver = [
            (kernel.program.kernels[0], shape, fields) for kernel, shape, fields in launches
        ]
        launch.enqueue(of_driver, stream, device, zeros)


def _stream_for(kernels: Iterable[Kernel], device: int) -> int:
    """The current stream; if it is captured, the kernels' programs stay for the graph."""
    if torch.cuda.is_current_stream_capturing():
        for kernel in kernels:
            kernel.program.keep_for_graphs()
    return context.current_stream(device)


def load(entry: str, parts: Mapping[str, str], shape: launch.Shape, device: torch.device) -> Kernel:
    """Compile a program and load it.

    Args:
        entry: the kernel's name.
        parts: the program's text (:mod:`flashrnn.jit.nvrtc`).
        shape: its launches', which overlap only where the device has that.
        device: the device.
    """
    if torch.cuda.get_device_capability(device) < (9, 0):
        shape = shape._replace(overlaps=False)
    cubin = nvrtc.compile_program(parts, launch.architecture(device))
    return Kernel(launch.Program(cubin, (entry,), index_of(device), shape.shared_memory), shape)


def index_of(device: torch.device) -> int:
    """A GPU's index; that of the current one where a device has none."""
    return torch.cuda.current_device() if device.index is None else device.index
