"""Backend ``triton``: one fused kernel forward and one backward, for every cell."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn.backends import autograd
from flashrnn.backends.gradients import Gradients, before_steps, complete, gathered, number_of
from flashrnn.backends.requirements import (
    missing_gpu,
    refusal,
    too_many_numbered_rows,
    too_many_rows,
)
from flashrnn.cells.render import render_triton
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit.source import load_source
from flashrnn.kernels.triton.plan import ScanPlan, plan_scan
from flashrnn.problem import Problem, tf32_allowed
from flashrnn.sequences import Sequences, operands, zeros_like_starts

# Earlier ones multiply no tiles of fewer than 16 columns.
OLDEST = (3, 5)
# Of a thread of backward, for small tiles: all there are. By itself the assembler uses fewer, for
# more programs at once, and computes elements one after another instead of interleaved. With all
# registers forward and backward of an LSTM take 1.31 instead of 1.61 ms at 24x32, but 1.91 instead
# of 1.81 at 12x64 (H200).
_MOST_REGISTERS = 255
_REGISTERS_OF_A_MULTIPROCESSOR = 65536


def unavailable(device: torch.device) -> str | None:
    """Why Triton does not run on a device."""
    return _not_installed() or (_not_interpreted(device) if _interpreted() else missing_gpu(device))


def _not_interpreted(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    return f"the tensors are on {device}, and Triton's interpreter (TRITON_INTERPRET=1) is not"


@cache
def _not_installed() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if _version() < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"it needs Triton {oldest} or later: pip install 'triton>={oldest}'"
    return None


def unsupported(problem: Problem) -> str | None:
    """Why it cannot do this problem."""
    reason = refusal(problem) or too_many_numbered_rows(problem) or too_many_rows(problem)
    if reason:
        return reason
    plan = _plan(problem, tf32_allowed(problem))
    return plan if isinstance(plan, str) else None


def forward(
    problem: Problem,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`flashrnn.backends.protocols.FusedBackend`."""
    cell, (B, T, N, D) = problem.cell, (problem.B, problem.T, problem.N, problem.D)
    # Where R does not stay in registers, h is read where the step before has stored it.
    stored = 1 if problem.returned == 0 and not problem.needs_gradient else None
    every_state, last_states, gates = autograd.new_outputs(problem, Wx, stored)
    given = _options(problem, sequences)
    h_starts = {}
    if sequences is not None and problem.is_sequenced:
        before = before_steps(problem, sequences, states[0], Wx.dtype)
        h_starts = {"before_rows": before.rows, "h_starts": before.starts}
        if problem.has_idle_rows:
            every_state.zero_()
    if B == 0:
        return autograd.returned_of(problem, every_state), last_states, gates
    alignment, wx_strides = _aligned(Wx)
    with _current(problem.device):
        fixed = _fixed(problem)
        plan = fixed.plan
        fixed.forward[(N * -(-B // plan.BLOCK_B),)](
            Wx,
            R.contiguous(),
            b.contiguous(),
            states,
            every_state,
            last_states,
            every_state if gates is None else gates,  # Which is then not written.
            problem.forward_clipval or 0.0,
            T,
            B,
            *wx_strides,
            *autograd.state_strides(states),
            *_operands(given | h_starts, _FORWARD_OPERANDS),
            math.prod(problem.rows),
            *_strides(given.get("reset_states")),
            N,
            D,
            *plan.blocks,
            len(cell.states),
            *fixed.positions,
            alignment,
            _is_wide(Wx),
            problem.needs_gradient,
            plan.R_in_registers,
            plan.stages,
            fixed.operand,
            fixed.precision,
            fixed.functions.step,
            *_constants(problem),
            every_state.shape[0],
            num_warps=plan.warps,
        )
    return autograd.returned_of(problem, every_state), last_states, gates


def backward(
    problem: Problem,
    R: Tensor,
    states_initial: Tensor,
    states: Tensor,
    gates: Tensor,
    d_states: Tensor | None,
    d_last_states: Tensor | None,
    sequences: Sequences | None = None,
) -> Gradients:
    """See :class:`flashrnn.backends.protocols.FusedBackend`."""
    cell, (B, N, D) = problem.cell, (problem.B, problem.N, problem.D)
    d_gates = torch.empty_like(gates)
    d_initial = torch.empty_like(states_initial, memory_format=torch.contiguous_format)
    given, d_resets = _options(problem, sequences), zeros_like_starts(sequences)
    if d_resets is not None:
        given["d_reset_states"] = d_resets.expand(-1, B, problem.T, -1, -1)
    if problem.has_idle_rows:
        d_gates.zero_()
    if B == 0:
        found = complete(problem, d_gates, d_initial, states_initial, states)
        return found._replace(reset_states=d_resets)
    clipval = problem.gradient_recurrent_clipval
    alignment, d_states_strides = (1, (0,) * 5) if d_states is None else _aligned(d_states)
    d_last_strides = (0,) * 4 if d_last_states is None else autograd.state_strides(d_last_states)
    with _current(problem.device):
        fixed = _fixed(problem)
        plan = fixed.plan
        fixed.backward[(N * -(-B // plan.BLOCK_B),)](
            R.contiguous(),
            states_initial,
            states,
            gates,
            d_states,
            d_last_states,
            d_gates,
            d_initial,
            clipval or 0.0,
            problem.forward_clipval or 0.0,
            problem.T,
            B,
            *autograd.state_strides(states_initial),
            *d_states_strides,
            *d_last_strides,
            *_operands(given, _BACKWARD_OPERANDS),
            math.prod(problem.rows),
            *_strides(given.get("reset_states")),
            *_strides(given.get("d_reset_states"))[:3],
            N,
            D,
            *plan.blocks,
            len(cell.states),
            fixed.positions[1],
            alignment,
            problem.gradient_recurrent_cut,
            clipval is not None,
            number_of(d_states),
            plan.R_in_registers,
            plan.stages,
            fixed.operand,
            fixed.precision,
            fixed.functions.derivative,
            *_constants(problem),
            num_warps=plan.warps,
            maxnreg=_most_registers(plan),
        )
    every_h = None
    if sequences is not None and problem.is_sequenced:
        before = before_steps(problem, sequences, states_initial[0], states.dtype)
        every_h = gathered(problem, before, states[0])
    found = complete(problem, d_gates, d_initial, states_initial, states, every_h)
    return found._replace(reset_states=d_resets)


_FORWARD_OPERANDS = (
    *("sequence_order", "sequence_rows", "sequence_lengths", "runs_backwards", "reset_flags"),
    *("reset_states", "before_rows", "h_starts"),
)
_BACKWARD_OPERANDS = (*_FORWARD_OPERANDS[:6], "d_reset_states")


def _options(problem: Problem, sequences: Sequences | None) -> dict[str, Tensor]:
    return {} if sequences is None else operands(problem, sequences)


def _operands(given: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor | None, ...]:
    """Those that kernels of calls without options do not have are ``None``."""
    return tuple(map(given.get, names))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if x is None else x.stride()


def _constants(problem: Problem) -> tuple[bool, ...]:
    """Which options of sequences a call has."""
    return problem.resets, problem.ragged, problem.packed, problem.reverse is not False


@cache
def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (TRITON_INTERPRET=1)."""
    from flashrnn.kernels.triton import pointwise

    return pointwise.INTERPRETED


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, wherever its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Fixed(NamedTuple):
    """What a launch needs that does not depend on B, T and clip values.

    Attributes:
        forward: the kernel of the scan.
        backward: that of the scan backwards.
        plan: tiles.
        positions: each gate's index in the gate dimensions of Wx, R and b; -1 where it has none.
        operand: the dtype of the product's operands; see :mod:`flashrnn.kernels.triton.scan`.
        precision: how float32 products round, as PyTorch's own matrix products are set to.
        functions: the module with the cell's step and derivative.
    """

    forward: Any
    backward: Any
    plan: ScanPlan
    positions: tuple[tuple[int, ...], ...]
    operand: Any
    precision: str
    functions: ModuleType


# What CUDA graphs launch. A graph does not keep a kernel, and Triton unloads one that nobody holds.
# Entries stay for good: nothing tells when a graph is gone.
_recorded: dict[int, _Fixed] = {}


def _fixed(problem: Problem) -> _Fixed:
    fixed = _fixed_for(
        problem.cell,
        problem.N,
        problem.D,
        problem.dtype,
        problem.device,
        problem.forward_clipval is not None,
        problem.dtype == torch.float32 and tf32_allowed(problem),
    )
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _recorded[id(fixed)] = fixed
    return fixed


# Each entry has kernels of its own, which are unloaded with it.
@lru_cache(maxsize=128)
def _fixed_for(
    cell: TracedCell,
    N: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    clips: bool,
    tf32: bool,
) -> _Fixed:
    import triton.language as tl

    from flashrnn.kernels.triton.scan import new_kernels

    plan = _plan(Problem(cell, 1, 1, N, D, dtype, device), tf32)
    assert isinstance(plan, ScanPlan), "flashrnn() asks unsupported() first"
    operands = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    forward, backward = new_kernels()
    return _Fixed(
        forward=forward,
        backward=backward,
        plan=plan,
        positions=tuple(_positions(cell, source) for source in ("Wx", "R", "b")),
        operand=tl.float32 if _interpreted() else operands.get(dtype, tl.float32),
        precision="tf32" if tf32 else "ieee",
        functions=load_source(render_triton(clipped(cell) if clips else cell)),
    )


def _most_registers(plan: ScanPlan) -> int | None:
    """Registers that a thread of backward may have; ``None`` if the assembler decides."""
    small = (plan.BLOCK_G + 2 * plan.BLOCK_S) * plan.BLOCK_D < 512
    fits = 32 * plan.warps * _MOST_REGISTERS <= _REGISTERS_OF_A_MULTIPROCESSOR
    return _MOST_REGISTERS if small and fits else None


def _plan(problem: Problem, tf32: bool) -> ScanPlan | str:
    shared_memory = _shared_memory(problem.device) if problem.device.type == "cuda" else 1 << 20
    return plan_scan(problem, exact=not tf32, shared_memory=shared_memory)


@cache
def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _aligned(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """A divisor of all strides but the last, and the strides: those divided by it, and the last."""
    *strides, innermost = tensor.stride()
    alignment = math.gcd(16, *strides)
    return alignment, (*(stride // alignment for stride in strides), innermost)


def _is_wide(Wx: Tensor) -> bool:
    """Whether offsets within one step of a sequence may need more than 32 bits."""
    strides, (_, _, gates, _, D) = Wx.stride(), Wx.shape
    return max(*strides, gates * strides[2], D * strides[4]) >= 2**31


def _positions(cell: TracedCell, source: str) -> tuple[int, ...]:
    """Each gate's index in ``source``'s gate dimension; -1 where it has none."""
    fed = cell.fed_by(source)
    return tuple(fed.index(k) if k in fed else -1 for k in range(len(cell.gates)))


@cache
def _version() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))
