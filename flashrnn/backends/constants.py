"""Functions that ``torch.compile`` calls while it compiles, and whose results are constants to it.

Imported only while it compiles: the decorator imports Dynamo.
"""

from __future__ import annotations

import torch

from flashrnn import backends
from flashrnn.cells.spec import Cell, cell_of
from flashrnn.problem import Problem
from flashrnn.problem import rnn_tf32_allowed as _rnn_tf32_allowed


@torch.compiler.assume_constant_result
def text(handle: str) -> str:
    """See :meth:`flashrnn.cells.traced.TracedCell.text_for`."""
    cell = _cell(handle)
    traced = cell.traced
    return traced.text_for(handle) if cell.captures else traced.text


def _cell(handle: str) -> Cell:
    cell = cell_of(handle)
    assert cell is not None, "the function that is compiled holds it"
    return cell


@torch.compiler.assume_constant_result
def chosen(
    name: str,
    handle: str,
    N: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_gradient: bool,
    allow_tf32: bool | None,
    resets: bool,
    ragged: bool,
    packed: bool,
    reverse: bool | tuple[bool, ...],
    returned: int | None,
) -> str:
    """See :func:`flashrnn.backends.best`. B, T and clip values decide nothing."""
    problem = Problem(
        _cell(handle).traced,
        *(1, 1, N, D, dtype, device, needs_gradient),
        allow_tf32=allow_tf32,
        resets=resets,
        ragged=ragged,
        packed=packed,
        reverse=reverse,
        returned=returned,
    )
    return backends.best(name, problem)


@torch.compiler.assume_constant_result
def fused_on(device: torch.device) -> bool:
    """See :func:`flashrnn.backends.fused_on`."""
    return any(
        not backends.load(name).unavailable(device)
        for name in backends.PREFERENCE
        if name != "vanilla"
    )


@torch.compiler.assume_constant_result
def rnn_tf32_allowed() -> bool:
    """See :func:`flashrnn.problem.rnn_tf32_allowed`."""
    return _rnn_tf32_allowed()
