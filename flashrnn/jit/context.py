"""The device, the stream and the driver's context that a thread's launches go to.

PyTorch has devices and streams. Every call of the driver also depends on a context. Most processes
have one for each device, its primary context, which PyTorch makes. A green context has a part of
the device's multiprocessors; a thread launches there while that context is current, or on one of
its streams. A context that the caller has made current stays current.

A stream is given by its handle, ``torch.cuda.Stream.cuda_stream``. 0, the default stream, is that
of the current context.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

_OLDEST_WITH_GREEN_CONTEXTS = 12040


class _Thread(threading.local):
    """State of a thread.

    Attributes:
        devices: those that have had a current context in this thread. From then on PyTorch's
            change of its current device changes the driver's, too.
    """

    def __init__(self) -> None:
        self.devices: set[int] = set()


_thread = _Thread()
_UNCHANGED = nullcontext()


def on_device(device: int) -> AbstractContextManager[None]:
    """Makes a device the current one of this thread, for PyTorch and for the driver.

    If the caller has made a context of this device current, that one stays current. If it is one of
    another device, it is current again afterwards.
    """
    if device in _thread.devices and torch.cuda.current_device() == device:
        return _UNCHANGED
    return _made_current(device)


@contextlib.contextmanager
def _made_current(device: int) -> Iterator[None]:
    from cuda.core import Device

    before = _current()
    if torch.cuda.current_device() == device:
        # In a thread where PyTorch has used only its default device, as in autograd's threads,
        # the driver may have no current context.
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
        # PyTorch has made the primary context current.
        if int(before):
            _make_current(before)


def current_stream(device: int) -> int:
    """PyTorch's current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device)


def number(stream: int) -> int:
    """The number of a stream's context; no other context of this process ever has it."""
    # For None the driver gives the current context's number.
    (found,) = check(driver().cuCtxGetId(_of(stream) if stream else None))
    return int(found)


def multiprocessors(stream: int, device: int) -> int:
    """How many multiprocessors a stream's kernels run on: those of its context."""
    if driver_version() < _OLDEST_WITH_GREEN_CONTEXTS:
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
    """The newest CUDA that the driver supports: 13020 for 13.2."""
    (version,) = check(driver().cuDriverGetVersion())
    return int(version)


@cache
def driver() -> Any:
    """The module of the driver's functions. An import statement in each call would take longer."""
    from cuda.bindings import driver

    return driver


def check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a call of the driver, without its error code.

    Raises:
        RuntimeError: the call failed.
    """
    if result[0]:
        raise RuntimeError(f"the CUDA driver failed: {result[0]!r}")
    return result[1:]
