"""Kernels of a cubin, launched on a stream of PyTorch's, singly or as a recorded run.

A stream is meant by its handle, ``torch.cuda.Stream.cuda_stream``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: out of :func:`load_kernels`.
        config: out of :func:`configure`.
        arguments: integers, addresses among them.
    """

    kernel: Any
    config: Any
    arguments: tuple[int, ...]


def load_kernels(
    cubin: bytes, names: Sequence[str], device: int, shared_memory: int = 0
) -> list[Any]:
    """Kernels of a cubin, loaded onto a device.

    Args:
        cubin: the machine code.
        names: the kernels' names.
        device: the device's index.
        shared_memory: bytes of dynamic shared memory that their launches may ask for.
    """
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    attribute = driver.CUfunction_attribute
    limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    large_clusters = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    with on_device(device), _while_a_stream_may_be_captured():
        code = ObjectCode.from_cubin(cubin)
        kernels = [code.get_kernel(name) for name in names]
        for kernel in kernels:
            # Loading is lazy; the first launch might be in a capture, where nothing is loaded.
            (function,) = _check(driver.cuKernelGetFunction(kernel.handle))
            _check(driver.cuFuncSetAttribute(function, limit, shared_memory))
            if Device(device).compute_capability >= (9, 0):
                _check(driver.cuFuncSetAttribute(function, large_clusters, 1))
    return kernels


@lru_cache(maxsize=1024)
def configure(
    grid: int,
    threads: int,
    shared_memory: int = 0,
    overlaps: bool = False,
    together: bool = False,
    cluster: int = 0,
) -> Any:
    """The shape of a launch.

    Args:
        grid: thread blocks.
        threads: threads of a block.
        shared_memory: a block's dynamic shared memory in bytes.
        overlaps: whether it may start before the launch before it in the stream is complete, for
            which it then waits itself.
        together: whether all thread blocks run at once, as they must that wait for each other; the
            driver refuses a launch of more than the device holds.
        cluster: thread blocks of a cluster, whose multiple the grid is; 0: no clusters.
    """
    from cuda.core import LaunchConfig

    # In clusters the grid is counted by them.
    shape = {"grid": grid // cluster, "cluster": cluster} if cluster else {"grid": grid}

    return LaunchConfig(
        **shape,
        block=threads,
        shmem_size=shared_memory,
        programmatic_stream_serialization=overlaps,
        is_cooperative=together,
    )


_thread = threading.local()


@contextlib.contextmanager
def on_device(device: int) -> Iterator[None]:
    """Makes a device the current one of this thread, for PyTorch and for the driver.

    The driver does not know it yet in a thread where PyTorch has only ever used its default, as
    those of autograd. Once it does, it follows PyTorch.
    """
    from cuda.core import Device

    if torch.cuda.current_device() == device and getattr(_thread, "known", None) == device:
        yield
        return
    with torch.cuda.device(device):
        Device(device).set_current()
        _thread.known = device
        yield


def enqueue(launches: Iterable[Launch], stream: int) -> None:
    """Launch on a stream of the current device, in turn."""
    _enqueue(launches, _stream(stream))


def _enqueue(launches: Iterable[Launch], stream: Any) -> None:
    from cuda.core import launch

    for one in launches:
        launch(stream, one.config, one.kernel, *one.arguments)


class Recording:
    """A run of launches as a CUDA graph of the current device: replayed at the cost of one."""

    def __init__(self, launches: Iterable[Launch]) -> None:
        from cuda.core import Device

        builder = Device().create_graph_builder()
        # Other threads may go on with whatever they do.
        builder.begin_building("thread_local")
        _enqueue(launches, builder)
        builder.end_building()
        self._graph = builder.complete()
        builder.close()

    def replay(self, stream: int) -> None:
        """Enqueue the run on a stream."""
        self._graph.launch(_stream(stream))


@lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM


@contextlib.contextmanager
def _while_a_stream_may_be_captured() -> Iterator[None]:
    """Lets this thread load code although a capture, its own or another's, forbids it."""
    from cuda.bindings import driver

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (before,) = _check(driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        _check(driver.cuThreadExchangeStreamCaptureMode(before))


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver returned beside its error code."""
    error, *values = result
    if error:
        raise RuntimeError(f"the CUDA driver failed: {error!r}")
    return tuple(values)


def architecture(device: torch.device) -> str:
    """What a device's kernels are compiled for: ``"sm_80"``, ``"sm_90a"``, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    # Hopper's own instructions, which later GPUs have not all.
    return f"sm_{major}{minor}" + "a" * (major == 9)
