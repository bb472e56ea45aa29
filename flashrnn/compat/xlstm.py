"""sLSTM cells of the package ``xlstm`` (2.0.6) computed by this one.

``patch()`` replaces what the cells of ``xlstm.blocks.slstm.cell`` compute, of both of its backends,
in the whole process: layers, block stacks and language models made before or after use it, with
their own parameters. Its ``cuda`` cells then compile nothing when they are made, and, made so, have
no kernels of their own after ``unpatch()``.

Where the two sLSTMs differ: here n ≥ 1, which only states that no step has left can fall short of;
and m starts anew where n = 0, element by element, instead of where all of n is 0. xlstm's layer
feeds its ``fgate`` into the slot of the input gate and its ``igate`` into that of the forget gate;
nothing here depends on those names. Its ``vanilla`` cells keep biases and R by gate and then head,
its ``cuda`` cells by head and then gate: each kind's own conversion to its common layout is used.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashrnn.config import FlashRNNConfig
from flashrnn.functional import flashrnn

# xlstm's letters for a step, a head and a unit are S, N and H.
_LETTERS = str.maketrans("SNH", "THD")
# What was replaced, by class or module and name.
_replaced: dict[tuple[Any, str], Any] = {}


def patch(backend: str = "auto") -> None:
    """Let this package compute xlstm's sLSTM and LSTM cells, with a backend of it.

    The inputs' dtype is computed in by ``vanilla`` cells, ``config.dtype`` by ``cuda`` cells, as
    there; ``R`` and the bias are cast to it.

    Raises:
        ImportError: xlstm is not installed, or has not the classes of version 2.0.6.
    """
    cells = _cells()

    def all_states(cell: Any, training: bool, input: Tensor, state: Tensor) -> Tensor:
        """``[S, 1 + T, B, N · D]``, the given state first, as the cell's own functions return."""
        return torch.cat([state[:, None], _scan(cell, input, state, backend)], dim=1)

    def one_state(cell: Any, training: bool, input: Tensor, state: Tensor) -> Tensor:
        return _scan(cell, input, state, backend)

    unpatch()
    for owner, name, ours in (
        (cells.sLSTMCell_vanilla, "_impl", all_states),
        (cells.sLSTMCell_vanilla, "_impl_step", one_state),
        (cells.sLSTMCell_cuda, "_impl", all_states),
        (cells.sLSTMCell_cuda, "_impl_step", all_states),
        # It compiles xlstm's kernels.
        (cells, "sLSTMCellFuncGenerator", lambda training, config: None),
    ):
        _replaced[owner, name] = getattr(owner, name)
        setattr(owner, name, ours)


def unpatch() -> None:
    """Undo :func:`patch`; does nothing if it was not called."""
    while _replaced:
        (owner, name), theirs = _replaced.popitem()
        setattr(owner, name, theirs)


def _cells() -> ModuleType:
    from xlstm.blocks.slstm import cell

    for name in ("sLSTMCell_vanilla", "sLSTMCell_cuda", "sLSTMCellFuncGenerator"):
        if not hasattr(cell, name):
            raise ImportError(f"{cell.__file__} has no {name}; xlstm 2.0.6 has, and is what fits")
    return cell


def _scan(cell: Any, input: Tensor, state: Tensor, backend: str) -> Tensor:
    """The states after every step, ``[S, T, B, N · D]``.

    ``input`` is ``[T, B, G · N · D]`` in the cell's internal order of G and N, ``state``
    ``[S, B, N · D]``.
    """
    settings = cell.config
    N, D, G = settings.num_heads, settings.head_dim, settings.num_gates
    layout = settings.internal_input_shape.translate(_LETTERS)
    T, B = input.shape[:2]
    sizes = {"T": T, "B": B, "G": G, "H": N, "D": D}
    is_cuda = isinstance(cell, _cells().sLSTMCell_cuda)
    config = FlashRNNConfig(
        function=settings.function,
        gradient_recurrent_cut=settings.gradient_recurrent_cut,
        gradient_recurrent_clipval=settings.gradient_recurrent_clipval,
        forward_clipval=settings.forward_clipval,
        enable_automatic_mixed_precision=settings.enable_automatic_mixed_precision,
        input_shape=layout,
        output_shape="STBHD",
        recurrent_shape="HPGD",
        bias_shape="HGD",
        dtype=settings.dtype if is_cuda else input.dtype,
    )
    every, _ = flashrnn(
        input.view([sizes[letter] for letter in layout]),
        cell._recurrent_kernel_int2ext(cell._recurrent_kernel),
        cell._bias_int2ext(cell._bias),
        state.view(-1, 1, B, N, D),
        config=config,
        backend=backend,
    )
    return every.reshape(-1, T, B, N * D)
