"""Backend ``triton`` without a GPU: its kernels run by Triton's interpreter."""

import gc
import importlib.util
import math
import os
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flashrnn import cell, flashrnn, initial
from flashrnn.backends import autograd, triton
from flashrnn.backends.gradients import Gradients
from flashrnn.cells import resolve
from flashrnn.cells.render import render_triton
from flashrnn.jit.source import load_source
from flashrnn.kernels.triton.plan import ScanPlan, plan_scan
from flashrnn.problem import Problem
from tests.fused import (  # noqa: F401
    DTYPES,
    OPTIONS,
    PRODUCTS,
    absent_gradients_are_zeros,
    all_strided,
    contains_what_is_beyond_float16,
    continues_exactly,
    hold_to_vanilla,
    poisoned,
    put,
    round_as_a_gpu,
    same_pattern_as_vanilla,
    same_without_gradients,
    tf32,
)
from tests.problems import (
    BUILT_IN,
    Inputs,
    call,
    gentle_inputs,
    gradients,
    random_inputs,
    root,
    sparse,
    undefined,
    wide,
)
from tests.sequences import (
    KINDS,
    hold_padding_out,
    hold_ragged_to_vanilla,
    hold_rows_of_no_sequence,
    random_ragged,
)
from tests.stress import fuzz
from tests.test_graphs import TABLES, check_table, table_inputs

# Triton's interpreter before 3.7, of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")

# Triton's own library is interpreted or not as the variable says when it is first imported.
needs_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1, with which `make test` runs this file by itself",
)


@pytest.fixture
def interpreter(monkeypatch):
    """Triton's interpreter, mended."""
    round_as_a_gpu(monkeypatch)


@pytest.fixture
def on_the_cpu(interpreter, poisoned):  # noqa: F811
    """The interpreter, and NaN in whatever the backend allocates."""


@needs_triton
@pytest.mark.parametrize(
    ("sizes", "kind", "dtype"),
    [
        # A quick run has each cell once, and one in each dtype at both sizes.
        pytest.param(
            sizes,
            kind,
            dtype,
            marks=[]
            if kind == "lstm" or (sizes[2], dtype) == (2, torch.bfloat16)
            else pytest.mark.slow,
        )
        for sizes in ((3, 4, 2, 5), (9, 3, 1, 40))
        for kind in (*BUILT_IN, sparse, wide)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_equals_vanilla(on_the_cpu, sizes, kind, dtype):
    hold_to_vanilla("triton", kind, *sizes, dtype)


@needs_triton
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 64, 1, 16), (17, 2, 5, 17), (2, 2, 1, 128)])
def test_sizes(on_the_cpu, sizes):
    hold_to_vanilla("triton", "lstm", *sizes, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (3, 0, 2, 8)], ids=str)
def test_empty(on_the_cpu, sizes):
    hold_to_vanilla("triton", "slstm", *sizes, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(on_the_cpu, dtype, options):
    """In float32 R is read again at every step, in bfloat16 it stays: both ways."""
    hold_to_vanilla("triton", "lstm", 5, 4, 2, 24, dtype, **options)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kinds",
    [pytest.param(x, marks=[] if x in KINDS[-2:] else pytest.mark.slow) for x in KINDS],
    ids=lambda kinds: "-".join(kinds.values()),
)
def test_sequences(on_the_cpu, kinds, dtype):
    """In float32 R is read again at every step, in bfloat16 it stays: both ways."""
    case = random_ragged("lstm", 11, 5, 3, 20, seed=4, dtype=dtype, **kinds)
    expected = hold_ragged_to_vanilla("triton", case)
    with torch.no_grad():
        states, last_states = case.call("triton")
    assert torch.equal(states, expected["states"])
    assert torch.equal(last_states, expected["last_states"])


@needs_triton
def test_padding_reaches_nothing(on_the_cpu):
    hold_padding_out("triton", "some")


@needs_triton
def test_rows_of_no_sequence_are_zero(on_the_cpu, monkeypatch):
    monkeypatch.setattr("flashrnn.sequences._known", lambda *_: None)
    hold_rows_of_no_sequence("triton", "some")


@needs_triton
def test_any_strides(on_the_cpu):
    hold_to_vanilla("triton", "gru", 3, 4, 2, 24, torch.bfloat16, change=all_strided)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp where it is inf.
@pytest.mark.parametrize("kind", BUILT_IN)
def test_extremes_give_no_nan(on_the_cpu, kind):
    inputs = random_inputs(kind, 9, 2, 1, 4, dtype=torch.float32)
    with torch.no_grad():
        inputs.Wx.copy_(100 * torch.randint(-3, 4, inputs.Wx.shape))
        inputs.states.zero_()
    outputs = call(kind, inputs, backend="triton")
    found = gradients(outputs, inputs)
    assert all(x.isfinite().all() for x in (*outputs, *found.values()))


# NumPy's, of what is not finite, which here is meant.
unbounded = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@needs_triton
@unbounded
@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"])
@pytest.mark.parametrize("kind", [root, undefined], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 3, 1, 12)], ids=str)
def test_padding_reaches_no_sum(on_the_cpu, kind, dtype, tf32, sizes):  # noqa: F811
    inputs = gentle_inputs(kind, *sizes, dtype)
    outputs = call(kind, inputs, backend="vanilla")
    assert all(x.isfinite().all() for x in (*outputs, *gradients(outputs, inputs).values()))
    same_pattern_as_vanilla("triton", kind, inputs)


@needs_triton
@unbounded
@pytest.mark.slow
@pytest.mark.parametrize("D", [*range(2, 17), 33, 65, 96, 100, 128])
def test_padding_of_every_size_reaches_no_sum(on_the_cpu, D):
    for kind, dtype in [(undefined, torch.bfloat16), (root, torch.float32)]:
        same_pattern_as_vanilla("triton", kind, gentle_inputs(kind, 1, 2, 1, D, dtype))


@needs_triton
@unbounded
def test_padding_reaches_no_sum_where_16_bits_are_read_again(on_the_cpu):
    inputs = random_inputs(wide, 1, 3, 1, 65, torch.bfloat16)
    with torch.no_grad():
        inputs.Wx[0, 1, 2, 0, 7], inputs.Wx[0, 1, 3, 0, 8] = torch.inf, torch.nan
    same_pattern_as_vanilla("triton", wide, inputs)


@needs_triton
@unbounded
@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"])
@pytest.mark.parametrize(
    "kind", ["gru", sparse, pytest.param("elman", marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize(
    # An infinite h that R multiplies; an R that the last step's gradient does not pass.
    ("name", "at"),
    [("states", (0, 1, 0, 0, 3)), ("R", (0, 0, 2, 5)), ("Wx", (1, 1, -1, 0, 4))],
)
def test_what_is_not_finite_spreads_as_in_vanilla(
    on_the_cpu,
    kind,
    dtype,
    tf32,  # noqa: F811
    value,
    name,
    at,
):
    inputs = random_inputs(kind, 2, 3, 1, 12, dtype)
    put(inputs, name, value, *at)
    same_pattern_as_vanilla("triton", kind, inputs)


@needs_triton
@unbounded
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_matrix_and_no_steps(on_the_cpu, dtype):
    inputs = random_inputs("lstm", 2, 0, 1, 8, dtype)
    put(inputs, "R", torch.inf, 0, 0, 2, 5)
    same_pattern_as_vanilla("triton", "lstm", inputs)


@needs_triton
@unbounded
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"gradient_recurrent_clipval": 0.05}, *OPTIONS[2:]], ids=str)
def test_clips_keep_nan(on_the_cpu, dtype, options):
    inputs = random_inputs("lstm", 2, 4, 2, 12, dtype)
    asked = tuple(torch.ones_like(x) for x in call("lstm", inputs, backend="vanilla"))
    asked[1][0, 1, 0, 0, 3] = torch.nan
    same_pattern_as_vanilla("triton", "lstm", inputs, asked, **options)
    put(inputs, "Wx", torch.nan, 0, 2, 0, 1, 5)
    same_pattern_as_vanilla("triton", "lstm", inputs, **options)


@needs_triton
@unbounded
@pytest.mark.parametrize("D", [12, 65], ids=["R in registers", "R read again"])
def test_a_clip_contains_what_is_beyond_float16(on_the_cpu, D):
    contains_what_is_beyond_float16("triton", D)


RUN_TABLE = """
@triton.jit
def run(given, found, rows: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    x = tl.load(given + row, row < rows)
    y = tl.load(given + rows + row, row < rows)
    z = tl.load(given + 2 * rows + row, row < rows)
    states = step((), (x, y, z), 0.0)
    for k in tl.static_range(len(states)):
        tl.store(found + k * rows + row, states[k].to(tl.float32), row < rows)
"""


@needs_triton
@unbounded
@pytest.mark.parametrize("table", TABLES, ids=str)
def test_operations_are_right_to_float32_accuracy(interpreter, table):
    gates = torch.stack(table_inputs())
    rows = gates.shape[1]
    given = torch.full((len(table.states), rows), math.nan)
    run = load_source(render_triton(table) + RUN_TABLE).run
    run[(-(-rows // 128),)](gates, given, rows, 128)
    check_table(table, gates, given)


# Addresses


class Sparse:
    """Tensors of sparse files: of those that pass 2³¹ elements, only what is touched takes room.

    Room lies before and behind, so that an offset that overflowed finds zeros and harms nothing.
    """

    ROOM = 2**34

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def strided(self, size, stride, dtype):
        self.count += 1
        end = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        numbers = torch.from_file(
            str(self.folder / str(self.count)), True, 2 * self.ROOM + end + 1, dtype=dtype
        )
        return numbers.as_strided(size, stride, self.ROOM)

    def contiguous(self, size, dtype):
        return self.strided(size, torch.empty(size, device="meta").stride(), dtype)

    def far(self, x, distance):
        """The values of x, all neighbours at least the distance apart."""
        stride = [distance + 64 * 8**k for k in range(x.ndim)]
        return self.strided(x.shape, stride, x.dtype).copy_(x.detach())


@needs_triton
@pytest.mark.parametrize(
    # A stride of 32 bits, whose multiples have more; and one that has more itself.
    ("dtype", "distance"),
    [(torch.bfloat16, 2**31), (torch.float32, 2**30)],
)
def test_strides_beyond_32_bits(interpreter, tmp_path, dtype, distance):
    inputs = random_inputs("lstm", 2, 3, 2, 3, dtype)
    far = partial(Sparse(tmp_path).far, distance=distance)
    moved = Inputs(**{name: far(x).requires_grad_() for name, x in inputs.tensors().items()})
    runs = []
    for leaves, place in ((inputs, torch.Tensor.clone), (moved, far)):
        outputs = call("lstm", leaves, backend="triton")
        slopes = [place(torch.cos(x.detach())) for x in outputs]
        found = torch.autograd.grad(outputs, list(leaves.tensors().values()), slopes)
        runs.append([*outputs, *found])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


class FirstProgram:
    """A kernel of which one program runs, whatever the grid."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(1,)]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sizes_beyond_32_bits(interpreter, monkeypatch, tmp_path, dtype):
    """The first of 2³⁰ heads: from one gate, sequence, step or state to the next is 2³⁰."""
    B, T, N, D = 2, 2, 2**30, 1
    sparse, empty_like, new_empty = Sparse(tmp_path), torch.empty_like, torch.Tensor.new_empty

    def large(x, *size, **options):
        made = new_empty(x.to("meta"), *size, **options)
        if made.numel() < 2**30:
            return new_empty(x, *size, **options)
        return sparse.contiguous(made.shape, made.dtype)

    def large_like(x, **options):
        return empty_like(x, **options) if x.numel() < 2**30 else large(x, x.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", large)
    monkeypatch.setattr(torch, "empty_like", large_like)
    monkeypatch.setattr(triton, "complete", lambda problem, *of, **_: Gradients(*of[:2], *of[:2]))
    fixed = triton._fixed
    monkeypatch.setattr(
        triton,
        "_fixed",
        lambda problem: fixed(problem)._replace(
            forward=FirstProgram(fixed(problem).forward),
            backward=FirstProgram(fixed(problem).backward),
        ),
    )

    def place(x, heads, dim=-2):
        size = list(x.shape)
        size[dim] = heads
        placed = sparse.contiguous(size, x.dtype) if heads > 1 else torch.empty(size, dtype=x.dtype)
        placed.narrow(dim, 0, 1).copy_(x.detach())
        return placed

    inputs = random_inputs("lstm", B, T, 1, D, dtype)
    runs = []
    for heads in (1, N):
        problem = Problem(resolve("lstm").traced, B, T, heads, D, dtype, torch.device("cpu"), True)
        Wx, b, initial = (place(x, heads) for x in (inputs.Wx, inputs.b, inputs.states))
        R = place(inputs.R, heads, 1)
        states, last, gates = triton.forward(problem, Wx, R, b, initial)
        d_states, d_last = (place(torch.cos(x.narrow(-2, 0, 1)), heads) for x in (states, last))
        found = triton.backward(problem, R, initial, states, gates, d_states, d_last)
        runs.append([x.narrow(-2, 0, 1) for x in (states, last, gates, *found[:2])])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@needs_triton
def test_absent_gradients(on_the_cpu):
    assert absent_gradients_are_zeros("triton", 3, 3, 2, 24)


@needs_triton
def test_no_gradient_asked_for(on_the_cpu):
    assert same_without_gradients("triton")


@needs_triton
def test_continues_a_sequence_exactly(on_the_cpu):
    assert continues_exactly("triton")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")  # opcheck's.
@needs_triton
def test_operators_pass_opcheck(interpreter):
    Wx, R, b, states = random_inputs("gru", 2, 3, 2, 8, torch.float32).tensors().values()
    named = ("triton", resolve("gru").traced.text)
    torch.library.opcheck(autograd.scan, (Wx, R, b, states, *named, True, False, None, None))
    R, states = R.detach(), states.detach()
    every_state, last_states, gates = autograd.scan(
        Wx.detach(), R, b.detach(), states, *named, True, False, None, None
    )
    saved = (R, states, every_state, gates)
    asked = (torch.ones_like(every_state), torch.ones_like(last_states))
    torch.library.opcheck(autograd.scan_backward, (*saved, *asked, *named, False, None, None))


def coupled(states, gates):
    _, c = states
    f, z, o = gates
    c = torch.sigmoid(f) * c + (1 - torch.sigmoid(f)) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c), c


@pytest.fixture
def uncompiled():
    torch.compiler.reset()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "own_cell", "autocast"),
    [
        ("triton", False, False),
        ("triton", True, False),
        ("triton", False, True),
        ("auto", True, True),
    ],
)
def test_compiled_whole(interpreter, uncompiled, backend, own_cell, autocast):
    """One graph, the same bits, and a second graph for sizes that change but no third."""
    own = cell(states=("h", "c"), gates=("f", "z", "o"))
    # Of two, so that the one that is compiled has not been traced yet.
    kind, same = (own(coupled), own(coupled)) if own_cell else ("lstm", "lstm")

    def step(*tensors):
        with torch.autocast("cpu", enabled=autocast):
            return flashrnn(*tensors, function=kind, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for sizes in [(2, 3), (2, 3), (3, 4), (5, 6)]:
        inputs = random_inputs(same, *sizes, 2, 8, torch.float32)
        given = compiled(*inputs.tensors().values())
        found = gradients(given, inputs)
        outputs = step(*inputs.tensors().values())
        expected = gradients(outputs, inputs)
        assert given[0].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(given, outputs, strict=True))
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert counter.frame_count == 2


@needs_triton
def test_compiled_without_states_and_for_several_heads(interpreter, uncompiled):
    """N and D decide the plan, and get a graph each; what the eager call keeps is not touched."""
    compiled = torch.compile(
        partial(flashrnn, function="elman", backend="triton"), fullgraph=True, backend="aot_eager"
    )
    for N, D in [(1, 8), (2, 8), (2, 17), (1, 8)]:
        Wx, R, b, _ = random_inputs("elman", 2, 3, N, D, torch.float32).tensors().values()
        expected = flashrnn(Wx, R, b, function="elman", backend="triton")
        assert all(map(torch.equal, compiled(Wx, R, b), expected))


@needs_triton
def test_compiled_call_that_cannot_be_says_why(uncompiled):
    inputs = random_inputs("lstm", 2, 3, 1, 8, torch.float64)
    compiled = torch.compile(
        partial(flashrnn, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"cannot do this call: dtype float64"):
        compiled(*inputs.tensors().values())


@needs_triton
def test_default_states_of_inference_serve_training(interpreter, monkeypatch):
    monkeypatch.setattr(initial, "_zeros", {})
    Wx, R, b, _ = random_inputs("lstm", 2, 3, 1, 8, torch.float32).tensors().values()
    with torch.inference_mode():
        expected, _ = flashrnn(Wx, R, b, backend="triton")
    states, _ = flashrnn(Wx, R, b, backend="triton")
    states.sum().backward()
    assert torch.equal(states, expected)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([3, 2])}])
def test_a_backward_pass_within_autocast_is_in_the_dtype_of_the_forward(interpreter, options):
    """As the operators of PyTorch that autocast casts in a forward pass are not in a backward."""
    inputs = random_inputs("lstm", 2, 3, 1, 8, torch.float32)
    states, _ = call("lstm", inputs, backend="triton", **options)
    asked = list(inputs.tensors().values())
    expected = torch.autograd.grad(states.sum(), asked, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = torch.autograd.grad(states.sum(), asked)
    assert all(map(torch.equal, given, expected))


@needs_triton
def test_gradient_of_a_gradient_is_refused(interpreter):
    inputs = random_inputs("lstm", 2, 3, 1, 8, torch.float32)
    states, _ = call("lstm", inputs, backend="triton")
    (d_Wx,) = torch.autograd.grad(states.sum(), inputs.Wx, create_graph=True)
    with pytest.raises(NotImplementedError, match="'triton' has no second derivative"):
        torch.autograd.grad(d_Wx.sum(), inputs.R)


def test_kernels_go_with_what_they_were_made_for():
    """Those of a cell are kept by a bounded cache alone."""
    pytest.importorskip("triton")
    assert triton._fixed_for.cache_info().maxsize is not None
    gru, lstm = (
        problem(kind, 24, torch.bfloat16)._replace(device=torch.device("cpu"))
        for kind in ("gru", "lstm")
    )
    kept = weakref.ref(triton._fixed(gru).forward)
    assert triton._fixed(gru).forward is kept()
    # Some Tritons remember the last kernel of a name themselves.
    triton._fixed(lstm)
    triton._fixed_for.cache_clear()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_a_clip_value_is_not_compiled_in(options):
    pytest.importorskip("triton")
    (name,) = options
    lstm = problem("lstm", 24, torch.bfloat16)._replace(device=torch.device("cpu"))
    given = [triton._fixed(lstm._replace(**{name: value})) for value in (0.1, 0.2)]
    assert given[0] is given[1]


# Plans


def problem(kind, D, dtype):
    return Problem(resolve(kind).traced, 16, 8, 2, D, dtype, torch.device("cuda"))


@pytest.mark.parametrize("shared_memory", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_cover_every_head_up_to_128(dtype, exact, shared_memory):
    for kind in BUILT_IN:
        for D in range(1, 129):
            plan = plan_scan(problem(kind, D, dtype), exact, shared_memory)
            assert isinstance(plan, ScanPlan), plan
            assert plan.BLOCK_D >= D and plan.BLOCK_D & (plan.BLOCK_D - 1) == 0
            assert 1 <= plan.warps <= 16


@pytest.mark.parametrize("D", [16, 64, 128])
@pytest.mark.parametrize("exact", [True, False])
def test_no_more_registers_are_asked_for_than_there_are(exact, D):
    """512 threads of 255 registers do not fit a multiprocessor, and no launch would."""
    for kind in BUILT_IN:
        plan = plan_scan(problem(kind, D, torch.float32), exact, 227 * 1024)
        registers = triton._most_registers(plan)
        assert registers is None or 32 * plan.warps * registers <= 65536


def test_a_larger_head_is_refused_with_the_reason():
    assert "a head of 129 units; it takes up to 128" in plan_scan(
        problem("lstm", 129, torch.bfloat16), False, 227 * 1024
    )


@needs_triton
@unbounded
@pytest.mark.parametrize("number", [1000579, 1000585, 1000609])
def test_fuzzing_knows_what_a_clip_in_float16_cannot_tell(on_the_cpu, number):
    """Whether a gate's gradient is infinite or beyond 65504; of another backend it is a fault."""
    case = replace(
        fuzz.draw(1000573, "cuda"),
        number=number,
        B=2,
        T=2,
        N=1,
        D=5,
        asked="both",
        unasked=(),
        layouts=("contiguous",) * 5,
    )
    draw = fuzz.Draw(case, "cpu", 0)
    given = draw.by("triton")
    assert not fuzz._other_kinds(case, draw, given, "triton")
    assert "d_states" in fuzz._other_kinds(case, draw, given, "cuda_fused")


@cell(states=("h", "c"), gates=("g",))
def constant_h(states, gates):
    """What R multiplies is a number."""
    return torch.full_like(gates[0], 2.0), states[1] + torch.tanh(gates[0])


@needs_triton
def test_a_clipped_constant(on_the_cpu):
    hold_to_vanilla("triton", constant_h, 3, 4, 2, 5, torch.float32, forward_clipval=0.5)
