"""Cells: one definition each, and what is derived from it."""

from flashrnn.cells.library import elman, gru, lstm, slstm
from flashrnn.cells.signature import Gate
from flashrnn.cells.spec import Cell, available_functions, cell, register, resolve

__all__ = [
    "Cell",
    "Gate",
    "available_functions",
    "cell",
    "elman",
    "gru",
    "lstm",
    "register",
    "resolve",
    "slstm",
]
