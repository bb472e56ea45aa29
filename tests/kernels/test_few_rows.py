"""Products over few rows: of a layer's input, and the gradients that follow from the gates'."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashrnn import nn, recurrent_layer
from flashrnn.backends import cuda_fused, few_rows, protocols
from flashrnn.backends.fused import scans
from flashrnn.cells import resolve
from flashrnn.kernels import call
from flashrnn.kernels import few_rows as kernels
from flashrnn.problem import Problem
from tests.emulation import fused_emulation, needs_compiler, one_by_one  # noqa: F401
from tests.fused import PRODUCTS, poisoned, tf32  # noqa: F401
from tests.gpus import GPUS
from tests.layers import NAMES, layer_inputs, results
from tests.machine_code import local_memory, needs_nvrtc
from tests.nn.against import tensors
from tests.problems import relative_error, sparse
from tests.steps import by_steps, forget

CPU = torch.device("cpu")
# B, T, I, N and D: less than a tile of everything; several tiles and chunks of each dimension; rows
# that begin anywhere, or at 4 or 8 bytes; one step; one sequence.
SIZES = [
    (2, 3, 8, 1, 16),
    (23, 6, 136, 2, 72),
    (5, 7, 33, 2, 21),
    (3, 4, 66, 1, 70),
    (67, 1, 12, 3, 20),
    (1, 70, 16, 1, 136),
    # Sums over several chunks of rows.
    (9, 47, 33, 2, 21),
]
CHOICES = few_rows._taken, few_rows._input, few_rows._asked, few_rows.gives_R
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}


def problem_of(kind, B, T, N, D, dtype, **options):
    return Problem(resolve(kind).traced, B, T, N, D, dtype, CPU, needs_gradient=True, **options)


def random(*sizes, dtype=torch.float32, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transposed(x):
    """The same values, as a view of ``[T, B, I]``."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def with_gaps(x):
    """The same values in rows that lie further apart, from an odd address on."""
    *outer, I = x.shape  # noqa: E741
    room = torch.full((math.prod(outer) * (I + 3) + 1,), math.nan, dtype=x.dtype)
    view = room[1:].view(*outer, I + 3)[..., :I]
    return view.copy_(x)


@needs_compiler
@pytest.mark.parametrize(
    "layout", [lambda x: x, transposed, with_gaps], ids=["", "by_time", "gaps"]
)
@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_input_product(fused_emulation, poisoned, sizes, dtype, tf32, layout):  # noqa: F811
    B, T, I, N, D = sizes  # noqa: E741
    problem = problem_of("lstm", B, T, N, D, dtype)
    x, W = layout(random(B, T, I, dtype=dtype)), random(4, N, D, I, dtype=dtype, seed=1)
    # From an odd address on.
    bias = random(4 * N * D + 1, dtype=dtype, seed=2)[1:].view(4, N, D)
    truth = torch.einsum("bti,gndi->btgnd", x.double(), W.double())
    for plus, added in ((None, 0.0), (bias, bias.double())):
        Wx = few_rows.multiply(problem, protocols.Factors(x, W, bias=plus))
        assert relative_error(Wx, truth + added) <= tolerance(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_ring_of_fewer_chunks(fused_emulation, poisoned, monkeypatch, dtype):  # noqa: F811
    """As on GPUs with less shared memory, of a sum over many chunks."""
    monkeypatch.setattr(few_rows, "whole", lambda device: GPUS["sm_89"])
    few_rows._product_kernel.cache_clear()
    launched = []

    def keep(launches, zeros=None):
        launched.extend(launches)
        one_by_one(launches, zeros)

    monkeypatch.setattr(few_rows, "launch_in_turn", keep)
    problem = problem_of("lstm", 3, 2, 1, 17, dtype)
    x, W = random(3, 2, 1000, dtype=dtype), random(4, 1, 17, 1000, dtype=dtype, seed=1)
    Wx = few_rows.multiply(problem, protocols.Factors(x, W))
    ((_, shape, _),) = launched
    assert shape.shared_memory < GPUS["sm_89"].shared_memory
    truth = torch.einsum("bti,gndi->btgnd", x.double(), W.double())
    assert relative_error(Wx, truth) <= EPSILON[dtype]


def tolerance(dtype):
    by_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return 2**-10 if by_tf32 else EPSILON[dtype]


@needs_compiler
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("kind", ["lstm", "gru", sparse], ids=["lstm", "gru", "sparse"])
@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(
    fused_emulation,  # noqa: F811
    poisoned,  # noqa: F811
    monkeypatch,
    sizes,
    dtype,
    tf32,  # noqa: F811
    kind,
    shared,
):
    """All that follow from the gates' in one launch, of given gradients of these. Where CTAs share
    tiles, each sums over a chunk or two."""
    monkeypatch.setattr(kernels.plan, "_LEAST_CHUNKS", 1 if shared else 100)
    monkeypatch.setattr(kernels.plan, "_MOST_SHARES", 3)
    B, T, I, N, D = sizes  # noqa: E741
    problem = problem_of(kind, B, T, N, D, dtype)
    cell, S, G = problem.cell, len(problem.cell.states), len(problem.cell.gates)
    Gw, Gr, Gb = (list(cell.fed_by(source)) for source in ("Wx", "R", "b"))
    is_layer = Gw == list(range(Gw[0], Gw[0] + len(Gw)))
    x, W = transposed(random(B, T, I, dtype=dtype)), random(len(Gw), N, D, I, dtype=dtype, seed=1)
    d_gates, states = random(B, T, G, N, D, dtype=dtype, seed=2), random(S, B, T, N, D, dtype=dtype)
    # One start for all sequences, its heads far apart.
    initial = random(S, 1, 1, D, N, seed=3).transpose(3, 4).expand(-1, B, -1, -1, -1)
    d_bias = random(B, G, N, D, seed=4)
    found = {
        "d_R": torch.full((len(Gr), N, D, D), torch.nan, dtype=dtype),
        "d_b": torch.full((len(Gb), N, D), torch.nan, dtype=dtype),
    }
    given = {"initial": initial, "states": states, "d_gates": d_gates, "d_bias": d_bias}
    factors = None
    if is_layer:
        factors = protocols.Factors(x, W, needs_x=True, needs_W=True)
        given |= {"x": x, "W": W}
        found |= {"d_x": torch.full_like(x, torch.nan), "d_W": torch.full_like(W, torch.nan)}
        found["d_x"] = found["d_x"].contiguous()
    asked = few_rows.asked(problem, factors)
    if asked is None:
        asked = few_rows.Asked(True, False, False, (), 0, few_rows._precision(problem))
    tiles = few_rows.tiles_of(problem, asked)
    *_, of_R = tiles
    shares = {of_kind.shares for of_kind in tiles if of_kind.number}
    assert shares <= ({1, 2, 3} if shared else {1})
    if shared and B * T > 400:
        assert of_R.shares > 1
    _, counters, _, _, sums = few_rows.scratch(problem, asked)
    assert bool(counters) == any(of_kind.shares > 1 for of_kind in tiles)
    scratch = {
        "counters": torch.zeros(counters, 4, dtype=torch.int32),
        "sums": torch.full((sums, 4), torch.nan),
    }
    given |= {name: memory for name, memory in scratch.items() if len(memory)}
    addresses, layout = call.BACKWARD.read({**given, **found})
    kernel, shape, packing = few_rows.gradients(problem, asked, layout)
    one_by_one([(kernel, shape, packing(addresses))])

    of_gates = d_gates.double()
    before = torch.cat([initial[0].to(dtype), states[0, :, :-1]], 1).double()
    truths = {
        "d_R": torch.einsum("btgnd,btnp->gndp", of_gates[:, :, Gr], before),
        "d_b": d_bias.double().sum(0)[Gb],
    }
    if is_layer:
        truths["d_x"] = torch.einsum("btgnd,gndi->bti", of_gates[:, :, Gw], W.double())
        truths["d_W"] = torch.einsum("btgnd,bti->gndi", of_gates[:, :, Gw], x.double())
    for name, truth in truths.items():
        assert relative_error(found[name], truth) <= tolerance(dtype), name


@needs_compiler
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinite_factors(fused_emulation, poisoned, value):  # noqa: F811
    """In float32, whose products split their factors, they reach the sums that they are part of."""
    problem = problem_of("lstm", 4, 2, 1, 5, torch.float32)
    x, W = random(4, 2, 3), random(4, 1, 5, 3, seed=1)
    x[1, 1, 2] = value
    Wx = few_rows.multiply(problem, protocols.Factors(x, W))
    truth = torch.einsum("bti,gndi->btgnd", x, W)
    torch.testing.assert_close(Wx, truth, equal_nan=True)
    bias = random(4, 1, 5, seed=2)
    bias[2, 0, 3] = value
    Wx = few_rows.multiply(problem, protocols.Factors(x, W, bias=bias))
    torch.testing.assert_close(Wx, truth + bias, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("asked", [("x",), ("W",), ("R", "b"), NAMES], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", sparse], ids=["lstm", "gru", "sparse"])
@pytest.mark.parametrize(("N", "D"), [(2, 20), (1, 136)])
def test_a_layer(fused_emulation, poisoned, kind, N, D, asked):  # noqa: F811
    """Of small and of large heads, whichever gradients are asked for."""
    inputs = layer_inputs(kind, 3, 4, 9, N, D, torch.bfloat16)
    for leaf, name in zip(inputs, NAMES, strict=True):
        leaf.requires_grad_(name in asked)
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in inputs]
    given = results(recurrent_layer, inputs, asked, kind, "cuda_fused")
    truth = results(recurrent_layer, exact, asked, kind, "vanilla")
    plain = results(recurrent_layer, inputs, asked, kind, "vanilla")
    for found, right, near in zip(given, truth, plain, strict=True):
        assert relative_error(found, right) <= 2 * relative_error(near, right) + 2**-8


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_beside_a_scan_step_by_step(fused_emulation, poisoned, monkeypatch, dtype):  # noqa: F811
    """The product is a launch of its own; torch.nn's form of results is PyTorch's to make."""
    by_steps(monkeypatch)
    layer = nn.LSTM(9, 20, dtype=dtype, backend="cuda_fused")
    x = random(4, 3, 9, dtype=dtype)
    found, again = tensors(layer(x)), tensors(layer(x))
    forget()
    monkeypatch.undo()
    exact = torch.nn.LSTM(9, 20, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    for one, twice, right in zip(found, again, tensors(exact(x.double())), strict=True):
        assert torch.equal(one, twice)
        assert relative_error(one, right) <= 4 * EPSILON[dtype]


@needs_compiler
@pytest.mark.parametrize(("N", "D"), [(2, 20), (1, 136)])
def test_launches(fused_emulation, monkeypatch, N, D):  # noqa: F811
    """A layer's step is two launches in each direction, and PyTorch multiplies nothing."""
    inputs = layer_inputs("lstm", 3, 4, 9, N, D, torch.bfloat16)
    launched = []

    def count(launches, zeros=None):
        launched.append(len(launches))
        one_by_one(launches, zeros)

    monkeypatch.setattr(scans, "launch_in_turn", count)
    with torch.profiler.profile() as profile:
        results(recurrent_layer, inputs, NAMES, "lstm", "cuda_fused")
    assert launched == [2, 2]
    assert not {event.key for event in profile.key_averages()} & {"aten::mm", "aten::bmm"}


def turned(tensor):
    """The same values, the neighbours of each dimension but the first far apart."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.detach().permute(order).contiguous().permute(order)


@needs_compiler
@pytest.mark.parametrize("unpack", [turned, with_gaps, torch.clone], ids=["turned", "gaps", "same"])
def test_hooks_on_saved_tensors(fused_emulation, unpack):  # noqa: F811
    """What comes back may be laid out in any way."""
    inputs = layer_inputs("gru", 3, 4, 16, 1, 20, torch.bfloat16)
    expected = results(recurrent_layer, inputs, NAMES, "gru", "cuda_fused")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        given = results(recurrent_layer, inputs, NAMES, "gru", "cuda_fused")
    for found, right in zip(given, expected, strict=True):
        assert relative_error(found, right) <= 2**-7


@needs_compiler
def test_many_rows_are_left_to_the_library(fused_emulation, monkeypatch):  # noqa: F811
    """First the gradients, whose sums run over all rows, then the product as well."""
    problem = problem_of("lstm", 3, 4, 2, 20, torch.bfloat16)
    x, W = random(3, 4, 8, dtype=torch.bfloat16), random(4, 2, 20, 8, dtype=torch.bfloat16)
    factors = protocols.Factors(x, W, True, True)

    def taken(problem):
        for kept in CHOICES:
            kept.cache_clear()
        return cuda_fused.multiplies(problem, x, W), few_rows.asked(problem, factors) is not None

    assert taken(problem) == (True, True)
    of_gradients, of_product = kernels.plan._OF_GRADIENTS, kernels.plan._OF_PRODUCT
    monkeypatch.setitem(of_gradients, 2, of_gradients[2]._replace(most_of_pieces=3.0))
    assert taken(problem) == (True, False)
    monkeypatch.setitem(of_product, 2, of_product[2]._replace(most=2.5))
    assert taken(problem) == (False, False)
    for kept in CHOICES:
        kept.cache_clear()


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 40, 3000]), st.integers(1, 100_000)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([2, 4]),
)
def test_every_chunk_of_a_tile_is_one_ctas(products, itemsize):
    """The kernel gives each CTA of a tile equally many chunks but the last, which has some."""
    products = [kernels.Summed(*product) for product in products]
    tiles = kernels.shared(products, itemsize, GPUS["sm_90a"])
    for of_kind, (number, summed) in zip(tiles, products, strict=True):
        chunks = -(-summed * itemsize // 256)
        of_each = -(-chunks // of_kind.shares)
        assert of_kind.number == number and 1 <= of_kind.shares <= 32
        assert (of_kind.shares - 1) * of_each < chunks <= of_kind.shares * of_each
    counters, sums = kernels.scratch(tiles)
    shared = sum(of_kind.ctas for of_kind in tiles if of_kind.shares > 1)
    assert counters * 4 >= shared and sums * 4 == shared * 64 * 64


@needs_nvrtc
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
def test_compiles_nearly_without_spills(precision, arch):
    """A thread keeps a few constants in local memory on some architectures, and no sums."""
    for piece_bytes in (16, 4) if precision != "bfloat16" else (16, 4, 2):
        for program in (
            kernels.product(precision, piece_bytes, GPUS[arch]),
            kernels.gradients(resolve("lstm").traced, precision, piece_bytes, GPUS[arch]),
        ):
            assert local_memory(program.text, arch)[1] <= 256
