"""Heads that clusters of CTAs own. What all regimes share is in ``test_regimes.py``."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from flashrnn.cells import resolve
from flashrnn.kernels import cluster, source
from flashrnn.kernels.cluster import ClusterBackwardPlan, backward_plan, mma_plan, wgmma_plan
from flashrnn.kernels.plan import Counts
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import hold_to_vanilla
from tests.gpus import GPUS, H200, LARGER, planned
from tests.kernels.regimes import (
    CLUSTER_BACKWARD,
    CLUSTER_MMA,
    CLUSTER_WGMMA_BACKWARD,
    take,  # noqa: F401
)
from tests.kernels.test_grid import with_little_in_registers
from tests.machine_code import (
    instructions,
    loop_of_products,
    needs_nvrtc,
    spills_in_a_loop,
    spills_in_the_loop_of_products,
)

SAVES_GATES = source.forward_options(True)

# ---- the machine code


def quick(cases, *chosen):
    """Parameters, of which a quick run has the chosen ones."""
    return [pytest.param(*case, marks=[] if case in chosen else pytest.mark.slow) for case in cases]


MMA = [("lstm", 256), ("lstm", 512), ("slstm", 384), ("gru", 256), ("elman", 768)]


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "D", "arch"),
    quick([(*x, arch) for x in MMA for arch in ("sm_90a", "sm_100")], ("gru", 256, "sm_90a")),
)
def test_mma_compiles_without_spills(kind, D, arch):
    cell = resolve(kind)
    plans = list(mma_plan.possible_plans(Counts.of(cell), D, GPUS[arch]))
    assert plans
    for plan in plans:
        parts = plan.source(cell, "bfloat16", SAVES_GATES, piece_bytes=16)
        assert not spills_in_the_loop_of_products(parts, arch), plan


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "D"),
    quick(list(itertools.product(["lstm", "gru", "slstm"], [136, 192, 256])), ("lstm", 192)),
)
def test_producer_threads_keep_their_addresses(kind, D):
    """A warp of many units, and two n-tiles, are many pieces for a producer thread."""
    for N, B in itertools.product([1, 6], [16, 256]):
        plan = cluster.plan_mma_forward(planned(kind, B, N, D, torch.bfloat16), H200, False)
        parts = plan.source(resolve(kind), "bfloat16", SAVES_GATES, piece_bytes=16)
        assert not spills_in_a_loop(parts, "sm_90a"), (B, N)


WGMMA = [("lstm", 256), ("lstm", 512), ("lstm", 768)]
WGMMA += [("slstm", 768), ("gru", 768), ("elman", 768)]


@needs_nvrtc
@pytest.mark.parametrize(("kind", "D"), quick(WGMMA, ("lstm", 256)))
def test_wgmma_compiles_without_spills(kind, D):
    cell, plans = resolve(kind), set()
    for B, parts in ((64, 1), (256, 1), (256, 2), (512, 2)):
        possible = wgmma_plan.possible_plans(Counts.of(cell), D, H200)
        cycles = {
            plan: wgmma_plan.estimated_cycles(plan, Counts.of(cell), B, 1, H200)
            for plan in possible
            if plan.parts == parts
        }
        plans.add(min(cycles, key=cycles.__getitem__))
    for plan in plans:
        parts = plan.source(cell, "bfloat16", SAVES_GATES, piece_bytes=16)
        assert not spills_in_a_loop(parts, "sm_90a"), plan
        # One wait a turn: where the compiler serializes products, it waits for each of them.
        assert len(instructions(parts, "sm_90a", "WARPGROUP.DEPBAR")) == plan.parts, plan


BACKWARD = [("lstm", 256), ("slstm", 384), ("gru", 512)]


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "D", "arch"),
    quick([(*x, arch) for x in BACKWARD for arch in ("sm_90a", "sm_100")], ("lstm", 256, "sm_90a")),
)
def test_backward_compiles_without_spills(kind, D, arch):
    plan = cluster.plan_backward(planned(kind, 16, 1, D, torch.bfloat16), GPUS[arch], True)
    cell = resolve(kind)
    options = source.backward_options(False, False, len(cell.states), given_last=False)
    parts = plan.source(cell, "bfloat16", options, piece_bytes=16)
    assert "cluster/reduce_scatter.cuh" in parts
    assert not spills_in_the_loop_of_products(parts, arch)


WGMMA_BACKWARD = [("lstm", 512, 128), ("lstm", 512, 1024), ("lstm", 768, 64), ("lstm", 768, 256)]
WGMMA_BACKWARD += [("gru", 768, 128), ("gru", 768, 1024), ("slstm", 768, 256), ("elman", 1024, 256)]


@needs_nvrtc
@pytest.mark.parametrize(("kind", "D", "B"), quick(WGMMA_BACKWARD, ("lstm", 512, 128)))
def test_wgmma_backward_waits_once_for_its_products(kind, D, B):
    """The compiler makes each product wait for the one before where it cannot tell that no thread
    diverges. Of addresses that stay the same some may be read back at each step."""
    plan = cluster.plan_wgmma_backward(planned(kind, B, 1, D, torch.bfloat16), H200, True)
    cell = resolve(kind)
    options = source.backward_options(False, False, len(cell.states), given_last=False)
    loop = loop_of_products(plan.source(cell, "bfloat16", options, piece_bytes=16), "sm_90a")
    steps = plan.rows * plan.units * len(cell.fed_by("R")) // 16
    assert sum("HGMMA" in x for x in loop) == steps
    assert sum("WARPGROUP.DEPBAR" in x for x in loop) == 1
    local = sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in loop)
    assert local <= 0.02 * len(loop), (local, len(loop))


# ---- the kernels


@needs_compiler
@pytest.mark.parametrize("kind", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_sixteen_ctas(take, kind):  # noqa: F811
    """Each lane that makes up a packet sends it to two of them."""

    def largest(problem, gpu, backward):
        plans = mma_plan.possible_plans(Counts.of_problem(problem), problem.D, gpu)
        return max(plans, key=lambda plan: (plan.size, plan.n_tiles))

    regime = take(replace(CLUSTER_MMA[0], forward=largest, gpu=LARGER))
    assert regime.plans(planned(kind, 9, 1, 248, torch.bfloat16), LARGER, False).size == 16
    hold_to_vanilla("cuda_fused", kind, 9, 3, 1, 248, torch.bfloat16)


def backward_by(rank):
    """A function that plans the backward scan by the plan whose rank is least."""

    def plan(problem, gpu, backward):
        values = backward_plan.Values.of(problem, backward=True)
        choices = backward_plan._choices(values, 8 * -(-problem.B // 8), problem.D, gpu)
        plans = [backward_plan._plan(choice, gpu) for choice in choices]
        return min((plan for plan in plans if plan), key=rank)

    return plan


@needs_compiler
@pytest.mark.parametrize(
    ("rank", "chosen", "D"),
    [
        pytest.param(*case, D, id=f"{name}-{D}", marks=marks)
        for name, case in {
            "n_tiles": (lambda plan: -plan.n_tiles, lambda plan: plan.n_tiles > 1),
            "small clusters": (lambda plan: plan.size, lambda plan: plan.size == 2),
            "large clusters": (lambda plan: -plan.size, lambda plan: plan.size == 4),
            # Lanes own several units and sequences, or not all warps own some.
            "few warps": (lambda plan: (plan.warps, -plan.units), lambda plan: plan.warps == 4),
            "many warps": (lambda plan: (-plan.warps, plan.units), lambda plan: plan.warps == 16),
        }.items()
        for D, marks in ((134, ()), (140, pytest.mark.slow))
    ],
)
def test_any_tiles_of_the_backward_scan(take, rank, chosen, D):  # noqa: F811
    regime = take(replace(CLUSTER_BACKWARD, backward=backward_by(rank)))
    plan = regime.plans(planned("lstm", 20, 1, D, torch.bfloat16), regime.gpu, True)
    assert isinstance(plan, ClusterBackwardPlan) and chosen(plan), plan
    hold_to_vanilla("cuda_fused", "lstm", 20, 3, 1, D, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_fragments_wherever_there_is_room(take, dtype):  # noqa: F811
    def changed(problem, gpu, backward):
        return with_little_in_registers(cluster.plan_backward(problem, gpu, backward))

    regime = take(replace(CLUSTER_BACKWARD, backward=changed))
    plan = regime.plans(planned("lstm", 9, 2, 140, dtype), regime.gpu, True)
    assert plan.in_shared and plan.in_memory
    hold_to_vanilla("cuda_fused", "lstm", 9, 2, 2, 140, dtype)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("regime", CLUSTER_WGMMA_BACKWARD, ids=str)
def test_many_exchanges_of_the_wgmma_backward(take, regime):  # noqa: F811
    """Warps are held up at random: a wait that lacks, or that misses its phase, shows in time."""
    hold_to_vanilla(take(regime).backend, "lstm", 3, 70, 1, regime.D, torch.bfloat16)
