"""Heads that groups of CTAs own over the whole GPU; the rest is in ``test_regimes.py``."""

from dataclasses import replace

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.cells import resolve
from flashrnn.kernels import grid, source
from flashrnn.kernels.grid import GridPlan
from flashrnn.kernels.grid import plan as planning
from flashrnn.kernels.sizes import tiles_of
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import hold_to_vanilla, others_keep_their_bits
from tests.gpus import GPUS, H200, LARGER, SMALL, planned
from tests.kernels.regimes import GRID, take  # noqa: F401
from tests.machine_code import instructions, needs_nvrtc, spills_in_the_loop_of_products
from tests.problems import BUILT_IN, call, gradients, random_inputs

# ---- the machine code


def programs(kind, D, precision, gpu, N=1):
    cell, dtype = resolve(kind), getattr(torch, precision)
    problem = planned(kind, 16, N, D, dtype)
    plans = [grid.plan_scan(problem, gpu, backward) for backward in (False, True)]
    assert all(isinstance(plan, GridPlan) for plan in plans), plans
    backward = source.backward_options(False, False, len(cell.states), given_last=False)
    return [
        plans[0].source(cell, precision, source.forward_options(True), aligned=True),
        plans[1].source(cell, precision, backward, aligned=True),
    ]


def architectures(quick):
    """All, of which a quick run compiles for some."""
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in GPUS]


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "D", "precision", "arch"),
    [
        pytest.param(kind, D, precision, arch, marks=[] if (D, arch) in quick else pytest.mark.slow)
        for kind, D, precision, quick in (
            ("lstm", 320, "bfloat16", {(320, "sm_90a")}),
            ("lstm", 1024, "bfloat16", {(1024, "sm_80")}),
            ("slstm", 320, "bfloat16", set()),
            ("slstm", 1024, "bfloat16", set()),
            ("lstm", 320, "float32", set()),
        )
        for arch in GPUS
    ],
)
def test_compiles_for_every_architecture_without_spills(kind, D, precision, arch):
    for parts in programs(kind, D, precision, GPUS[arch]):
        assert not spills_in_the_loop_of_products(parts, arch), list(parts)[-1]


@needs_nvrtc
@pytest.mark.parametrize("arch", architectures({"sm_90a"}))
def test_a_packet_is_one_access(arch):
    """Of 16 bytes, coherent over the GPU: whoever sees the flag has the values."""
    for parts in programs("lstm", 1024, "bfloat16", GPUS[arch]):
        assert "grid/all_gather.cuh" in parts
        coherent = instructions(parts, arch, "STRONG.GPU")
        assert {"LDG", "STG"} <= {instruction[:3] for instruction in coherent}
        assert all(".128." in instruction for instruction in coherent), coherent


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "D"),
    [
        pytest.param(kind, D, marks=[] if (kind, D) == ("lstm", 768) else pytest.mark.slow)
        for kind in BUILT_IN
        for D in (512, 768, 1024)
    ],
)
def test_wgmma_compiles_without_spills(kind, D):
    plan = grid.plan_wgmma_forward(planned(kind, 256, 1, D, torch.bfloat16), H200, False)
    parts = plan.source(resolve(kind), "bfloat16", source.forward_options(True), aligned=True)
    assert not spills_in_the_loop_of_products(parts, "sm_90a")
    coherent = instructions(parts, "sm_90a", "STRONG.GPU")
    assert coherent and all(".128." in name for name in coherent), coherent


# ---- the kernels


@pytest.fixture
def prefer(take, monkeypatch):  # noqa: F811
    """``prefer(rank)`` chooses the plans whose rank, a number or some, is least."""
    estimated_cycles = planning.estimated_cycles
    take(GRID)

    def prefer(rank):
        def cycles(choice, plan, *sizes):
            found = rank(plan)
            number = 0
            for part in found if isinstance(found, tuple) else (found,):
                number = 1000 * number + int(part)
            # The estimate decides between plans of the same rank.
            return 10**9 * number + int(estimated_cycles(choice, plan, *sizes))

        monkeypatch.setattr(planning, "estimated_cycles", cycles)
        planning.best_plan.cache_clear()

    yield prefer
    planning.best_plan.cache_clear()


def check(*sizes, **options):
    hold_to_vanilla("cuda_fused", *sizes, **options)


def plans(*sizes):
    """Forward's and backward's."""
    found = [GRID.plans(planned(*sizes), GRID.gpu, backward) for backward in (False, True)]
    assert all(isinstance(plan, GridPlan) for plan in found), found
    return found


@needs_compiler
@pytest.mark.parametrize(
    ("rank", "chosen"),
    [
        (lambda plan: -plan.n_tiles, lambda plan: plan.n_tiles > 1),
        (lambda plan: -plan.interleaved, lambda plan: plan.interleaved > 1),
        (lambda plan: plan.size, lambda plan: plan.units > 40),
        (lambda plan: -plan.warps, lambda plan: plan.warps >= 8),
    ],
    ids=["n_tiles", "interleaved", "small groups", "many warps"],
)
def test_any_tiles(prefer, rank, chosen):
    prefer(rank)
    found = plans("lstm", 20, 1, 140, torch.bfloat16)
    assert all(map(chosen, found)), found
    check("lstm", 20, 2, 1, 140, torch.bfloat16)


def with_little_in_registers(plan):
    """Two fragments in registers, the others in shared and in global memory by halves."""
    rest = plan.in_registers + plan.in_shared + plan.in_memory - 2
    in_shared, in_memory = rest // 2, rest - rest // 2
    moved = 512 * plan.warps * (in_shared - plan.in_shared)
    return replace(
        plan,
        in_registers=2,
        in_shared=in_shared,
        in_memory=in_memory,
        shared_memory=plan.shared_memory + moved,
    )


@needs_compiler
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_fragments_wherever_there_is_room(take, dtype):  # noqa: F811
    def changed(problem, gpu, backward):
        return with_little_in_registers(grid.plan_scan(problem, gpu, backward))

    regime = take(replace(GRID, forward=changed, backward=changed))
    problem = planned("lstm", 9, 2, 140, dtype)
    for backward in (False, True):
        plan = regime.plans(problem, regime.gpu, backward)
        assert plan.in_shared and plan.in_memory
    check("lstm", 9, 2, 2, 140, dtype)


@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "units", "n_tiles", "D", "chains"),
    [(SMALL, 44, 2, 260, 1), pytest.param(LARGER, 16, 2, 300, 2, marks=pytest.mark.slow)],
    ids=["a slice a turn", "two slices a turn"],
)
def test_loops_over_slices(prefer, take, monkeypatch, gpu, units, n_tiles, D, chains):  # noqa: F811
    """As in the widest heads in float32: backward has a loop for each kind of memory."""
    monkeypatch.setattr(planning, "_MOST_UNROLLED", 0)
    prefer(lambda plan: (plan.units != units, plan.n_tiles != n_tiles))

    def changed(problem, gpu, backward):
        return replace(with_little_in_registers(grid.plan_scan(problem, gpu, backward)), ahead=1)

    regime = take(replace(GRID, forward=changed, backward=changed, gpu=gpu))
    plan = regime.plans(planned("lstm", 9, 1, D, torch.float32), gpu, True)
    row_tiles = tiles_of(plan.units, 16)
    assert (2 if row_tiles * plan.n_tiles == 2 else 1) == chains, plan
    # Of each kind more whole slices than one turn has.
    assert min(plan.in_shared, plan.in_memory) // (3 * row_tiles) > chains, plan
    check("lstm", 9, 2, 1, D, torch.float32)


@needs_compiler
@pytest.mark.parametrize(
    ("N", "interleaved", "T"),
    [
        (3, 2, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (1, 1, 1),
                (1, 1, 3),
                (1, 2, 1),
                (1, 2, 3),
                (3, 1, 1),
                (3, 1, 3),
                (3, 2, 1),
            ]
        ),
    ],
)
def test_a_group_has_more_than_it_computes_at_a_time(prefer, N, interleaved, T):
    """Of one head and of another, of which it has to load R; the last sequences are fewer."""
    prefer(lambda plan: (plan.interleaved != interleaved, plan.n_tiles, 100 - plan.size))
    B = 20 * interleaved
    for plan in plans("gru", B, N, 131, torch.float16):
        assert plan.interleaved == interleaved
        assert plan.work_tiles(B, N) > 2 * plan.groups(B, N, SMALL), plan
    check("gru", B, T, N, 131, torch.float16)


@needs_compiler
@pytest.mark.parametrize(
    ("B", "T"),
    [
        (33, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(33, 1), (64, 1), (64, 4)]),
    ],
)
def test_batch_tiles_are_interleaved(prefer, B, T):
    """All of a group's tiles exist, or some are missing."""
    prefer(lambda plan: (8 - plan.interleaved, plan.n_tiles))
    assert all(plan.interleaved == 8 for plan in plans("slstm", B, 1, 131, torch.bfloat16))
    check("slstm", B, T, 1, 131, torch.bfloat16)


@needs_compiler
def test_no_kernel_of_its_own_for_a_length(take):  # noqa: F811
    take(GRID)
    for T in (2, 5):
        inputs = random_inputs("elman", 1, T, 1, 129, torch.bfloat16)
        gradients(call("elman", inputs, backend="cuda_fused"), inputs)
    assert cuda_fused._scan_kernel.cache_info().currsize == 2


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_others_keep_their_bits_by_the_plans_of_an_h200(fused_emulation, dtype):  # noqa: F811
    assert others_keep_their_bits("cuda_fused", 4, 131, dtype)
