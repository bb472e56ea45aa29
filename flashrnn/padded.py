"""Heads computed with more units than they have, so that their rows are whole pieces of 16 bytes.

Kernels that move rows in such pieces are the faster ones, of many sequences by far. The units that
are added have weights and states of zero. They stay zero, and add nothing to the others' sums.
"""

from __future__ import annotations

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


def widened(tensor: Tensor, D: int, dims: int = 1) -> Tensor:
    """A tensor with zeros behind each of its last dimensions of units, up to D."""
    return pad(tensor, (0, D - tensor.shape[-1]) * dims)


def widened_options(options: Sequences | None, D: int) -> Sequences | None:
    """The same of the options' states."""
    if options is None or options.reset_states is None:
        return options
    return options._replace(reset_states=widened(options.reset_states, D))


def narrowed(tensor: Tensor, D: int) -> Tensor:
    """The first D units, contiguous."""
    return tensor[..., :D].contiguous()
