"""FlashRNN: fast, exact recurrent neural networks with multi-head recurrence.

Importing this package touches no GPU and compiles nothing.
"""

from typing import Any

from flashrnn.cells import Cell, available_functions, cell, register
from flashrnn.cells.spec import CellError
from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn

# Its operators are what saved programs call.
from flashrnn.backends import autograd as _operators  # isort: skip  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "CellError",
    "FlashRNNConfig",
    "available_functions",
    "cell",
    "flashrnn",
    "register",
]


def __getattr__(name: str) -> Any:
    """``flashrnn.nn``, imported when it is first asked for."""
    if name == "nn":
        import flashrnn.nn as nn

        return nn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
