"""Backend ``cuda`` without a GPU: its kernels compiled for every architecture, and run on the CPU.

``emulation`` compiles the same text as C++ and runs it thread by thread, so these tests see
whatever the kernels compute, but neither the tensor cores' own rounding nor a race.
"""

import ctypes
import math

import pytest
import torch

from flashrnn.backends import cuda, cuda_fused, requirements
from flashrnn.cells import resolve
from flashrnn.jit import nvrtc
from flashrnn.kernels import program as programs
from flashrnn.kernels import step
from flashrnn.problem import Problem
from tests.emulation import (  # noqa: F401
    H200,
    Library,
    emulated,
    emulation,
    needs_compiler,
)
from tests.fused import (  # noqa: F401
    DTYPES,
    LAYOUTS,
    OPTIONS,
    all_strided,
    at_odd_addresses,
    check_clipped,
    continues_exactly,
    hold_to_vanilla,
    poisoned,
    same_without_gradients,
)
from tests.machine_code import spills_in_a_loop
from tests.patterns import BAD_AT_ZERO, follows_vanilla, ignores_what_is_not_there
from tests.problems import BUILT_IN, call, random_inputs, relative_error, sparse, wide
from tests.test_graphs import TABLES, check_table, everything, more, table_inputs
from tests.test_jit import needs_nvrtc

PRECISIONS = ("bfloat16", "float16", "float32", "tf32")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")


def program(kind, B, N, D, precision, backward):
    kind = resolve(kind)
    plan = step.plan_step(kind, B, N, D, precision, backward)
    if backward:
        return step.backward_source(kind, precision, plan, False, False)
    return step.forward_source(kind, precision, plan, True)


@needs_nvrtc
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse, wide, everything, more], ids=str)
def test_compiles_for_every_architecture_without_spills(kind, arch, backward):
    for precision in ("bfloat16", "float32"):
        assert not spills_in_a_loop(program(kind, 16, 1, 768, precision, backward), arch), precision


@needs_nvrtc
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [(16, 12, 64), (256, 1, 768), (7, 5, 41), (16, 1, 4096)], ids=str)
def test_compiles_for_every_plan_without_spills(sizes, precision, backward):
    for kind in ("lstm", "slstm"):
        assert not spills_in_a_loop(program(kind, *sizes, precision, backward), "sm_90a"), kind


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_plans_cover_every_problem(precision, backward):
    for kind in (*BUILT_IN, sparse, wide):
        for B in (1, 7, 8, 9, 24, 64, 300):
            for N in (1, 5):
                for D in (1, 16, 40, 41, 96, 320, 4096):
                    plan = step.plan_step(resolve(kind), B, N, D, precision, backward)
                    assert plan.grid(B, N, D) * plan.units * 8 * plan.blocks >= B * N * D
                    partial = plan.threads // 32 * 8 * plan.blocks * (16 * plan.tiles + 4) * 4
                    assert 32 <= plan.threads <= 1024 and plan.depth >= 1 and partial <= 48 * 1024


# ---- the cell's text


@pytest.fixture(scope="module")
def cell_text(tmp_path_factory):
    """``apply(kind, name, inputs) -> outputs`` of a cell's rendered functions."""
    libraries = {}

    def library(kind):
        if kind not in libraries:
            text = emulated(programs.prelude(resolve(kind), "float32", {}))
            text += """
            extern "C" void run_step(int units, const float* in, float* out) {
                for (int i = 0; i < units; ++i) {
                    step(*(const float(*)[S])(in + i * (S + G)),
                         *(const float(*)[G])(in + i * (S + G) + S), *(float(*)[S])(out + i * S),
                         0.0f);
                }
            }
            extern "C" void run_derivative(int units, const float* in, float* out) {
                for (int i = 0; i < units; ++i) {
                    const float* mine = in + i * (2 * S + G);
                    derivative(*(const float(*)[S])mine, *(const float(*)[G])(mine + S),
                               *(const float(*)[S])(mine + S + G),
                               *(float(*)[S])(out + i * (S + G)),
                               *(float(*)[G])(out + i * (S + G) + S), 0.0f);
                }
            }
            """
            libraries[kind] = Library(text, tmp_path_factory.mktemp("cell")).functions
        return libraries[kind]

    def apply(kind, name, inputs):
        S, G = len(resolve(kind).states), len(resolve(kind).gates)
        rows = torch.stack(inputs, dim=1).float().contiguous()
        out = torch.full((len(rows), S if name == "step" else S + G), math.nan)
        function = getattr(library(kind), f"run_{name}")
        function(len(rows), *(ctypes.c_void_p(x.data_ptr()) for x in (rows, out)))
        return out.T

    return apply


def reference(kind, inputs):
    """The step and its derivative by PyTorch, in the inputs' dtype."""
    kind = resolve(kind)
    S, G = len(kind.states), len(kind.gates)
    leaves = [x.clone().requires_grad_() for x in inputs[: S + G]]
    new = kind.step(tuple(leaves[:S]), tuple(leaves[S:]))
    used = [(y, d) for y, d in zip(new, inputs[S + G :], strict=True) if y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in used],
        leaves,
        [d for _, d in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.stack([y.detach() for y in new]), torch.stack(found)


def some_inputs(kind, units, scale):
    """Float32 numbers as float64: states, gates, gradients of the new states."""
    kind = resolve(kind)
    generator = torch.Generator().manual_seed(0)
    count = 2 * len(kind.states) + len(kind.gates)
    inputs = [scale * torch.randn(units, generator=generator) for _ in range(count)]
    if "n" in kind.states:
        inputs[kind.states.index("n")].abs_().add_(1)
    return [x.double() for x in inputs]


@needs_compiler
@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0])
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse, everything, more], ids=str)
def test_cell_text_is_the_cell_to_float32_accuracy(cell_text, kind, scale):
    inputs = some_inputs(kind, 4096, scale)
    S, G = len(resolve(kind).states), len(resolve(kind).gates)
    new, derivative = reference(kind, inputs)
    given = cell_text(kind, "step", inputs[: S + G]), cell_text(kind, "derivative", inputs)
    for mine, truth in zip([*given[0], *given[1]], [*new, *derivative], strict=True):
        assert relative_error(mine, truth) < 2e-6


@needs_compiler
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
def test_cell_text_gives_nan_only_where_pytorch_does(cell_text, kind):
    extremes = torch.tensor([0.0, -0.0, 1e-30, 1.0, -1.0, 20.0, 100.0, -100.0, 3e38])
    extremes = torch.cat([extremes, torch.tensor([math.inf, -math.inf, math.nan])])
    kind = resolve(kind)
    S, G = len(kind.states), len(kind.gates)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(extremes), (2 * S + G, 20_000), generator=generator)
    inputs = list(extremes[draws])
    new, derivative = reference(kind, inputs)
    given = cell_text(kind, "step", inputs[: S + G]), cell_text(kind, "derivative", inputs)
    for mine, theirs in zip([*given[0], *given[1]], [*new, *derivative], strict=True):
        wrong = mine.isnan() & ~theirs.isnan()
        assert not wrong.any(), [x[wrong][0].item() for x in inputs]


@needs_compiler
@pytest.mark.parametrize("table", TABLES, ids=str)
def test_operations_are_right_to_float32_accuracy(cell_text, table):
    gates = table_inputs()
    states = [torch.zeros_like(gates[0])] * len(table.states)
    check_table(table, gates, cell_text(table, "step", [*states, *gates]))


# ---- the kernels


def check(*problem, **options):
    hold_to_vanilla("cuda", *problem, **options)


@pytest.fixture
def on_the_cpu(emulation, poisoned):  # noqa: F811
    """Backend ``cuda`` is emulated, and what it allocates is NaN."""


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse, wide], ids=str)
def test_equals_vanilla(on_the_cpu, kind, dtype):
    check(kind, 7, 3, 2, 40, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),
        (2, 5, 3, 17),
        (25, 2, 1, 41),
        # A warp's chunks are more than it keeps on their way.
        (2, 2, 1, 420),
        (2, 2, 1, 840),
        # Several blocks of sequences in a tile; many tiles.
        (70, 2, 1, 136),
        # More steps than the longest recording.
        (1, 130, 1, 8),
        # Five tiles of sequences by the launch for six.
        (33, 2, 2, 8),
    ],
    ids=str,
)
def test_sizes(on_the_cpu, sizes, dtype):
    check("lstm", *sizes, dtype)


@needs_compiler
@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (3, 0, 2, 8)], ids=str)
def test_empty(on_the_cpu, sizes):
    check("slstm", *sizes, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_options(on_the_cpu, kind, options):
    check(kind, 5, 4, 2, 24, torch.float32, **options)


@needs_compiler
def test_tf32(on_the_cpu, monkeypatch):
    monkeypatch.setattr(programs, "precision_of", lambda dtype: "tf32")
    inputs = random_inputs("lstm", 3, 4, 2, 40, torch.float32)
    truth = call("lstm", inputs.to(torch.float64), backend="vanilla")
    given = call("lstm", inputs, backend="cuda")
    error = relative_error(given[0], truth[0])
    assert 1e-6 < error < 1e-3


@needs_compiler
def test_any_strides(on_the_cpu):
    check("lstm", 3, 4, 2, 24, torch.bfloat16, change=all_strided)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [at_odd_addresses, *LAYOUTS])
def test_any_addresses_and_layouts(on_the_cpu, change, dtype):
    check("lstm", 3, 4, 2, 24, dtype, change=change)


@needs_compiler
@pytest.mark.parametrize("clipval", [None, 1.0], ids="clipped to {}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_infinite_and_nan_where_vanilla_has_them(on_the_cpu, dtype, clipval):
    # Of a stored float16 nothing tells whether it was infinite before it was rounded, and a clip
    # contains it.
    infinite = ("inf", "-inf") if dtype == torch.float16 and clipval else ()
    follows_vanilla("cuda", 3, 3, 2, 20, dtype=dtype, but=infinite, clipval=clipval)


@needs_compiler
@pytest.mark.parametrize("kind", BAD_AT_ZERO, ids=str)
def test_units_that_are_not_there_reach_no_sum(on_the_cpu, kind):
    ignores_what_is_not_there("cuda", kind, 3, 3, 2, 20, dtype=torch.float32)
    ignores_what_is_not_there("cuda", kind, 3, 3, 2, 19, dtype=torch.bfloat16)


@needs_compiler
def test_a_schedule_of_clips_compiles_once(on_the_cpu):
    programs = cuda._forward_program, cuda._backward_program
    for clipval in (0.1, 0.2, 1e39, 1e-50):
        check_clipped("cuda", clipval)
    assert [kept.cache_info().currsize for kept in programs] == [1, 1]


@needs_compiler
def test_no_gradient_asked_for(on_the_cpu):
    assert same_without_gradients("cuda")


@needs_compiler
def test_continues_a_sequence_exactly(on_the_cpu):
    assert continues_exactly("cuda")


# ---- what it says of itself


def test_says_why_it_cannot():
    if not torch.cuda.is_available():
        assert "NVIDIA GPU" in cuda.unavailable(torch.device("cuda"))
    assert "cpu" in cuda.unavailable(torch.device("cpu"))
    values = {"cell": resolve("lstm"), "B": 1, "T": 1, "N": 1, "D": 1, "dtype": torch.float32}
    double = Problem(**{**values, "dtype": torch.float64}, device=torch.device("cuda"))
    assert "float64" in cuda.unsupported(double)
    assert cuda.unsupported(Problem(**values, device=torch.device("cuda"))) is None


def test_the_compiler_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(requirements, "missing_gpu", lambda device: None)
    compiler = requirements._unavailable_compiler.__wrapped__
    monkeypatch.setattr(requirements, "_unavailable_compiler", compiler)
    monkeypatch.setattr(nvrtc, "_version", lambda: 1 / 0)
    with pytest.raises(ValueError, match=r'pip install "flashrnn\[cuda\]"'):
        call("lstm", random_inputs("lstm", 1, 1, 1, 1, torch.float32), backend="cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda_fused"])
def test_sizes_beyond_what_kernels_count_to_are_refused(name, monkeypatch):
    monkeypatch.setattr(cuda_fused, "_gpu", lambda problem: H200)
    backend = {"cuda": cuda, "cuda_fused": cuda_fused}[name]
    device = torch.device("cuda")

    def reason(B, T, N, D, needs_gradient=False):
        cell = resolve("elman").traced
        return backend.unsupported(
            Problem(cell, B, T, N, D, torch.bfloat16, device, needs_gradient)
        )

    assert "B is 2147483648" in reason(2**31, 1, 1, 1)
    assert "T is 2147483648" in reason(1, 2**31, 1, 1)
    assert "N · D is 2147483648" in reason(1, 1, 2**30, 2)
    assert "thread blocks" in reason(2**20, 1, 2**16, 16)
    assert reason(2**31 - 1, 3, 1, 1) is None
    assert reason(64, 2**31 - 1, 1, 1) is None
    # Whose R's gradient has more rows than 32 bits count.
    rows = reason(2**16, 2**16, 1, 1, needs_gradient=True)
    assert rows is None if name == "cuda_fused" else "B · T is 4294967296" in rows
