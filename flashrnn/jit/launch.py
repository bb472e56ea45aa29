"""Kernels of a cubin, launched on a stream of PyTorch's, singly or as a recorded run.

A stream is meant by its handle, ``torch.cuda.Stream.cuda_stream``; see :mod:`flashrnn.jit.context`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from flashrnn.jit import nvrtc
from flashrnn.jit.context import (
    check,
    current_stream,
    driver,
    on_device,
    within,
    within_primary,
)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: one of a :class:`Program`'s.
        config: out of :func:`configure`.
        arguments: integers, addresses among them.
    """

    kernel: Any
    config: Any
    arguments: tuple[int, ...]


class Program:
    """A cubin on a device: there for as long as somebody holds this object, or a graph may.

    What nobody holds any more waits in a list until it is long enough to wait for the streams where
    launches may be under way, and is unloaded then.

    Attributes:
        device: the device's index.
        kernels: in the order of their names; whoever launches one holds the program meanwhile.
    """

    def __init__(
        self, cubin: bytes, names: Sequence[str], device: int, shared_memory: int = 0
    ) -> None:
        """Load.

        Args:
            cubin: the machine code.
            names: the kernels' names.
            device: the device's index.
            shared_memory: bytes of dynamic shared memory that their launches may ask for.
        """
        from cuda.core import Kernel

        self.device = device
        attribute = driver().CUfunction_attribute
        settings = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared_memory}
        if torch.cuda.get_device_capability(device) >= (9, 0):
            settings[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        with on_device(device), _while_a_stream_may_be_captured():
            _unload(device)
            # By the driver itself: cuda.core does not unload what it loads.
            (library,) = check(driver().cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
            forgotten = _forgotten.setdefault(device, [])
            weakref.finalize(self, forgotten.append, library).atexit = False
            found = [check(driver().cuLibraryGetKernel(library, name.encode())) for name in names]
            for (kernel,) in found:
                # Of the kernel on this device: of a function, they would be one context's.
                for name, value in settings.items():
                    check(driver().cuKernelSetAttribute(name, value, kernel, device))
        self.kernels = tuple(Kernel.from_handle(int(kernel)) for (kernel,) in found)
        self._load()

    def keep_for_graphs(self) -> None:
        """Before a launch that a graph of the user's will hold, for who knows how long."""
        _in_graphs.add(self)
        self._load()

    def _load(self) -> None:
        """Loading is lazy, by contexts; in a capture nothing is loaded."""
        with (
            on_device(self.device),
            within(current_stream(self.device)),
            _while_a_stream_may_be_captured(),
        ):
            for kernel in self.kernels:
                check(driver().cuKernelGetFunction(kernel.handle))


# For good: nothing tells when a graph of the user's is gone.
_in_graphs: set[Program] = set()
# By devices; emptied when it is long, see _unload.
_forgotten: dict[int, list[Any]] = {}
# By devices, the streams that there were launches on. Never emptied: PyTorch has a few dozen, and
# the driver gives the handles of streams that are no more to later ones.
_streams: dict[int, set[int]] = {}
_MOST_FORGOTTEN = 32


def _unload(device: int) -> None:
    """Unload what is forgotten, if it is enough to wait for the streams of all launches.

    Not for the device: that would spoil what another thread captures.
    """
    forgotten = _forgotten.get(device, [])
    if len(forgotten) < _MOST_FORGOTTEN or torch.cuda.is_current_stream_capturing():
        return
    with within_primary(device):
        if all(map(_wait_for, tuple(_streams.get(device, ())))):
            while forgotten:
                check(driver().cuLibraryUnload(forgotten.pop()))


def _wait_for(stream: int) -> bool:
    """Wait for a stream's launches, unless it is being captured."""
    code = driver().CUresult
    error, status = driver().cuStreamIsCapturing(stream)
    if error == code.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        return False  # The default stream, while one is captured that waits for it.
    if error:
        return True  # A stream that is no more.
    if status != driver().CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
        return False
    (error,) = driver().cuStreamSynchronize(stream)
    return not error


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


def enqueue(launches: Iterable[Launch], stream: int, device: int) -> None:
    """Launch on a stream of a device, the current one, in turn."""
    _enqueue(launches, _stream(stream, device))


def _enqueue(launches: Iterable[Launch], stream: Any) -> None:
    launch = _launch()
    for one in launches:
        launch(stream, one.config, one.kernel, *one.arguments)


@cache
def _launch() -> Any:
    # An import statement for each launch would cost a good part of it.
    from cuda.core import launch

    return launch


class Recording:
    """A run of launches as a CUDA graph: replayed at the cost of one."""

    def __init__(self, launches: Iterable[Launch], stream: int) -> None:
        """Record.

        Args:
            launches: the run.
            stream: one of the context that it is for; the run need not be replayed on it.
        """
        from cuda.core import Stream

        flags = driver().CUstream_flags.CU_STREAM_NON_BLOCKING
        with within(stream):
            (recorder,) = check(driver().cuStreamCreate(flags))
            builder = Stream.from_handle(int(recorder)).create_graph_builder()
            # Other threads may go on with whatever they do.
            builder.begin_building("thread_local")
            _enqueue(launches, builder)
            builder.end_building()
            self._graph = builder.complete()
            builder.close()
            check(driver().cuStreamDestroy(recorder))

    def replay(self, stream: int, device: int) -> None:
        """Enqueue the run on a stream of a device."""
        self._graph.launch(_stream(stream, device))


# By devices too: a stream of cuda.core's remembers its device, and all have the default stream.
@lru_cache(maxsize=256)
def _stream(handle: int, device: int) -> Any:
    from cuda.core import Stream

    _streams.setdefault(device, set()).add(handle or _DEFAULT)
    return Stream.from_handle(handle or _DEFAULT)


# The driver's own handle of the default stream.
_DEFAULT = 1


_PROBE = 'extern "C" __global__ void probe() {}'
_LARGEST_CLUSTER = 16


def clusters_at_once(device: int, stream: int, shared_memory: int) -> tuple[int, ...]:
    """What the driver says of clusters in a stream's context; see :class:`flashrnn.tiling.GPU`.

    Args:
        device: the device's index, of compute capability 9.0 or later.
        stream: the stream.
        shared_memory: all that a thread block may have, so that none shares a multiprocessor.
    """
    cubin = nvrtc.compile_program({"probe": _PROBE}, architecture(device))
    program = Program(cubin, ["probe"], device, shared_memory)
    function = driver().CUfunction(int(program.kernels[0].handle))
    attribute = driver().CUlaunchAttribute()
    attribute.id = driver().CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    config = driver().CUlaunchConfig()
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX = 32
    config.sharedMemBytes = shared_memory
    config.hStream = stream
    found = [0, 0]
    for size in range(2, _LARGEST_CLUSTER + 1):
        cluster = attribute.value.clusterDim
        cluster.x, cluster.y, cluster.z = size, 1, 1
        config.gridDimX = size
        config.attrs, config.numAttrs = [attribute], 1
        error, count = driver().cuOccupancyMaxActiveClusters(function, config)
        # A size that the device does not know.
        found.append(0 if error else count)
    return tuple(found)


@contextlib.contextmanager
def _while_a_stream_may_be_captured() -> Iterator[None]:
    """Lets this thread load code although a capture, its own or another's, forbids it."""
    mode = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (before,) = check(driver().cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        check(driver().cuThreadExchangeStreamCaptureMode(before))


def architecture(device: torch.device | int) -> str:
    """What a device's kernels are compiled for: ``"sm_80"``, ``"sm_90a"``, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    # Hopper's own instructions, which later GPUs have not all.
    return f"sm_{major}{minor}" + "a" * (major == 9)
