"""Functions that ``torch.compile`` calls while it compiles, and whose results are constants to it.

Imported only while it compiles: the decorator imports Dynamo.
"""

from __future__ import annotations

import torch

from flashrnn import backends
from flashrnn.cells.spec import Cell, cell_of
from flashrnn.problem import Problem


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
        resets=resets,
        ragged=ragged,
        packed=packed,
        reverse=reverse,
        returned=returned,
    )
    return backends.best(name, problem)
