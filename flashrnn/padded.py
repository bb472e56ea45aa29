"""Heads computed with more units than they have, so that their rows are multiples of 16 bytes.

Kernels that move rows in pieces of 16 bytes are faster, and much faster for many sequences.

Each additional unit has the gates of its head's first unit; its own states start at 0. R's columns
for these units are 0, so each adds 0 · h to the other units' sums, which is 0 as long as h is
finite. It is for cells that :func:`flashrnn.cells.bounds.stays_finite` accepts, unless what follows
from gates alone is NaN. Then the first unit's h is NaN too, and so are all h of the next step, with
and without such units.

Backward, an infinite gradient times these zeros is NaN, and so are an infinite R of the first unit
times a gradient of 0 and what follows from infinite gates. So gradients that are infinite without
additional units, or where R or a gate is, may be NaN. Calls with a ``gradient_recurrent_clipval``,
which contains such, have no additional units.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashrnn.backends import Backend
from flashrnn.problem import Problem
from flashrnn.sequences import Sequences


def units(backend: Backend, problem: Problem, of_layer: bool) -> int:
    """How many units the heads of a problem are computed with: D, or more.

    Args:
        backend: by which backend.
        problem: what is computed. A call of one step is never padded, like a Stepper's.
        of_layer: whether Wx is a product with weights, to which the units are added; else Wx is
            copied.
    """
    if problem.D * problem.dtype.itemsize % 16 == 0:
        return problem.D
    asked = getattr(backend, "padded_units", None)
    return problem.D if asked is None else asked(problem, of_layer)


def repeated(gates: Tensor, D: int, dim: int = -1) -> Tensor:
    """Gates' weights or gates with D units along a dimension: the first one's again, behind the
    others."""
    first = gates.detach().narrow(dim, 0, 1)
    sizes = list(gates.shape)
    sizes[dim] = D - gates.shape[dim]
    return torch.cat([gates, first.expand(sizes)], dim)


def recurrent(R: Tensor, D: int) -> Tensor:
    """R ``[Gr, N, D, D]``, whose columns for the additional units are 0."""
    return with_zeros(repeated(R, D, dim=2), D)


def with_zeros(states: Tensor, D: int) -> Tensor:
    """States of D units, of which the additional ones' are 0."""
    return pad(states, (0, D - states.shape[-1]))


def options(given: Sequences | None, D: int) -> Sequences | None:
    """Options of sequences whose states have D units."""
    if given is None or given.reset_states is None:
        return given
    return given._replace(reset_states=with_zeros(given.reset_states, D))


def narrowed(tensor: Tensor, D: int) -> Tensor:
    """The first D units, contiguous."""
    return tensor[..., :D].contiguous()
