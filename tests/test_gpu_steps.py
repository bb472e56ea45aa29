"""Scans of many sequences, step by step, on a GPU: library products and the cell's launches."""

import threading

import pytest
import torch

from flashrnn import Stepper, flashrnn
from flashrnn.backends import steps
from tests.fused import (  # noqa: F401
    DTYPES,
    OPTIONS,
    PRODUCTS,
    absent_gradients_are_zeros,
    all_strided,
    at_odd_addresses,
    contains_what_is_beyond_float16,
    hold_to_vanilla,
    others_keep_their_bits,
    poisoned,
    same_bits_from_a_graph,
    tf32,
)
from tests.patterns import follows_vanilla
from tests.problems import (
    BUILT_IN,
    call,
    gradients,
    random_inputs,
    relative_error,
    sparse,
    wide,
    widest,
)
from tests.steps import by_steps, forget

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned(poisoned):  # noqa: F811
    """See :func:`tests.fused.poisoned`."""


@pytest.fixture(params=["cuda", "cuda_fused"])
def backend(request, monkeypatch):
    """A backend that computes step by step wherever it can."""
    by_steps(monkeypatch)
    yield request.param
    forget()


@pytest.fixture
def products(monkeypatch):
    """What the library multiplies, in order."""
    found, multiply = [], steps.multiply

    def counted(left, right, product):
        found.append((*left.shape, right.shape[-1]))
        multiply(left, right, product)

    monkeypatch.setattr(steps, "multiply", counted)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse, wide, widest], ids=str)
@pytest.mark.parametrize("sizes", [(7, 5, 3, 136), (70, 9, 1, 768), (33, 64, 2, 256)], ids=str)
def test_equals_vanilla(backend, products, kind, dtype, sizes):
    B, T, N, D = sizes
    if kind is widest:
        if dtype == torch.float32 and backend == "cuda_fused":
            pytest.skip("20 gates of float32 fit no persistent kernel, and `auto` takes `cuda`")
        # Fixed bounds of 64 steps and more are of ordinary cells. Of this one's gradients vanilla
        # itself errs by 8e-3.
        T = min(T, 40)
    hold_to_vanilla(backend, kind, B, T, N, D, dtype, "cuda")
    assert len(products) == 2 * T


@pytest.mark.parametrize(
    ("kind", "sizes", "dtype"),
    [
        ("lstm", (642, 5, 1, 1408), torch.float16),
        ("lstm", (578, 9, 1, 1112), torch.float16),
        ("lstm", (4096, 3, 1, 512), torch.bfloat16),
        ("gru", (1024, 4, 1, 768), torch.bfloat16),
        ("slstm", (1000, 3, 2, 520), torch.bfloat16),
    ],
    ids=str,
)
def test_many_sequences(backend, kind, sizes, dtype):
    hold_to_vanilla(backend, kind, *sizes, dtype, "cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda_fused"])
def test_is_chosen_where_a_step_is_a_large_product(products, name):
    hold_to_vanilla(name, "lstm", 642, 5, 1, 1408, torch.float16, "cuda")
    forward, backward = [(1, 642, 1408, 5632)] * 5, [(1, 642, 5632, 1408)] * 5
    if name == "cuda":
        assert products == forward + backward
    elif "H200" in torch.cuda.get_device_name():
        # Forward another kernel is faster.
        assert products == backward
    products.clear()
    hold_to_vanilla(name, "lstm", 16, 5, 1, 1408, torch.float16, "cuda")
    assert not products


@pytest.mark.parametrize("directions", [(False,), (True,)], ids=["forward", "backward"])
def test_one_direction_alone(monkeypatch, directions):
    by_steps(monkeypatch, directions)
    hold_to_vanilla("cuda_fused", "lstm", 70, 9, 1, 768, torch.bfloat16, "cuda")
    forget()


@pytest.mark.parametrize("tf32", [True], indirect=True)
def test_tf32(backend, tf32):  # noqa: F811
    inputs = random_inputs("lstm", 70, 16, 1, 256, torch.float32, "cuda")
    exact = inputs.to(torch.float64)
    truth, given = call("lstm", exact, backend="vanilla"), call("lstm", inputs, backend=backend)
    assert 1e-6 < relative_error(given[0], truth[0]) < 1e-3
    right, mine = gradients(truth, exact), gradients(given, inputs)
    assert all(relative_error(mine[name], right[name]) < 2e-3 for name in right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend, dtype, options):
    hold_to_vanilla(backend, "lstm", 5, 9, 2, 152, dtype, "cuda", **options)


@pytest.mark.parametrize("change", [all_strided, at_odd_addresses])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_layout(backend, dtype, change):
    hold_to_vanilla(backend, "gru", 35, 4, 2, 136, dtype, "cuda", change=change)


def results(backend, inputs):
    outputs = call("lstm", inputs, backend=backend)
    return [x.detach() for x in (*outputs, *gradients(outputs, inputs).values())]


@pytest.mark.parametrize("sizes", [(9, 20, 2, 136), (1024, 5, 1, 1024)], ids=str)
def test_same_bits_twice(backend, sizes):
    inputs = random_inputs("lstm", *sizes, torch.bfloat16, "cuda")
    first = results(backend, inputs)
    assert all(map(torch.equal, results(backend, inputs), first))
    with torch.no_grad():
        assert all(map(torch.equal, call("lstm", inputs, backend=backend), first))


@pytest.mark.parametrize("B", [5, 300, 1024])
def test_parts_of_a_sequence_have_the_bits_of_the_whole(backend, B):
    """The library's products too, whose rows of h lie T rows apart."""
    inputs = random_inputs("lstm", B, 64, 1, 768, torch.bfloat16, "cuda")
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    whole, last = flashrnn(Wx, R, b, states, "lstm", backend)
    found, carried = [], states
    for first, end in ((0, 1), (1, 2), (2, 9), (9, 64)):
        part, carried = flashrnn(Wx[:, first:end], R, b, carried, "lstm", backend)
        found.append(part)
    assert torch.equal(torch.cat(found, 2), whole) and torch.equal(carried, last)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_step_at_a_time_gives_the_bits_of_a_sequence(backend, kind):
    inputs = random_inputs(kind, 300, 5, 1, 768, torch.bfloat16, "cuda")
    Wx, R, b, states = (x.detach() for x in inputs.tensors().values())
    every, last = flashrnn(Wx, R, b, states, kind, backend)
    stepper, carried = Stepper(R, b, kind, backend), states.squeeze(2).clone()
    for t in range(5):
        stepper(Wx[:, t], carried, out=carried)
        assert torch.equal(carried.bfloat16(), every[:, :, t])
    assert torch.equal(carried, last.squeeze(2))


def test_absent_gradients(backend):
    assert absent_gradients_are_zeros(backend, 9, 3, 2, 136, device="cuda")


def test_a_clip_contains_what_is_beyond_float16(backend):
    contains_what_is_beyond_float16(backend, 136, "cuda")


@pytest.mark.parametrize(("dtype", "tf32"), PRODUCTS, indirect=["tf32"])
def test_sequences_do_not_meet(backend, dtype, tf32):  # noqa: F811
    for kind, where in (("slstm", "Wx"), ("lstm", "states")):
        assert others_keep_their_bits(backend, 17, 136, dtype, "cuda", kind, where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("clipval", [None, 1.0])
def test_finite_infinite_and_nan_where_vanilla_has_them(backend, dtype, clipval):
    follows_vanilla(backend, 5, 3, 2, 136, dtype=dtype, clipval=clipval, device="cuda")


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
def test_in_a_graph_of_the_users(backend):
    inputs = random_inputs("lstm", 70, 9, 2, 256, torch.bfloat16, "cuda")

    def run():
        states, last_states = call("lstm", inputs, backend=backend)
        return states, last_states, *torch.autograd.grad(states, inputs.Wx, states.detach())

    run()
    assert same_bits_from_a_graph(run, inputs)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node")
def test_threads_and_streams(backend):
    """The library's handles are a thread's own, its work space a stream's."""
    inputs = random_inputs("lstm", 200, 40, 1, 512, torch.bfloat16, "cuda")
    expected, good = results(backend, inputs), []
    torch.cuda.synchronize()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                found = results(backend, inputs)
                torch.cuda.current_stream().synchronize()
                good.append(all(map(torch.equal, found, expected)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_second_gpu_while_the_first_is_current(backend):
    hold_to_vanilla(backend, "lstm", 70, 5, 2, 136, torch.bfloat16, "cuda:1")
    torch.cuda._sleep(10**10)
    hold_to_vanilla(backend, "lstm", 70, 5, 2, 136, torch.bfloat16, "cuda:1")
    torch.cuda.synchronize()
