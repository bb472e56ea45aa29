"""The gradients of R and b, which follow from the gates' gradients once the backward scan is done.

They are a product and a sum over all steps, each in a fixed order: the same inputs give the same
bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.cells.traced import TracedCell
from flashrnn.problem import Problem


class Gradients(NamedTuple):
    """The gradients of a call.

    Attributes:
        gates: ``[B, T, G, N, D]``, of the pre-activations.
        states: ``[S, B, 1, N, D]``, of the initial states.
        R: ``[Gr, N, D, D]``.
        b: ``[Gb, N, D]``.
    """

    gates: Tensor
    states: Tensor
    R: Tensor
    b: Tensor


def number_of(d_states: Tensor | None) -> int:
    """Of how many states, from ``h`` on, every step's gradients are given."""
    return 0 if d_states is None else len(d_states)


def of_no_steps(
    problem: Problem,
    d_gates: Tensor,
    d_last_states: Tensor | None,
    states_initial: Tensor,
    states: Tensor,
) -> Gradients:
    """The gradients of a call without sequences or without steps: states pass through it."""
    if d_last_states is None:
        d_last_states = torch.zeros_like(states_initial)
    d_initial = d_last_states.clone(memory_format=torch.contiguous_format)
    return complete(problem, d_gates, d_initial, states_initial, states)


def complete(
    problem: Problem,
    d_gates: Tensor,
    d_initial: Tensor,
    states_initial: Tensor,
    states: Tensor,
) -> Gradients:
    """A backward scan's gradients, completed by those of R and b."""
    d_R = recurrent_gradient(problem.cell, d_gates, states_initial[0], states[0])
    return Gradients(d_gates, d_initial, d_R, bias_gradient(problem.cell, d_gates))


def select(gates: Tensor, dim: int, indices: tuple[int, ...]) -> Tensor:
    """Some gates: a view if their indices are consecutive."""
    first, count = indices[0] if indices else 0, len(indices)
    if indices == tuple(range(first, first + count)):
        return gates.narrow(dim, first, count)
    # Not by a tensor of indices: its copy to the GPU would make the host wait, and a CUDA graph
    # cannot record such a copy.
    return torch.stack([gates.select(dim, k) for k in indices], dim)


def recurrent_gradient(cell: TracedCell, d_gates: Tensor, h_initial: Tensor, h: Tensor) -> Tensor:
    """``dR[g, n, d, p] = Σ d_gates[b, t, g, n, d] · h[b, t − 1, n, p]`` over b and t."""
    B, T, _, N, D = d_gates.shape
    fed = select(d_gates, 2, cell.fed_by("R"))
    Gr = fed.shape[2]
    # A single head takes one product for all its gates. The gates of one of several heads are
    # apart in memory, so each takes a product of its own, and reads an h of its own: to repeat h
    # takes half the traffic of bringing a head's gates together, and d_R comes out in its layout.
    repeated, width = (1, Gr * D) if N == 1 else (Gr, D)
    # h as the forward product read it: rounded, one step earlier. One copy shifts all steps, from
    # sequence to sequence too, and the first step of each is then overwritten. To concatenate the
    # initial h and the rest takes several times as long.
    before = h.new_empty(B, T, repeated, N, D)
    if T > 1:
        before.view(B * T, repeated, N * D)[1:] = h.reshape(B * T, 1, N * D)[:-1]
    if T:
        before[:, 0] = h_initial
    rows = fed.reshape(B * T, repeated * N, width)
    columns = before.view(B * T, repeated * N, D)
    return torch.bmm(rows.permute(1, 2, 0), columns.transpose(0, 1)).view(Gr, N, D, D)


def bias_gradient(cell: TracedCell, d_gates: Tensor) -> Tensor:
    """``db[g, n, d] = Σ d_gates[b, t, g, n, d]`` over b and t."""
    # The sum runs in float32 and is rounded once.
    return select(d_gates.sum((0, 1)), 0, cell.fed_by("b"))
