"""Kernels of a cubin, launched on a stream of PyTorch's, singly or as a recorded run.

A stream is given by its handle, ``torch.cuda.Stream.cuda_stream``; see :mod:`flashrnn.jit.context`.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
import weakref
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

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


class Shape(NamedTuple):
    """The shape of a launch.

    Attributes:
        grid: CTAs.
        threads: threads of a CTA.
        shared_memory: a CTA's dynamic shared memory in bytes.
        overlaps: whether it may start before the launch before it in the stream is complete. Its
            kernel then waits for that launch (PTX: griddepcontrol.wait).
        cooperative: whether all CTAs must run at once, since they wait for each other. The driver
            refuses a launch of more CTAs than the device has room for.
        cluster_size: CTAs of a cluster, a divisor of the grid; 0 for no clusters.
    """

    grid: int
    threads: int
    shared_memory: int = 0
    overlaps: bool = False
    cooperative: bool = False
    cluster_size: int = 0


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: one of a :class:`Program`'s.
        shape: the launch's shape.
        arguments: integers and addresses, of 8 bytes each. If the kernel's last parameter is a
            struct, its fields are the last of them.
    """

    kernel: Any
    shape: Shape
    arguments: Sequence[int]


class Program:
    """A cubin on a device. It stays loaded while this object exists or a CUDA graph may launch it.

    Afterwards its launches may still be running. So it goes into a list of cubins to be unloaded.
    When the list is long, this waits for the streams on which programs were launched and unloads
    the whole list.

    Attributes:
        device: the device's index.
        kernels: in the order of their names. Whoever launches one holds the program meanwhile.
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
        self.device = device
        attribute = driver().CUfunction_attribute
        settings = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared_memory}
        if torch.cuda.get_device_capability(device) >= (9, 0):
            settings[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        with on_device(device), _while_a_stream_may_be_captured():
            _unload(device)
            # Not by cuda.core, which never unloads what it loads.
            (library,) = check(driver().cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
            forgotten = _forgotten.setdefault(device, [])
            weakref.finalize(self, forgotten.append, library).atexit = False
            found = [check(driver().cuLibraryGetKernel(library, name.encode())) for name in names]
            for (kernel,) in found:
                # Set for the kernel on a device. A function's attributes hold in one context only.
                for name, value in settings.items():
                    check(driver().cuKernelSetAttribute(name, value, kernel, device))
        # Where the driver takes a function it also takes a kernel, as a function's handle.
        self.kernels = tuple(driver().CUfunction(int(kernel)) for (kernel,) in found)
        self._load()

    def keep_for_graphs(self) -> None:
        """To be called before a launch that becomes part of a CUDA graph of the user's."""
        _in_graphs.add(self)
        self._load()

    def _load(self) -> None:
        """Load the kernels in the current stream's context.

        The driver would do so at the first launch there, which fails while a stream is captured.
        """
        with (
            on_device(self.device),
            within(current_stream(self.device)),
            _while_a_stream_may_be_captured(),
        ):
            for kernel in self.kernels:
                check(driver().cuKernelGetFunction(driver().CUkernel(int(kernel))))


# Programs stay here for good: nothing tells when a graph of the user's is gone.
_in_graphs: set[Program] = set()
# Libraries to be unloaded, by device; see Program.
_forgotten: dict[int, list[Any]] = {}
# The streams that there were launches on, by device. Never emptied: PyTorch has a few dozen, and
# the driver gives handles of destroyed streams to new ones.
_streams: defaultdict[int, set[int]] = defaultdict(set)
_MOST_FORGOTTEN = 32


def _unload(device: int) -> None:
    """Unload a device's forgotten libraries, if there are enough of them to wait for its streams.

    To wait for the device instead would end the capture of a stream by another thread.
    """
    forgotten = _forgotten.get(device, [])
    if len(forgotten) < _MOST_FORGOTTEN or torch.cuda.is_current_stream_capturing():
        return
    with within_primary(device):
        if all(map(_wait_for, tuple(_streams.get(device, ())))):
            while forgotten:
                check(driver().cuLibraryUnload(forgotten.pop()))


def _wait_for(stream: int) -> bool:
    """Wait for a stream's launches; ``False`` if it is being captured, so that nothing can wait."""
    code = driver().CUresult
    error, status = driver().cuStreamIsCapturing(stream)
    if error == code.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        return False  # The default stream, while a stream is captured that waits for it.
    if error:
        return True  # A destroyed stream.
    if status != driver().CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
        return False
    (error,) = driver().cuStreamSynchronize(stream)
    return not error


class Zeros(NamedTuple):
    """Memory to be set to zero, which takes the host a fraction of PyTorch's operation.

    Attributes:
        address: where it begins, a multiple of 4.
        words: of 4 bytes.
    """

    address: int
    words: int

    def enqueue(self, stream: int) -> None:
        """On a stream of the current device."""
        check(driver().cuMemsetD32Async(self.address, 0, self.words, stream))


def enqueue(
    launches: Iterable[tuple[Any, Shape, Sequence[int]]],
    stream: int,
    device: int,
    zeros: Zeros | None = None,
) -> None:
    """Launch on a stream of a device, which is the current one, in order.

    A launch is a :class:`Launch`, or a plain tuple of the same, which takes less time to make.
    ``zeros`` is set to zero before.
    """
    stream = stream or _DEFAULT
    _streams[device].add(stream)
    if zeros is not None:
        zeros.enqueue(stream)
    _enqueue(launches, stream)


def _enqueue(launches: Iterable[tuple[Any, Shape, Sequence[int]]], stream: int) -> None:
    launch, values, addresses = driver().cuLaunchKernelEx, _room.values, _room.addresses
    for kernel, shape, arguments in launches:
        config = _config(shape, stream)
        # The driver takes as many addresses as the kernel has parameters, and copies the arguments
        # before it returns. A parameter of 4 bytes is the lower half of its 8.
        _packing(len(arguments)).pack_into(values, 0, *arguments)
        (error,) = launch(config, kernel, addresses, 0)
        if error:
            check((error,))


class _Room(threading.local):
    """A thread's memory for the arguments of a launch, 8 bytes each, and for their addresses."""

    def __init__(self) -> None:
        self.values = (ctypes.c_int64 * _MOST_ARGUMENTS)()
        first = ctypes.addressof(self.values)
        self._places, self.addresses = _addresses_of(first, _MOST_ARGUMENTS)


class Kept:
    """A launch that is enqueued on one stream many times, each time with other arguments at a few
    places. For one thread at a time.

    Attributes:
        arguments: of 8 bytes each; the driver copies them when the launch is enqueued.
    """

    def __init__(self, one: Launch, stream: int, device: int, zeros: Zeros | None = None) -> None:
        """Prepare.

        Args:
            one: the launch. Who keeps this holds its program.
            stream: the stream.
            device: the stream's.
            zeros: what is set to zero before each launch.
        """
        self._device, self._kernel = device, one.kernel
        self._zeros, self._stream = zeros, stream or _DEFAULT
        self._config = _config(one.shape, self._stream)
        self.arguments = array("q", one.arguments)
        first, count = self.arguments.buffer_info()
        self._places, self._addresses = _addresses_of(first, count)
        _streams[device].add(stream or _DEFAULT)

    def enqueue(self) -> None:
        """Launch."""
        with on_device(self._device):
            if self._zeros is not None:
                self._zeros.enqueue(self._stream)
            check(driver().cuLaunchKernelEx(self._config, self._kernel, self._addresses, 0))


def _addresses_of(first: int, count: int) -> tuple[array[int], int]:
    """The addresses of values of 8 bytes each, and where these addresses lie."""
    found = array("Q", range(first, first + 8 * count, 8))
    return found, found.buffer_info()[0]


_MOST_ARGUMENTS = 128
_room = _Room()


@cache
def _packing(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


@lru_cache(maxsize=1024)
def _config(shape: Shape, stream: int) -> Any:
    """A launch's shape and stream, for the driver, which only reads it: threads may share it."""
    config = driver().CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = shape.grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
    config.sharedMemBytes = shape.shared_memory
    config.hStream = stream
    kinds = driver().CUlaunchAttributeID
    attributes = []
    if shape.cluster_size:
        cluster = driver().CUlaunchAttribute()
        cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = cluster.value.clusterDim
        dimension.x, dimension.y, dimension.z = shape.cluster_size, 1, 1
        attributes.append(cluster)
    if shape.cooperative:
        cooperative = driver().CUlaunchAttribute()
        cooperative.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        cooperative.value.cooperative = 1
        attributes.append(cooperative)
    if shape.overlaps:
        overlaps = driver().CUlaunchAttribute()
        overlaps.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlaps.value.programmaticStreamSerializationAllowed = 1
        attributes.append(overlaps)
    # The list is copied.
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


class Recording:
    """A run of launches as a CUDA graph, which is replayed at the cost of one launch."""

    def __init__(self, launches: Iterable[Launch], stream: int) -> None:
        """Record.

        Args:
            launches: the run.
            stream: a stream of the context in which the run is replayed, on any of its streams.
        """
        from cuda.core import Stream

        flags = driver().CUstream_flags.CU_STREAM_NON_BLOCKING
        with within(stream):
            (recorder,) = check(driver().cuStreamCreate(flags))
            builder = Stream.from_handle(int(recorder)).create_graph_builder()
            # The capture restricts what this thread calls, not other threads.
            builder.begin_building("thread_local")
            _enqueue(launches, int(recorder))
            builder.end_building()
            self._graph = builder.complete()
            builder.close()
            check(driver().cuStreamDestroy(recorder))

    def replay(self, stream: int, device: int) -> None:
        """Enqueue the run on a stream of a device."""
        _streams[device].add(stream or _DEFAULT)
        self._graph.launch(_stream(stream, device))


# By device too: cuda.core's Stream remembers its device, and every device has the default stream.
@lru_cache(maxsize=256)
def _stream(handle: int, device: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle or _DEFAULT)


# The driver's own handle of the default stream.
_DEFAULT = 1


PROBE = {"probe": 'extern "C" __global__ void probe() {}'}
"""The program that :func:`clusters_at_once` asks about."""

_LARGEST_CLUSTER = 16


def clusters_at_once(device: int, stream: int, shared_memory: int) -> tuple[int, ...]:
    """How many clusters of each size run at once in a stream's context; see ``kernels/gpu.py``.

    Args:
        device: the device's index, of compute capability 9.0 or later.
        stream: the stream.
        shared_memory: all that a CTA may have, so that no two CTAs share a multiprocessor.
    """
    cubin = nvrtc.compile_program(PROBE, architecture(device))
    program = Program(cubin, ["probe"], device, shared_memory)
    (function,) = program.kernels
    found = [0, 0]
    for size in range(2, _LARGEST_CLUSTER + 1):
        config = _config(Shape(size, 32, shared_memory, cluster_size=size), stream)
        error, count = driver().cuOccupancyMaxActiveClusters(function, config)
        # An error means that the device has no clusters of this size.
        found.append(0 if error else count)
    return tuple(found)


@contextlib.contextmanager
def _while_a_stream_may_be_captured() -> Iterator[None]:
    """Lets this thread load code while it, or another thread, captures a stream."""
    mode = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (before,) = check(driver().cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        check(driver().cuThreadExchangeStreamCaptureMode(before))


def architecture(device: torch.device | int) -> str:
    """The architecture that a device's kernels are compiled for: ``"sm_80"``, ``"sm_90a"``, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    # With Hopper's own instructions, not all of which later GPUs have.
    return f"sm_{major}{minor}" + "a" * (major == 9)
