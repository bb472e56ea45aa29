"""Errors that stop the demo with a message instead of a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType


class DemoError(Exception):
    """Something that the user can put right; the message says how."""


def optional(module: str) -> ModuleType:
    """A module out of the packages that only the demo needs.

    Raises:
        DemoError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DemoError(
            f'the demo needs {error.name}, which is not installed: pip install "flashrnn-jit[demo]"'
        ) from error
