"""The folder where compiled kernels are kept, and who may have put into it what runs here.

Machine code runs with its user's rights. So it is read only from files that nobody but this user
(or root, who may do anything anyway) can have written. What is asked, and when:

- Before each use, whether the folder is this user's or root's, and that its mode lets nobody else
  write; an access control list that lets somebody shows in the mode, too. Else the folder is not
  used, and a warning says so.
- Of each file, once it is open, whether it is such a file itself. So a folder or a link that is
  exchanged between question and use leads to no file of another user.

Folders above are not asked about: who may write there can put a folder of his own in place, which
is then refused, or take the folder away, and then kernels are compiled again.

On Windows, whose folders of users are private and have no such modes, nothing is asked.
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

    It is ``$FLASHRNN_CACHE_DIR``, or ``flashrnn`` in the user's cache folder. Where there is no
    such thing, or others may write there, it is a temporary one of this process; ``None`` where
    that cannot be made either.

    Warns:
        UserWarning: ``$FLASHRNN_CACHE_DIR`` or the user's folder is not used; once for each reason.
    """
    try:
        folder = _wanted()
    except RuntimeError as error:
        # Path's, without HOME and an entry in the list of users, as in many a container.
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
    """Why nothing from a folder may run; ``None`` for one that does not exist, too."""
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
    """A folder for this process alone: a forked one has its own, and removes no other's."""
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
