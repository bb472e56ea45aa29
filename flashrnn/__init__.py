"""FlashRNN: fast, exact recurrent neural networks with multi-head recurrence.

Importing this package touches no GPU and compiles nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashrnn.cells import Cell, available_functions, cell, register
from flashrnn.cells.spec import CellError
from flashrnn.compat import installed as _installed

# From there, so that the folder of upstream's import paths is loaded before the function takes its
# name.
from flashrnn.flashrnn import FlashRNNConfig, flashrnn

# Its operators are what saved programs call.
from flashrnn.backends import autograd as _operators  # isort: skip  # noqa: F401

if TYPE_CHECKING:
    from flashrnn.ahead import compile_ahead
    from flashrnn.layer import recurrent_layer
    from flashrnn.stepper import Stepper, step

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

# What is imported when it is first asked for, and from where.
_LATER = {
    "Stepper": "flashrnn.stepper",
    "compile_ahead": "flashrnn.ahead",
    "recurrent_layer": "flashrnn.layer",
    "step": "flashrnn.stepper",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("flashrnn.nn")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "nn"})
