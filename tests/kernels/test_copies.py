"""Several copies in one launch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashrnn.backends import copies
from flashrnn.backends.protocols import Results
from flashrnn.cells import resolve
from flashrnn.kernels import call
from flashrnn.kernels import copies as plan
from flashrnn.problem import Problem
from tests.emulation import fused_emulation, needs_compiler, one_by_one  # noqa: F401
from tests.gpus import GPUS
from tests.machine_code import local_memory, needs_nvrtc


@needs_compiler
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=plan.MOST),
    added=st.lists(st.booleans(), min_size=plan.MOST, max_size=plan.MOST),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_each_has_its_elements_and_no_others(fused_emulation, counts, added, dtype):  # noqa: F811
    sources = [torch.randn(count).to(dtype) for count in counts]
    others = [torch.randn(count).to(dtype) for count in counts]
    # Each behind an element that stays as it is, and before one.
    found = [torch.full((count + 2,), torch.nan, dtype=dtype) for count in counts]
    addresses = []
    for source, other, plus, to in zip(sources, others, added, found, strict=False):
        addresses += [source.data_ptr(), other.data_ptr() if plus else 0, to[1:].data_ptr()]
    copies.enqueue(tuple(counts), addresses, dtype, torch.device("cpu"))
    for source, other, plus, to in zip(sources, others, added, found, strict=False):
        assert torch.equal(to[1:-1], source + other if plus else source)
        assert to[0].isnan() and to[-1].isnan()


CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
# What rounding must get right: those that are no numbers, beyond 16 bits, least ones, and ties.
SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 7e4, 3.4e38, 1e-8, -0.0, 1 + 2**-9])


@needs_compiler
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["lstm", "gru"]),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 70)),
    by_time=st.booleans(),
    dtype=DTYPES,
    saves=st.booleans(),
)
def test_results_of_a_scan(fused_emulation, kind, sizes, by_time, dtype, saves):  # noqa: F811
    """h by time is that of each step, and a last state what PyTorch rounds it to; nothing else is
    written."""
    (B, T, N, D), S = sizes, len(resolve(kind).states)
    problem = Problem(resolve(kind).traced, *sizes, dtype, CPU, needs_gradient=saves)
    states = torch.randn(S if saves else 1, B, T, N, D).to(dtype)
    last_states = torch.randn(S, B, 1, N, D)
    special = SPECIAL[: last_states.numel()]
    last_states.view(-1)[: len(special)] = special
    states.view(-1)[:1] = torch.nan
    wanted = copies.results(problem, states, by_time)
    assert (wanted.h is not None) == (by_time and B > 1 and T > 1)
    assert (wanted.last is not None) == (dtype != torch.float32)
    room = [None if x is None else torch.full((x.numel() + 2,), 7.0).to(dtype) for x in wanted]
    found = Results(
        *(None if x is None else y[1:-1].view(x.shape) for x, y in zip(wanted, room, strict=True))
    )
    tensors = {"states": states, "last_states": last_states, **copies.operands(found)}
    addresses, layout = call.FORWARD.read(tensors)
    launches = copies.behind_scan(problem, layout)
    assert len(launches) == any(x is not None for x in found)
    one_by_one([(kernel, shape, pack(addresses)) for kernel, shape, pack in launches])
    h = states[0].view(B, T, N * D).transpose(0, 1)
    last = last_states.view(S, B, N * D).to(dtype)
    for result, right, around in zip(found, (h, last), room, strict=True):
        if result is not None:
            torch.testing.assert_close(result, right, rtol=0, atol=0, equal_nan=True)
            assert around[0] == around[-1] == 7


def test_more_results_are_left_to_pytorch():
    problem = Problem(resolve("lstm").traced, 64, 32, 1, 512, torch.float16, CPU)
    like = torch.empty(0, dtype=torch.float16)
    assert copies.results(problem, like, by_time=True).h.numel() == plan.MOST_RESULTS
    assert copies.results(problem._replace(T=33), like, by_time=True) == Results()


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
def test_compiles_without_local_memory(arch):
    """The list of copies is constants of the launch, from which each CTA takes one."""
    assert local_memory(plan.program("bfloat16"), arch) == (0, 0)
