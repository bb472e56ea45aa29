"""What is asked of every plan, without a kernel that runs."""

import itertools

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.backends.fused import plans
from flashrnn.cells import resolve
from flashrnn.kernels import cluster, grid, registry, single_cta, streamed
from flashrnn.kernels.cluster import (
    ClusterBackwardPlan,
    ClusterMmaPlan,
    ClusterWgmmaBackwardPlan,
    ClusterWgmmaPlan,
)
from flashrnn.kernels.gpu import clusters_of
from flashrnn.kernels.grid import GridPlan, GridWgmmaPlan
from flashrnn.kernels.per_step.plan import plan_step
from flashrnn.kernels.plan import Plan
from flashrnn.kernels.single_cta import GradientPlan, SingleCtaPlan
from flashrnn.kernels.sizes import tiles_of
from flashrnn.kernels.streamed import StreamedPlan
from tests.emulation import plan_taken
from tests.gpus import A100, B200, H200, RTX_4090, SMALL, planned
from tests.problems import BUILT_IN, sparse, wide, widest

CELLS = [*BUILT_IN, sparse, wide]
PRECISIONS = ("bfloat16", "float16", "float32", "tf32")
DTYPES = [torch.bfloat16, torch.float32]
directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
gpus = pytest.mark.parametrize("gpu", [A100, RTX_4090, H200], ids=["A100", "RTX 4090", "H200"])


def check(plan, gpu, B, N, D, given):
    """Hold a plan to the GPU and to the problem, as far as all regimes have it in common."""
    assert plan.D == D and plan.shared_memory <= gpu.shared_memory, given
    assert plan.threads % 32 == 0 and 32 <= plan.threads <= 1024, given
    ctas, size = plan.grid(B, N, gpu), plan.cluster_size
    if size:
        assert gpu.clusters[size] and ctas % size == 0, given
        clusters = plan.clusters if isinstance(plan, GridWgmmaPlan) else 1
        assert ctas == plan.groups(B, N, gpu) * clusters * size, given
    if plan.cooperative:
        assert 1 <= ctas <= gpu.multiprocessors or B == 0, given
    scratch = plan.scratch(B, N, gpu)
    assert scratch.packets >= 0 and scratch.R_in_memory >= 0, given
    if isinstance(plan, SingleCtaPlan):
        assert plan.sequences * ctas >= B * N and plan.stages >= 3, given
        return
    if isinstance(plan, GridWgmmaPlan):
        assert (plan.clusters - 1) * plan.units < D <= plan.clusters * plan.units, given
        assert plan.n_tiles % plan.size == 0 and 1 <= plan.in_registers <= plan.steps, given
        # What setmaxnreg can give is what the CTA got at its launch, as many for each thread.
        of_all = 128 * (plan.warpgroups * plan.registers + plan.PRODUCER_REGISTERS)
        assert plan.warpgroups == 1 or of_all <= 65536 // plan.threads // 8 * 8 * plan.threads
        return
    if isinstance(plan, StreamedPlan):
        assert (plan.unit_tiles - 1) * plan.units < D <= plan.unit_tiles * plan.units, given
        assert plan.work_tiles(B, N) >= plan.groups(B, N, gpu) >= 1 and plan.stages >= 3, given
        # What the plan's warps have at their launch.
        assert 2 * plan.registers + plan.PRODUCER_REGISTERS <= 3 * 168, given
        return
    units = plan.units
    # Of whole rows of CTAs the last one may lack all units.
    needed = plan.columns if isinstance(plan, ClusterWgmmaBackwardPlan) else 1
    assert (plan.size - needed) * units < D <= plan.size * units, given
    if isinstance(plan, GridPlan):
        assert 8 * plan.n_tiles * plan.interleaved * plan.work_tiles(B, N) >= B * N, given
        assert plan.groups(B, N, gpu) <= plan.work_tiles(B, N), given
    else:
        # Clusters wait for no other, so there is one for each tile.
        assert 8 * plan.n_tiles * plan.groups(B, N, gpu) >= B * N, given
    if isinstance(plan, (GridPlan, ClusterBackwardPlan)):
        in_memory = (plan.in_shared, plan.in_memory)
        assert plan.in_registers >= 1 and min(in_memory) >= 0, given
    if isinstance(plan, ClusterWgmmaBackwardPlan):
        assert plan.size == plan.rows * plan.columns and plan.rows >= 2, given
        assert plan.columns * plan.units == plan.threads // 2, given
        assert plan.in_registers >= 1 and 1 <= plan.ahead <= 4 // plan.columns * plan.n_tiles, given
    if isinstance(plan, ClusterMmaPlan):
        assert plan.units % plan.warps == 0 and plan.size in (2, 4, 8, 16), given
    if isinstance(plan, ClusterWgmmaPlan):
        assert 2 <= plan.size <= 16 and plan.threads <= 512, given
        computing = 128 * plan.warpgroups * plan.registers
        registers = computing + plan.PRODUCERS * plan.PRODUCER_REGISTERS
        # As the launch has them; threads share out among them no more than those.
        of_a_thread = min(255, 64 * 1024 // plan.threads // 8 * 8)
        assert registers <= of_a_thread * plan.threads or plan.warpgroups == 1, given
        assert plan.registers % 8 == 0 and plan.in_registers >= 1, given


def fragments(kind, dtype, plan):
    """A warp's fragments of R, out of what a CTA sends and what it computes."""
    recurrent = len(resolve(kind).fed_by("R"))
    if isinstance(plan, ClusterBackwardPlan):
        row_tiles = tiles_of(tiles_of(plan.size * tiles_of(plan.units, 2), 8), plan.warps)
        return row_tiles * 2 * tiles_of(plan.units * recurrent * dtype.itemsize, 64)
    sent, produced = (recurrent, 1) if plan.backward else (1, recurrent)
    packets = plan.size * sent * tiles_of(plan.units, 12 // dtype.itemsize)
    return tiles_of(packets, 8 * plan.warps) * 3 * tiles_of(plan.units * produced, 16)


@directions
@gpus
def test_plans_of_small_heads(gpu, backward):
    for kind, D in itertools.product(CELLS, [1, 16, 40, 41, 96, 127, 128]):
        for B, N, dtype in itertools.product([1, 7, 16, 64, 300], [1, 12], DTYPES):
            plan = single_cta.plan_scan(planned(kind, B, N, D, dtype), gpu, backward)
            given = (kind, B, N, D, dtype)
            if isinstance(plan, str):
                # A large head's matrix is more than a multiprocessor holds: of a built-in cell on
                # an H200 never, elsewhere in float32.
                assert D > 64 and "shared memory" in plan, given
                assert kind is wide or (gpu != H200 and dtype == torch.float32), given
                continue
            check(plan, gpu, B, N, D, given)


@pytest.mark.slow
@directions
@gpus
def test_plans_of_large_heads(gpu, backward):
    heads = [129, 200, 256, 320, 511, 768, 1024, 1536, 2048]
    for kind, D, dtype, B, N in itertools.product(
        CELLS, heads, DTYPES, [1, 7, 16, 64, 300], [1, 3]
    ):
        hold_to_grid(kind, B, N, D, dtype, gpu, backward)


@directions
@gpus
def test_some_plans_of_large_heads(gpu, backward):
    heads = [129, 320, 768, 2048]
    for kind, D, dtype, B in itertools.product(["gru", wide], heads, DTYPES, [1, 300]):
        hold_to_grid(kind, B, 3, D, dtype, gpu, backward)


def hold_to_grid(kind, B, N, D, dtype, gpu, backward):
    given = (kind, D, dtype, B, N)
    problem = planned(kind, B, N, D, dtype)
    plan = grid.plan_scan(problem, gpu, backward)
    if isinstance(plan, str):
        assert plan.startswith(f"a head of {D} units;"), plan
        assert D > 768, given
    else:
        check(plan, gpu, B, N, D, given)
        have = plan.in_registers + plan.in_shared + plan.in_memory
        assert have == fragments(kind, dtype, plan), given
    plan = cluster.plan_backward(problem, gpu, backward)
    if isinstance(plan, ClusterBackwardPlan):
        assert backward and gpu.clusters
        check(plan, gpu, B, N, D, given)
        have = plan.in_registers + plan.in_shared + plan.in_memory
        assert have == fragments(kind, dtype, plan), given


# How many of the problems have a plan at least.
FORWARD = {
    cluster.plan_mma_forward: ([136, 160, 200, 256, 384, 520], [0, 1, 16, 300], 100),
    cluster.plan_wgmma_forward: ([136, 200, 256, 512, 768, 1000], [0, 64, 256, 777], 150),
    grid.plan_wgmma_forward: ([136, 256, 512, 768, 1024, 2048, 3168], [1, 48, 256, 777], 150),
    streamed.plan_forward: ([136, 256, 512, 1024, 2048, 4096], [1, 256, 777, 4096], 150),
}


@pytest.mark.parametrize(
    "plan_forward", FORWARD, ids=["mma", "cluster wgmma", "grid wgmma", "streamed"]
)
def test_plans_of_forward_scans_in_16_bits(plan_forward):
    found = 0
    heads, batches, least = FORWARD[plan_forward]
    for kind, D, B, N in itertools.product(CELLS, heads, batches, [1, 3]):
        plan = plan_forward(planned(kind, B, N, D, torch.bfloat16), H200, False)
        if isinstance(plan, Plan):
            found += 1
            check(plan, H200, B, N, D, (kind, B, N, D))
            assert plan.estimated_cycles > 0
    assert found > least


def test_wgmma_plans_of_backward_scans():
    found = 0
    for kind, D, B, N in itertools.product(
        CELLS, [129, 200, 256, 511, 640, 768, 1000], [0, 1, 64, 256, 777], [1, 3]
    ):
        problem = planned(kind, B, N, D, torch.bfloat16)
        plan = cluster.plan_wgmma_backward(problem, H200, True)
        if isinstance(plan, Plan):
            found += 1
            check(plan, H200, B, N, D, (kind, B, N, D))
            assert plan.estimated_cycles > 0
    assert found > 250


def test_other_scans_have_no_wgmma_plans_backward():
    def none(problem, gpu=H200, backward=True):
        plan = cluster.plan_wgmma_backward(problem, gpu, backward)
        return isinstance(plan, str) and len(plan) > 10

    problem = planned("lstm", 256, 1, 768, torch.bfloat16)
    assert not none(problem)
    assert none(problem, backward=False)
    assert all(none(problem, gpu) for gpu in (A100, RTX_4090, B200))
    others = ({"dtype": torch.float32}, {"gradient_recurrent_cut": True})
    others += ({"resets": True}, {"ragged": True}, {"reverse": True})
    assert all(none(problem._replace(**other)) for other in others)
    small_clusters = H200._replace(clusters=clusters_of(132, 4))
    assert none(problem, small_clusters)
    # R of such a head takes more than the registers and shared memory of 16 CTAs.
    assert none(planned("lstm", 256, 1, 1024, torch.bfloat16))
    assert none(planned("gru", 256, 1, 1024, torch.bfloat16))


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        *[((B, 1, 768), B >= 128) for B in (1, 16, 64, 128, 256, 1024)],
        *[((B, 1, 512), B >= 256) for B in (16, 64, 128, 256, 1024, 4096)],
        *[((16, 3, 256), False), ((64, 3, 256), False), ((256, 1, 1024), False)],
    ],
    ids=str,
)
def test_backward_scans_multiply_by_wgmma_where_they_have_many_sequences(
    monkeypatch, sizes, chosen
):
    """By estimates. An H200 was measured to be faster so at 1×768 from 128 sequences on."""
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    plan = plan_taken(planned("lstm", *sizes, torch.bfloat16), True)
    assert isinstance(plan, ClusterWgmmaBackwardPlan) == chosen


def none(plan_forward, kind, B, N, D, gpu=H200, dtype=torch.bfloat16, backward=False):
    """Whether there is no plan, and a reason."""
    plan = plan_forward(planned(kind, B, N, D, dtype), gpu, backward)
    return isinstance(plan, str) and len(plan) > 10


@pytest.mark.parametrize(
    ("plan_forward", "sizes", "type_of_plan"),
    [
        (cluster.plan_mma_forward, (16, 3, 256), ClusterMmaPlan),
        (cluster.plan_wgmma_forward, (256, 1, 768), ClusterWgmmaPlan),
        (grid.plan_wgmma_forward, (256, 1, 768), GridWgmmaPlan),
        (streamed.plan_forward, (256, 1, 768), StreamedPlan),
    ],
    ids=["mma", "cluster wgmma", "grid wgmma", "streamed"],
)
def test_forward_scans_in_16_bits_have_no_other_plans(plan_forward, sizes, type_of_plan):
    plan = plan_forward(planned("lstm", *sizes, torch.bfloat16), H200, False)
    assert isinstance(plan, type_of_plan)
    assert none(plan_forward, "lstm", *sizes, dtype=torch.float32)
    assert none(plan_forward, "lstm", *sizes, backward=True)
    others = (A100, RTX_4090) if type_of_plan is ClusterMmaPlan else (A100, RTX_4090, B200)
    assert all(none(plan_forward, "lstm", *sizes, gpu=other) for other in others)


def test_plans_only_where_it_is_possible_and_pays():
    assert none(cluster.plan_mma_forward, "lstm", 16, 1, 772)
    assert none(cluster.plan_mma_forward, wide, 16, 3, 256)
    assert none(cluster.plan_wgmma_forward, "lstm", 256, 1, 772)
    assert none(cluster.plan_wgmma_forward, "lstm", 256, 1, 1024)
    assert none(cluster.plan_wgmma_forward, wide, 256, 3, 256)
    small_clusters = H200._replace(clusters=clusters_of(132, 4))
    assert none(cluster.plan_wgmma_forward, "lstm", 256, 1, 768, gpu=small_clusters)
    assert none(grid.plan_wgmma_forward, "lstm", 256, 1, 772)
    assert none(grid.plan_wgmma_forward, "lstm", 256, 1, 2560)
    assert none(grid.plan_wgmma_forward, wide, 256, 1, 768)
    no_clusters = H200._replace(clusters=())
    assert none(grid.plan_wgmma_forward, "lstm", 256, 1, 768, gpu=no_clusters)
    assert none(streamed.plan_forward, "lstm", 256, 1, 772)
    assert none(streamed.plan_forward, "slstm", 256, 1, 768)
    assert none(streamed.plan_forward, widest, 256, 1, 768)
    assert none(streamed.plan_forward, "lstm", 256, 1, 768, gpu=no_clusters)
    assert none(cluster.plan_backward, "lstm", 16, 3, 256)
    assert none(cluster.plan_backward, "lstm", 16, 3, 256, gpu=A100, backward=True)


def test_no_larger_clusters_than_run():
    few = SMALL._replace(multiprocessors=7, clusters=clusters_of(7, 8))
    plan = cluster.plan_mma_forward(planned("lstm", 16, 3, 256, torch.bfloat16), few, False)
    assert isinstance(plan, str) or plan.size < 8
    plan = cluster.plan_mma_forward(planned("lstm", 16, 3, 136, torch.bfloat16), few, False)
    assert isinstance(plan, ClusterMmaPlan)


@pytest.mark.slow
@directions
@gpus
def test_sequences_and_heads_do_not_decide_whether_there_is_a_plan(gpu, backward):
    """A graph of torch.compile holds for all batch sizes."""
    # Those next to the largest are the ones that may depend on it.
    hold_for_all_batches(CELLS, [200, 1024, *range(1260, 2400, 60), 4096], DTYPES, gpu, backward)


@directions
@gpus
def test_sequences_and_heads_do_not_decide_of_some(gpu, backward):
    hold_for_all_batches(["lstm"], range(1260, 2400, 120), [torch.bfloat16], gpu, backward)


def hold_for_all_batches(kinds, heads, dtypes, gpu, backward):
    many = [(0, 1), (1, 1), (9, 3), (64, 1), (300, 12)]
    for kind, D, dtype in itertools.product(kinds, heads, dtypes):
        exist = [
            isinstance(grid.plan_scan(planned(kind, B, N, D, dtype), gpu, backward), GridPlan)
            for B, N in many
        ]
        assert len(set(exist)) == 1, (kind, D, dtype, exist)


def test_the_batch_does_not_decide_for_any_regime(monkeypatch):
    """Where a batch that is small has no plan, one that is large has none either."""
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    for D in (768, 1024, 3168, 4096):
        refused = [
            isinstance(registry.best_plan(problem, H200, False), str)
            for problem in (planned("elman", B, 1, D, torch.bfloat16) for B in (1, 300))
        ]
        assert len(set(refused)) == 1, D


# Milliseconds of T = 1024 steps in bfloat16 on an H200 (2026-11-29), of some of the cases that
# docs/cost-model.md counts: plans, as tiles x sequences of a tile, the fastest first. Backward is
# with R's gradient.
TIMED = """
lstm 32 12x64 backward: 1x4 0.481, 1x2 0.530, 1x8 0.568
lstm 100 12x64 backward: 1x8 1.079, 3x4 1.099, 1x4 1.371, 1x2 1.514
lstm 128 12x64 forward: 1x8 0.482, 3x4 0.557
lstm 128 12x64 saving: 3x4 0.622, 1x8 0.726
lstm 128 12x64 backward: 3x4 1.213, 1x8 1.291, 1x4 1.477
lstm 200 12x64 forward: 3x8 0.773, 1x8 0.776, 1x4 0.874, 3x4 1.100
lstm 200 12x64 saving: 3x8 1.026, 1x4 1.071, 1x8 1.178, 3x4 1.227
lstm 200 12x64 backward: 3x8 1.832, 1x8 2.049, 1x4 2.221
lstm 1024 12x64 forward: 1x8 2.849, 3x8 3.153
gru 128 12x64 saving: 3x4 0.466, 1x8 0.549
gru 128 12x64 backward: 3x4 1.059, 1x8 1.151, 1x4 1.244
slstm 128 12x64 saving: 3x4 0.712, 1x8 0.866
slstm 128 12x64 backward: 3x4 1.582, 1x8 1.784, 1x4 1.914
lstm 32 24x32 forward: 1x2 0.222, 1x4 0.267
lstm 32 24x32 saving: 1x2 0.245, 1x4 0.310
lstm 32 24x32 backward: 1x2 0.398, 1x8 0.441, 1x4 0.449
lstm 64 24x32 forward: 1x4 0.270, 1x8 0.386
lstm 64 24x32 saving: 1x4 0.334, 1x8 0.413
lstm 64 24x32 backward: 1x4 0.657, 1x8 0.746, 6x4 0.900
lstm 100 24x32 saving: 6x4 0.543, 1x8 0.732, 1x4 0.743
lstm 100 24x32 backward: 6x4 1.056, 1x8 1.228
lstm 128 24x32 forward: 1x8 0.430, 1x4 0.514
lstm 200 24x32 forward: 6x8 0.718, 1x8 0.860, 6x4 0.906
gru 128 24x32 saving: 1x8 0.633, 1x4 0.775
gru 128 24x32 backward: 1x8 1.201, 1x4 1.326
gru 256 24x32 saving: 6x4 1.054, 1x4 1.303, 1x8 1.386
slstm 256 24x32 saving: 6x4 1.748, 1x4 1.969, 1x8 2.011
lstm 32 48x16 forward: 1x4 0.196, 1x8 0.270
lstm 32 48x16 saving: 1x4 0.231, 1x8 0.296
lstm 32 48x16 backward: 1x4 0.420, 1x8 0.498
lstm 64 48x16 saving: 1x8 0.440, 1x4 0.454, 12x4 0.593
lstm 100 48x16 forward: 1x8 0.438, 1x4 0.453, 1x2 0.547, 12x4 0.774
lstm 100 48x16 backward: 1x4 1.208, 1x2 1.357, 1x8 1.550
lstm 128 48x16 forward: 1x4 0.526, 1x8 0.609, 12x4 0.779
lstm 128 48x16 saving: 1x4 0.877, 12x4 1.102, 1x8 1.187
lstm 128 48x16 backward: 1x4 1.562, 1x8 1.852
lstm 512 48x16 saving: 12x4 3.525, 1x8 4.534
lstm 1024 48x16 saving: 12x4 7.009, 1x8 9.361
gru 128 48x16 backward: 1x4 1.416, 1x8 1.593
lstm 32 6x128 forward: 1x2 0.394, 1x4 0.501
lstm 32 6x128 saving: 1x2 0.430, 1x4 0.566
lstm 32 6x128 backward: 1x2 0.754, 1x4 0.877
lstm 64 6x128 backward: 1x4 1.033, 1x8 1.208
lstm 200 6x128 forward: 1x8 1.331, 1x4 1.497
lstm 200 6x128 saving: 1x8 1.468, 1x4 1.698
gru 256 6x128 saving: 1x8 1.123, 1x4 1.324
slstm 256 6x128 saving: 1x8 1.657, 1x4 1.866
"""


@pytest.mark.parametrize("timed", TIMED.strip().split("\n"))
def test_small_heads_take_a_plan_that_is_among_the_fastest(timed):
    """Within 3% of the fastest that was timed."""
    case, times = timed.split(": ")
    kind, B, sizes, direction = case.split()
    N, D = map(int, sizes.split("x"))
    milliseconds = {plan: float(ms) for plan, ms in (x.split() for x in times.split(", "))}
    problem = planned(kind, int(B), N, D, torch.bfloat16, needs_gradient=direction != "forward")
    plan = single_cta.plan_scan(problem, H200, direction == "backward")
    taken = f"{plan.tiles}x{plan.sequences // plan.tiles}"
    assert milliseconds[taken] <= 1.03 * min(milliseconds.values())


@directions
@pytest.mark.parametrize(("N", "D"), [(12, 64), (24, 32), (6, 128)])
def test_few_sequences_lie_in_the_smallest_tiles(N, D, backward):
    """Multiprocessors would idle otherwise."""
    for B in (1, 16):
        plan = single_cta.plan_scan(planned("lstm", B, N, D, torch.bfloat16), H200, backward)
        assert plan.sequences == 2


def test_several_tiles_take_registers_that_only_some_gpus_shift():
    """And none for options of sequences, cells of many gates, wider heads, or float32."""
    problem = planned("lstm", 256, 12, 64, torch.bfloat16)
    others = [
        planned("lstm", 256, 12, 96, torch.bfloat16),
        planned("lstm", 256, 12, 32, torch.float32),
        planned(wide, 256, 12, 64, torch.bfloat16),
        problem._replace(ragged=True),
    ]
    assert any(plan.tiles > 1 for plan in single_cta.possible_plans(problem, H200, False))
    assert all(plan.tiles == 1 for plan in single_cta.possible_plans(problem, A100, False))
    for other in others:
        assert all(plan.tiles == 1 for plan in single_cta.possible_plans(other, H200, False))


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        *[((B, 1, 768), False) for B in (1, 16, 64, 128, 256)],
        *[((B, 1, 512), B >= 64) for B in (16, 64, 128, 256)],
        *[((B, 3, 256), B >= 256) for B in (16, 64, 72, 136, 256)],
        *[((64, 12, 192), False), ((256, 2, 384), True), ((256, 1, 1024), False)],
    ],
    ids=str,
)
def test_clusters_multiply_by_wgmma_where_it_is_fastest(monkeypatch, sizes, chosen):
    """As measured on an H200; at B = 72 and 136 others are estimated to take half the rounds."""
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    plan = plan_taken(planned("lstm", *sizes, torch.bfloat16), False)
    assert isinstance(plan, ClusterWgmmaPlan) == chosen


# Microseconds of a step in bfloat16, T = 1024, forward, on an H200 (2026-11-29), by regimes.
TIMED_LARGE = """
gru 256 1x768 plain: GridWgmma 3.574, ClusterWgmma 3.945
gru 256 1x768 saving: GridWgmma 4.086, ClusterWgmma 4.640
lstm 64 1x768 plain: ClusterWgmma 2.277, GridWgmma 2.605
lstm 64 1x768 saving: Grid 2.199, GridWgmma 2.641
lstm 128 1x768 plain: ClusterWgmma 2.879, GridWgmma 2.914
lstm 128 1x768 saving: GridWgmma 2.969, ClusterWgmma 3.321
lstm 256 1x768 plain: GridWgmma 3.985, ClusterWgmma 4.350
lstm 256 1x768 saving: GridWgmma 4.378, ClusterWgmma 5.010
lstm 128 1x512 plain: ClusterWgmma 1.820, GridWgmma 2.448
lstm 256 1x512 plain: ClusterWgmma 2.473, GridWgmma 2.856
lstm 256 1x512 saving: ClusterWgmma 2.835, GridWgmma 3.045
lstm 16 1x1024 plain: Grid 1.489, GridWgmma 2.157
lstm 32 1x1024 plain: Grid 2.322, GridWgmma 2.401
lstm 64 1x1024 plain: GridWgmma 2.844, Grid 3.802
elman 64 1x1024 plain: ClusterWgmma 1.641, GridWgmma 2.085
lstm 32 1x1536 plain: GridWgmma 3.077, Grid 3.418
lstm 16 1x2048 plain: GridWgmma 3.173, Grid 3.422
lstm 128 3x256 plain: ClusterWgmma 1.785, ClusterMma 2.326
lstm 128 3x256 saving: ClusterWgmma 2.223, ClusterMma 2.361
lstm 64 1x512 plain: ClusterWgmma 1.357, Grid 1.787
lstm 64 1x512 saving: ClusterWgmma 1.451, Grid 1.885
gru 64 1x512 plain: ClusterWgmma 1.267, Grid 1.503
gru 64 1x512 saving: ClusterWgmma 1.330, Grid 1.560
slstm 64 1x512 plain: ClusterWgmma 1.453, Grid 1.898
slstm 64 1x512 saving: ClusterWgmma 1.560, Grid 1.983
"""


@pytest.mark.parametrize("timed", TIMED_LARGE.strip().split("\n"))
def test_large_heads_take_a_regime_that_is_among_the_fastest(timed):
    """Within 3% of the fastest that was timed, whether pre-activations are saved or not."""
    case, times = timed.split(": ")
    kind, B, sizes, direction = case.split()
    N, D = map(int, sizes.split("x"))
    microseconds = {regime: float(us) for regime, us in (x.split() for x in times.split(", "))}
    saves = direction == "saving"
    problem = planned(kind, int(B), N, D, torch.bfloat16, needs_gradient=saves)
    taken = type(registry.best_plan(problem, H200, False)).__name__.removesuffix("Plan")
    assert microseconds[taken] <= 1.03 * min(microseconds.values())


@pytest.mark.parametrize(
    ("kind", "sizes", "parts"),
    [
        *[("lstm", (B, 1, 512), parts) for B, parts in ((64, 1), (128, 1), (256, 2))],
        *[("gru", (256, 1, 512), 2), ("slstm", (256, 1, 512), 2), ("lstm", (256, 3, 256), 2)],
    ],
    ids=str,
)
def test_sequences_are_in_two_parts_where_that_is_faster(monkeypatch, kind, sizes, parts):
    """As measured on an H200: many sequences, and R in registers."""
    monkeypatch.setattr(plans, "gpu_of", lambda problem: H200)
    plan = plan_taken(planned(kind, *sizes, torch.bfloat16), False)
    assert isinstance(plan, ClusterWgmmaPlan) and plan.parts == parts


@pytest.mark.parametrize("gpu", [RTX_4090, H200], ids=["RTX 4090", "H200"])
@pytest.mark.parametrize("D", [1, 24, 64, 100, 128])
def test_gradient_plans_fit_the_gpu_and_cover_every_row_once(gpu, D):
    rows_and_heads = itertools.product((1, 31, 1000, 260_000, 10**10), (1, 12))
    for (rows, N), recurrent in itertools.product(rows_and_heads, (1, 3, 4, 7, 16, 70)):
        for itemsize in (2, 4):
            plan = single_cta.plan_gradient(recurrent, rows, N, D, itemsize, gpu)
            assert isinstance(plan, GradientPlan)
            assert plan.gates * plan.groups >= recurrent
            assert (plan.parts - 1) * plan.rows < rows <= plan.parts * plan.rows
            assert plan.rows <= 2**14
            assert plan.shared_memory <= gpu.shared_memory


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_plans_of_a_step_cover_every_problem(precision, backward):
    problems = itertools.product(
        CELLS, (1, 7, 8, 9, 24, 64, 300), (1, 5), (1, 16, 40, 41, 96, 320, 4096)
    )
    for kind, B, N, D in problems:
        plan = plan_step(resolve(kind), B, N, D, precision, backward)
        assert plan.grid(B, N, D) * plan.units * 8 * plan.n_tiles >= B * N * D
        partial = plan.threads // 32 * 8 * plan.n_tiles * (16 * plan.tiles + 4) * 4
        assert 32 <= plan.threads <= 1024 and plan.depth >= 1 and partial <= 48 * 1024


# ---- reasons


def test_a_plan_says_why_there_is_none():
    assert "128" in single_cta.plan_scan(planned("lstm", 1, 1, 129, torch.bfloat16), H200, False)


def test_the_backend_says_why_it_cannot(monkeypatch):
    if not torch.cuda.is_available():
        assert "NVIDIA GPU" in cuda_fused.unavailable(torch.device("cuda"))
    assert "cpu" in cuda_fused.unavailable(torch.device("cpu"))
    monkeypatch.setattr(plans, "gpu_of", lambda problem: RTX_4090)
    assert "float64" in cuda_fused.unsupported(planned("lstm", 1, 1, 16, torch.float64))
    assert "2048 units" in cuda_fused.unsupported(planned("lstm", 1, 1, 2048, torch.float32))
    assert "shared memory" in cuda_fused.unsupported(planned("lstm", 1, 1, 128, torch.float32))
    assert cuda_fused.unsupported(planned("lstm", 1, 1, 64, torch.bfloat16)) is None
    assert cuda_fused.unsupported(planned("lstm", 1, 1, 129, torch.bfloat16)) is None
    reason = cuda_fused.unsupported(planned("lstm", 1, 1, 4096, torch.bfloat16))
    assert reason.startswith("a head of 4096 units;")


@pytest.mark.parametrize(
    ("sizes", "backward", "wider"),
    [
        ((64, 12, 64), False, lambda plan: plan.sequences),
        ((64, 1, 768), True, lambda plan: -plan.interleaved),
    ],
    ids=["narrower tiles", "interleaved batch tiles"],
)
def test_lengths_that_differ_decide(sizes, backward, wider):
    """They end one after another: what is fastest while all run is not the fastest on average."""
    spread = {"ragged": True, "returned": 2}
    problem = planned("lstm", *sizes, torch.bfloat16, needs_gradient=True)
    plans = [
        registry.best_plan(problem._replace(**spread, even=even), H200, backward)
        for even in (False, True)
    ]
    assert wider(plans[0]) < wider(plans[1])
    assert wider(plans[1]) == wider(registry.best_plan(problem, H200, backward))
