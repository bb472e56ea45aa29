"""The recurrences that torch.nn has: our cells for them, and PyTorch's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.cells.library import elman, gru, lstm
from flashrnn.cells.spec import Cell, cell


@cell(states=("h",), gates=("g",))
def elman_relu(states: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The simple recurrent network with the rectifier of ``torch.nn.RNN``: ``h' = relu(g)``."""
    (g,) = gates
    return (torch.relu(g),)


class Mode(NamedTuple):
    """A recurrence that torch.nn has.

    Attributes:
        cell: the cell that computes the same here.
        layers: PyTorch's kernel for all layers of it.
        step: PyTorch's kernel for one step of one layer.
    """

    cell: Cell
    layers: Callable[..., Any]
    step: Callable[..., Any]


MODES = {
    "LSTM": Mode(lstm, torch.lstm, torch.lstm_cell),
    "GRU": Mode(gru, torch.gru, torch.gru_cell),
    "RNN_TANH": Mode(elman, torch.rnn_tanh, torch.rnn_tanh_cell),
    "RNN_RELU": Mode(elman_relu, torch.rnn_relu, torch.rnn_relu_cell),
}
"""By the name that torch.nn has for it in ``mode``."""


def mode_of(cell: Cell) -> str:
    """torch.nn's name of a cell; the cell's own where torch.nn has none."""
    return next((name for name, mode in MODES.items() if mode.cell is cell), cell.name)
