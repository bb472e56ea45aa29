"""Launches of ``cuda_fused`` that are prepared once for all calls like one another."""

from __future__ import annotations

from typing import NamedTuple

from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel
from flashrnn.kernels import call


class LaunchTemplate(NamedTuple):
    """A launch that lacks only its tensors' addresses.

    Attributes:
        kernel: the kernel.
        shape: the launch's.
        packing: of the record's fields, out of the addresses of all the call's tensors.
    """

    kernel: Kernel
    shape: launch.Shape
    packing: call.Packing
