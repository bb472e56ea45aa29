"""Backend ``cuda_fused`` for heads of more than 128 units, without a GPU.

The emulation lets what thread blocks send each other arrive late and out of order, so a missing
wait shows. Its GPU is a small one: blocks that run at once take time.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from flashrnn.backends import cuda_fused
from flashrnn.cells import resolve
from flashrnn.kernels import program, team
from flashrnn.tiling import GPU, TeamPlan, plan_team
from flashrnn.tiling import team as tiling
from tests.emulation import H200, clusters_of, fused_emulation, needs_compiler, plan_taken  # noqa: F401
from tests.fused import (  # noqa: F401
    DTYPES,
    OPTIONS,
    all_strided,
    continues_exactly,
    gives_the_same_bits,
    hold_to_vanilla,
    keeps_a_nan_to_its_sequence_and_head,
    others_keep_their_bits,
    poisoned,
    same_without_gradients,
)
from tests.machine_code import instructions, spills_in_the_loop_of_products
from tests.patterns import BAD_AT_ZERO, follows_vanilla, ignores_what_is_not_there
from tests.problems import BUILT_IN, call, gradients, random_inputs, relative_error, sparse, wide
from tests.test_cuda_fused import A100, GPUS, RTX_4090, problem
from tests.test_jit import needs_nvrtc

# ---- plans


def plan_of(kind, B, N, D, dtype, gpu, backward):
    return plan_team(problem(kind, B, N, D, dtype), gpu, backward)


def tiles(size, tile):
    return -(-size // tile)


def fragments(kind, dtype, plan, backward):
    """A warp's fragments of R, out of what a block sends and what it computes."""
    recurrent = len(resolve(kind).fed_by("R"))
    if plan.scatter:
        row_tiles = tiles(tiles(plan.size * tiles(plan.units, 2), 8), plan.warps())
        return row_tiles * 2 * tiles(plan.units * recurrent * dtype.itemsize, 64)
    sent, produced = (recurrent, 1) if backward else (1, recurrent)
    parcel_words = 4 if plan.cluster else 3
    parcels = plan.size * sent * tiles(plan.units, 4 * parcel_words // dtype.itemsize)
    rows = plan.units * produced
    return tiles(parcels, 8 * plan.sum_parts) * parcel_words * tiles(rows, 16 * plan.row_parts)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("gpu", [A100, RTX_4090, H200], ids=["A100", "RTX 4090", "H200"])
def test_plans_fit_the_gpu_and_cover_the_problem(gpu, backward):
    heads = [129, 200, 256, 320, 511, 768, 1024, 1536, 2048]
    for kind, D, dtype, B, N in itertools.product(
        [*BUILT_IN, sparse, wide],
        heads,
        [torch.bfloat16, torch.float32],
        [1, 7, 16, 64, 300],
        [1, 3],
    ):
        given = (kind, D, dtype, B, N)
        plan = plan_of(kind, B, N, D, dtype, gpu, backward)
        if isinstance(plan, str):
            assert plan.startswith(f"a head of {D} units;"), plan
            assert D > 768, given
            continue
        assert (plan.size - 1) * plan.units < D <= plan.size * plan.units, given
        assert 8 * plan.blocks * plan.turns * plan.items(B, N) >= B * N, given
        teams = plan.teams(B, N, gpu)
        assert 1 <= teams <= plan.items(B, N), given
        if plan.cluster:
            assert gpu.clusters[plan.size] and plan.size in (2, 4, 8, 16), given
            # Clusters wait for no other, so there is one for each item.
            assert teams == plan.items(B, N), given
        else:
            assert teams * plan.size <= gpu.multiprocessors, given
        assert plan.shared_memory <= gpu.shared_memory, given
        assert 32 * plan.warps() <= 1024, given
        assert plan.held >= 1 and plan.spared >= 0 and plan.streamed >= 0, given
        have = plan.held + plan.spared + plan.streamed
        assert have == fragments(kind, dtype, plan, backward), given


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("gpu", [A100, RTX_4090, H200], ids=["A100", "RTX 4090", "H200"])
def test_sequences_and_heads_do_not_decide_whether_there_is_a_plan(gpu, backward):
    """A graph of torch.compile holds for all batch sizes."""
    many = [(0, 1), (1, 1), (9, 3), (64, 1), (300, 12)]
    # Those next to the largest are the ones that may depend on it.
    for kind, D, dtype in itertools.product(
        [*BUILT_IN, sparse, wide],
        [200, 1024, *range(1260, 2400, 60), 4096],
        [torch.bfloat16, torch.float32],
    ):
        there = [
            isinstance(plan_of(kind, B, N, D, dtype, gpu, backward), TeamPlan) for B, N in many
        ]
        assert len(set(there)) == 1, (kind, D, dtype, there)


# ---- the machine code


def programs(kind, D, precision, gpu, N=1):
    cell, dtype = resolve(kind), getattr(torch, precision)
    plans = [plan_of(kind, 16, N, D, dtype, gpu, backward) for backward in (False, True)]
    assert all(isinstance(plan, TeamPlan) for plan in plans), plans
    return [
        team.forward_source(cell, precision, D, plans[0], True),
        team.backward_source(cell, precision, D, plans[1], False, False),
    ]


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize(
    ("kind", "D", "precision"),
    [
        *(("lstm", D, "bfloat16") for D in (320, 1024)),
        *(("slstm", D, "bfloat16") for D in (320, 1024)),
        ("lstm", 320, "float32"),
    ],
    ids=str,
)
def test_compiles_for_every_architecture_without_spills(kind, D, precision, arch):
    for parts in programs(kind, D, precision, GPUS[arch]):
        assert not spills_in_the_loop_of_products(parts, arch), list(parts)[-1]


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100"])
def test_a_cluster_compiles_without_spills(arch):
    parts = programs("lstm", 256, "bfloat16", GPUS[arch], N=3)[0]
    assert "team_gather_cluster.cuh" in parts
    assert not spills_in_the_loop_of_products(parts, arch)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100"])
@pytest.mark.parametrize(("kind", "D"), [("lstm", 256), ("slstm", 384), ("gru", 512)])
def test_a_cluster_that_scatters_compiles_without_spills(kind, D, arch, prefer_scatter):
    parts = programs(kind, D, "bfloat16", GPUS[arch])[1]
    assert "team_scatter.cuh" in parts
    assert not spills_in_the_loop_of_products(parts, arch)


def in_order(ranks, cycles):
    """A number that is least where the first rank is, then the next, then the cycles."""
    number = 0
    for rank in ranks:
        number = 1000 * number + int(rank)
    return 10**9 * number + int(cycles)


@pytest.fixture
def prefer_scatter(monkeypatch):
    cycles = tiling.cycles
    monkeypatch.setattr(
        tiling,
        "cycles",
        lambda choice, plan, *sizes: in_order(
            [choice.values.backward and not plan.scatter], cycles(choice, plan, *sizes)
        ),
    )
    tiling.best_plan.cache_clear()
    yield
    tiling.best_plan.cache_clear()


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
def test_a_parcel_is_one_access(arch):
    """Of 16 bytes, coherent over the GPU: whoever sees the tag has the values."""
    for parts in programs("lstm", 1024, "bfloat16", GPUS[arch]):
        assert "team_gather_grid.cuh" in parts
        coherent = instructions(parts, arch, "STRONG.GPU")
        assert {"LDG", "STG"} <= {instruction[:3] for instruction in coherent}
        assert all(".128." in instruction for instruction in coherent), coherent


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 1) spilling(unsigned* x, float* y, int n) {
    float sums[24][4] = {};
    for (int t = 0; t < n; ++t) {
#pragma unroll
        for (int i = 0; i < 24; ++i) mma(sums[i], x[i], 1, 2, 3, x[t], x[n - t], bfloat16{});
    }
#pragma unroll
    for (int i = 0; i < 24; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) y[(4 * i + k) * 1024 + threadIdx.x] = sums[i][k];
    }
}
"""


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
def test_a_spill_would_be_noticed(arch):
    parts = {"ptx.cuh": program.read("ptx.cuh"), "spilling": SPILLING}
    assert spills_in_the_loop_of_products(parts, arch)


# ---- the kernels

FEW = GPU(6, 232448, shifts_registers=True, multiplies_by_groups=True, clusters=clusters_of(6, 4))


@pytest.fixture
def on_the_cpu(fused_emulation, poisoned):  # noqa: F811
    """Backend ``cuda_fused`` is emulated, and what it allocates is NaN."""


@pytest.fixture(params=["grid", "clusters", "scatter"])
def prefer(request, on_the_cpu, monkeypatch):
    """``prefer(rank)`` chooses the plans whose rank is least, for one way to exchange.

    Forward does not know the third way: there it is the second.
    """
    cycles, clusters = tiling.cycles, request.param != "grid"
    scatter = request.param == "scatter"

    def prefer(rank):
        def ranks(plan):
            found = rank(plan)
            return found if isinstance(found, tuple) else (found,)

        monkeypatch.setattr(
            tiling,
            "cycles",
            lambda choice, plan, *sizes: in_order(
                [
                    plan.cluster != clusters,
                    scatter and not plan.scatter and choice.values.backward,
                    plan.scatter and not scatter,
                    *ranks(plan),
                ],
                cycles(choice, plan, *sizes),
            ),
        )
        tiling.best_plan.cache_clear()
        cuda_fused._best_plan.cache_clear()

    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: FEW)
    monkeypatch.setattr(cuda_fused, "plan_cluster", lambda problem, gpu: None)
    prefer(lambda plan: 0)
    yield prefer
    tiling.best_plan.cache_clear()


def check(*sizes, **options):
    hold_to_vanilla("cuda_fused", *sizes, **options)


def plans(*sizes):
    """Forward's and backward's."""
    found = [plan_taken(problem(*sizes), backward) for backward in (False, True)]
    assert all(isinstance(plan, TeamPlan) for plan in found), found
    return found


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_equals_vanilla(prefer, kind, dtype):
    check(kind, 9, 3, 2, 131, dtype)


@needs_compiler
@pytest.mark.parametrize(
    "sizes",
    [
        (3, 2, 1, 200),
        # A single step, and the smallest of these heads.
        (2, 1, 1, 129),
        # More heads and sequences than teams at once.
        (20, 2, 3, 131),
    ],
    ids=str,
)
def test_sizes(prefer, sizes):
    check("slstm", *sizes, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("sizes", [(0, 3, 1, 131), (3, 0, 1, 131)], ids=str)
def test_empty(prefer, sizes):
    check("slstm", *sizes, torch.bfloat16)


GATHERING = pytest.mark.parametrize("prefer", ["grid", "clusters"], indirect=True)
SCATTERING = pytest.mark.parametrize("prefer", ["scatter"], indirect=True)


@needs_compiler
@GATHERING
@pytest.mark.parametrize(
    ("rank", "chosen"),
    [
        (lambda plan: -plan.blocks, lambda plan: plan.blocks > 1),
        (lambda plan: -plan.turns, lambda plan: plan.turns > 2),
        (lambda plan: plan.size, lambda plan: plan.units > 40),
        (lambda plan: -plan.sum_parts, lambda plan: plan.sum_parts >= 8),
        (lambda plan: -plan.row_parts, lambda plan: plan.row_parts > 1 or not plan.cluster),
    ],
    ids=["columns", "turns", "small teams", "sum parts", "row parts"],
)
def test_any_tiles(prefer, rank, chosen):
    prefer(rank)
    found = plans("lstm", 20, 1, 140, torch.bfloat16)
    assert all(map(chosen, found)), found
    check("lstm", 20, 2, 1, 140, torch.bfloat16)


@needs_compiler
@SCATTERING
@pytest.mark.parametrize(
    ("rank", "chosen"),
    [
        (lambda plan: -plan.blocks, lambda plan: plan.blocks > 1),
        (lambda plan: plan.size, lambda plan: plan.size == 2),
        (lambda plan: -plan.size, lambda plan: plan.size == 4),
        # Lanes own several units and sequences, or not all warps own some.
        (lambda plan: (plan.warps(), -plan.units), lambda plan: plan.warps() == 4),
        (lambda plan: (-plan.warps(), plan.units), lambda plan: plan.warps() == 16),
    ],
    ids=["columns", "small teams", "large teams", "few warps", "many warps"],
)
@pytest.mark.parametrize("D", [134, 140])
def test_any_tiles_of_parts_of_dh(prefer, rank, chosen, D):
    prefer(rank)
    plan = plans("lstm", 20, 1, D, torch.bfloat16)[1]
    assert plan.scatter and chosen(plan), plan
    check("lstm", 20, 3, 1, D, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fragments_wherever_there_is_room(prefer, monkeypatch, dtype):
    """Two of them in registers, the others in shared and in global memory by halves."""

    def changed(*arguments):
        plan = plan_team(*arguments)
        rest = plan.held + plan.spared + plan.streamed - 2
        spared, streamed = rest // 2, rest - rest // 2
        shared_memory = plan.shared_memory + 512 * plan.warps() * (spared - plan.spared)
        return replace(plan, held=2, spared=spared, streamed=streamed, shared_memory=shared_memory)

    monkeypatch.setattr(cuda_fused, "plan_team", changed)
    assert all(plan.spared and plan.streamed for plan in plans("lstm", 9, 2, 140, dtype))
    check("lstm", 9, 2, 2, 140, dtype)


@needs_compiler
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("prefer", ["grid"], indirect=True)
def test_a_team_has_more_than_it_computes_at_a_time(prefer, N, turns, T):
    """Of one head and of another, of which it has to load R; the last sequences are fewer."""
    prefer(lambda plan: (plan.turns != turns, plan.blocks, -plan.size))
    B = 20 * turns
    for plan in plans("gru", B, N, 131, torch.float16):
        assert plan.turns == turns
        assert plan.items(B, N) > 2 * plan.teams(B, N, FEW), plan
    check("gru", B, T, N, 131, torch.float16)


@needs_compiler
@GATHERING
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("B", [33, 64])
def test_tiles_take_turns(prefer, B, T):
    """All of a team's tiles there, and with some missing."""
    prefer(lambda plan: (-plan.turns, plan.blocks))
    assert all(plan.turns == 8 for plan in plans("slstm", B, 1, 131, torch.bfloat16))
    check("slstm", B, T, 1, 131, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(prefer, options):
    check("gru", 5, 4, 2, 131, torch.float32, **options)


@needs_compiler
def test_tf32(prefer, monkeypatch):
    monkeypatch.setattr(program, "precision_of", lambda dtype: "tf32")
    inputs = random_inputs("lstm", 3, 3, 1, 140, torch.float32)
    outputs = [call("lstm", inputs.to(torch.float64), backend="vanilla")]
    outputs += [call("lstm", inputs, backend="cuda_fused")]
    assert 1e-6 < relative_error(outputs[1][0], outputs[0][0]) < 1e-3


@needs_compiler
def test_no_kernel_of_its_own_for_a_length(prefer):
    for T in (2, 5):
        inputs = random_inputs("elman", 1, T, 1, 129, torch.bfloat16)
        gradients(call("elman", inputs, backend="cuda_fused"), inputs)
    assert cuda_fused._team_kernel.cache_info().currsize == 2


@needs_compiler
def test_any_strides(prefer):
    check("lstm", 3, 4, 2, 131, torch.bfloat16, change=all_strided)


@needs_compiler
def test_no_gradient_asked_for(prefer):
    assert same_without_gradients("cuda_fused", 131)


@needs_compiler
def test_continues_a_sequence_exactly(prefer):
    assert continues_exactly("cuda_fused", 131)


@needs_compiler
def test_same_bits_in_whatever_order_things_arrive(prefer):
    assert gives_the_same_bits("lstm", 9, 3, 1, 131)


@needs_compiler
def test_a_nan_stays_in_its_sequence_and_head(prefer):
    assert keeps_a_nan_to_its_sequence_and_head(4, 131)


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "clipval"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, 1.0)],
    ids=str,
)
def test_finite_infinite_and_nan_where_vanilla_has_them(prefer, dtype, clipval):
    follows_vanilla("cuda_fused", 3, 3, 2, 131, dtype=dtype, clipval=clipval)


@needs_compiler
@pytest.mark.parametrize("kind", BAD_AT_ZERO, ids=str)
def test_units_that_are_not_there_reach_no_sum(prefer, kind):
    ignores_what_is_not_there("cuda_fused", kind, 3, 3, 2, 131, dtype=torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_others_keep_their_bits(on_the_cpu, dtype):
    assert others_keep_their_bits("cuda_fused", 4, 131, dtype)


# ---- what it says of itself


def test_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: RTX_4090)
    assert cuda_fused.unsupported(problem("lstm", 1, 1, 129, torch.bfloat16)) is None
    reason = cuda_fused.unsupported(problem("lstm", 1, 1, 4096, torch.bfloat16))
    assert reason.startswith("a head of 4096 units;")
