"""Backend ``cuda_fused`` forward for many sequences of heads that clusters own, without a GPU.

The emulation lets what thread blocks send each other arrive late and out of order, and reads it
only then, and holds warps up as chance has it, so a missing wait shows.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.cells import resolve
from flashrnn.kernels import wide_cluster as kernel
from flashrnn.tiling import GPU, WideClusterPlan, plan_wide_cluster
from flashrnn.tiling import wide_cluster as tiling
from flashrnn.tiling.cluster import Rows
from tests.emulation import H200, clusters_of, fused_emulation, needs_compiler, plan_taken  # noqa: F401
from tests.fused import (  # noqa: F401
    all_strided,
    at_odd_addresses,
    clips_h,
    continues_exactly,
    gives_the_same_bits,
    hold_to_vanilla,
    keeps_a_nan_to_its_sequence_and_head,
    poisoned,
    same_without_gradients,
)
from tests.machine_code import spills_in_a_loop
from tests.patterns import BAD_AT_ZERO, follows_vanilla, ignores_what_is_not_there
from tests.problems import BUILT_IN, sparse, wide
from tests.test_cuda_fused import A100, GPUS, RTX_4090, problem
from tests.test_jit import needs_nvrtc

# ---- plans


def plan_of(kind, B, N, D, gpu=H200, dtype=torch.bfloat16):
    return plan_wide_cluster(problem(kind, B, N, D, dtype), gpu)


def test_plans_fit_the_gpu_and_cover_the_problem():
    found = 0
    for kind, D, B, N in itertools.product(
        [*BUILT_IN, sparse], [136, 200, 256, 512, 768, 1000], [0, 64, 256, 777], [1, 3]
    ):
        plan = plan_of(kind, B, N, D)
        if plan is None:
            continue
        found += 1
        given = (kind, B, N, D)
        assert (plan.size - 1) * plan.units < D <= plan.size * plan.units, given
        assert 2 <= plan.size <= 16 and plan.threads() <= 512, given
        assert 8 * plan.blocks * plan.clusters(B, N) >= B * N, given
        assert plan.shared_memory <= H200.shared_memory, given
        computing, traffic = 128 * plan.groups, plan.TRAFFIC
        registers = computing * plan.registers + traffic * plan.TRAFFIC_REGISTERS
        # As the launch has them; threads share out among them no more than those.
        of_a_thread = min(255, 64 * 1024 // plan.threads() // 8 * 8)
        assert registers <= of_a_thread * plan.threads() or plan.groups == 1, given
        assert plan.registers % 8 == 0 and plan.held >= 1, given
    assert found > 150


def test_only_where_it_is_possible():
    assert isinstance(plan_of("lstm", 256, 1, 768), WideClusterPlan)
    assert plan_of("lstm", 256, 1, 772) is plan_of("lstm", 256, 1, 1024) is None
    assert plan_of(wide, 256, 3, 256) is None
    assert plan_of("lstm", 256, 3, 256, dtype=torch.float32) is None
    for other in (A100, RTX_4090, GPUS["sm_100"], H200._replace(clusters=clusters_of(132, 4))):
        assert plan_of("lstm", 256, 1, 768, other) is None


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        *[((B, 1, 768), B >= 128) for B in (1, 16, 64, 128, 256)],
        *[((B, 1, 512), B >= 128) for B in (16, 128, 256)],
        *[((B, 3, 256), B >= 256) for B in (16, 64, 72, 128, 136, 256)],
        *[((64, 12, 192), False), ((256, 2, 384), True), ((256, 1, 1024), False)],
    ],
    ids=str,
)
def test_chosen_where_it_is_fastest(monkeypatch, sizes, chosen):
    """As measured on an H200; at B = 72 and 136 others are reckoned to take half the rounds."""
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: H200)
    plan = plan_taken(problem("lstm", *sizes, torch.bfloat16), False)
    assert isinstance(plan, WideClusterPlan) == chosen


# ---- the machine code


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "D"),
    [("lstm", 256), ("lstm", 512), ("lstm", 768), ("slstm", 768), ("gru", 768), ("elman", 768)],
)
def test_compiles_without_spills(kind, D):
    cell = resolve(kind)
    for B, N in itertools.product((64, 128, 256, 512), (1, 3)):
        plan = plan_of(kind, B, N, D)
        parts = kernel.forward_source(cell, "bfloat16", D, plan, True)
        assert not spills_in_a_loop(parts, "sm_90a"), plan


# ---- the kernel

SOME = GPU(20, 232448, shifts_registers=True, multiplies_by_groups=True, clusters=clusters_of(20))


@pytest.fixture
def on_the_cpu(fused_emulation, poisoned, monkeypatch):  # noqa: F811
    """Backend ``cuda_fused`` is emulated, and what it allocates is NaN.

    These plans before others, those with two groups of warps first.
    """
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: SOME)
    monkeypatch.setattr(tiling, "cycles", lambda plan, *_: abs(plan.groups - 2))
    tiling.best_plan.cache_clear()
    yield
    tiling.best_plan.cache_clear()


TILES = [(1, 4, 2), (2, 2, 2), (2, 3, 1), (3, 5, 1)]


@pytest.fixture(params=TILES, ids="{0[0]} groups, {0[1]}x8 sequences, {0[2]} buffers".format)
def tiles(request, on_the_cpu, monkeypatch):
    """Groups of warps, blocks of 8 sequences, buffers; with one, R lies in shared memory too."""
    groups, blocks, buffers = request.param
    possible = tiling.possible_plans

    def wanted(rows, D, gpu):
        for plan in possible(rows, D, gpu):
            if (plan.groups, plan.blocks) != (groups, blocks):
                continue
            if buffers == 1:
                steps = plan.size * plan.units // 16
                spared = plan.groups * (plan.held - steps // 3) * 2048
                memory = plan.shared_memory + spared
                plan = replace(plan, buffers=1, held=steps // 3, shared_memory=memory)
            yield plan

    monkeypatch.setattr(tiling, "possible_plans", wanted)
    return request.param


def check(kind, *sizes, **options):
    B, _, N, D, dtype = sizes
    plan = plan_taken(problem(kind, B, N, D, dtype), False)
    if not isinstance(plan, WideClusterPlan):
        assert not list(tiling.possible_plans(Rows.of(resolve(kind)), D, SOME))
        pytest.skip("one block would have all units")
    hold_to_vanilla("cuda_fused", kind, *sizes, **options)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_equals_vanilla(tiles, kind, dtype):
    check(kind, 17, 4, 2, 136, dtype)


@needs_compiler
@pytest.mark.parametrize(
    "sizes",
    [
        # A single step, and few sequences.
        (2, 1, 1, 136),
        # All units there, and the last cluster's sequences fewer.
        (41, 3, 1, 192),
        # The last block lacks some of its units.
        (20, 2, 3, 152),
    ],
    ids=str,
)
def test_sizes(tiles, sizes):
    check("slstm", *sizes, torch.bfloat16)


@needs_compiler
def test_any_strides(on_the_cpu):
    check("gru", 19, 4, 2, 136, torch.float16, change=all_strided)


@needs_compiler
def test_at_odd_addresses(on_the_cpu):
    check("gru", 19, 4, 2, 136, torch.float16, change=at_odd_addresses)


@needs_compiler
def test_clipped(on_the_cpu):
    clips_h("cuda_fused", 19, 136)


@needs_compiler
def test_no_gradient_asked_for(on_the_cpu):
    assert same_without_gradients("cuda_fused", 136)


@needs_compiler
def test_continues_a_sequence_exactly(on_the_cpu):
    assert continues_exactly("cuda_fused", 136)


@needs_compiler
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_same_bits_in_whatever_order_things_arrive(tiles, kind):
    assert gives_the_same_bits(kind, 18, 5, 1, 192)


@needs_compiler
def test_a_nan_stays_in_its_sequence_and_head(tiles):
    assert keeps_a_nan_to_its_sequence_and_head(9, 136)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_finite_infinite_and_nan_where_vanilla_has_them(on_the_cpu, dtype):
    follows_vanilla("cuda_fused", 17, 3, 1, 136, dtype=dtype, clipval=1.0)


@needs_compiler
@pytest.mark.parametrize("kind", BAD_AT_ZERO, ids=str)
def test_units_that_are_not_there_reach_no_sum(on_the_cpu, kind):
    ignores_what_is_not_there("cuda_fused", kind, 17, 3, 1, 136, dtype=torch.bfloat16)
