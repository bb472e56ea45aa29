"""Heads that groups of CTAs own over the whole GPU; the rest is in ``test_regimes.py``."""

from dataclasses import replace

import pytest
import torch

from flashrnn import FlashRNNConfig, Stepper, calls, flashrnn
from flashrnn.backends.fused import scans
from flashrnn.cells import resolve
from flashrnn.kernels import grid, source
from flashrnn.kernels.grid import GridPlan
from flashrnn.kernels.grid import plan as planning
from flashrnn.kernels.sizes import tiles_of
from tests.emulation import (  # noqa: F401
    emulation,
    fused_emulation,
    needs_compiler,
    one_by_one,
)
from tests.fused import OPTIONS, at_odd_address, hold_to_vanilla, others_keep_their_bits, strided
from tests.gpus import GPUS, H200, LARGER, SMALL, planned
from tests.kernels.regimes import GRID, GRID_WGMMA, take  # noqa: F401
from tests.machine_code import instructions, needs_nvrtc, spills_in_the_loop_of_products
from tests.problems import BUILT_IN, Inputs, call, gradients, random_inputs, sparse
from tests.sequences import (
    ALL,
    KINDS,
    alternating,
    gradients_of,
    hold_empty_sequences_out,
    hold_padding_out,
    hold_ragged_to_vanilla,
    hold_rows_of_no_sequence,
    hold_to_each_alone,
    random_ragged,
)


def slow_but(quick, values):
    """Parameters, of which a quick run takes one."""
    return [x if x == quick else pytest.param(x, marks=pytest.mark.slow) for x in values]


# ---- the machine code


def programs(kind, D, precision, gpu, N=1):
    cell, dtype = resolve(kind), getattr(torch, precision)
    problem = planned(kind, 16, N, D, dtype)
    plans = [grid.plan_scan(problem, gpu, backward) for backward in (False, True)]
    assert all(isinstance(plan, GridPlan) for plan in plans), plans
    backward = source.backward_options(False, False, len(cell.states), given_last=False)
    return [
        plans[0].source(cell, precision, source.forward_options(True), piece_bytes=16),
        plans[1].source(cell, precision, backward, piece_bytes=16),
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
@pytest.mark.slow
@pytest.mark.parametrize("arch", GPUS)
def test_compiles_at_many_sizes(arch):
    """An old compiler crashed over two of these, for sm_120: that ends the process."""
    for kind in BUILT_IN:
        for D in (512, 1024, 2048):
            problem = planned(kind, 16, 1, D, torch.bfloat16)
            plan = grid.plan_scan(problem, GPUS[arch], backward=False)
            if isinstance(plan, GridPlan):
                options = source.forward_options(True)
                parts = plan.source(problem.cell, "bfloat16", options, piece_bytes=16)
                assert instructions(parts, arch, "HMMA")


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
    parts = plan.source(resolve(kind), "bfloat16", source.forward_options(True), piece_bytes=16)
    assert not spills_in_the_loop_of_products(parts, "sm_90a")
    # One wait for each product: where it cannot have a product run asynchronously, the compiler has
    # each of its instructions wait for the one before.
    assert len(instructions(parts, "sm_90a", "WARPGROUP.DEPBAR")) == plan.batch_tiles


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
        calls.kept.clear()

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
@pytest.mark.parametrize(
    ("interleaved", "dtype"),
    [
        (1, torch.float32),
        (2, torch.bfloat16),
        pytest.param(1, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(2, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_single_step_has_the_bits_of_a_sequences_first(prefer, monkeypatch, interleaved, dtype):
    """By a kernel whose CTAs read the initial h themselves and do not wait for each other.

    One sequence's h has an infinity, of which float32's products make NaN and compute sums anew.
    """
    prefer(lambda plan: (plan.interleaved != interleaved, plan.units % 12 > 0))
    plan, _ = plans("lstm", 19, 2, 140, dtype)
    assert plan.interleaved == interleaved and plan.units % 12 == 0
    cooperative = []

    def launched(launches, zeros=None):
        cooperative.extend(shape.cooperative for _, shape, _ in launches)
        one_by_one(launches, zeros)

    monkeypatch.setattr(scans, "launch_in_turn", launched)
    inputs = random_inputs("lstm", 19, 2, 2, 140, dtype)
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    states[0, 3, 0, 1, 7] = torch.inf
    every, _ = flashrnn(Wx, R, b, states, backend="cuda_fused")
    first = every[:, :, 0].nan_to_num(7)
    for start in (states, strided(states).detach()):
        one, last = flashrnn(Wx[:, :1], R, b, start, backend="cuda_fused")
        by_stepper = Stepper(R, b, backend="cuda_fused")(Wx[:, 0], start.squeeze(2))
        assert torch.equal(one[:, :, 0].nan_to_num(7), first)
        for found in (last.squeeze(2), by_stepper):
            assert torch.equal(found.to(dtype).nan_to_num(7), first)
    assert cooperative == [True, False, False]


@needs_compiler
@pytest.mark.parametrize("units", slow_but(32, [24, 32]))
@pytest.mark.parametrize("D", [140, pytest.param(142, marks=pytest.mark.slow)])
def test_R_is_loaded_in_pieces(prefer, units, D):
    """8 bytes at a time, whether a lane's packets have 12 neighbouring units or not; or 4."""
    prefer(lambda plan: plan.units != units)
    plan, _ = plans("lstm", 9, 1, D, torch.bfloat16)
    assert plan.units == units
    check("lstm", 9, 2, 1, D, torch.bfloat16)


@needs_compiler
def test_no_kernel_of_its_own_for_a_length(take):  # noqa: F811
    take(GRID)
    for T in (2, 5):
        inputs = random_inputs("elman", 1, T, 1, 129, torch.bfloat16)
        gradients(call("elman", inputs, backend="cuda_fused"), inputs)
    assert scans.scan_kernel.cache_info().currsize == 2


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_others_keep_their_bits_by_the_plans_of_an_h200(fused_emulation, dtype):  # noqa: F811
    assert others_keep_their_bits("cuda_fused", 4, 131, dtype)


# ---- options of sequences

FIELDS = [
    {"resets": True},
    {"ragged": True},
    {"reverse": True},
    {"resets": True, "ragged": True, "packed": True, "reverse": True},
]


@needs_compiler
@pytest.mark.parametrize("kinds", slow_but(ALL[1], KINDS), ids=lambda x: "-".join(x.values()))
def test_options_of_sequences_equal_vanilla(take, kinds):  # noqa: F811
    case = random_ragged("lstm", 7, 5, 3, GRID.D, dtype=torch.bfloat16, **kinds)
    hold_ragged_to_vanilla(take(GRID).backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "kinds"), alternating(GRID.cells, GRID.dtypes), ids=str)
def test_options_of_sequences_with_every_cell_and_dtype(take, kind, dtype, kinds):  # noqa: F811
    case = random_ragged(kind, 9, 4, 2, 130, seed=3, dtype=dtype, **kinds)
    hold_ragged_to_vanilla(take(GRID).backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize("sizes", [*GRID.sizes, (1, 1, 1, 129), (2, 9, 2, 260)], ids=str)
def test_options_of_sequences_of_any_sizes(take, sizes, kinds):  # noqa: F811
    case = random_ragged("slstm", *sizes, seed=5, dtype=torch.bfloat16, **kinds)
    hold_ragged_to_vanilla(take(GRID).backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_options_of_sequences_and_of_the_config(take, options, dtype):  # noqa: F811
    case = random_ragged("gru", 5, 4, 2, GRID.D, dtype=dtype, **ALL[0])
    config = FlashRNNConfig(**options, initial_val=0.5)
    hold_ragged_to_vanilla(take(GRID).backend, case, config=config)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("change", [strided, at_odd_address])
@pytest.mark.parametrize("regime", [GRID, GRID_WGMMA[0]], ids=str)
def test_options_of_sequences_in_any_layout(take, regime, change):  # noqa: F811
    sizes = (regime.B, 3, 1, regime.D)
    case = random_ragged("lstm", *sizes, dtype=torch.bfloat16, **ALL[0])
    inputs = {name: change(x) for name, x in case.inputs.tensors().items()}
    case = replace(case, inputs=Inputs(**inputs), reset_states=change(case.reset_states))
    hold_ragged_to_vanilla(take(regime).backend, case)


def with_lengths(case, lengths):
    """The case with such lengths, the sequences in an order that is not sorted."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))
    shuffled = torch.tensor(lengths)[order]
    options = case.options | {"lengths": shuffled}
    return replace(case, options=options, lengths=shuffled.tolist())


# Steps of each batch tile of 8 sequences. A group has two at a time, the second and the last, the
# third and the one before the last; the first is alone. Beside each other are numbers of both
# parities, and steps and none.
STEPS_OF_TILES = {
    "one less": [5, 4, 4, 3, 3],
    "one step, then many": [4, 1, 1, 0, 0],
    "without steps": [3, 0, 0, 0, 0],
    "two less": [5, 3, 2, 0, 0],
    "equal": [2, 2, 2, 2, 1],
}


@needs_compiler
@pytest.mark.parametrize("name", slow_but("one less", STEPS_OF_TILES))
@pytest.mark.parametrize("interleaved", slow_but(2, [1, 2]))
def test_batch_tiles_have_steps_of_their_own(prefer, interleaved, name):
    """A group computes several work tiles, of one head and of another: what it exchanges of a tile
    that ends sooner does not get into the way of what it exchanges of the next."""
    prefer(lambda plan: (plan.interleaved != interleaved, plan.n_tiles, 100 - plan.size))
    B, N = 36, 3
    for plan in plans("elman", B, N, 131, torch.bfloat16):
        assert plan.interleaved == interleaved
        assert plan.work_tiles(B, N) > 2 * plan.groups(B, N, SMALL), plan
    lengths = [steps for steps in STEPS_OF_TILES[name] for _ in range(8)][:B]
    case = random_ragged(
        *("elman", B, 5, N, 131),
        ragged="lengths",
        reverse="some",
        resets="sequence",
        dtype=torch.bfloat16,
    )
    case = with_lengths(case, lengths)
    hold_ragged_to_vanilla("cuda_fused", case)
    runs = [gradients_of(case, case.call("cuda_fused")) for _ in range(2)]
    assert all(torch.equal(x, runs[1][key]) for key, x in runs[0].items())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_interleaved_batch_tiles_have_options(prefer, dtype, kinds):
    prefer(lambda plan: (8 - plan.interleaved, plan.n_tiles))
    assert all(plan.interleaved == 8 for plan in plans("slstm", 60, 1, 131, dtype))
    case = random_ragged("slstm", 60, 7, 1, 131, seed=2, dtype=dtype, **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
def test_wide_batch_tiles_have_options(prefer, kinds):
    """Two n-tiles, and two elements of a thread or more."""
    prefer(lambda plan: (-plan.n_tiles, plan.size))
    case = random_ragged("lstm", 20, 4, 2, 140, dtype=torch.bfloat16, **kinds)
    hold_ragged_to_vanilla("cuda_fused", case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("ragged", ["lengths", "packed"])
@pytest.mark.parametrize("regime", [GRID, GRID_WGMMA[0]], ids=str)
def test_a_sequence_has_the_bits_that_it_has_alone(take, regime, ragged):  # noqa: F811
    B = 4 if regime is GRID else regime.B
    case = random_ragged("lstm", B, 5, 2, regime.D, 2, ragged=ragged, dtype=torch.bfloat16)
    plan = regime.plans(planned("lstm", B, 2, regime.D, torch.bfloat16), regime.gpu, False)
    assert isinstance(plan, GridPlan) == (regime is GRID)
    # In a batch as large as the other, which has the same plan.
    hold_to_each_alone(take(regime).backend, case, range(7), copies=B)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kinds", ALL, ids=["lengths", "packed"])
@pytest.mark.parametrize("regime", [GRID, GRID_WGMMA[0]], ids=str)
def test_same_bits_of_options_without_gradients(take, regime, kinds):  # noqa: F811
    """Where less is stored: nothing for a backward pass, and only the states that are asked for."""
    take(regime)
    case = random_ragged("lstm", regime.B, 4, 1, regime.D, dtype=torch.bfloat16, **kinds)
    expected = case.call("cuda_fused")
    with torch.no_grad():
        given = case.call("cuda_fused")
    for x, y in zip(given, expected, strict=True):
        assert torch.equal(x, y)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("reverse", "ragged"), [("none", "lengths"), ("some", "packed")])
def test_what_is_no_step_reaches_nothing(take, monkeypatch, reverse, ragged):  # noqa: F811
    monkeypatch.setattr("flashrnn.sequences._known", lambda *_: None)
    backend = take(GRID).backend
    hold_padding_out(backend, reverse, D=GRID.D)
    hold_rows_of_no_sequence(backend, reverse, D=GRID.D)
    hold_empty_sequences_out(backend, ragged, D=GRID.D)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("regime", [GRID, GRID_WGMMA[0]], ids=str)
def test_no_sequence_of_a_batch_has_a_step(take, regime):  # noqa: F811
    case = random_ragged(
        "lstm", regime.B, 3, 1, regime.D, ragged="lengths", resets="zeros", dtype=torch.bfloat16
    )
    case = with_lengths(case, [0] * regime.B)
    found = gradients_of(case, case.call(take(regime).backend))
    assert torch.equal(found["last_states"], case.inputs.states)
    assert not found["states"].any() and not found["d_Wx"].any() and not found["d_R"].any()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids=lambda x: "-".join(x.values()))
def test_many_sequences_by_wgmma_have_options(take, kinds):  # noqa: F811
    """More than a group has at a time, and some of another head."""
    case = random_ragged("lstm", 65, 4, 2, 136, dtype=torch.bfloat16, **kinds)
    hold_ragged_to_vanilla(take(GRID_WGMMA[0]).backend, case)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_every_cell_by_wgmma_has_options(take, kind):  # noqa: F811
    case = random_ragged(kind, 33, 3, 1, 152, dtype=torch.float16, **ALL[0])
    hold_ragged_to_vanilla(take(GRID_WGMMA[0]).backend, case)


COMPILED = [
    ("lstm", (16, 1, 768), "bfloat16"),
    ("lstm", (1, 1, 2048), "bfloat16"),
    ("lstm", (64, 1, 1000), "bfloat16"),
    ("slstm", (64, 2, 320), "bfloat16"),
    ("gru", (64, 1, 1024), "float16"),
    ("lstm", (16, 1, 768), "float32"),
]


def met_by_pairs():
    """Every two of a problem, an architecture and options of sequences meet.

    Each problem is compiled once for each architecture: with all options for one half of them, as
    these take most registers, and with one of the others for the rest. A quick run has the first.
    """
    *others, everything = FIELDS
    for i, problem in enumerate(COMPILED):
        for j, arch in enumerate(sorted(GPUS, key=lambda arch: arch != "sm_90a")):
            fields = others[(i // 2 + j // 2) % len(others)] if (i + j) % 2 else everything
            yield pytest.param(problem, arch, fields, marks=pytest.mark.slow if i or j else [])


@needs_nvrtc
@pytest.mark.parametrize(("problem", "arch", "fields"), list(met_by_pairs()), ids=str)
def test_options_compile_without_spills(problem, arch, fields):
    kind, sizes, precision = problem
    cell, dtype = resolve(kind), getattr(torch, precision)
    problem = planned(kind, *sizes, dtype)._replace(returned=1, **fields)
    for backward in (False, True):
        plan = grid.plan_scan(problem, GPUS[arch], backward)
        options = source.options_of(problem, backward, stored=1)
        parts = plan.source(cell, precision, options, piece_bytes=16)
        assert not spills_in_the_loop_of_products(parts, arch), backward


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILT_IN)
def test_options_compile_without_spills_by_wgmma(kind):
    for fields in FIELDS:
        problem = planned(kind, 256, 1, 768, torch.bfloat16)._replace(returned=1, **fields)
        plan = grid.plan_wgmma_forward(problem, H200, False)
        options = source.options_of(problem, False, stored=1)
        parts = plan.source(resolve(kind), "bfloat16", options, piece_bytes=16)
        assert not spills_in_the_loop_of_products(parts, "sm_90a"), fields
