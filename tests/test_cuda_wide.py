"""Backend ``cuda_fused`` forward for large heads and many sequences, without a GPU.

The emulated GPU is a small one, whose only team has all tiles of a batch that is not so large.
"""

import itertools

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.cells import resolve
from flashrnn.kernels import wide as kernel
from flashrnn.tiling import GPU, WidePlan, plan_wide
from flashrnn.tiling import wide as tiling
from tests.emulation import H200, fused_emulation, needs_compiler, plan_taken  # noqa: F401
from tests.fused import (  # noqa: F401
    all_strided,
    hold_to_vanilla,
    keeps_a_nan_to_its_sequence_and_head,
    poisoned,
)
from tests.machine_code import instructions, spills_in_the_loop_of_products
from tests.patterns import BAD_AT_ZERO, follows_vanilla, ignores_what_is_not_there
from tests.problems import BUILT_IN, call, random_inputs, sparse, wide
from tests.test_cuda_fused import A100, GPUS, RTX_4090, problem
from tests.test_jit import needs_nvrtc

# ---- plans


def plan_of(kind, B, N, D, gpu=H200, dtype=torch.bfloat16):
    return plan_wide(problem(kind, B, N, D, dtype), gpu)


def test_plans_fit_the_gpu_and_cover_the_problem():
    found = 0
    for kind, D, B, N in itertools.product(
        [*BUILT_IN, sparse, wide], [130, 256, 510, 768, 1024, 2048, 3168], [48, 256, 777], [1, 3]
    ):
        plan = plan_of(kind, B, N, D)
        if plan is None:
            continue
        found += 1
        given = (kind, B, N, D)
        assert (plan.size - 1) * plan.UNITS < D <= plan.size * plan.UNITS, given
        assert plan.teams(B, N, H200) * plan.size <= H200.multiprocessors, given
        assert plan.shared_memory <= H200.shared_memory, given
        assert 3 <= plan.tiles <= 4, given
    assert found > 40


def test_only_where_it_is_possible_and_pays():
    assert isinstance(plan_of("lstm", 256, 1, 768), WidePlan)
    assert plan_of("lstm", 64, 1, 768) is None
    assert plan_of("lstm", 256, 1, 767) is None
    assert plan_of("lstm", 256, 1, 2048) is None
    assert plan_of("lstm", 256, 1, 768, dtype=torch.float32) is None
    assert plan_of("lstm", 256, 1, 768, A100) is plan_of("lstm", 256, 1, 768, RTX_4090) is None
    assert plan_of("lstm", 256, 1, 768, GPUS["sm_100"]) is None


def test_the_batch_does_not_decide_whether_there_is_a_plan(monkeypatch):
    """Where a batch that is small has none, one that is large has none either."""
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: H200)
    for D in (768, 1024, 3168, 4096):
        there = [
            isinstance(plan_taken(problem("elman", B, 1, D, torch.bfloat16), False), str)
            for B in (1, 300)
        ]
        assert len(set(there)) == 1, D


# ---- the machine code


@needs_nvrtc
@pytest.mark.parametrize("kind", BUILT_IN)
@pytest.mark.parametrize("D", [512, 768, 1024])
def test_compiles_without_spills(kind, D):
    plan = plan_of(kind, 256, 1, D)
    parts = kernel.forward_source(resolve(kind), "bfloat16", D, plan, True)
    assert not spills_in_the_loop_of_products(parts, "sm_90a")
    coherent = instructions(parts, "sm_90a", "STRONG.GPU")
    assert coherent and all(".128." in name for name in coherent), coherent


# ---- the kernel

FEW = GPU(7, 232448, shifts_registers=True, multiplies_by_groups=True)


@pytest.fixture
def on_the_cpu(fused_emulation, poisoned, monkeypatch):  # noqa: F811
    """Backend ``cuda_fused`` is emulated, and what it allocates is NaN.

    These plans before others, whatever they are reckoned to take.
    """
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: FEW)
    monkeypatch.setattr(tiling, "cycles", lambda *_: 0.0)


def check(kind, *sizes, **options):
    assert isinstance(plan_taken(problem(kind, *(sizes[i] for i in (0, 2, 3, 4))), False), WidePlan)
    hold_to_vanilla("cuda_fused", kind, *sizes, **options)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_equals_vanilla(on_the_cpu, kind, dtype):
    check(kind, 33, 3, 1, 132, dtype)


@needs_compiler
@pytest.mark.parametrize(
    "sizes",
    [
        # A single step; all sequences there, all units.
        (64, 1, 1, 144),
        # Another head after the first, whose last tiles lack most sequences; few units of a block.
        (65, 3, 2, 130),
        # One head for several times, its last sequences fewer.
        (130, 2, 1, 146),
    ],
    ids=str,
)
def test_sizes(on_the_cpu, sizes):
    check("slstm", *sizes, torch.bfloat16)


@needs_compiler
def test_any_strides(on_the_cpu):
    check("gru", 35, 3, 2, 130, torch.float16, change=all_strided)


@needs_compiler
def test_clipped(on_the_cpu):
    check("gru", 35, 3, 2, 130, torch.float16, forward_clipval=0.3)


@needs_compiler
def test_no_gradient_asked_for_and_same_bits(on_the_cpu):
    inputs = random_inputs("lstm", 40, 3, 1, 130, torch.bfloat16)
    outputs = call("lstm", inputs, backend="cuda_fused")
    with torch.no_grad():
        again = call("lstm", inputs, backend="cuda_fused")
    assert all(torch.equal(x, y) for x, y in zip(outputs, again, strict=True))


@needs_compiler
def test_a_nan_stays_in_its_sequence_and_head(on_the_cpu):
    assert keeps_a_nan_to_its_sequence_and_head(33, 130)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_finite_infinite_and_nan_where_vanilla_has_them(on_the_cpu, dtype):
    follows_vanilla("cuda_fused", 33, 3, 1, 130, dtype=dtype, clipval=1.0)


@needs_compiler
@pytest.mark.parametrize("kind", BAD_AT_ZERO, ids=str)
def test_units_that_are_not_there_reach_no_sum(on_the_cpu, kind):
    ignores_what_is_not_there("cuda_fused", kind, 33, 3, 1, 130, dtype=torch.bfloat16)
