"""Heads that one CTA owns. What all regimes share is in ``test_regimes.py``."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashrnn import FlashRNNConfig, calls, cell
from flashrnn.backends import cuda_fused
from flashrnn.backends.fused import scans
from flashrnn.backends.gradients import select
from flashrnn.cells import resolve
from flashrnn.kernels import registry, source
from flashrnn.kernels.single_cta import (
    SingleCtaPlan,
    plan_gradient,
    plan_scan,
    possible_plans,
)
from flashrnn.problem import Problem
from tests.emulation import fused_emulation, needs_compiler  # noqa: F401
from tests.fused import (
    all_strided,
    at_odd_addresses,
    check_clipped,
    hold_to_vanilla,
    poisoned,  # noqa: F401
    with_gaps,
)
from tests.gpus import GPUS, H200, planned
from tests.machine_code import instructions, needs_nvrtc, spills_in_a_loop
from tests.patterns import bounded_follows_vanilla, follows_vanilla
from tests.problems import call, gradients, random_inputs, relative_error, wide
from tests.sequences import alternating
from tests.terms import SIZES, keeps_every_term, leaves_other_sequences_alone

# ---- the machine code


# What backward may be given: gradients of all states, and of the last ones. Cases take turns.
GIVEN = [(True, True), (True, False), (False, True)]


def programs(kind, B, N, D, precision, gpu, given, piece_bytes=16):
    cell = resolve(kind)
    dtype = getattr(torch, precision.replace("tf32", "float32"))
    plans = [plan_scan(planned(kind, B, N, D, dtype), gpu, backward) for backward in (False, True)]
    assert all(isinstance(plan, SingleCtaPlan) for plan in plans), plans
    all_states, last = given
    backward = source.backward_options(False, False, len(cell.states) if all_states else 0, last)
    gradient = plan_gradient(len(cell.fed_by("R")), B * 64, N, D, dtype.itemsize, gpu)
    return [
        plans[0].source(cell, precision, source.forward_options(True), piece_bytes),
        plans[1].source(cell, precision, backward, piece_bytes),
        gradient.source(cell, precision, piece_bytes),
    ]


# Those that a quick run compiles.
QUICK = {("lstm", "sm_90a"), ("slstm", "sm_80"), (wide, "sm_90a")}


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "arch", "given"),
    [
        pytest.param(*case, marks=[] if case[:2] in QUICK else pytest.mark.slow)
        for case in alternating(("lstm", "slstm", wide), GPUS, GIVEN)
    ],
    ids=str,
)
def test_compiles_for_every_architecture_without_spills(kind, arch, given):
    for parts in programs(kind, 16, 12, 64, "bfloat16", GPUS[arch], given):
        assert not spills_in_a_loop(parts, arch), list(parts)[-1]


PLANS = [
    *(
        ("lstm", sizes, "bfloat16")
        for sizes in [(1, 1, 16), (256, 12, 64), (16, 6, 128), (300, 6, 128), (64, 8, 96)]
    ),
    *(("lstm", sizes, "float32") for sizes in [(1, 1, 16), (16, 12, 64), (16, 6, 128)]),
    ("lstm", (16, 12, 64), "tf32"),
    # Several tiles.
    *(("slstm", sizes, "bfloat16") for sizes in [(128, 12, 64), (256, 12, 64), (200, 24, 32)]),
    *(("lstm", sizes, "float16") for sizes in [(128, 12, 64), (256, 24, 32), (300, 12, 48)]),
    ("lstm", (500, 24, 16), "bfloat16"),
    *((kind, (256, 12, 64), "bfloat16") for kind in ("gru", "elman")),
]


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "given"),
    list(zip(PLANS, itertools.cycle(GIVEN))),
    ids=str,
)
def test_compiles_for_every_plan_without_spills(case, given):
    kind, sizes, precision = case
    for parts in programs(kind, *sizes, precision, H200, given):
        assert not spills_in_a_loop(parts, "sm_90a"), list(parts)[-1]


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "arch", "by_float16"),
    [
        pytest.param(kind, arch, by_float16, marks=[] if quick else pytest.mark.slow)
        for kind, by_float16 in (("elman", True), ("lstm", True), ("gru", False), ("slstm", False))
        for arch in GPUS
        for quick in [(kind, arch) == ("elman", "sm_90a")]
    ],
)
def test_a_bounded_h_takes_half_the_instructions(kind, arch, by_float16):
    """Of float16 a step's product, and once more for h of any size; of tf32 where R needs it."""
    plan = plan_scan(planned(kind, 16, 12, 64, torch.float32), GPUS[arch], False)
    parts = plan.source(resolve(kind), "float32", source.forward_options(True), piece_bytes=16)
    assert not spills_in_a_loop(parts, arch)
    products = instructions(parts, arch, "HMMA")
    gates = len(resolve(kind).fed_by("R"))
    float16 = sum("TF32" not in name for name in products)
    assert len(products) - float16 == gates * (64 // 8) * 3
    assert float16 == (2 * gates * (64 // 16) * 3 if by_float16 else 0)


# Heads of which no row or few begin at multiples of 16 bytes, and the pieces of these.
IN_PIECES = [
    *(("lstm", sizes, "bfloat16", 2) for sizes in [(26, 1, 61), (2000, 1, 61), (2000, 1, 15)]),
    *(("lstm", (2000, 1, D), "bfloat16", x) for D, x in [(20, 8), (54, 4)]),
    *(("lstm", (641, 1, D), "float32", x) for D, x in [(54, 8), (91, 4)]),
    ("slstm", (2000, 1, 61), "bfloat16", 2),
    ("gru", (2000, 1, 127), "float16", 2),
]


@needs_nvrtc
@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=pytest.mark.slow if i else []) for i, x in enumerate(IN_PIECES)],
    ids=str,
)
def test_small_pieces_without_spills(case):
    kind, sizes, precision, piece_bytes = case
    found = programs(kind, *sizes, precision, GPUS["sm_90a"], (True, True), piece_bytes)
    for parts in found:
        assert not spills_in_a_loop(parts, "sm_90a"), list(parts)[-1]


# ---- around the kernels


def test_gates_are_selected_without_asking_the_host(monkeypatch):
    """A CUDA graph records no copy of indices from the host."""
    gates = torch.randn(2, 4, 3)
    expected = gates.index_select(1, torch.tensor([0, 2, 3]))
    monkeypatch.delattr(torch, "tensor")
    assert torch.equal(select(gates, 1, (0, 2, 3)), expected)
    assert select(gates, 1, (1, 2)).data_ptr() == gates[:, 1].data_ptr()
    assert select(gates, 1, ()).shape == (2, 0, 3)


# ---- the kernels


@pytest.fixture
def on_the_cpu(fused_emulation, poisoned):  # noqa: F811
    """Backend ``cuda_fused`` is emulated, and what it allocates is NaN."""


@needs_compiler
def test_fragments_in_shared_memory(on_the_cpu):
    # A gate's rows are 14 fragments.
    plan = plan_scan(planned("lstm", 2, 1, 112, torch.float32), H200, False)
    assert plan.in_registers < 4 * 14
    hold_to_vanilla("cuda_fused", "lstm", 2, 3, 1, 112, torch.float32)


# Each kind of piece; more and fewer steps than the ring has stages; a row of few threads, and of
# more pieces than threads.
PIECES = [
    (17, torch.bfloat16, 3, with_gaps),
    (71, torch.float16, 12, with_gaps),
    (15, torch.float16, 2, at_odd_addresses),
    (127, torch.bfloat16, 1, at_odd_addresses),
    (20, torch.float16, 12, with_gaps),
    (20, torch.bfloat16, 2, all_strided),
    (16, torch.float16, 3, with_gaps),
    (18, torch.bfloat16, 12, at_odd_addresses),
    (71, torch.float32, 12, at_odd_addresses),
    (20, torch.float32, 3, at_odd_addresses),
    (18, torch.float32, 2, with_gaps),
    (33, torch.float32, 1, all_strided),
]


@needs_compiler
@pytest.mark.parametrize(
    ("D", "dtype", "T", "change"),
    [pytest.param(*x, marks=pytest.mark.slow if i else []) for i, x in enumerate(PIECES)],
)
def test_rows_that_begin_anywhere(on_the_cpu, D, dtype, T, change):
    hold_to_vanilla("cuda_fused", "lstm", 7 if D < 64 else 3, T, 2, D, dtype, change=change)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_no_tiling_decides_a_bit(on_the_cpu, monkeypatch, kind):
    """The tiling follows from B; what a sequence's results are does not."""
    inputs = random_inputs(kind, 27, 3, 2, 24, torch.bfloat16)

    def results(k):
        def plan(*of):
            plans = possible_plans(*of)
            return plans[min(k, len(plans) - 1)]

        monkeypatch.setattr(registry, "SMALL_HEADS", (plan,))
        registry.best_plan.cache_clear()
        scans.prepare.cache_clear()
        calls.kept.clear()
        outputs = call(kind, inputs, backend="cuda_fused")
        return [*outputs, *gradients(outputs, inputs).values()]

    problem = planned(kind, 27, 2, 24, torch.bfloat16)
    tiles = [[x.tiles for x in possible_plans(problem, H200, back)] for back in (False, True)]
    assert tiles == [[1, 1, 1, 6, 6], [1, 1, 1, 6]]
    first, *others = (results(k) for k in range(5))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(other, first, strict=True))


@cell(states=("h",), gates=("g",))
def steep_at_four(states, gates):
    """At 4 its slope is finite, but not in float16; at 0 it is infinite."""
    return (torch.tanh(1e30 * (gates[0] - 4)) + 1 / gates[0] - 0.25,)


@needs_compiler
# Several tiles; one, whose rows begin anywhere.
@pytest.mark.parametrize(("D", "k"), [(24, 3), pytest.param(23, 2, marks=pytest.mark.slow)])
def test_sequences_that_are_not_there_keep_no_clip_from_containing(on_the_cpu, monkeypatch, D, k):
    """Lines of a tile's absent sequences are zeros, whose gradients here are no rounded numbers."""
    monkeypatch.setattr(registry, "SMALL_HEADS", (lambda *of: possible_plans(*of)[k],))
    inputs = random_inputs(steep_at_four, 3, 3, 1, D, torch.float16)
    with torch.no_grad():
        for x in inputs.tensors().values():
            x.zero_()
        inputs.Wx.fill_(4)
        # Zero times inf would be NaN.
        inputs.R.fill_(0.25)[..., 0] = 0
    found = []
    for name in ("cuda_fused", "vanilla"):
        config = FlashRNNConfig(gradient_recurrent_clipval=0.5)
        _, last_states = call(steep_at_four, inputs, backend=name, config=config)
        slopes = torch.full_like(last_states, 100.0)
        found.append(torch.autograd.grad(last_states, inputs.states, slopes)[0])
    assert torch.equal(*found) and (found[0][..., 1:] == 0.5).all()


class Operations(TorchDispatchMode):
    """The names of PyTorch's operations within it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*arguments, **(options or {}))


@needs_compiler
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_backward_asks_pytorch_for_memory_alone(fused_emulation, kind):  # noqa: F811
    """Each operation more would be a launch, and 10 us of the host's time."""
    inputs, cell = random_inputs(kind, 3, 4, 2, 24, torch.bfloat16), resolve(kind).traced
    Wx, R, b, initial = (x.detach() for x in inputs.tensors().values())
    initial = torch.zeros(()).expand_as(initial)
    problem = Problem(cell, 3, 4, 2, 24, Wx.dtype, Wx.device, needs_gradient=True)
    states, _, gates = cuda_fused.forward(problem, Wx, R, b, initial)
    with Operations() as operations:
        cuda_fused.backward(problem, R, initial, states, gates, torch.ones_like(states), None)
    assert operations.names <= {"ones_like", "empty_like", "new_empty", "select"}


@needs_compiler
@pytest.mark.slow
def test_large_heads_multiply_nothing_into_the_first_step(on_the_cpu):
    """They multiply before there is a gradient to multiply, and an infinite R would show it."""
    follows_vanilla("cuda_fused", 3, 3, 2, 120, dtype=torch.bfloat16)


@needs_compiler
def test_no_kernel_of_its_own_for_a_length(on_the_cpu):
    for T in (2, 40, 520):  # In parts, whose sums are of a second kernel, only the last.
        inputs = random_inputs("elman", 1, T, 1, 16, torch.bfloat16)
        gradients(call("elman", inputs, backend="cuda_fused"), inputs)
    assert scans.scan_kernel.cache_info().currsize == 2
    assert scans.gradient_kernel.cache_info().currsize == 1
    assert scans.sums_kernel.cache_info().currsize == 1


@needs_compiler
@pytest.mark.parametrize("forward_clipval", [None, 0.5, 1e39], ids="clipped to {}".format)
@pytest.mark.parametrize("kind", ["lstm", pytest.param("elman", marks=pytest.mark.slow)])
def test_bounded_h_takes_care_where_it_must(on_the_cpu, kind, forward_clipval):
    bounded_follows_vanilla("cuda_fused", kind, 3, 4, 2, 20, forward_clipval=forward_clipval)


@needs_compiler
@pytest.mark.parametrize("sizes", SIZES)
def test_every_term_has_its_precision(on_the_cpu, sizes):
    keeps_every_term("cuda_fused", 20, sizes)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["ordinary", "tinier", "larger", "spread", "spread, large"])
@pytest.mark.parametrize("bound", [1e-6, 0.5, 1e6, 1e15])
def test_every_term_has_its_precision_whatever_the_bound(on_the_cpu, bound, sizes):
    keeps_every_term("cuda_fused", 20, sizes, bound)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("D", [16, 64, 112, 128])
@pytest.mark.parametrize("sizes", ["spread", "rows of R", "wide R"])
def test_every_term_has_its_precision_in_heads_of_any_size(on_the_cpu, D, sizes):
    keeps_every_term("cuda_fused", D, sizes)


@needs_compiler
def test_what_float16_cannot_hold_leaves_other_sequences_alone(on_the_cpu):
    """A tile's sequences are columns of one product. Some steps later h is in the range again."""
    leaves_other_sequences_alone("cuda_fused", "lstm", 7, 4, 1, 20)


@needs_compiler
@pytest.mark.parametrize("value", [1e-30, 1e6, 1e38])
def test_resets_to_what_float16_cannot_hold(on_the_cpu, value):
    inputs = random_inputs("lstm", 3, 4, 1, 20, torch.float32)
    reset = torch.zeros(3, 4, dtype=torch.bool)
    reset[1, 2], reset[2, 0], reset[2, 3] = True, True, True
    starts = inputs.states.detach().clone()
    starts[0, ..., ::3] = value
    with torch.no_grad():
        results = [
            call("lstm", x, backend=name, reset=reset, reset_states=starts.to(x.Wx))
            for name, x in (("cuda_fused", inputs), ("vanilla", inputs.to(torch.float64)))
        ]
    assert all(relative_error(x, exact) < 1e-6 for x, exact in zip(*results, strict=True))


@needs_compiler
def test_a_schedule_of_clips_compiles_once(on_the_cpu):
    for clipval in (0.1, 0.2, 1e39, 1e-50):
        check_clipped("cuda_fused", clipval)
    assert scans.scan_kernel.cache_info().currsize == 2
    assert registry.best_plan.cache_info().currsize == 2


@needs_compiler
def test_a_gradient_of_the_last_states_alone(on_the_cpu):
    inputs = random_inputs("lstm", 3, 4, 2, 20, torch.float32)
    weights = [torch.randn(2, 3, 1, 2, 20, generator=torch.Generator().manual_seed(0))]
    leaves = list(inputs.tensors().values())
    found = [
        torch.autograd.grad(call("lstm", inputs, backend=name)[1], leaves, weights)
        for name in ("cuda_fused", "vanilla")
    ]
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(*found, strict=True))
