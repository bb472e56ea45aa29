"""Heads computed with more units than they have, so that their rows are multiples of 16 bytes.

Kernels that move rows in pieces of 16 bytes are the faster ones, of many sequences by far. Each
additional unit computes what a head's first unit would from the same gates and states of zero. R
has zeros where it would multiply their h, so that they add nothing to the others' sums: 0 times
what is finite. They are not finite only where the first unit's gates are not, so that NaN and
infinity are where the definition has them (but an infinite R of the first unit, which gradients of
0 of the additional ones are multiplied by, may give NaN in place of infinity).
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
        problem: what is computed. Of one step they have D: so do those of a Stepper.
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
    """R ``[Gr, N, D, D]``, of which nothing multiplies the additional units' h."""
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
