"""FlashRNN: fast, exact recurrent neural networks with multi-head recurrence.

Importing this package touches no GPU and compiles nothing.
"""

from typing import Any

from flashrnn.ahead import compile_ahead
from flashrnn.cells import Cell, available_functions, cell, register
from flashrnn.cells.spec import CellError
from flashrnn.compat import installed as _installed

# From there, so that the folder of upstream's import paths is loaded before the function takes its
# name.
from flashrnn.flashrnn import FlashRNNConfig, flashrnn
from flashrnn.layer import recurrent_layer
from flashrnn.stepper import Stepper, step

# Its operators are what saved programs call.
from flashrnn.backends import autograd as _operators  # isort: skip  # noqa: F401

_installed.check()

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "CellError",
    "FlashRNNConfig",
    "Stepper",
    "available_functions",
    "cell",
    "compile_ahead",
    "flashrnn",
    "recurrent_layer",
    "register",
    "step",
]


def __getattr__(name: str) -> Any:
    """``flashrnn.nn``, imported when it is first asked for."""
    if name == "nn":
        import flashrnn.nn as nn

        return nn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
