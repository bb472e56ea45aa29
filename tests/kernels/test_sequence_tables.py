"""The tables of calls with options of sequences, run as C++ on the CPU and compiled for GPUs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashrnn.backends import tables
from flashrnn.backends.gradients import copies_of_h
from flashrnn.kernels import sequence_tables
from tests.emulation import emulation, needs_compiler  # noqa: F401
from tests.fused import poisoned  # noqa: F401
from tests.gpus import GPUS
from tests.machine_code import needs_nvrtc, spills_in_a_loop
from tests.tables import hold_to_pytorch, random_options

CALLS = st.fixed_dictionaries(
    {
        # Up to several CTAs of sequences, of rows and of starts.
        "B": st.sampled_from([1, 2, 5, 9, 40, 300]),
        "T": st.sampled_from([1, 2, 7, 40, 1100]),
        "N": st.sampled_from([1, 3]),
        "D": st.sampled_from([1, 8, 40]),
        "ragged": st.sampled_from(["none", "lengths", "packed"]),
        "resets": st.sampled_from(["none", "zeros", "sequence", "step"]),
        "reverse": st.sampled_from(["none", "all", "some"]),
        "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        "integers": st.sampled_from([torch.int32, torch.int64]),
        "strided": st.booleans(),
        "seed": st.integers(0, 99),
    }
).filter(lambda call: call["B"] * call["T"] * call["N"] * call["D"] < 200_000)


@needs_compiler
@given(CALLS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_equal_what_pytorch_makes(emulation, poisoned, call):  # noqa: F811
    problem, sequences, initial = random_options(**call)
    if problem.is_sequenced:
        hold_to_pytorch(problem, sequences, initial)


@needs_compiler
@given(CALLS.map(lambda call: call | {"ragged": "none", "resets": "none", "reverse": "none"}))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_h_before_steps_of_a_call_without_options(emulation, poisoned, call):  # noqa: F811
    problem, _, initial = random_options(**call)
    sizes = len(problem.cell.states), problem.B, problem.T, problem.N, problem.D
    states = torch.randn(sizes).to(problem.dtype)
    found = tables.h_before(problem, None, initial, states)
    rounded = initial[0].to(problem.dtype)
    before = torch.cat([rounded, states[0]], 1)[:, :-1].flatten(0, 1)
    assert found.shape[1] == copies_of_h(problem.cell, problem.N)
    for k in range(found.shape[1]):
        assert torch.equal(found[:, k], before)


@needs_compiler
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
def test_so_many_sequences_that_pytorch_sorts_them(emulation, monkeypatch, ragged):  # noqa: F811
    monkeypatch.setattr(sequence_tables, "MOST_SEQUENCES", 4)
    for B in (4, 5):
        problem, sequences, initial = random_options(
            *(B, 9, 2, 8),
            ragged=ragged,
            resets="step",
            reverse="some",
            dtype=torch.bfloat16,
            integers=torch.int32,
            strided=False,
            seed=1,
        )
        with monkeypatch.context() as within:
            if B > 4:
                within.setattr(tables, "_prepared", None)
            else:
                within.setattr(tables, "before_steps", None)
            made = tables.made(problem, sequences, initial)
        assert made.before is not None
    # h before each step is copied by the kernel all the same.
    hold_to_pytorch(problem, sequences, initial)


@needs_nvrtc
@pytest.mark.parametrize(
    "arch", ["sm_90a", *(pytest.param(x, marks=pytest.mark.slow) for x in GPUS if x != "sm_90a")]
)
def test_compiles_without_spills(arch):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for entry in (sequence_tables.TABLES, sequence_tables.H_BEFORE):
            assert not spills_in_a_loop(sequence_tables.program(entry, dtype), arch)
