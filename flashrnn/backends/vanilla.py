"""Backend ``vanilla``: the recurrence as a plain PyTorch loop, on any device.

It is the definition that every other backend is compared with, and the only one that can be
differentiated twice. A step is one batched product and one call of the cell. What does not depend
on the step before is computed for all steps at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashrnn.backends import Run, Runs, recorded
from flashrnn.cells.traced import TracedCell
from flashrnn.problem import Problem, as_dtype_has_it, without_autocast
from flashrnn.sequences import Sequences, bounds


def unavailable(device: torch.device) -> str | None:
    """Nothing: it runs wherever PyTorch does."""
    return None


def unsupported(problem: Problem) -> str | None:
    """Nothing: it supports every problem."""
    return None


def run(
    problem: Problem,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`flashrnn.backends.autograd.run`."""
    if sequences is None or not problem.is_sequenced:
        every_state, last_states = _run(problem, Wx, R, b, states, _Steps())
        # A slice of all would be a node of autograd too, whose gradient is a copy.
        returned = problem.returned
        return every_state if returned is None else every_state[:returned], last_states
    if problem.longest is None and _can_wait(sequences):
        # Else every sequence of a packed batch takes as many steps as the batch has rows.
        _, lengths = bounds(sequences, problem.T)
        if lengths is not None and problem.B:
            problem = problem._replace(longest=int(lengths.max()))
    order = _Rows(problem, sequences)
    problem = problem._replace(T=problem.steps)
    steps = _Steps()
    if order.lengths is not None:
        # [T, B], and a place for heads and one for units.
        running = torch.arange(problem.T, device=Wx.device)[:, None] < order.lengths
        steps = steps._replace(running=running[:, None, :, None])
    if sequences.reset is not None:
        to = sequences.reset_states
        to = states.new_zeros(()).expand_as(states) if to is None else to
        steps = steps._replace(resets=order.resets(sequences.reset), to=order.starts(to))
    every_state, last_states = _run(problem, order.steps(Wx), R, b, states, steps)
    return order.rows(every_state[: problem.returned]).contiguous(), last_states


def _can_wait(sequences: Sequences) -> bool:
    """Whether the numbers of a packed batch may be looked at, though they are on a GPU."""
    cuts = sequences.cu_seqlens
    if cuts is None or recorded():
        return False
    return not (cuts.is_cuda and torch.cuda.is_current_stream_capturing())


class _Steps(NamedTuple):
    """What is special about some steps of some sequences.

    Attributes:
        running: ``[T, 1, B, 1]``, whether a sequence has the step.
        resets: ``[T, N, B, 1]``, whether its states go back before it.
        to: ``[T or 1, S, N, B, D]``, to what.
    """

    running: Tensor | None = None
    resets: Tensor | None = None
    to: Tensor | None = None


class _Rows:
    """Rows of time in the order in which heads compute them: step i of each sequence.

    A packed batch becomes ``[B, steps]``; heads that run backwards have a sequence's last step
    first. Rows that no step has are 0.
    """

    def __init__(self, problem: Problem, sequences: Sequences) -> None:
        self.problem, self.device = problem, problem.device
        self.first, self.lengths = bounds(sequences, problem.T)
        reverse = problem.reverse
        heads = reverse if isinstance(reverse, tuple) else (reverse,) * problem.N
        self.turns = any(heads)
        self.backwards = torch.tensor(heads, device=self.device)
        length = problem.T if self.lengths is None else self.lengths[:, None]
        step = torch.arange(problem.steps, device=self.device).expand(problem.B, problem.steps)
        self.has_step = step < length
        # [B, steps]: the time of a step of a head that runs backwards, and the step of a time.
        self.turned = torch.where(self.has_step, length - 1 - step, step)

    def steps(self, x: Tensor, dim: int = 0) -> Tensor:
        """``[..., B, T, ·, N, ·]`` out of ``x`` in rows, whose first dimension is ``dim``."""
        return self._turn(self._unpacked(x, dim), dim)

    def rows(self, x: Tensor) -> Tensor:
        """``[S, B, T, N, D]`` in the rows of the call."""
        x = self._turn(x.unsqueeze(3), 1).squeeze(3)
        if self.lengths is not None:
            x = torch.where(self.has_step[:, :, None, None], x, 0.0)
        if self.first is None:
            return pad(x, (0, 0, 0, 0, 0, self.problem.T - x.shape[2]))
        # The sequence that has a row: the last that begins there or before, but for empty ones.
        assert self.lengths is not None
        total = torch.arange(self.problem.T, device=self.device)
        ends = self.first + self.lengths
        sequence = torch.searchsorted(ends, total, right=True).clamp_max(self.problem.B - 1)
        step = total - self.first[sequence]
        found = x[:, sequence, step.clamp(0, max(0, self.problem.steps - 1))]
        is_inside = (step >= 0) & (step < self.lengths[sequence])
        return torch.where(is_inside[:, None, None], found, 0.0).unsqueeze(1)

    def resets(self, reset: Tensor) -> Tensor:
        """``[T, N, B, 1]``: a flag cuts a sequence between a step and the one before it in time."""
        flags = self._unpacked(reset[..., None, None, None], 0)
        # Backwards the later of the two steps is computed first, so that the flag is the other's.
        following = torch.cat([flags[:, 1:], torch.zeros_like(flags[:, :1])], 1)
        has_following = torch.cat([self.has_step[:, 1:], torch.zeros_like(self.has_step[:, :1])], 1)
        following = following & has_following[..., None, None, None]
        flags = torch.where(self.backwards[:, None], following, flags)
        flags = self._turn(flags & self.has_step[..., None, None, None], 0)
        return flags[:, :, 0].permute(1, 2, 0, 3)

    def starts(self, starts: Tensor) -> Tensor:
        """``[T or 1, S, N, B, D]`` out of a start for each row, or one for each sequence."""
        if starts.shape[2] != 1:
            starts = self.steps(starts.unsqueeze(3), 1).squeeze(3)
        return starts.permute(2, 0, 3, 1, 4)

    def _unpacked(self, x: Tensor, dim: int) -> Tensor:
        if self.first is None:
            return x.narrow(dim + 1, 0, self.problem.steps)
        row = self.first[:, None] + torch.arange(self.problem.steps, device=self.device)
        row = row.clamp_max(self.problem.T - 1)
        return x.select(dim, 0).index_select(dim, row.flatten()).unflatten(dim, row.shape)

    def _turn(self, x: Tensor, dim: int) -> Tensor:
        """Turn time of the heads that run backwards; twice is what was."""
        if not self.turns:
            return x
        index = self.turned.view(*(1,) * dim, *self.turned.shape, 1, 1, 1)
        turned = x.gather(dim + 1, index.expand(x.shape))
        return torch.where(self.backwards[:, None], turned, x)


def _run(
    problem: Problem, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor, steps: _Steps
) -> tuple[Tensor, Tensor]:
    """``[S, B, T, N, D]`` and ``[S, B, 1, N, D]`` of ``Wx`` in ``[B, T]`` steps."""
    cell, dtype, carry_dtype = problem.cell, problem.dtype, states.dtype
    S, B, T, N, D = len(cell.states), problem.B, problem.T, problem.N, problem.D
    order = _order(cell)
    inputs = _input_preactivations(problem, Wx.to(carry_dtype), b.to(carry_dtype), order)
    recurrent_matrix = _recurrent_matrix(R, carry_dtype)
    # [S, B, 1, N, D] to a contiguous [N, B, D] for each state, the layout of the cell's results.
    carried = tuple(state.transpose(0, 1).contiguous() for state in states.squeeze(2).unbind(0))

    trajectory: list[tuple[Tensor, ...]] = []
    for t, inputs_t in enumerate(_unbound(inputs.permute(1, 3, 0, 2, 4), 0)):
        if steps.resets is not None and steps.to is not None:
            starts = steps.to[t if steps.to.shape[0] > 1 else 0].unbind(0)
            reset = steps.resets[t]
            carried = tuple(torch.where(reset, x, y) for x, y in zip(starts, carried, strict=True))
        running = None if steps.running is None else steps.running[t]
        carried = _next(problem, order, carried, inputs_t, recurrent_matrix, running)
        trajectory.append(carried)

    last_states = torch.stack(carried).transpose(1, 2).unsqueeze(2).contiguous()
    if T == 0:
        # Empty, but computed from all inputs, so that backward gives zeros for each.
        inputs_of_all = [Wx, R, b] if steps.to is None else [Wx, R, b, steps.to]
        nothing = torch.stack([x.sum().to(dtype) for x in inputs_of_all]).sum()
        return Wx.new_empty(S, B, 0, N, D) + nothing, last_states
    stacked = torch.stack([after[s] for s in range(S) for after in trajectory])
    every_state = stacked.view(S, T, N, B, D).permute(0, 3, 1, 2, 4)
    return every_state.to(dtype).contiguous(), last_states


def stepper(problem: Problem, R: Tensor, b: Tensor) -> Runs:
    """Steps one at a time; see :mod:`flashrnn.backends`."""
    order, carry_dtype = _order(problem.cell), problem.carry_dtype
    recurrent_matrix, b = _recurrent_matrix(R, carry_dtype), b.to(carry_dtype)

    def run_of(B: int) -> Run:
        of_batch = problem._replace(B=B)

        @torch.no_grad()
        def run(wx: Tensor, states: Tensor, out: Tensor | None) -> Tensor:
            Wx = wx.unsqueeze(1).to(carry_dtype)
            with without_autocast(wx.device.type):
                inputs = _input_preactivations(of_batch, Wx, b, order).permute(1, 3, 0, 2, 4)
                carried = tuple(state.transpose(0, 1).contiguous() for state in states.unbind(0))
                carried = _next(of_batch, order, carried, inputs[0], recurrent_matrix)
                return torch.stack([x.transpose(0, 1) for x in carried], out=out)

        return run

    return run_of


def _order(cell: TracedCell) -> tuple[int, ...]:
    """All gates, first those that R feeds: a product then adds to one slice."""
    recurrent = cell.fed_by("R")
    return (*recurrent, *(k for k in range(len(cell.gates)) if k not in recurrent))


def _recurrent_matrix(R: Tensor, carry_dtype: torch.dtype) -> Tensor:
    """``[N, D, Gr · D]``: what h is multiplied by, of all gates that R feeds."""
    Gr, N, D, _ = R.shape
    return R.to(carry_dtype).permute(1, 3, 0, 2).reshape(N, D, Gr * D)


def _next(
    problem: Problem,
    order: tuple[int, ...],
    carried: tuple[Tensor, ...],
    inputs: Tensor,
    recurrent_matrix: Tensor,
    running: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The states after a step, ``[N, B, D]`` each, of those before.

    ``inputs`` are Wx and b of the step, ``[N, B, G, D]``, the gates in ``order``. ``running``,
    ``[1, B, 1]``, says which sequences have the step, where not all do; states of others stay.
    """
    cell, dtype, carry_dtype = problem.cell, problem.dtype, carried[0].dtype
    step = problem.step
    assert step is not None, "flashrnn() hands it on"
    B, N, D = problem.B, problem.N, problem.D
    G, Gr = len(cell.gates), len(cell.fed_by("R"))
    declared = sorted(range(G), key=order.__getitem__)
    before = carried
    if running is not None:
        # A step that a sequence lacks is computed too, and has no gradient: by choice, since 0
        # times an infinite derivative is NaN.
        carried = tuple(torch.where(running, x, x.detach()) for x in carried)
    # h is rounded to dtype before it multiplies R: the same numbers as the returned h.
    h = carried[0].to(dtype).to(carry_dtype)
    if running is not None:
        # Nor a part of R's gradient, in which h is what 0 is multiplied by.
        h = torch.where(running, h, 0.0)
    if problem.gradient_recurrent_cut:
        h = h.detach()
    elif problem.gradient_recurrent_clipval is not None:
        h = _ClipGradient.apply(h, as_dtype_has_it(problem.gradient_recurrent_clipval, carry_dtype))
    product = torch.baddbmm(inputs[:, :, :Gr].reshape(N, B, Gr * D), h, recurrent_matrix)
    gates = (*product.view(N, B, Gr, D).unbind(2), *_unbound(inputs[:, :, Gr:], 2))
    if running is not None:
        gates = tuple(torch.where(running, x, x.detach()) for x in gates)
    after = tuple(step(carried, tuple(gates[k] for k in declared)))
    if problem.forward_clipval is not None:
        bound = as_dtype_has_it(problem.forward_clipval, carry_dtype)
        after = (after[0].clamp(-bound, bound), *after[1:])
    if running is not None:
        after = tuple(torch.where(running, x, y) for x, y in zip(after, before, strict=True))
    return after


def _input_preactivations(
    problem: Problem, Wx: Tensor, b: Tensor, order: tuple[int, ...]
) -> Tensor:
    """Wx and b of all gates, ``[B, T, G, N, D]``, in ``order``."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    bias = dict(zip(cell.fed_by("b"), _unbound(b, 0), strict=True))
    b = torch.stack([bias.get(k, b.new_zeros(N, D)) for k in order])
    if cell.fed_by("Wx") != order:
        given = dict(zip(cell.fed_by("Wx"), Wx.unbind(2), strict=True))
        nothing = Wx.new_zeros(()).expand(B, T, N, D)
        Wx = torch.stack([given.get(k, nothing) for k in order], dim=2)
    return Wx + b


def _unbound(tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
    """``tensor.unbind(dim)``, also of size 0, for which saved programs cannot have it."""
    return tensor.unbind(dim) if tensor.shape[dim] else ()


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clipped element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, clipval: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.clipval = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(-ctx.clipval, ctx.clipval), None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "gradient_recurrent_clipval clips gradients that flow backward, and a derivative "
            "forward (torch.func.jvp, jacfwd, torch.autograd.forward_ad) has none: leave it out, "
            "or take torch.func.vjp or jacrev"
        )
