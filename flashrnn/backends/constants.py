"""What ``torch.compile`` takes as given: it asks once, while it compiles, and does not look inside.

Only it imports this module, for the decorator imports it in turn.
"""

from __future__ import annotations

import torch

from flashrnn import backends
from flashrnn.backends import autograd
from flashrnn.cells.spec import cell_of
from flashrnn.problem import Problem


@torch.compiler.assume_constant_result
def key(handle: str) -> str:
    """The string that stands for a cell in a graph."""
    return autograd.remember(cell_of(handle))


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
    problem = Problem(cell_of(handle), 1, 1, N, D, dtype, device, needs_gradient)
    return backends.best(name, problem)
