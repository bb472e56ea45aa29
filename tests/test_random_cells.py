"""Cells drawn at random: their graphs, their C++ text and Triton's kernels, against PyTorch."""

import ctypes
import math
import random

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from flashrnn.cells import elman
from flashrnn.cells.graph import evaluate
from flashrnn.cells.render import render_cuda
from tests.emulation import Library, emulated, needs_compiler
from tests.fused import round_as_a_gpu
from tests.kernels.test_source import cell_alone, reference
from tests.kernels.test_triton import needs_triton
from tests.problems import call, gradients, random_inputs
from tests.random_cells import random_cell

pytestmark = pytest.mark.slow
rngs = st.randoms(use_true_random=False)
# A smaller cell is no simpler one: what fails is not shrunk. The same cells are drawn in each run:
# one that no run has met may have a derivative whose digits PyTorch's own kernels lack.
by_numbers = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


def some_inputs(mine, units, seed=0):
    """States, gates and gradients of the new states."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 * len(mine.states) + len(mine.gates)
    return list(torch.randn(count, units, generator=generator).double())


@by_numbers
@given(rng=rngs)
def test_graphs_are_the_cell_and_its_derivative(rng):
    mine = random_cell(rng)
    inputs = some_inputs(mine, 20)
    new, derivative = reference(mine, inputs)
    units = list(zip(*(x.tolist() for x in inputs), strict=True))
    S, graphs = len(mine.states), mine.graphs
    for graph, expected, count in (
        (graphs.forward, new, len(inputs) - S),
        (graphs.derivative, derivative, len(inputs)),
    ):
        found = [[float(x) for x in evaluate(graph, unit[:count])] for unit in units]
        found = torch.tensor(found, dtype=torch.float64).T
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


ENTRY = """
extern "C" void step_{0}(int units, const float* in, float* out) {{
    using cell_{0}::S, cell_{0}::G;
    for (int i = 0; i < units; ++i, in += 2 * S + G, out += 2 * S + G) {{
        const auto& states = *(const float(*)[S])in;
        const auto& gates = *(const float(*)[G])(in + S);
        cell_{0}::step(states, gates, *(float(*)[S])out, 0.0f);
        cell_{0}::derivative(states, gates, *(const float(*)[S])(in + S + G),
                             *(float(*)[S])(out + S), *(float(*)[G])(out + 2 * S), 0.0f);
    }}
}}
"""


@needs_compiler
def test_text_is_the_cell_to_float32_accuracy():
    """Of many cells in one program, which takes a second to compile for every ten."""
    cells = [random_cell(random.Random(k)) for k in range(40)]
    text = emulated(cell_alone(elman))
    for k, mine in enumerate(cells):
        text += f"namespace cell_{k} {{\n{render_cuda(mine)}\n}}\n{ENTRY.format(k)}"
    functions = Library(text).functions
    for k, mine in enumerate(cells):
        inputs = some_inputs(mine, 200, k)
        truth, rounded = (
            torch.cat(reference(mine, [x.to(dtype) for x in inputs])).double()
            for dtype in (torch.float64, torch.float32)
        )
        rows = torch.stack(inputs, 1).float().contiguous()
        out = torch.full((len(rows), truth.shape[0]), math.nan)
        getattr(functions, f"step_{k}")(
            len(rows), *(ctypes.c_void_p(x.data_ptr()) for x in (rows, out))
        )
        assert_near(out.T.double(), truth, rounded)


def assert_near(given, truth, rounded):
    """As near to the truth as float32 is, or near at all where a result is well conditioned."""
    allowed = 1e-4 * truth.abs() + 1e-5 + 100 * (rounded - truth).abs()
    assert ((given - truth).abs() <= allowed).all()


OPTIONS = [
    {},
    {"reverse": True},
    {"return_states": "h"},
    {"lengths": torch.tensor([3, 0])},
    {"reset": torch.tensor([[0, 1, 0], [1, 0, 1]]).bool()},
]


@needs_triton
# NumPy's, of units that are not there and of masked branches.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(by_numbers, max_examples=15)
@given(rng=rngs, D=st.sampled_from([1, 3, 4]), options=st.sampled_from(OPTIONS))
def test_kernels_of_triton_are_vanilla(interpreter_of_all, rng, D, options):
    """Outputs and the gradients of all that goes in."""
    mine, seed = random_cell(rng), rng.randrange(1000)
    inputs = random_inputs(mine, 2, 3, 2, D, torch.float32, seed=seed)
    found = []
    for leaves, backend in (
        (inputs.to(torch.float64), "vanilla"),
        (inputs, "vanilla"),
        (inputs, "triton"),
    ):
        outputs = call(mine, leaves, backend=backend, **options)
        # Of vanilla an output that depends on nothing requires no gradient.
        outputs = tuple(y + 0 * leaves.Wx.sum().to(y.dtype) for y in outputs)
        results = [*outputs, *gradients(outputs, leaves).values()]
        found.append(torch.cat([x.detach().double().flatten() for x in results]))
    truth, rounded, given = found
    # A step that rounding takes to the other side of a floor or a condition is another one.
    assume((truth - rounded).abs().max() < 1e-3)
    assert_near(given, truth, rounded)


@pytest.fixture(scope="module")
def interpreter_of_all():
    """Triton's interpreter, for all examples."""
    with pytest.MonkeyPatch.context() as patch:
        round_as_a_gpu(patch)
        yield
