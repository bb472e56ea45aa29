"""NVIDIA's driver and PyTorch's view of it, without a GPU; see fake_driver.c.

For a separate process, since what has been loaded stays. Call ``install`` before anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

SOURCE = Path(__file__).with_suffix(".c")
MULTIPROCESSORS = 132


class FakeDriver:
    """The driver's counters, and the state of PyTorch that the package asks for.

    Attributes:
        library: what fake_driver.c exports.
        device: PyTorch's current one.
        stream: PyTorch's current one.
        capturing: whether it is being captured.
    """

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name in ("fake_green_context", "fake_current", "fake_primary"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.device, self.stream, self.capturing = 0, 0, False
        self._streams: list[ctypes.c_void_p] = []

    def count(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, name).value

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, name).value = value

    @property
    def current(self) -> int | None:
        """The context that is current in this thread."""
        return self.library.fake_current()

    @current.setter
    def current(self, context: int | None) -> None:
        self.library.fake_set_current(ctypes.c_void_p(context))

    def green_context(self, multiprocessors: int, device: int = 0) -> int:
        return self.library.fake_green_context(device, multiprocessors)

    def stream_of(self, context: int) -> int:
        """A stream of a context; never freed."""
        self._streams.append(ctypes.c_void_p(context))
        return ctypes.addressof(self._streams[-1])

    @contextlib.contextmanager
    def within(self, context: int) -> Iterator[None]:
        """Make a context current, as a caller does."""
        before, self.current = self.current, context
        yield
        self.current = before

    @contextlib.contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """Make a stream current, as a caller does; the context stays as it is."""
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def settings(self, kernel: int) -> list[int]:
        """A kernel's attributes, by their numbers."""
        return list((ctypes.c_long * 32).from_address(kernel + 8))

    def arguments(self, count: int) -> list[int]:
        """Of the last launch, two words each."""
        return list((ctypes.c_longlong * (2 * count)).in_dll(self.library, "last_arguments"))

    def primary(self, device: int) -> int:
        return self.library.fake_primary(device)

    @contextlib.contextmanager
    def on(self, device: torch.device | int) -> Iterator[None]:
        """Stands in for torch.cuda.device, which knows only primary contexts."""
        index = device if isinstance(device, int) else device.index or 0
        before = self.device
        self._switch(index)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, device: int) -> None:
        if device != self.device:
            self.device, self.current = device, self.primary(device)


def compiled(folder: Path) -> Path:
    """The driver, built; needs gcc."""
    path = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(path), str(SOURCE)], check=True)
    return path


def install(path: str) -> FakeDriver:
    """Load the driver that :func:`compiled` built, and have PyTorch see two GPUs."""
    driver = FakeDriver(Path(path))
    properties = SimpleNamespace(
        name="H200",
        major=9,
        minor=0,
        multi_processor_count=MULTIPROCESSORS,
        shared_memory_per_block_optin=232448,
        total_memory=141 << 30,
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.current_device = lambda: driver.device
    torch.cuda.device = driver.on
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: properties.name
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.is_current_stream_capturing = lambda: driver.capturing
    torch._C._cuda_getCurrentRawStream = lambda device: driver.stream
    return driver
