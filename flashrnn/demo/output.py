"""The files that the demo writes: atomically, and checked to be writable before any work."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from flashrnn.demo.errors import DemoError


def check_writable(*paths: Path) -> None:
    """Make the files' folders, and write to each as :func:`write` will, but leave it as it is.

    Raises:
        DemoError: a file cannot be written; says which, and why.
    """
    for path in paths:
        unfinished = _unfinished(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(b"")
            unfinished.unlink()
        except OSError as error:
            raise DemoError(f"--output {path.parent}: {error.strerror}") from error
        if path.is_dir():
            raise DemoError(f"--output {path.parent}: {path} is to be a file, and is a folder")


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader finds the old file or the new one, complete.

    Raises:
        DemoError: it cannot be written; says why.
    """
    unfinished = _unfinished(path)
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        kept = "; the one of before is as it was" if path.exists() else ""
        raise DemoError(f"{path} could not be written: {error.strerror}{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
