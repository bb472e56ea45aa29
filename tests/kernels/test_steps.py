"""Scans of many sequences, step by step. What all regimes share is in ``test_regimes.py``."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashrnn import Stepper, flashrnn
from flashrnn.backends import cuda, cuda_fused, steps, tables
from flashrnn.cells import resolve
from flashrnn.jit import nvrtc
from flashrnn.kernels import registry, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.per_step import cell_plan
from flashrnn.kernels.per_step.cell_plan import CellPlan, factors_are_apart
from tests.emulation import emulation, fused_emulation, needs_compiler  # noqa: F401
from tests.fused import (
    all_strided,
    at_odd_addresses,
    contains_what_is_beyond_float16,
    continues_exactly,
    hold_to_vanilla,
    poisoned,  # noqa: F401
    same_without_gradients,
    tf32,  # noqa: F401
)
from tests.gpus import A100, B200, GPUS, H200, RTX_4090, planned
from tests.machine_code import in_order, local_memory, needs_nvrtc
from tests.problems import BUILT_IN, call, gradients, random_inputs, sparse, wide, widest
from tests.sequences import alternating
from tests.steps import by_steps, forget
from tests.test_graphs import everything, more

directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])

# ---- the machine code


def program(kind, D, precision, backward, aligned=True, **options):
    cell = resolve(kind).traced
    found = source.forward_options(True)
    if backward:
        found = source.backward_options(False, False, len(cell.states), given_last=False)
        found = (*found, ("STAGED", False))
    found = tuple((dict(found) | options).items())
    return CellPlan(backward, D).source(cell, precision, found, aligned)


def test_a_thread_has_as_many_units_as_it_can_hold_the_numbers_of():
    def units(kind, backward):
        return cell_plan.units_of(resolve(kind).traced, backward)

    for kind in BUILT_IN:
        assert [units(kind, x) for x in (False, True)] == [4, 4], kind
    assert [units(wide, x) for x in (False, True)] == [2, 4]
    assert [units(widest, x) for x in (False, True)] == [1, 2]
    plan = CellPlan(False, 1024)
    sizes = [plan.grid(resolve(kind).traced, 100, 2) for kind in ("lstm", wide, widest)]
    assert sizes == [200, 400, 800]


# One of each pair of a cell and an architecture that a quick run compiles.
QUICK = {("lstm", "sm_80"), ("slstm", "sm_90a"), (wide, "sm_120")}


@needs_nvrtc
@directions
@pytest.mark.parametrize(
    ("kind", "arch", "precisions"),
    [
        pytest.param(*case, marks=[] if case[:2] in QUICK else pytest.mark.slow)
        for case in alternating(
            (*BUILT_IN, sparse, wide, widest, everything, more),
            GPUS,
            [("float32", "float16"), ("float16", "float32")],
        )
    ],
    ids=str,
)
def test_compiles_for_every_architecture_without_spills(kind, arch, precisions, backward):
    """Nor does anything else lie in local memory, but what sines of large arguments need.

    The precisions are those of forward and backward; in 16 bits there are options too.
    """
    options = {}
    if precisions[backward] == "float16":
        options = {"STAGED": True, "CLIP": True} if backward else {"SAVE_GATES": False}
        options["aligned"] = False
    parts = program(kind, 1024, precisions[backward], backward, **options)
    size, spilled = local_memory(parts, arch)
    if nvrtc.version() < (13, 0) and kind is wide:
        pytest.skip("it compiles; NVRTC 12.8 spills 24 bytes of it for one architecture")
    assert spilled == 0
    assert size == 0 or kind in (everything, more)


@needs_nvrtc
@directions
def test_what_no_launch_writes_is_loaded_before_the_wait(backward):
    """And everything in vectors. The launch's latency is hidden so, and memory's rate reached."""
    names = in_order(program("lstm", 1024, "bfloat16", backward), "sm_90a")
    (wait,) = [i for i, name in enumerate(names) if name == "ACQBULK"]
    before = [name for name in names[:wait] if name == "LDG.E.64"]
    # Four gates of Wx, and of b; or four pre-activations, c, the gradients of h and c.
    assert len(before) == (7 if backward else 8)
    behind = [name for name in names[wait:] if name.startswith("LDG.E.128")]
    # The product, and c. Nobody reads the h before a step, or passes a gradient on to it.
    assert len(behind) == (2 if backward else 5)
    stores = [name for name in names if name.startswith("ST")]
    assert sorted(set(stores)) == ["STG.E.128", "STG.E.64"]


# ---- the choice

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


def chosen(kind, B, N, D, dtype, backward, gpu=H200, precision=None, **fields):
    precision = precision or str(dtype).removeprefix("torch.")
    fields["allow_tf32"] = precision == "tf32"
    problem = planned(kind, B, N, D, dtype)._replace(**fields)
    return registry.plan_steps(problem, precision, gpu, backward) is not None


@pytest.mark.parametrize(
    ("sizes", "dtype", "expected"),
    [
        # Where an H200 was measured to take several times as long as the product would. Forward a
        # persistent kernel is ahead of the library's product.
        ((642, 1, 1408), f16, (False, True)),
        ((578, 1, 1112), f16, (False, True)),
        ((1024, 1, 1024), bf16, (False, True)),
        ((1024, 1, 768), bf16, (False, True)),
        ((256, 1, 2048), bf16, (False, True)),
        ((64, 1, 2048), bf16, (False, True)),
        # Persistent kernels are ahead, or nearly so.
        ((256, 1, 768), bf16, (False, False)),
        ((4096, 1, 512), bf16, (False, True)),
        ((256, 1, 1024), bf16, (False, True)),
        ((64, 1, 768), bf16, (False, False)),
        ((16, 1, 2048), bf16, (False, False)),
        ((1024, 3, 256), bf16, (False, False)),
        # A CTA has a head.
        ((4096, 12, 64), bf16, (False, False)),
        # Without the tensor cores' tf32 the library is no faster.
        ((1024, 1, 768), f32, (False, False)),
    ],
    ids=str,
)
def test_many_sequences_of_wide_heads_are_computed_step_by_step(sizes, dtype, expected):
    assert tuple(chosen("lstm", *sizes, dtype, x) for x in (False, True)) == expected


@directions
def test_with_tf32_float32_is_computed_step_by_step(backward):
    for B, D in ((1024, 768), (1208, 1216)):
        # Forward a persistent kernel is faster.
        assert chosen("gru", B, 1, D, f32, backward, precision="tf32") == backward


@directions
def test_the_choice_does_not_depend_on_what_gives_the_same_bits(backward):
    """Parts of a sequence, and calls without gradients."""
    for T in (1, 2, 2**20):
        for needs_gradient in (False, True):
            fields = {"T": T, "needs_gradient": needs_gradient}
            assert chosen("lstm", 1024, 1, 1408, bf16, backward, A100, **fields)
            assert chosen("gru", 1208, 1, 1216, f32, backward, A100, "tf32", **fields)
            assert not chosen("lstm", 128, 1, 768, bf16, backward, **fields)


@directions
@pytest.mark.parametrize("gpu", [A100, RTX_4090, H200, B200], ids=["A100", "4090", "H200", "B200"])
def test_what_cannot_be_computed_so_is_not(gpu, backward):
    assert not chosen("lstm", 4096, 1, 1409, bf16, backward, gpu)
    for option in ("resets", "ragged", "reverse"):
        assert not chosen("lstm", 4096, 1, 1408, bf16, backward, gpu, **{option: True}, returned=1)
    # Of the same without the options; few sequences are left to persistent kernels on every GPU.
    assert not chosen("lstm", 63, 1, 1408, bf16, backward, gpu)
    plan = registry.plan_steps(planned("lstm", 4096, 1, 1408, bf16), "bfloat16", gpu, backward)
    assert plan in (None, CellPlan(backward, 1408))


def test_estimated_time_grows_with_what_is_computed():
    def cycles(B, D, gpu=H200):
        problem = planned("lstm", B, 1, D, bf16)
        return [cell_plan.estimated_cycles(problem, "bfloat16", gpu, x) for x in (False, True)]

    for sizes in ((1024, 1024), (2048, 2048), (512, 4096)):
        few, more_of_them = cycles(*sizes), cycles(2 * sizes[0], sizes[1])
        wider, smaller = cycles(sizes[0], 2 * sizes[1]), cycles(*sizes, GPU(66, 1, True, True))
        for x in (more_of_them, wider, smaller):
            assert all(1.4 * a < b for a, b in zip(few, x, strict=True))


@pytest.mark.parametrize("tf32", [False, True], indirect=True)
def test_float32_is_left_to_kernels_where_pytorch_would_round_otherwise(tf32):  # noqa: F811
    problem = planned("lstm", 4096, 1, 1024, f32)
    allowed = torch.backends.cuda.matmul.allow_tf32
    assert steps.may_be_faster(problem)
    for asked in (False, True):
        assert steps.may_be_faster(problem._replace(allow_tf32=asked)) == (asked == allowed)


def test_float16_is_left_to_kernels_where_pytorch_would_add_in_float16(monkeypatch):
    half = planned("lstm", 4096, 1, 1024, f16)
    assert steps.may_be_faster(half)
    monkeypatch.setattr(steps, "_sums_in_float16", lambda: True)
    assert not steps.may_be_faster(half)
    assert steps.may_be_faster(half._replace(dtype=bf16))
    assert not steps.may_be_faster(half._replace(dtype=bf16, B=cell_plan.FEWEST - 1))


def test_factors_that_lie_apart_are_told():
    def apart(kind, N, dtype, clipval=None):
        problem = planned(kind, 64, N, 512, dtype)
        return factors_are_apart(problem._replace(gradient_recurrent_clipval=clipval))

    assert not apart("lstm", 1, bf16) and not apart("gru", 1, bf16) and not apart(sparse, 1, bf16)
    assert apart("lstm", 2, bf16) and not apart("elman", 2, bf16)
    assert apart("lstm", 1, f16, 0.5) and not apart("lstm", 1, bf16, 0.5)


def test_pytorch_takes_products_of_16_bits_in_float32():
    """On GPUs alone; what is asked for is understood on every device."""
    left, right = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 8, 5).bfloat16()
    with pytest.raises(NotImplementedError, match=r"aten::bmm\.dtype_out.* 'CPU'"):
        steps.multiply(left, right, torch.empty(2, 3, 5))


# ---- the scans


@pytest.fixture
def emulated(emulation, fused_emulation, poisoned, monkeypatch):  # noqa: F811
    """``emulated(directions)`` has such directions computed step by step, on the CPU."""

    def start(backward=(False, True)):
        by_steps(monkeypatch, backward)

    yield start
    forget()


class Products:
    """Counts what the library multiplies."""

    def __init__(self, monkeypatch):
        self.shapes, multiply = [], steps.multiply

        def counted(left, right, product):
            self.shapes.append((*left.shape, right.shape[-1]))
            multiply(left, right, product)

        monkeypatch.setattr(steps, "multiply", counted)


@needs_compiler
@pytest.mark.parametrize(("backend", "D"), [("cuda", 40), ("cuda_fused", 136)])
@pytest.mark.parametrize("backward", [(), (False,), (True,), (False, True)], ids=str)
def test_each_direction_in_its_own_way(emulated, monkeypatch, backend, D, backward):
    emulated(backward)
    products = Products(monkeypatch)
    hold_to_vanilla(backend, "lstm", 3, 4, 1, D, bf16)
    expected = [(1, 3, D, 4 * D)] * 4 * (False in backward)
    assert products.shapes == expected + [(1, 3, 4 * D, D)] * 4 * (True in backward)


@needs_compiler
@pytest.mark.parametrize("dtype", [bf16, pytest.param(f32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [wide, widest], ids=str)
def test_threads_of_fewer_units(emulated, kind, dtype):
    """Whose numbers are in vectors of fewer words, or of no word."""
    emulated()
    for change in (lambda inputs: inputs, at_odd_addresses):
        hold_to_vanilla("cuda", kind, 3, 4, 2, 40, dtype, change=change)


@needs_compiler
def test_without_a_gradient_through_R_nothing_is_multiplied(emulated, monkeypatch):
    emulated()
    products = Products(monkeypatch)
    hold_to_vanilla("cuda", "lstm", 3, 4, 2, 40, bf16, gradient_recurrent_cut=True)
    assert products.shapes == [(2, 3, 40, 160)] * 4


@needs_compiler
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(B=st.integers(1, 80), T=st.integers(1, 5), N=st.integers(1, 3), one=st.booleans())
def test_any_number_of_sequences_steps_and_heads(emulated, B, T, N, one):
    emulated()
    hold_to_vanilla("cuda", "lstm", B, T, 1 if one else N, 40, bf16)


def test_the_first_launch_waits_for_all_before_it(emulated, monkeypatch):
    """Later ones load what no launch of the scan writes before they wait: it is complete then."""
    emulated()
    enqueued = []

    class Kept:
        def __init__(self, shape, fields):
            self.shape, self.arguments = shape, list(fields)

        def enqueue(self):
            enqueued.append((self.arguments[-1], self.shape.overlaps))

    class Kernel:
        def __init__(self, entry, parts, shape, device):
            self.shape, self.kept = shape, Kept

    monkeypatch.setattr(steps, "_kernel", Kernel)
    inputs = random_inputs("lstm", 3, 4, 1, 40, bf16)
    outputs = call("lstm", inputs, backend="cuda")
    assert enqueued == [(0, False), (1, True), (2, True), (3, True)]
    enqueued.clear()
    gradients(outputs, inputs)
    assert enqueued == [(3, False), (2, True), (1, True), (0, True)]


@needs_compiler
@pytest.mark.parametrize("backend", ["cuda", pytest.param("cuda_fused", marks=pytest.mark.slow)])
def test_what_gives_the_same_bits(emulated, backend):
    emulated()
    assert continues_exactly(backend, 136)
    assert same_without_gradients(backend, 136, kind="lstm")


@needs_compiler
@pytest.mark.parametrize("backend", ["cuda", "cuda_fused"])
def test_a_step_at_a_time_gives_the_bits_of_a_sequence(emulated, backend):
    emulated()
    inputs = random_inputs("lstm", 5, 3, 1, 136, bf16)
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    every, last = flashrnn(Wx, R, b, states, "lstm", backend)
    stepper, carried = Stepper(R, b, "lstm", backend), states.squeeze(2).clone()
    for t in range(3):
        stepper(Wx[:, t], carried, out=carried)
        assert torch.equal(carried.to(bf16), every[:, :, t])
    assert torch.equal(carried, last.squeeze(2))


@needs_compiler
def test_a_later_call_is_launched_as_if_it_were_the_first(emulated):
    """Whatever the calls before it have left in caches: layouts, sizes, clip values."""
    emulated()
    for change in (all_strided, lambda inputs: inputs, at_odd_addresses):
        hold_to_vanilla("cuda", "lstm", 3, 4, 1, 40, bf16, change=change)
    for sizes in ((3, 5, 1), (4, 4, 1), (3, 4, 1)):
        hold_to_vanilla("cuda", "lstm", *sizes, 40, bf16)
    for clipval in (0.5, 0.05, 0.5):
        options = {"gradient_recurrent_clipval": clipval}
        hold_to_vanilla("cuda", "lstm", 3, 4, 1, 40, bf16, **options)


@needs_compiler
def test_a_clip_contains_what_is_beyond_float16(emulated):
    emulated()
    contains_what_is_beyond_float16("cuda", 24)


@needs_compiler
@pytest.mark.parametrize("returned", ["last", "h", "all"])
def test_returned_states(emulated, returned):
    """What is not returned is not stored, but h, which the next product reads."""
    emulated()
    inputs = random_inputs("lstm", 4, 3, 1, 40, bf16)
    every, last = call("lstm", inputs, backend="cuda")
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    some, end = flashrnn(Wx, R, b, states, "lstm", "cuda", return_states=returned)
    assert torch.equal(some, every[: len(some)]) and torch.equal(end, last)
    assert len(some) == {"last": 0, "h": 1, "all": 2}[returned]


@needs_compiler
@pytest.mark.parametrize("returned", ["last", "h", "all"])
@pytest.mark.parametrize("of_last", [False, True])
def test_gradients_of_some_results(emulated, returned, of_last):
    """Of the other results they are absent, and count as zeros."""
    emulated()
    inputs = random_inputs("lstm", 4, 3, 1, 40, f32)
    found = []
    for backend in ("cuda", "vanilla"):
        every, last = call("lstm", inputs, backend=backend, return_states=returned)
        asked = last if of_last or returned == "last" else every
        found.append(torch.autograd.grad(asked.sin().sum(), list(inputs.tensors().values())))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_compiled_ahead_is_what_a_call_loads(emulated, monkeypatch):
    emulated()
    loaded, kernel = [], steps._kernel

    def load(entry, parts, shape, device):
        loaded.append(nvrtc.join(parts))
        assert shape.overlaps and shape.threads % 32 == 0
        return kernel(entry, parts, shape, device)

    monkeypatch.setattr(steps, "_kernel", load)
    inputs = random_inputs("gru", 4, 3, 1, 136, bf16)
    outputs = call("gru", inputs, backend="cuda_fused")
    gradients((outputs[0],), inputs)
    problem = planned("gru", 4, 1, 136, bf16)
    # `cuda_fused` is told that it is no layer, whose call would load further programs.
    for name, module, told in (("cuda", cuda, ()), ("cuda_fused", cuda_fused, (False,))):
        for backward, text in enumerate(loaded):
            found = module.programs(problem, H200, "bfloat16", bool(backward), *told)
            # Backward, h before each step is copied.
            *others, of_h = found if backward else (*found, None)
            assert [nvrtc.join(parts) for parts in others] == [text], name
            assert of_h is None or of_h == tables.program_of_h(problem)
    of_layers = cuda_fused.programs(problem, H200, "bfloat16", False)
    assert [list(parts)[-1] for parts in of_layers][1:] == [
        "few_rows/product.cu",
        "copies/copies.cu",
    ]
    assert len(loaded) == 2
