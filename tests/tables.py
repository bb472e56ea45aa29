"""The tables of random calls with options, beside what PyTorch's operations make."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrnn.backends import tables
from flashrnn.backends.gradients import before_steps, gathered
from flashrnn.cells import lstm
from flashrnn.problem import Problem, carry_dtype
from flashrnn.sequences import Sequences, bounds, operands


def random_options(
    B: int,
    T: int,
    N: int,
    D: int,
    *,
    ragged: str,
    resets: str,
    reverse: str,
    dtype: torch.dtype,
    integers: torch.dtype,
    strided: bool,
    seed: int,
    device: str = "cpu",
) -> tuple[Problem, Sequences, Tensor]:
    """A problem, its options and its initial states.

    Args:
        B: the number of sequences.
        T: the number of steps; of a packed batch its rows.
        N: the number of heads.
        D: the head dimension.
        ragged: ``"none"``, ``"lengths"`` or ``"packed"``, with values of which some are out of
            range, as nobody sees who does not wait for the GPU.
        resets: ``"none"``; to ``"zeros"``; to a start of each ``"sequence"`` or each ``"step"``.
        reverse: ``"none"``, ``"all"`` or ``"some"`` heads.
        dtype: of h.
        integers: of lengths.
        strided: whether the options' tensors have rows or elements between those that are meant.
        seed: of all that is random.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = tuple(bool(x) for x in torch.randint(0, 2, (N,), generator=generator))
    packed, every = ragged == "packed", 2 if strided else 1
    rows = (1, T) if packed else (B, T)
    problem = Problem(
        *(lstm.traced, B, T, N, D, dtype, torch.device(device), True),
        resets=resets != "none",
        ragged=ragged != "none",
        packed=packed,
        reverse={"none": False, "all": True, "some": heads}[reverse],
        returned=2,
    )
    sequences = Sequences()
    if ragged != "none":
        size = every * (B + packed)
        values = torch.randint(-2, T + 3, (size,), generator=generator, dtype=integers)
        if packed and seed % 2:
            values = values.sort().values
        values = values.to(device)[::every]
        sequences = sequences._replace(**{"cu_seqlens" if packed else "lengths": values})
    if resets != "none":
        flags = torch.rand(rows[0], T, every, generator=generator) < 0.3
        sequences = sequences._replace(reset=flags.to(device)[..., 0])
    carry = carry_dtype(dtype)
    if resets in ("sequence", "step"):
        # A single row is one start for all sequences, which calls expand.
        lead = (B, 1) if resets == "sequence" or rows == (1, 1) else rows
        starts = torch.randn(2, *lead, N, D * every, generator=generator)
        sequences = sequences._replace(reset_states=starts.to(device, carry)[..., ::every])
    initial = torch.randn(2, B, 1, N, D * every, generator=generator)
    return problem, sequences, initial.to(device, carry)[..., ::every]


def hold_to_pytorch(problem: Problem, sequences: Sequences, initial: Tensor) -> None:
    """The tables are those that PyTorch's operations make, and h before each step too."""
    rows, width = problem.rows[0] * problem.T, problem.N * problem.D
    options = {"dtype": problem.dtype, "device": problem.device}
    h = torch.randn(*problem.rows, problem.N, problem.D, **options)
    filled = torch.ones(3, rows, width, **options)
    idle = tables.Idle(filled, width) if problem.packed else None
    made = tables.made(problem, sequences, initial, idle)
    expected = operands(problem, sequences)
    assert made.of_scan.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(made.of_scan[name], x, rtol=0, atol=0, msg=name)
    _, lengths = bounds(sequences, problem.T, torch.int32)
    assert (made.lengths is None) == (lengths is None)
    if lengths is not None:
        assert torch.equal(made.lengths, lengths)
    before = before_steps(problem, sequences, initial[0], problem.dtype)
    assert made.before is not None
    assert torch.equal(made.before.rows, before.rows)
    assert torch.equal(made.before.starts, before.starts)
    found = tables.h_before(problem, made.before, initial, h)
    assert torch.equal(found, gathered(problem, before, h))
    if problem.packed:
        first, each = bounds(sequences, problem.T)
        row = torch.arange(rows, device=problem.device)
        is_step = ((row[:, None] >= first) & (row[:, None] < first + each)).any(1)
        assert not filled[:, ~is_step].any()
