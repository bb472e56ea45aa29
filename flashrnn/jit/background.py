"""Compiles programs that a later call will need in threads of their own, while other code runs.

A caller that needs such a program asks :func:`flashrnn.jit.nvrtc.compile_program` for it, as for
any other program. That function waits for the thread that compiles it. If that thread failed, it
compiles the program again and raises the error.

A process that ends waits for the programs that are being compiled, since NVRTC frees what they use
when the process ends. So there is no queue: if no thread is free, the later call compiles the
program.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping

from flashrnn.jit import nvrtc


def _new_room() -> threading.Semaphore:
    return threading.Semaphore(os.cpu_count() or 1)


_room = _new_room()


def _forget_threads() -> None:
    # A forked process has none of its parent's.
    global _room
    _room = _new_room()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forget_threads)


def compile_soon(programs: Iterable[Mapping[str, str]], arch: str) -> None:
    """Begin to compile programs, each in a thread of its own, and return.

    Args:
        programs: of each the text, as :func:`flashrnn.jit.nvrtc.compile_program` takes it.
        arch: the architecture.
    """
    for parts in programs:
        room = _room
        if not room.acquire(blocking=False):
            return
        thread = threading.Thread(
            target=_compile, args=(parts, arch, room), name="flashrnn compiles"
        )
        try:
            thread.start()
        except RuntimeError:  # No more threads: the process has too many, or is ending.
            room.release()
            return


def _compile(parts: Mapping[str, str], arch: str, room: threading.Semaphore) -> None:
    try:
        with contextlib.suppress(Exception):
            nvrtc.compile_program(parts, arch)
    finally:
        room.release()
