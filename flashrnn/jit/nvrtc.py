"""CUDA C++ text to a cubin: compiled by NVRTC once, kept in memory and in the cache folder.

A program is self-contained: it includes nothing. So its machine code depends on its text, the
architecture and the compiler's version only.

cuda.core has a cache, ``Program.compile(cache=FileStreamProgramCache(folder))``, which is not used.
It returns whatever file has a program's name, even if torn, empty or written by another user, and
leaves "a check at load time" to its caller. If the disk is full or read-only, it raises an error
and the kernel is lost. (Of cuda.core 1.2.0 to 1.2.2.)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from weakref import WeakValueDictionary

from flashrnn.jit.folder import cache_folder, read_trusted

INSTALL = 'pip install "flashrnn-jit[cuda]"'

_STANDARD = "c++17"
_DIGEST_SIZE = hashlib.sha256().digest_size

_importing = threading.RLock()
_lock = threading.Lock()
# By key. A lock exists for as long as a thread holds it or waits for it.
_compiling: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
# The threads that are within NVRTC, and a condition that is notified when one of them leaves.
_within: set[int] = set()
_left = threading.Condition()


def _wait_for_compilers() -> None:
    """Wait until no other thread is within NVRTC, and keep all others out.

    NVRTC has locks of its own. One that is held when a process forks stays held in the child.
    """
    _left.acquire()
    while _within - {threading.get_ident()}:
        _left.wait()


def _forget_locks() -> None:
    # Another thread of the parent process may have held them at the time of the fork.
    global _importing, _lock, _left
    _importing = threading.RLock()
    _lock = threading.Lock()
    _left = threading.Condition()
    _within.clear()
    _compiling.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(
        before=_wait_for_compilers,
        after_in_parent=lambda: _left.release(),
        after_in_child=_forget_locks,
    )


class CompileError(RuntimeError):
    """NVRTC refused a program: its log, which quotes the lines, and what the program was for."""


def unavailable() -> str | None:
    """Why nothing can be compiled here, and the command that helps; ``None`` if it can."""
    try:
        _version()
    except Exception as error:
        # A package or shared library is missing, or of a wrong version.
        return f"it compiles its kernels with cuda.core and NVRTC ({error}): {INSTALL}"
    return None


def version() -> tuple[int, int]:
    """The version of NVRTC, which is that of CUDA."""
    return _version()


def compile_program(parts: Mapping[str, str], arch: str) -> bytes:
    """The cubin of a program.

    Args:
        parts: the program's text in parts, in order, each under the name that errors give it.
        arch: the architecture: ``"sm_90"``, ``"sm_90a"``, ...

    Raises:
        CompileError: errors in the program; quotes the lines.
    """
    source = join(parts)
    key = _key(source, arch)
    # Threads may compile different programs at once, but not the same one.
    with _lock:
        lock = _compiling.setdefault(key, threading.Lock())
    with lock:
        return _cubin(key, source, arch, tuple(parts))


# Loaded kernels are kept elsewhere. This is for a second device, or if there is no cache folder.
@lru_cache(maxsize=64)
def _cubin(key: str, source: str, arch: str, names: tuple[str, ...]) -> bytes:
    folder = cache_folder()
    if folder is None:
        return _compile(source, arch, names)
    path = _path(folder, key)
    cubin = _read(path, key)
    if cubin is None:
        cubin = _compile(source, arch, names)
        _write(path, key, cubin)
    return cubin


def kept_as(parts: Mapping[str, str], arch: str) -> Path | None:
    """The file that the cache folder has of a program; ``None`` where it would be compiled."""
    folder, key = cache_folder(), _key(join(parts), arch)
    if folder is None or _read(_path(folder, key), key) is None:
        return None
    return _path(folder, key)


def join(parts: Mapping[str, str]) -> str:
    """One text, with ``#line`` before each part, so that errors name it."""
    return "\n".join(f'#line 1 "{_printable(name)}"\n{text}' for name, text in parts.items()) + "\n"


def _printable(name: str) -> str:
    """A part's name as a C string's content."""
    return "".join(c if c.isprintable() and c not in '"\\' else "?" for c in name)


def _key(source: str, arch: str) -> str:
    described = "\0".join([source, arch, _STANDARD, *map(str, _version())])
    return hashlib.sha256(described.encode()).hexdigest()


def _version() -> tuple[int, int]:
    """NVRTC's version; an error where there is no NVRTC or no cuda.core to call it with."""
    # If two threads import them at once, one may see a module that is half imported.
    with _importing:
        import cuda.core
        from cuda.bindings import nvrtc

    if not hasattr(cuda.core, "launch"):
        raise ImportError(f"cuda.core {cuda.core.__version__} is too old")
    error, major, minor = nvrtc.nvrtcVersion()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC does not tell its version: {error}")
    return major, minor


def _compile(source: str, arch: str, names: Iterable[str]) -> bytes:
    from cuda.core import Program, ProgramOptions

    try:
        with _counted():
            program = Program(source, "c++", ProgramOptions(arch=arch, std=_STANDARD))
            return bytes(program.compile("cubin").code)
    except Exception as error:
        # The version in use: it may be PyTorch's NVRTC, not the one that this package requires.
        nvrtc = "NVRTC {}.{}".format(*_version())
        parts = ", ".join(names)
        raise CompileError(f"{nvrtc} could not compile ({parts}) for {arch}: {error}") from error


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """This thread is within NVRTC."""
    thread = threading.get_ident()
    with _left:
        _within.add(thread)
    try:
        yield
    finally:
        with _left:
            _within.discard(thread)
            _left.notify_all()


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.cubin"


def _digest(key: str, cubin: bytes) -> bytes:
    """A digest that a file begins with, of its key and its cubin."""
    return hashlib.sha256(key.encode() + cubin).digest()


def _read(path: Path, key: str) -> bytes | None:
    """The cubin in a file; ``None`` if there is no file, or it is damaged or not trusted."""
    content = read_trusted(path) or b""
    digest, cubin = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    return cubin if digest == _digest(key, cubin) else None


def _write(path: Path, key: str, cubin: bytes) -> None:
    """Write a cubin to a file of its own and rename it, so that processes may race.

    Errors are ignored: the kernel then runs, but is not kept.
    """
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".cubin")
        with os.fdopen(descriptor, "wb") as file:
            file.write(_digest(key, cubin) + cubin)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
