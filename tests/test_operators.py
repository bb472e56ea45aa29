"""What PyTorch does with a call: transforms, tensors of every kind, compiled and saved programs.

Right, or refused by name, on every backend: nothing goes past unnoticed. The fused ones are run by
Triton's interpreter.
"""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from flashrnn import FlashRNNConfig, cell, flashrnn
from tests.kernels.test_triton import interpreter, needs_triton  # noqa: F401
from tests.problems import call, gradients, random_inputs, relative_error, sparse

D = 4
R, b = torch.zeros(1, 1, D, D), torch.zeros(1, 1, D)
x = torch.ones(1, 2, 1, 1, D)
CLIP = FlashRNNConfig(gradient_recurrent_clipval=0.5)
CALL_REFUSED = "cannot do this call: it is within a transform of torch.func"


@pytest.fixture(params=["vanilla", pytest.param("triton", marks=needs_triton)])
def backend(request, interpreter):  # noqa: F811
    return request.param


@pytest.fixture
def uncompiled():
    torch.compiler.reset()


def elman(Wx, backend="vanilla", config=None):
    return flashrnn(Wx, R, b, function="elman", backend=backend, config=config)[0]


def dual(f, primal, tangent):
    """As torch.func.jvp, by the functions beneath it."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(primal, tangent)))


# tanh' of 1, at 8 units and steps that R = 0 keeps apart.
SLOPE = 1 - torch.tanh(torch.tensor(1.0)) ** 2

TRANSFORMS = {
    "jvp": lambda f: torch.func.jvp(f, (x,), (x,))[1].sum(),
    "dual": lambda f: dual(f, x, x).tangent.sum(),
    "jacfwd": lambda f: torch.func.jacfwd(f)(x).sum(),
    "jacrev": lambda f: torch.func.jacrev(f)(x).sum(),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(x).sum(),
    "vjp": lambda f: torch.func.vjp(f, x)[1](torch.ones(1, 1, 2, 1, D))[0].sum(),
    "vmap": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]).sum(),
    "linearize": lambda f: torch.func.linearize(f, x)[1](x).sum(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # PyTorch's own.
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_right_or_refused(backend, transform):
    if backend == "vanilla":
        torch.testing.assert_close(transform(elman), 8 * SLOPE)
    else:
        with pytest.raises(ValueError, match=f"'{backend}' {CALL_REFUSED}"):
            transform(lambda x: elman(x, backend))
    # "auto" takes the one that can.
    torch.testing.assert_close(transform(lambda x: elman(x, "auto")), 8 * SLOPE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_a_clipped_gradient(name):
    """Backward they clip as ever; forward there is nothing to clip, and they say so."""
    if name in ("jvp", "dual", "jacfwd", "linearize"):
        with pytest.raises(NotImplementedError, match="gradient_recurrent_clipval clips gradients"):
            TRANSFORMS[name](lambda x: elman(x, config=CLIP))
    else:
        given = TRANSFORMS[name](lambda x: elman(x, config=CLIP))
        torch.testing.assert_close(given, 8 * SLOPE)


@pytest.mark.parametrize("clipval", [None, 1e-3])
def test_functional_gradients_are_those_of_autograd(clipval):
    inputs = random_inputs("lstm", 2, 5, 2, 6)
    config = FlashRNNConfig(gradient_recurrent_clipval=clipval)
    leaves = [x.detach() for x in inputs.tensors().values()]
    expected = torch.autograd.grad(
        call("lstm", inputs, config=config)[0].square().sum(), inputs.tensors().values()
    )

    def loss(*leaves):
        return flashrnn(*leaves, config=config, backend="vanilla")[0].square().sum()

    given = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*leaves)
    assert all(map(torch.allclose, given, expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("where", ["around", "within"])
def test_transforms_and_compilation(backend, uncompiled, where):
    def given(f):
        if where == "around":
            return torch.compile(lambda x: torch.func.jvp(f, (x,), (x,))[1], backend="aot_eager")(x)
        return torch.func.jvp(torch.compile(f, backend="aot_eager"), (x,), (x,))[1]

    if backend == "vanilla":
        torch.testing.assert_close(given(elman).sum(), 8 * SLOPE)
    else:
        with pytest.raises(Exception, match=CALL_REFUSED):
            given(lambda x: elman(x, backend))
    torch.testing.assert_close(given(lambda x: elman(x, "auto")).sum(), 8 * SLOPE)


@needs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_operator_in_a_saved_graph_refuses_a_derivative_forward(interpreter):  # noqa: F811
    """It would give zeros: nothing of the package but the operator is called then."""
    program = torch.export.export(Elman("triton"), (x,)).module()
    torch.testing.assert_close(program(x).sum(), 8 * torch.tanh(torch.tensor(1.0)))
    for transform in (torch.func.jvp, dual):
        with pytest.raises(NotImplementedError, match="'triton' has no derivative forward"):
            transform(program, *(((x,), (x,)) if transform is torch.func.jvp else (x, x)))


@needs_triton
def test_batched_gradients_are_right(interpreter):  # noqa: F811
    """vmap over the backward pass, as torch.autograd's is_grads_batched has it."""
    inputs = random_inputs("lstm", 2, 3, 1, 8, torch.float32)
    weights = torch.randn(3, 2, 2, 3, 1, 8)
    given, expected = (
        torch.autograd.grad(
            call("lstm", inputs, backend=name)[0], inputs.Wx, weights, is_grads_batched=True
        )[0]
        for name in ("triton", "vanilla")
    )
    torch.testing.assert_close(given, expected)


# Tensors whose memory is not their value


def negated(tensor):
    """The tensor's negative, as a view that nobody has computed."""
    view = torch.complex(torch.zeros_like(tensor), tensor).conj().imag
    assert view.is_neg()
    return view


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **_):
        return f"Wrapper({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class Named(torch.Tensor):
    """A subclass that changes nothing."""


KINDS = {
    "negated": (negated, -1),
    "wrapper": (Wrapper, 1),
    "subclass": (lambda x: x.as_subclass(Named), 1),
    "parameter": (lambda x: torch.nn.Parameter(x), 1),
    "functional": (torch._to_functional_tensor, 1),
    "zeros": (lambda x: torch._efficientzerotensor(x.shape), 0),
}


@pytest.mark.parametrize("argument", ["Wx", "R", "b", "states"])
@pytest.mark.parametrize(("kind", "factor"), KINDS.values(), ids=KINDS)
def test_tensors_of_every_kind_mean_their_values(backend, kind, factor, argument):
    leaves = random_inputs("lstm", 2, 3, 2, 5, torch.float32).tensors()
    leaves = {name: x.detach() for name, x in leaves.items()}
    with torch.no_grad():
        expected = flashrnn(**leaves | {argument: factor * leaves[argument]}, backend="vanilla")
        given = flashrnn(**leaves | {argument: kind(leaves[argument])}, backend=backend)
    for found, right in zip(given, expected, strict=True):
        plain = (
            torch._from_functional_tensor(found) if torch._is_functional_tensor(found) else found
        )
        torch.testing.assert_close(plain.as_subclass(torch.Tensor), right)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("kind", ["negated", "wrapper", "subclass", "zeros"])
def test_incoming_gradients_of_every_kind_mean_their_values(backend, kind, output):
    make, factor = KINDS[kind]
    inputs = random_inputs("lstm", 2, 3, 2, 5, torch.float32)
    outputs, plain = (call("lstm", inputs, backend=name) for name in (backend, "vanilla"))
    weights = torch.randn_like(outputs[output])
    leaves = list(inputs.tensors().values())
    given = torch.autograd.grad(outputs[output], leaves, make(weights))
    expected = torch.autograd.grad(plain[output], leaves, factor * weights)
    for found, right in zip(given, expected, strict=True):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), right, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of prototypes.
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.to_sparse(), "Wx is a tensor of layout sparse_coo"),
        (lambda x: torch.nested.nested_tensor([x[0], x[0]]), "Wx is a tensor of layout nested"),
        (
            lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged),
            "Wx is a tensor of layout nested",
        ),
        (lambda x: x.to_mkldnn(), "Wx is a tensor of layout _mkldnn"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "Wx torch.quint8"),
        (lambda x: x + 0j, "Wx torch.complex64"),
    ],
    ids=["sparse", "nested", "jagged", "mkldnn", "quantized", "complex"],
)
def test_tensors_that_are_not_dense_are_refused(backend, make, words):
    with pytest.raises(TypeError, match=words):
        elman(make(x), backend)


# Compiled programs


@needs_triton
@pytest.mark.slow
def test_a_captured_value_that_changes_after_compilation_is_refused(interpreter, uncompiled):  # noqa: F811
    """What torch.compile has taken for a constant is compared at each call."""
    factor = [2.0]
    mine = cell(states=("h",), gates=("g",))(lambda s, g: (g[0] * factor[0],))

    def step(x, backend):
        return flashrnn(x, R, b, function=mine, backend=backend)[0]

    compiled = torch.compile(step, backend="aot_eager")
    for value in (2.0, 3.0, 4.0):
        factor[0] = value
        assert compiled(x, "vanilla").flatten()[0] == value
        assert step(x, "triton").flatten()[0] == value
        torch.compiler.reset()
        assert compiled(x, "triton").flatten()[0] == value
        factor[0] = 7.0
        with pytest.raises(RuntimeError, match="captures a Python value that has changed"):
            compiled(x, "triton")


@pytest.mark.slow
def test_a_cell_that_looks_at_shapes_is_refused_by_the_compiler_too(backend, uncompiled):
    mine = cell(states=("h",), gates=("g",))(lambda s, g: (g[0] / g[0].shape[-1],))
    compiled = torch.compile(
        lambda x: flashrnn(x, R, b, function=mine, backend=backend)[0], backend="eager"
    )
    with pytest.raises(Exception, match="looks at a tensor's shape"):
        compiled(x)


# Saved programs


class Elman(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, Wx):
        return elman(Wx, self.backend)


class Own(torch.nn.Module):
    """Of gates that R or b does not feed, with parameters of its own."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        leaves = random_inputs(sparse, 2, 3, 2, 5, torch.float32).tensors()
        leaves.pop("Wx")
        for name, leaf in leaves.items():
            self.register_parameter(name, torch.nn.Parameter(leaf.detach()))

    def forward(self, Wx):
        states, last_states = flashrnn(
            Wx, self.R, self.b, self.states, function=sparse, backend=self.backend
        )
        return states, last_states


LOADED = """
import sys, torch
import flashrnn
program, inputs = sys.argv[1:]
Wx, expected = torch.load(inputs)
given = torch.export.load(program).module()(Wx)
print(all(map(torch.equal, given, expected)))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_a_saved_program_runs_in_a_new_process(backend, uncompiled, tmp_path, strict):
    """Nothing is registered there: the program has all of the cell."""
    module, Wx = Own(backend), random_inputs(sparse, 2, 3, 2, 5, torch.float32).Wx.detach()
    program = torch.export.export(module, (Wx,), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((Wx, [y.detach() for y in module(Wx)]), tmp_path / "inputs.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADED]
    command += [str(tmp_path / "program.pt2"), str(tmp_path / "inputs.pt")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.9's loader.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_program_without_steps_is_saved_too(uncompiled, tmp_path):
    program = torch.export.export(Elman("vanilla"), (x[:, :0],))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    assert loaded(x[:, :0]).shape == (1, 1, 0, 1, D)


@needs_triton
def test_gradients_by_the_operator_are_those_of_the_fast_path(interpreter):  # noqa: F811
    inputs = random_inputs("gru", 2, 5, 2, 8, torch.float32)
    outputs = call("gru", inputs, backend="triton")
    expected = gradients(outputs, inputs)
    wrapped = flashrnn(
        **inputs.tensors() | {"b": inputs.b.as_subclass(Named)}, function="gru", backend="triton"
    )
    found = gradients(tuple(y.as_subclass(torch.Tensor) for y in wrapped), inputs)
    assert all(relative_error(found[name], expected[name]) == 0 for name in expected)


# ---- what records operators with symbols in place of sizes


OPTIONS_OF_SEQUENCES = {
    "none": ({}, {}),
    "lengths": ({"lengths": torch.tensor([3, 2])}, {"lengths": torch.tensor([1, 4, 2])}),
    "reset": ({"reset": torch.eye(2, 3).bool()}, {"reset": torch.eye(3, 4).bool()}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@needs_triton
@pytest.mark.parametrize("options", OPTIONS_OF_SEQUENCES.values(), ids=OPTIONS_OF_SEQUENCES)
def test_a_program_of_jit_trace_serves_other_batches(interpreter, options):  # noqa: F811
    """Of other sizes, values and options, with gradients."""

    def run(Wx, R, b, *given):
        return flashrnn(
            Wx, R, b, backend="triton", function="gru", **dict(zip(options[0], given, strict=True))
        )

    first, second = (
        (*list(random_inputs("gru", B, T, 2, D, torch.float32, seed=B).tensors().values())[:3],)
        for B, T in ((2, 3), (3, 4))
    )
    given = (*first, *options[0].values())
    program = torch.jit.trace(run, given, check_trace=False)
    results = []
    for by in (program, run):
        outputs = by(*second, *options[1].values())
        weights = [torch.full_like(y, 0.5) for y in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, second, weights)])
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@needs_triton
def test_what_jit_trace_cannot_record_is_refused(interpreter):  # noqa: F811
    Wx = torch.ones(1, 2, 1, 1, D)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace records no heads that run b"):
        torch.jit.trace(lambda Wx: flashrnn(Wx, R, b, None, "elman", "triton", reverse=True), (Wx,))


@needs_triton
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_graphs_of_make_fx(interpreter, mode):  # noqa: F811
    graph = make_fx(lambda Wx: elman(Wx, "triton"), tracing_mode=mode, _allow_non_fake_inputs=True)
    graph = graph(torch.randn(2, 3, 1, 1, D))
    Wx = torch.randn(4, 5, 1, 1, D) if mode == "symbolic" else torch.randn(2, 3, 1, 1, D)
    assert torch.equal(graph(Wx), elman(Wx, "triton"))
