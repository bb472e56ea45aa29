"""The device, the stream and the driver's context that a thread's launches go to.

PyTorch knows devices and streams; the driver's every call also means a context. Most processes
know one, the device's primary context, which PyTorch makes. A green context is given a part of the
device's multiprocessors: a thread launches there while it is current, or on a stream of its own.
What a caller has made current stays so.

A stream is meant by its handle, ``torch.cuda.Stream.cuda_stream``; 0, the default stream, is that
of whichever context is current.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

_OLDEST_WITH_PARTS = 12040


class _Thread(threading.local):
    """What is known of a thread.

    Attributes:
        devices: those that had a current context here; from then on the driver follows PyTorch.
    """

    def __init__(self) -> None:
        self.devices: set[int] = set()


_thread = _Thread()
_AS_IT_IS = nullcontext()


def on_device(device: int) -> AbstractContextManager[None]:
    """Makes a device the current one of this thread, for PyTorch and for the driver.

    A context of this device that the caller has made current stays current, within and after; one
    of another device's is back afterwards.
    """
    if device in _thread.devices and torch.cuda.current_device() == device:
        return _AS_IT_IS
    return _made_current(device)


@contextlib.contextmanager
def _made_current(device: int) -> Iterator[None]:
    from cuda.core import Device

    before = _current()
    if torch.cuda.current_device() == device:
        # The driver knows none in a thread where PyTorch has only ever used its default device,
        # as those of autograd.
        if not int(before) or int(check(driver().cuCtxGetDevice())[0]) != device:
            Device(device).set_current()
        _thread.devices.add(device)
        yield
        return
    try:
        with torch.cuda.device(device):
            Device(device).set_current()
            _thread.devices.add(device)
            yield
    finally:
        # PyTorch knows primary contexts only.
        if int(before):
            _make_current(before)


def current_stream(device: int) -> int:
    """PyTorch's current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device)


def number(stream: int) -> int:
    """The number of a stream's context; no other context of this process ever has it."""
    # Asked of none, the driver tells the current one's.
    (found,) = check(driver().cuCtxGetId(_of(stream) if stream else None))
    return int(found)


def multiprocessors(stream: int, device: int) -> int:
    """How many a stream's kernels run on: the device's, or those of its green context."""
    if driver_version() < _OLDEST_WITH_PARTS:
        return torch.cuda.get_device_properties(device).multi_processor_count
    kind = driver().CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    (resource,) = check(driver().cuCtxGetDevResource(_of(stream), kind))
    return int(resource.sm.smCount)


@contextlib.contextmanager
def within(stream: int) -> Iterator[None]:
    """Makes a stream's context the current one."""
    before = _current()
    _make_current(_of(stream))
    try:
        yield
    finally:
        _make_current(before)


@contextlib.contextmanager
def within_primary(device: int) -> Iterator[None]:
    """Makes a device's primary context the current one."""
    from cuda.core import Device

    before = _current()
    Device(device).set_current()
    try:
        yield
    finally:
        _make_current(before)


def _of(stream: int) -> Any:
    """A stream's context."""
    if not stream:
        return _current()
    (context,) = check(driver().cuStreamGetCtx(stream))
    return context


def _current() -> Any:
    (context,) = check(driver().cuCtxGetCurrent())
    return context


def _make_current(context: Any) -> None:
    check(driver().cuCtxSetCurrent(context))


@cache
def driver_version() -> int:
    """The newest CUDA that the driver knows: 13020 for 13.2."""
    (version,) = check(driver().cuDriverGetVersion())
    return int(version)


@cache
def driver() -> Any:
    """The driver's calls. An import statement for each call of one would cost more than it."""
    from cuda.bindings import driver

    return driver


def check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver returned beside its error code.

    Raises:
        RuntimeError: the call failed.
    """
    if result[0]:
        raise RuntimeError(f"the CUDA driver failed: {result[0]!r}")
    return result[1:]
