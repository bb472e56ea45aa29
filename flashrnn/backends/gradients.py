"""The gradients of R and b, which follow from the gates' gradients once the backward scan is done.

They are a product and a sum over all steps, each in a fixed order: the same inputs give the same
bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.cells.traced import TracedCell
from flashrnn.problem import Problem, matmul_tf32_allowed
from flashrnn.rows import widened
from flashrnn.sequences import Sequences, bounds, runs_backwards


class Gradients(NamedTuple):
    """The gradients of a call.

    Attributes:
        gates: ``[B, T, G, N, D]``, of the pre-activations.
        states: ``[S, B, 1, N, D]``, of the initial states.
        R: ``[Gr, N, D, D]``.
        b: ``[Gb, N, D]``.
        reset_states: of what resets go back to, in its shape; ``None`` without resets.
        x: of a layer's input, where the backend multiplies it and this gradient is asked for.
        W: of its input matrix, likewise.
    """

    gates: Tensor
    states: Tensor
    R: Tensor
    b: Tensor
    reset_states: Tensor | None = None
    x: Tensor | None = None
    W: Tensor | None = None


def number_of(d_states: Tensor | None) -> int:
    """Of how many states, from ``h`` on, every step's gradients are given."""
    return 0 if d_states is None else d_states.shape[0]


def of_no_steps(
    problem: Problem,
    d_gates: Tensor,
    d_last_states: Tensor | None,
    states_initial: Tensor,
) -> Gradients:
    """The gradients of a call without sequences or without steps: states pass through it."""
    d_gates.zero_()
    if d_last_states is None:
        d_last_states = torch.zeros_like(states_initial)
    d_initial = d_last_states.clone(memory_format=torch.contiguous_format)
    Gr, Gb = (len(problem.cell.fed_by(source)) for source in ("R", "b"))
    d_R = d_gates.new_zeros(Gr, problem.N, problem.D, problem.D)
    return Gradients(d_gates, d_initial, d_R, d_gates.new_zeros(Gb, problem.N, problem.D))


def complete(
    problem: Problem,
    d_gates: Tensor,
    d_initial: Tensor,
    states_initial: Tensor,
    states: Tensor,
    before: Tensor | None = None,
) -> Gradients:
    """A backward scan's gradients, completed by those of R and b.

    ``before`` is h before each step, as :func:`recurrent_gradient` takes it; ``None``: it is that
    of the row before.
    """
    if before is None:
        before = _shifted(states_initial[0], states[0], copies_of_h(problem.cell, problem.N))
    d_R = recurrent_gradient(problem.cell, d_gates, before)
    return Gradients(d_gates, d_initial, d_R, bias_gradient(problem.cell, d_gates))


def select(gates: Tensor, dim: int, indices: tuple[int, ...]) -> Tensor:
    """Some gates: all as they are, or a view if their indices are consecutive."""
    first, count = indices[0] if indices else 0, len(indices)
    if count == gates.shape[dim]:
        return gates
    if indices == tuple(range(first, first + count)):
        return gates.narrow(dim, first, count)
    # Not by a tensor of indices: its copy to the GPU would make the host wait, and a CUDA graph
    # cannot record such a copy.
    return torch.stack([gates.select(dim, k) for k in indices], dim)


def copies_of_h(cell: TracedCell, N: int) -> int:
    """How many times :func:`recurrent_gradient` reads h before each step.

    A single head takes one product for all its gates. The gates of one of several heads are apart
    in memory, so each takes a product of its own, and reads an h of its own: to repeat h takes half
    the traffic of bringing a head's gates together, and d_R comes out in its layout.
    """
    return 1 if N == 1 else len(cell.fed_by("R"))


def recurrent_gradient(cell: TracedCell, d_gates: Tensor, before: Tensor) -> Tensor:
    """``dR[g, n, d, p] = Σ d_gates[b, t, g, n, d] · h[b, t − 1, n, p]`` over b and t.

    Args:
        cell: the cell.
        d_gates: ``[B, T, G, N, D]``.
        before: h before each step, ``[B · T, copies_of_h, N, D]``.
    """
    B, T, _, N, D = d_gates.shape
    fed = select(d_gates, 2, cell.fed_by("R"))
    Gr = fed.shape[2]
    if N == 1:
        rows = fed.reshape(B * T, Gr * D)
        return over_rows(rows, before.view(B * T, D)).view(Gr, N, D, D)
    rows, columns = fed.reshape(B * T, Gr * N, D), before.view(B * T, Gr * N, D)
    return torch.bmm(rows.permute(1, 2, 0), columns.transpose(0, 1)).view(Gr, N, D, D)


def over_rows(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b`` ``[M, K]`` of ``[rows, M]`` and ``[rows, K]``: the sum over all steps' products."""
    parts = _parts(a, b)
    if parts == 1:
        return torch.mm(a.t(), b)
    a, b = a.unflatten(0, (parts, -1)), b.unflatten(0, (parts, -1))
    return torch.bmm(a.transpose(1, 2), b).sum(0)


# Rows, and elements of the product, from which on and up to which it takes less time in parts.
_ROWS_IN_PARTS, _MOST_IN_PARTS, _PARTS = 65536, 3072 * 768, 16


def _parts(a: Tensor, b: Tensor) -> int:
    """In how many parts rows are summed: by TF32 the library takes 2.13 ms for 65,536 rows of 3072
    and of 768, and 1.28 ms in 16 parts (H200). Of fewer rows, of larger products, in float32 and in
    16 bits there is little or nothing to gain."""
    rows, elements = a.shape[0], a.shape[1] * b.shape[1]
    is_long = rows >= _ROWS_IN_PARTS and rows % _PARTS == 0 and elements <= _MOST_IN_PARTS
    if is_long and a.is_cuda and a.dtype == torch.float32 and matmul_tf32_allowed():
        return _PARTS
    return 1


def _shifted(h_initial: Tensor, h: Tensor, repeated: int) -> Tensor:
    """``[B · T, repeated, N, D]``, h before each step, so many times."""
    B, T, N, D = h.shape
    # h as the forward product read it: rounded, one step earlier. One copy shifts all steps, from
    # sequence to sequence too, and the first step of each is then overwritten. To concatenate the
    # initial h and the rest takes several times as long.
    before = h.new_empty(B, T, repeated, N, D)
    if T > 1:
        to, of = before.view(B * T, repeated, N * D), h.reshape(B * T, 1, N * D)
        _copy_rows(to[1:], of[:-1])
    if T:
        before[:, 0] = h_initial
    return before.flatten(0, 1)


def _copy_rows(to: Tensor, of: Tensor) -> None:
    """Copy contiguous rows of ``[rows, 1, width]``, each to all of its ``[rows, count, width]``."""
    to, of = widened(to, of)
    to.copy_(of)


class Before(NamedTuple):
    """Where h before each step is.

    Attributes:
        rows: ``[directions, rows]`` of int32: the row of h, or −1 − k for row k of ``starts``. With
            heads that run backwards there are two directions, and the second is theirs.
        starts: ``[K, N, D]``, what sequences start with and what they go back to, rounded as h is.
    """

    rows: Tensor
    starts: Tensor


def before_steps(
    problem: Problem, sequences: Sequences, h_initial: Tensor, dtype: torch.dtype
) -> Before:
    """Where h before each step of a call with options is.

    Args:
        problem: the problem.
        sequences: its options.
        h_initial: ``[B, 1, N, D]``.
        dtype: of h.
    """
    B, T, N, D = problem.B, problem.T, problem.N, problem.D
    count = problem.rows[0] * T
    whole: dict[str, Any] = {"dtype": torch.int32, "device": problem.device}
    first, lengths = bounds(sequences, T)
    of_sequences = torch.arange(-1, -1 - B, -1, **whole)
    starts, start = [h_initial.reshape(B, N, D).to(dtype)], None
    if sequences.reset is not None:
        to = sequences.reset_states
        start = _start_of_each_row(problem, to, first, lengths)
        zeros = h_initial.new_zeros((1, N, D), dtype=dtype)
        starts.append(zeros if to is None else to[0].reshape(-1, N, D).to(dtype))
    own = torch.arange(count, **whole)
    is_step = None if lengths is None else _steps(problem, own, first, lengths)
    directions = []
    for backwards in (False,) if problem.reverse is False else (False, True):
        # The neighbour. Behind the last row is a place for sequences without steps.
        table = torch.arange(count + 1, **whole)
        table = (table + 1).clamp_(max=max(0, count - 1)) if backwards else table - 1
        rows = table[:count]
        if backwards and sequences.reset is not None and start is not None:
            # A flag cuts its row from the one before.
            flags = sequences.reset.reshape(-1)
            rows[:-1] = torch.where(flags[1:], start[:-1], rows[:-1])
        if lengths is not None:
            begin = torch.arange(B, device=problem.device) * T if first is None else first
            begin = begin + lengths - 1 if backwards else begin
            table[torch.where(lengths > 0, begin, count)] = of_sequences
        elif T:
            rows.view(B, T)[:, -1 if backwards else 0] = of_sequences
        if not backwards and sequences.reset is not None and start is not None:
            rows = torch.where(sequences.reset.reshape(-1), start, rows)
        if is_step is not None:
            # Gradients are 0 in rows that are no step, and 0 times what resets go back to there may
            # be NaN. Their own h is 0.
            rows = torch.where(is_step, rows, own)
        directions.append(rows)
    return Before(torch.stack(directions), torch.cat(starts))


def _steps(problem: Problem, row: Tensor, first: Tensor | None, lengths: Tensor) -> Tensor:
    """``[rows]``, whether each is a step of a sequence."""
    if first is None:
        return (row[: problem.T] < lengths[:, None]).view(-1)
    if not problem.B:
        return row >= 0
    return (row >= first[0]) & (row < first[-1] + lengths[-1])


def _start_of_each_row(
    problem: Problem, to: Tensor | None, first: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """``[rows]``, for each row what a reset there goes back to, as in :class:`Before`."""
    B, T = problem.B, problem.T
    whole: dict[str, Any] = {"dtype": torch.int32, "device": problem.device}
    count = problem.rows[0] * T
    if to is None:
        return torch.full((), -1 - B, **whole).expand(count)
    if to.shape[2] > 1:
        return torch.arange(-1 - B, -1 - B - count, -1, **whole)
    if first is None or lengths is None:
        return torch.arange(-1 - B, -1 - 2 * B, -1, **whole)[:, None].expand(B, T).reshape(-1)
    row = torch.arange(count, device=problem.device)
    sequence = torch.searchsorted(first + lengths, row, right=True).clamp_max(B - 1)
    return (-1 - B - sequence).int()


def gathered(problem: Problem, before: Before, h: Tensor) -> Tensor:
    """h before each step of a call with options, as :func:`recurrent_gradient` takes it."""
    rows, starts = before
    # One after another: starts count from the end, −1 the first.
    every = torch.cat([h.flatten(0, 1), starts.flip(0)])
    found = every[rows[0].long() % len(every)]
    if len(rows) > 1:
        backwards = runs_backwards(problem)[:, None] > 0
        found = torch.where(backwards, every[rows[1].long() % len(every)], found)
    count = copies_of_h(problem.cell, problem.N)
    return found.unsqueeze(1).expand(-1, count, -1, -1).contiguous()


def bias_gradient(cell: TracedCell, d_gates: Tensor) -> Tensor:
    """``db[g, n, d] = Σ d_gates[b, t, g, n, d]`` over b and t."""
    # The sum runs in float32 and is rounded once.
    return select(d_gates.sum((0, 1)), 0, cell.fed_by("b"))
