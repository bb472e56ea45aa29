"""The text of a CUDA program: what it includes, the record of a call, the cell."""

import ctypes
import math
import re
import struct
import subprocess

import pytest
import torch

from flashrnn.cells import lstm, resolve
from flashrnn.cells.operations import OPERATIONS
from flashrnn.cells.render import render_cuda, render_triton
from flashrnn.jit import nvrtc
from flashrnn.kernels import call, source
from flashrnn.kernels.per_step.plan import plan_step
from flashrnn.problem import Problem
from tests.emulation import HEADER, Library, emulated, needs_compiler
from tests.gpus import GPUS, planned
from tests.kernels.regimes import REGIMES
from tests.machine_code import (
    local_memory,
    needs_nvrtc,
    spills_in_a_loop,
    spills_in_the_loop_of_products,
)
from tests.problems import BUILT_IN, relative_error, sparse
from tests.test_graphs import TABLES, check_table, everything, more, table_inputs, within


def cell_alone(cell, record=call.FORWARD):
    """A program without a kernel."""
    kernel = {"alone.cu": '#include "problem.cuh"'}
    return source.program("alone.cu", cell, "float32", {}, record, kernel)


RECORDS = [call.FORWARD, call.BACKWARD, call.RECURRENT_GRADIENT, call.GRADIENT_SUMS]
records = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)

# ---- what a program includes


def programs(regime, kind="lstm"):
    """The regime's programs, as ``(entry, parts)``."""
    cell, dtype, B = resolve(kind), torch.bfloat16, max(64, regime.B)
    for backward in (False, True):
        options = source.forward_options(True)
        if backward:
            options = source.backward_options(True, True, len(cell.states), given_last=True)
        if regime.backend == "cuda":
            plan = plan_step(cell, B, 1, regime.D, "bfloat16", backward)
            yield plan.entry, plan.source(cell, "bfloat16", options)
        else:
            problem = planned(cell, B, 1, regime.D, dtype)
            plan = regime.plans(problem, regime.gpu, backward)
            yield plan.entry, plan.source(cell, "bfloat16", options, piece_bytes=16)


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_a_part_stands_once_and_before_those_that_include_it(regime):
    for entry, parts in programs(regime):
        names = list(parts)
        assert (names[-1].endswith(".cu") and f"{entry}(CALL)" in parts[names[-1]]) or (
            regime.backend == "cuda" and entry in parts[names[-1]]
        )
        assert "common/ptx.cuh" in parts and "problem.cuh" in parts
        for place, (name, text) in enumerate(parts.items()):
            assert "#include" not in text, name
            if not name.endswith((".cu", ".cuh")) or name in ("types.cuh", "problem.cuh"):
                continue
            original = source.read(name) if name != "common/wgmma.cuh" else text
            included = re.findall(r'^#include "(.*)"$', original, re.MULTILINE)
            assert all(names.index(other) < place for other in included), name
            # All lines keep their numbers.
            assert text.count("\n") == original.count("\n"), name


@needs_nvrtc
def test_an_error_names_the_file_and_its_line(monkeypatch):
    read = source.read

    def broken(name):
        text = read(name)
        return (
            text.replace("#include", "int broken = no_such_name;\n#include", 1)
            if (name == "single_cta/forward.cu")
            else text
        )

    monkeypatch.setattr(source, "read", broken)
    single_cta = next(regime for regime in REGIMES if regime.name == "single_cta")
    _, parts = next(programs(single_cta))
    line = broken("single_cta/forward.cu").split("int broken")[0].count("\n") + 1
    with pytest.raises(Exception, match=re.escape("single_cta/forward.cu")) as error:
        nvrtc.compile_program(parts, "sm_90a")
    assert f"({line})" in str(error.value) and "no_such_name" in str(error.value)


def test_a_file_that_does_not_exist_is_named(monkeypatch):
    read = source.read
    monkeypatch.setattr(
        source,
        "read",
        lambda name: '#include "no/such.cuh"\n' if name == "grid/forward.cu" else read(name),
    )
    record = call.FORWARD
    with pytest.raises(FileNotFoundError, match=r"no/such\.cuh"):
        source.program("grid/forward.cu", resolve("lstm"), "bfloat16", {}, record)


# ---- the record of a call


def pack(record, tensors, **numbers):
    addresses, layout = record.read(tensors)
    return record.packing(layout, **numbers)(addresses)


@records
def test_struct_parameters_and_packing_have_the_same_fields(record):
    parameters = [part.split()[-1].lstrip("*") for part in record.parameters.split(", ")]
    members = [line.split()[-1].rstrip(";") for line in record.struct.splitlines()[1:-1]]
    assert parameters == members and len(parameters) == record.size == len(pack(record, {}))
    assert len(set(parameters)) == len(parameters)


@records
def test_a_tensor_is_packed_as_its_address_and_strides(record):
    names = [part.split()[-1].lstrip("*") for part in record.parameters.split(", ")]
    tensors = {}
    for operand in record.operands:
        sizes = [1 if dim == "1" else 2 + i for i, dim in enumerate(operand.dims or "xyz")]
        tensors[operand.name] = torch.empty(sizes[::-1]).permute(*reversed(range(len(sizes))))
    numbers = {name: 100 + i for i, name in enumerate(record.numbers)}
    packed = dict(zip(names, pack(record, tensors, **numbers), strict=True))
    for operand in record.operands:
        tensor = tensors[operand.name]
        assert packed.pop(operand.name) == tensor.data_ptr()
        for dim, stride in zip(operand.dims, tensor.stride(), strict=False):
            if dim != "1":
                assert packed.pop(f"{operand.name}_{dim}") == stride
    assert packed == numbers


@records
def test_a_packing_serves_all_tensors_of_a_layout(record):
    """Other addresses give other values at the places of addresses alone; other strides, and other
    alignments, make another layout."""

    def tensors(offset=0, last=1):
        sizes = {operand.name: [2] * (len(operand.dims) or 1) for operand in record.operands}
        return {
            name: torch.empty(200)[offset:].as_strided(size, (*(16,) * (len(size) - 1), last))
            for name, size in sizes.items()
        }

    first, second = tensors(), tensors()
    (addresses, layout), (others, same) = record.read(first), record.read(second)
    assert layout == same
    packed = record.packing(layout)(others)
    assert packed == pack(record, second)
    differing = [x != y for x, y in zip(packed, record.packing(layout)(addresses), strict=True)]
    assert sum(differing) == len(record.operands)
    assert record.read(tensors(offset=1))[1] != layout
    if any(operand.dims for operand in record.operands):
        assert record.read(tensors(last=2))[1] != layout


def test_of_more_dimensions_the_first_element_is_read():
    """Of all states that is h: no view of it has to be made."""
    states, d_gates = torch.empty(3, 2, 4, 1, 16)[:2], torch.empty(2, 1, 4, 1, 16)
    initial = torch.empty(2, 4, 2, 1, 16).transpose(1, 2)[:, :, :1]
    record = call.RECURRENT_GRADIENT
    whole = record.read({"d_gates": d_gates, "h": states, "h_initial": initial})
    assert whole == record.read({"d_gates": d_gates, "h": states[0], "h_initial": initial[0]})


@pytest.mark.parametrize(
    ("offset", "stride", "last", "D", "multiple", "expected"),
    [
        (0, 16, 1, 16, 16, True),
        (0, 12, 1, 12, 16, False),
        (0, 12, 1, 12, 4, True),
        (1, 16, 1, 16, 4, False),
        (4, 16, 1, 16, 16, False),
        (4, 16, 1, 16, 4, True),
        (0, 18, 1, 16, 16, False),
        (0, 16, 2, 16, 4, False),
    ],
)
def test_aligned_rows_are_told(offset, stride, last, D, multiple, expected):
    """Of a tensor of 16 bits with so many elements from row to row, and from address to address."""
    Wx = torch.empty(4096, dtype=torch.bfloat16)[offset:]
    Wx = Wx.as_strided((2, 2, 2, 2, D), (8 * stride, 4 * stride, 2 * stride, stride, last))
    record = call.FORWARD
    _, layout = record.read({"Wx": Wx})
    assert record.rows_begin_at(multiple, ["Wx"], layout, D, 2) == expected


@pytest.mark.parametrize(
    ("dtype", "D", "offset", "expected"),
    [
        *((torch.bfloat16, D, 0, x) for D, x in [(16, 16), (20, 8), (18, 4), (17, 2)]),
        *((torch.float32, D, 0, x) for D, x in [(16, 16), (18, 8), (17, 4)]),
        *((torch.bfloat16, 16, offset, x) for offset, x in [(4, 8), (2, 4)]),
        *((torch.float32, 16, offset, x) for offset, x in [(2, 8), (1, 4)]),
    ],
)
def test_pieces_of_rows(dtype, D, offset, expected):
    Wx = torch.empty(2 * 2 * 4 * D + offset, dtype=dtype)[offset:].view(2, 2, 4, 1, D)
    _, layout = call.FORWARD.read({"Wx": Wx})
    assert call.FORWARD.piece_bytes(["Wx"], layout, D, dtype.itemsize) == expected


@records
def test_what_is_not_given_is_0(record):
    assert set(pack(record, {})) == {0}


@pytest.mark.parametrize("record", RECORDS[:2], ids=lambda record: record.name)
def test_addresses_of_scratch_memory_follow_those_of_the_tensors(record):
    names = [part.split()[-1].lstrip("*") for part in record.parameters.split(", ")]
    sizes = (("packets",), ("packets", "R_in_memory"), ("R_in_memory",), ("packets", "parts"))
    for given in sizes:
        scratch = call.Scratch(**dict.fromkeys(given, 5))
        tensors = {"R": torch.empty(1), "initial": torch.empty(2, 3, 1, 4, 5)}
        # Of what the record lacks, nothing is passed: "d_R" and, among scratch memory, "parts".
        addresses, layout = record.read({**tensors, "d_R": torch.empty(1)})
        behind = [*range(-1, -1 - len(given), -1)]
        layout = layout.with_scratch(scratch)
        packed = record.packing(layout, B=7)([*addresses, *behind])
        others = [name for name in given if name != "parts"]
        behind = behind[: len(others)]
        found = {name: value for name, value in zip(names, packed, strict=True) if value}
        strides = dict(zip(("s", "b", "1", "n", "d"), tensors["initial"].stride(), strict=True))
        assert found == {
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            **{f"initial_{dim}": strides[dim] for dim in "sbnd"},
            **dict(zip(others, behind, strict=True)),
            "B": 7,
        }


@needs_compiler
@pytest.mark.parametrize("record", RECORDS[:2], ids=lambda record: record.name)
def test_the_struct_lies_in_memory_as_it_is_packed(record):
    """Every field has 8 bytes, in the order of the numbers."""
    members = [line.split()[-1].rstrip(";") for line in record.struct.splitlines()[1:-1]]
    offsets = ", ".join(f"__builtin_offsetof({record.name}, {member})" for member in members)
    text = emulated(cell_alone(resolve("lstm"), record))
    text += f"""
    extern "C" int size() {{ return sizeof({record.name}); }}
    extern "C" int offset(int i) {{ const int all[] = {{{offsets}}}; return all[i]; }}
    """
    functions = Library(text).functions
    assert functions.size() == 8 * record.size
    assert [functions.offset(i) for i in range(record.size)] == list(range(0, functions.size(), 8))


def test_clips_are_two_float32_numbers():
    for gradient, forward in ((0.5, 2.0), (None, 1.0), (1.0, None), (1e39, 1e-50)):
        given = struct.unpack("=ff", struct.pack("=q", source.clips(gradient, forward)))
        expected = [torch.tensor(x or 0.0, dtype=torch.float32).item() for x in (gradient, forward)]
        assert list(given) == expected


# ---- precisions


@pytest.fixture
def tf32_setting():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("PyTorch has only the older setting, allow_tf32")
    before = matmul.fp32_precision
    yield matmul
    matmul.allow_tf32 = False
    matmul.fp32_precision = before


def test_tf32_may_be_allowed_by_either_setting(tf32_setting):
    for name, value, precision in [
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "float32"),
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "float32"),
    ]:
        setattr(tf32_setting, name, value)
        assert source.precision_of(problem_of(torch.float32)) == precision, name
    assert source.precision_of(problem_of(torch.bfloat16)) == "bfloat16"


def test_tf32_may_be_allowed_by_the_call(tf32_setting):
    for setting in ("tf32", "ieee"):
        tf32_setting.fp32_precision = setting
        assert source.precision_of(problem_of(torch.float32, True)) == "tf32"
        assert source.precision_of(problem_of(torch.float32, False)) == "float32"
        assert source.precision_of(problem_of(torch.float16, True)) == "float16"


def problem_of(dtype, allow_tf32=None):
    return Problem(lstm.traced, 1, 1, 1, 8, dtype, torch.device("cpu"), allow_tf32=allow_tf32)


# ---- the cell's text


@pytest.fixture(scope="module")
def cell_text():
    """``apply(kind, name, inputs) -> outputs`` of a cell's rendered functions."""
    libraries = {}

    def library(kind):
        if kind not in libraries:
            text = emulated(cell_alone(resolve(kind)))
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
            libraries[kind] = Library(text).functions
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


def test_spellings_for_an_interval_stand_where_arguments_lie_in_it():
    """In the step and in the derivative; and nowhere else, for elsewhere they are wrong."""
    ranged = {name: row.within for name, row in OPERATIONS.items() if row.within}
    assert set(within.states) == set(ranged)
    everywhere, rows = resolve("slstm"), TABLES[0]
    for row in ranged.values():
        for render, spelling in ((render_cuda, row.cuda), (render_triton, row.triton)):
            name = spelling.split("(")[0]
            assert name in render(within) and render(everywhere).count(name) == 2
            assert name not in render(rows)


# The largest distance from the number nearest to the truth, in units in the last place. The truth
# is 2 atanh(x / (2 + x)), by its series: x / (2 + x) is at most 0.34, so that in float64 the terms
# behind the 17th are nothing. The compiler makes vectors of it, which it cannot of log1p.
EVERY_LOG1P = """
extern "C" bool is_fused() {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return true;
#else
    return false;
#endif
}
static inline double truth_of(double x) {
    const double ratio = x / (2 + x), square = ratio * ratio;
    double series = 0;
#pragma GCC unroll 17
    for (int k = 33; k > 0; k -= 2) series = series * square + 1.0 / k;
    return 2 * ratio * series;
}
extern "C" double truth(double x) { return truth_of(x); }
extern "C" int given_back(unsigned begin, unsigned end) {
    unsigned count = 0;
    for (unsigned bits = begin; bits < end; ++bits) {
        count += __float_as_uint(pointwise::log1p_up_to_1(__uint_as_float(bits))) == bits;
    }
    return count;
}
extern "C" int furthest(unsigned begin, unsigned end) {
    int furthest = 0;
    for (unsigned bits = begin; bits < end; ++bits) {
        const float x = __uint_as_float(bits);
        const int given = __float_as_uint(pointwise::log1p_up_to_1(x));
        const int distance = abs(given - int(__float_as_uint(float(truth_of(x)))));
        furthest = distance > furthest ? distance : furthest;
    }
    return furthest;
}
"""


def bits_of(x):
    return int.from_bytes(struct.pack("<f", x), "little")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "rounded twice"])
def test_log1p_of_every_number_of_its_interval(tmp_path, fused):
    """With fused products, as on GPUs, it is as right as CUDA's log1pf is said to be: the nearest
    number or one beside it. Without, as in Triton's interpreter, it is two away at most."""
    text, library = tmp_path / "every.cpp", tmp_path / "every.so"
    text.write_text(emulated(cell_alone(resolve("slstm"))) + EVERY_LOG1P, encoding="utf-8")
    how = ["-march=native", f"-ffp-contract={'fast' if fused else 'off'}"]
    shared = ["-std=c++17", "-O3", "-w", "-fPIC", "-shared", "-include", str(HEADER)]
    subprocess.run(["g++", *how, *shared, "-o", library, text], check=True)
    functions = ctypes.CDLL(str(library))
    if fused and not functions.is_fused():
        pytest.skip("needs a processor with fused products")
    row, sign = OPERATIONS["log1p"].within, bits_of(-0.0)
    functions.truth.argtypes, functions.truth.restype = [ctypes.c_double], ctypes.c_double
    for x in torch.linspace(row.least, row.largest, 10_000, dtype=torch.float64).tolist():
        assert functions.truth(x) == pytest.approx(math.log1p(x), rel=1e-15, abs=0)
    # Of numbers below 2^-25 none is nearer to log1p(x) = x - x^2 / 2 + ... than x.
    small, largest, least = bits_of(2.0**-25), bits_of(row.largest), bits_of(row.least)
    for zero in (0, sign):
        assert functions.given_back(zero, zero + small) == small
    assert functions.furthest(small, largest + 1) == (1 if fused else 2)
    assert functions.furthest(sign + small, least + 1) <= 1


# ---- that a spill would be noticed


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {
    float y[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) y[i] = x[1024 * i + threadIdx.x];
    for (int t = 0; t < n; ++t) {
#pragma unroll
        for (int i = 0; i < 64; ++i) y[i] = y[i] * y[(i + 17) % 64] + x[t];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) x[1024 * i + threadIdx.x] = y[i];
}
"""


@needs_nvrtc
@pytest.mark.parametrize(
    "arch",
    [arch if arch == "sm_90a" else pytest.param(arch, marks=pytest.mark.slow) for arch in GPUS],
)
def test_a_spill_would_be_noticed(arch):
    assert spills_in_a_loop({"spilling": SPILLING}, arch)
    size, spilled = local_memory({"spilling": SPILLING}, arch)
    assert size > 0 and spilled > 0


SPILLING_PRODUCTS = """
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
@pytest.mark.parametrize(
    "arch",
    [arch if arch == "sm_90a" else pytest.param(arch, marks=pytest.mark.slow) for arch in GPUS],
)
def test_a_spill_in_the_loop_of_products_would_be_noticed(arch):
    parts = {"ptx": source.read("common/ptx.cuh"), "spilling": SPILLING_PRODUCTS}
    assert spills_in_the_loop_of_products(parts, arch)
