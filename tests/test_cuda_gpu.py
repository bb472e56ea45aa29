"""Backend ``cuda`` on a GPU."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from flashrnn import FlashRNNConfig
from tests.emulation import poisoned  # noqa: F401
from tests.problems import BUILT_IN, call, gradients, random_inputs, relative_error
from tests.test_cuda import sparse, strided

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _poisoned(poisoned):  # noqa: F811
    """See :func:`tests.emulation.poisoned`."""


def run(kind, inputs, **options):
    outputs = call(kind, inputs, **options)
    return outputs, gradients(outputs, inputs)


def check(kind, B, T, N, D, dtype, change=None, **options):
    """At most twice vanilla's error, or the bounds for 16-bit residuals and for float32."""
    config = FlashRNNConfig(**options)
    inputs = random_inputs(kind, B, T, N, D, dtype, "cuda")
    if change is not None:
        inputs = change(inputs)
    truth, right = run(kind, inputs.to(torch.float64), backend="vanilla", config=config)
    plain, theirs = run(kind, inputs, backend="vanilla", config=config)
    given, mine = run(kind, inputs, backend="cuda", config=config)
    allowed = 1e-5 if dtype == torch.float32 else 3e-3
    for x, y, z in zip(given, plain, truth, strict=True):
        assert relative_error(x, z) <= max(allowed, 2 * relative_error(y, z))
    allowed = 1e-5 if dtype == torch.float32 else 7e-3
    for name, z in right.items():
        error = relative_error(mine[name], z)
        assert error <= max(allowed, 2 * relative_error(theirs[name], z)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*BUILT_IN, sparse], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 16), (7, 2, 5, 40), (24, 64, 1, 96), (7, 64, 5, 41), (16, 64, 2, 320)],
    ids=str,
)
def test_equals_vanilla(kind, dtype, sizes):
    check(kind, *sizes, dtype)


@pytest.mark.parametrize("sizes", [(7, 777, 1, 40), (2, 3, 1, 4096), (256, 4, 1, 768)], ids=str)
def test_large(sizes):
    check("lstm", *sizes, torch.bfloat16)


@pytest.mark.parametrize("sizes", [(0, 3, 2, 16), (3, 0, 2, 16)], ids=str)
def test_empty(sizes):
    check("lstm", *sizes, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_recurrent_cut": True},
        {"gradient_recurrent_clipval": 0.05},
        {"forward_clipval": 0.3},
    ],
    ids=str,
)
def test_options(dtype, options):
    check("lstm", 5, 9, 2, 24, dtype, **options)


def test_any_strides():
    def change(inputs):
        return type(inputs)(**{name: strided(x) for name, x in inputs.tensors().items()})

    check("lstm", 3, 4, 2, 24, torch.bfloat16, change=change)


def test_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    inputs = random_inputs("lstm", 7, 16, 2, 48, torch.float32, "cuda")
    truth, right = run("lstm", inputs.to(torch.float64), backend="vanilla")
    given, mine = run("lstm", inputs, backend="cuda")
    assert 1e-6 < relative_error(given[0], truth[0]) < 1e-3
    assert all(relative_error(mine[name], right[name]) < 2e-3 for name in right)


@pytest.fixture
def expected():
    inputs = random_inputs("lstm", 16, 200, 4, 64, torch.bfloat16, "cuda")
    result = run("lstm", inputs, backend="cuda")
    torch.cuda.synchronize()
    return inputs, result


def same_again(inputs, result):
    outputs, found = run("lstm", inputs, backend="cuda")
    torch.cuda.current_stream().synchronize()
    same = [torch.equal(x, y) for x, y in zip(outputs, result[0], strict=True)]
    return all([*same, *(torch.equal(found[name], result[1][name]) for name in found)])


def test_same_bits_twice(expected):
    assert same_again(*expected)


@pytest.mark.parametrize("own_stream", [False, True])
def test_threads_at_once(expected, own_stream):
    good = []

    def work():
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            good.append(all(same_again(*expected) for _ in range(10)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 3


@pytest.mark.parametrize("used_before", [False, True])
def test_in_a_graph_of_the_users(used_before):
    sizes = (5, 35, 2, 72) if used_before else (5, 33, 2, 88)
    inputs = random_inputs("gru", *sizes, torch.bfloat16, "cuda")

    def step():
        states, last_states = call("gru", inputs, backend="cuda")
        return states, last_states, *torch.autograd.grad(states, inputs.Wx, states.detach())

    if used_before:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        inputs.Wx.mul_(0.5)
    graph.replay()
    given = [x.clone() for x in results]
    assert all(torch.equal(x, y) for x, y in zip(given, step(), strict=True))


FIRST = """
import time, torch
from tests.problems import call, random_inputs
inputs = random_inputs("lstm", 16, 1024, 12, 64, torch.bfloat16, "cuda")
torch.cuda.synchronize()
start = time.perf_counter()
states, _ = call("lstm", inputs, backend="cuda")
torch.autograd.grad(states.float().sum(), inputs.Wx)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def test_first_result_of_a_shape_is_there_soon(tmp_path):
    environment = {**os.environ, "FLASHRNN_CACHE_DIR": str(tmp_path)}

    def seconds():
        printed = subprocess.run(
            [sys.executable, "-c", FIRST],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return float(printed.stdout)

    # Uncached, then from the disk; both directions each, and the second with some room for it.
    assert seconds() < 3.0
    assert min(seconds(), seconds()) < 0.6
