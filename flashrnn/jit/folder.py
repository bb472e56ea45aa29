"""The folder where compiled kernels are kept, and the check that only this user can write there.

Machine code runs with its user's rights. So it is read only from files that nobody but this user
(or root, who may do anything anyway) can have written. The checks:

- Before each use of the folder: it must belong to this user or root, and its mode must let nobody
  else write. (An access control list that lets somebody write shows in the mode.) Otherwise the
  folder is not used, and a warning says so.
- Of each file, after it has been opened: the same. So nothing is gained by replacing the folder or
  a link between check and use.

Folders above are not checked. Whoever can write there can put another folder in place, which is
then refused, or remove the folder, and then kernels are compiled again.

On Windows, where users' folders are private and have no such modes, nothing is checked.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

_VARIABLE = "FLASHRNN_CACHE_DIR"


def cache_folder() -> Path | None:
    """The folder for what may be kept, which need not exist yet.

    It is ``$FLASHRNN_CACHE_DIR``, or ``flashrnn`` in the user's cache folder. If there is no such
    folder or others may write there, it is a temporary one of this process; ``None`` if that
    cannot be made either.

    Warns:
        UserWarning: ``$FLASHRNN_CACHE_DIR`` or the user's folder is not used; once for each reason.
    """
    try:
        folder = _wanted()
    except RuntimeError as error:
        # From Path.home(), without HOME and an entry in the list of users, as in some containers.
        if os.environ.get(_VARIABLE):
            _warn(f"{_VARIABLE}={os.environ[_VARIABLE]} names no folder: {error}. {_INSTEAD}")
        return _private_folder(os.getpid())
    reason = _untrusted(folder)
    if reason is None:
        return folder
    _warn(f"no kernel is read from or kept in {folder}: {reason}. {_INSTEAD}")
    return _private_folder(os.getpid())


_INSTEAD = (
    "Kernels are kept in a private folder until this process ends, and compiled again by the next "
    f"one. To keep them, name a folder in {_VARIABLE} that is yours and that nobody else may write."
)


def read_trusted(path: Path) -> bytes | None:
    """A file's content; ``None`` where there is no such file, or where it may be another user's."""
    try:
        with path.open("rb") as file:
            return None if _others_may_write(os.fstat(file.fileno())) else file.read()
    except OSError:
        return None


def _wanted() -> Path:
    given = os.environ.get(_VARIABLE)
    if given:
        return Path(given).expanduser()
    users = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path there is to be ignored, says the specification of XDG_CACHE_HOME.
    return (users if users.is_absolute() else Path.home() / ".cache") / "flashrnn"


def _untrusted(folder: Path) -> str | None:
    """Why nothing from a folder may run; ``None`` if it may, or if the folder does not exist."""
    try:
        status = folder.stat()
    except OSError:
        return None
    reason = _others_may_write(status)
    if reason and hasattr(os, "geteuid") and status.st_uid == os.geteuid():
        return f"{reason} (if nobody did, mend it: chmod go-w '{folder}')"
    return reason


def _others_may_write(status: os.stat_result) -> str | None:
    """How another user may have written a file or a folder; ``None`` if nobody can have."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to another user, number {status.st_uid}, who may put code there"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"its mode {stat.filemode(status.st_mode)} lets other users put code there"
    return None


@lru_cache(maxsize=1)
def _private_folder(process: int) -> Path | None:
    """A folder for one process. A forked one gets its own and does not remove its parent's."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="flashrnn-"))
    except OSError:
        return None

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@lru_cache(maxsize=256)
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
