"""What ``torch.compile`` takes as given: it asks once, while it compiles, and does not look inside.

Only it imports this module, for the decorator imports it in turn.
"""

from __future__ import annotations

import torch

from flashrnn import backends
from flashrnn.cells.spec import cell_of
from flashrnn.problem import Problem


@torch.compiler.assume_constant_result
def text(handle: str) -> str:
    """See :attr:`flashrnn.cells.traced.TracedCell.text`."""
    return cell_of(handle).traced.text


@torch.compiler.assume_constant_result
def chosen(
    name: str,
    handle: str,
    N: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_gradient: bool,
) -> str:
    """See :func:`flashrnn.backends.best`; of a problem, what a backend may decide by."""
    problem = Problem(cell_of(handle).traced, 1, 1, N, D, dtype, device, needs_gradient)
    return backends.best(name, problem)
