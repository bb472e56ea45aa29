"""Backend ``cuda_fused`` forward for heads that clusters own warp by warp, without a GPU.

The emulation lets what thread blocks send each other arrive late and out of order, and holds warps
up as chance has it, so a missing wait shows.
"""

import itertools

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.cells import resolve
from flashrnn.kernels import cluster as kernel
from flashrnn.tiling import GPU, ClusterPlan, plan_cluster
from flashrnn.tiling import cluster as tiling
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
from tests.machine_code import spills_in_a_loop, spills_in_the_loop_of_products
from tests.patterns import BAD_AT_ZERO, follows_vanilla, ignores_what_is_not_there
from tests.problems import BUILT_IN, sparse, wide
from tests.test_cuda_fused import A100, GPUS, RTX_4090, problem
from tests.test_jit import needs_nvrtc

# ---- plans


def plan_of(kind, B, N, D, gpu=H200, dtype=torch.bfloat16):
    return plan_cluster(problem(kind, B, N, D, dtype), gpu)


def test_plans_fit_the_gpu_and_cover_the_problem():
    found = 0
    for kind, D, B, N in itertools.product(
        [*BUILT_IN, sparse], [136, 160, 200, 256, 384, 520], [0, 1, 16, 300], [1, 3]
    ):
        plan = plan_of(kind, B, N, D)
        if plan is None:
            continue
        found += 1
        given = (kind, B, N, D)
        assert (plan.size - 1) * plan.units < D <= plan.size * plan.units, given
        assert plan.units % plan.warps == 0 and plan.threads() <= 1024, given
        assert plan.size in (2, 4, 8, 16), given
        assert 8 * plan.blocks * plan.clusters(B, N) >= B * N, given
        assert plan.shared_memory <= H200.shared_memory, given
    assert found > 100


def test_only_where_it_is_possible():
    assert isinstance(plan_of("lstm", 16, 3, 256), ClusterPlan)
    assert plan_of("lstm", 16, 1, 772) is None
    assert plan_of(wide, 16, 3, 256) is None
    assert plan_of("lstm", 16, 3, 256, dtype=torch.float32) is None
    assert plan_of("lstm", 16, 3, 256, A100) is plan_of("lstm", 16, 3, 256, RTX_4090) is None


def test_no_larger_clusters_than_run():
    few = GPU(
        7, 232448, shifts_registers=True, multiplies_by_groups=True, clusters=clusters_of(7, 8)
    )
    assert plan_of("lstm", 16, 3, 256, few) is None or plan_of("lstm", 16, 3, 256, few).size < 8
    assert isinstance(plan_of("lstm", 16, 3, 136, few), ClusterPlan)


# ---- the machine code


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100"])
@pytest.mark.parametrize(
    ("kind", "D"), [("lstm", 256), ("lstm", 512), ("slstm", 384), ("gru", 256), ("elman", 768)]
)
def test_compiles_without_spills(kind, D, arch):
    cell = resolve(kind)
    plans = list(tiling.possible_plans(tiling.Rows.of(cell), D, GPUS[arch]))
    assert plans
    for plan in plans:
        parts = kernel.forward_source(cell, "bfloat16", D, plan, True)
        assert not spills_in_the_loop_of_products(parts, arch), plan


@needs_nvrtc
@pytest.mark.parametrize("kind", ["lstm", "gru", "slstm"])
@pytest.mark.parametrize("D", [136, 192, 256])
def test_traffic_threads_keep_their_addresses(kind, D):
    """A warp of many units, and two blocks of sequences, are many pieces for a traffic thread."""
    for N, B in itertools.product([1, 6], [16, 256]):
        parts = kernel.forward_source(resolve(kind), "bfloat16", D, plan_of(kind, B, N, D), True)
        assert not spills_in_a_loop(parts, "sm_90a"), (B, N)


# ---- the kernel

FEW = GPU(6, 232448, shifts_registers=True, multiplies_by_groups=True, clusters=clusters_of(6, 4))


@pytest.fixture
def on_the_cpu(fused_emulation, poisoned, monkeypatch):  # noqa: F811
    """Backend ``cuda_fused`` is emulated, and what it allocates is NaN.

    These plans before others, whatever they are reckoned to take.
    """
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: FEW)
    monkeypatch.setattr(tiling, "cycles", lambda *_: 0.0)
    tiling.best_plan.cache_clear()
    yield
    tiling.best_plan.cache_clear()


@pytest.fixture(params=[(2, 1), (2, 2), (4, 1), (4, 2)], ids="{0[0]} blocks, {0[1]}x8".format)
def tiles(request, on_the_cpu, monkeypatch):
    """The size of a cluster, and the blocks of 8 sequences that it owns; others where it cannot."""
    size, blocks = request.param
    monkeypatch.setattr(
        tiling, "cycles", lambda plan, *_: (plan.size != size) + (plan.blocks != blocks) / 2
    )
    tiling.best_plan.cache_clear()
    return request.param


def check(kind, *sizes, **options):
    B, _, N, D, dtype = sizes
    assert isinstance(plan_taken(problem(kind, B, N, D, dtype), False), ClusterPlan)
    hold_to_vanilla("cuda_fused", kind, *sizes, **options)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_equals_vanilla(tiles, kind, dtype):
    check(kind, 9, 4, 2, 136, dtype)


@needs_compiler
@pytest.mark.parametrize(
    "sizes",
    [
        # A single step, and the smallest of these heads.
        (2, 1, 1, 136),
        # All units and sequences there.
        (16, 3, 1, 192),
        # The last block lacks some of its units, and sequences.
        (20, 2, 3, 152),
    ],
    ids=str,
)
def test_sizes(tiles, sizes):
    check("slstm", *sizes, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_sixteen_blocks(on_the_cpu, monkeypatch, kind):
    """Each lane that makes up a parcel sends it to two of them."""
    many = FEW._replace(multiprocessors=20, clusters=clusters_of(20))
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: many)
    monkeypatch.setattr(tiling, "cycles", lambda plan, *_: -plan.size - plan.blocks)
    assert plan_taken(problem(kind, 9, 1, 248, torch.bfloat16), False).size == 16
    check(kind, 9, 3, 1, 248, torch.bfloat16)


@needs_compiler
def test_any_strides(on_the_cpu):
    check("gru", 3, 4, 2, 136, torch.float16, change=all_strided)


@needs_compiler
def test_clipped(on_the_cpu):
    clips_h("cuda_fused", 5, 136)


@needs_compiler
def test_no_gradient_asked_for(on_the_cpu):
    assert same_without_gradients("cuda_fused", 136)


@needs_compiler
def test_continues_a_sequence_exactly(on_the_cpu):
    assert continues_exactly("cuda_fused", 136)


@needs_compiler
@pytest.mark.parametrize("kind", ["lstm", "elman"])
def test_same_bits_in_whatever_order_things_arrive(tiles, kind):
    assert gives_the_same_bits(kind, 9, 5, 1, 136)


@needs_compiler
def test_a_nan_stays_in_its_sequence_and_head(tiles):
    assert keeps_a_nan_to_its_sequence_and_head(4, 136)


@needs_compiler
def test_at_odd_addresses(on_the_cpu):
    check("gru", 3, 4, 2, 136, torch.float16, change=at_odd_addresses)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_finite_infinite_and_nan_where_vanilla_has_them(on_the_cpu, dtype):
    follows_vanilla("cuda_fused", 3, 3, 2, 136, dtype=dtype, clipval=1.0)


@needs_compiler
@pytest.mark.parametrize("kind", BAD_AT_ZERO, ids=str)
def test_units_that_are_not_there_reach_no_sum(on_the_cpu, kind):
    ignores_what_is_not_there("cuda_fused", kind, 3, 3, 2, 136, dtype=torch.bfloat16)
