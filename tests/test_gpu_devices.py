"""Contexts, devices and what many calls leave behind, on a GPU; see also test_devices.py."""

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashrnn import FlashRNNConfig, calls, cell, flashrnn
from flashrnn.backends import cuda, cuda_fused, steps, tables
from flashrnn.backends.fused import plans, scans
from flashrnn.cells import lstm
from flashrnn.jit import context, launch, nvrtc
from flashrnn.kernels.per_step import runs
from flashrnn.problem import Problem
from tests.fused import hold_to_vanilla
from tests.gpus import alone
from tests.problems import call, gradients, random_inputs

pytestmark = pytest.mark.gpu

needs_green = pytest.mark.skipif(
    not hasattr(torch._C, "_CUDAGreenContext"), reason="needs a PyTorch with green contexts"
)


def current():
    """The driver's current context, and how many multiprocessors it has."""
    driver = context.driver()
    (found,) = context.check(driver.cuCtxGetCurrent())
    return int(found), context.multiprocessors(0, 0) if int(found) else None


class Green:
    """PyTorch's green context of a few multiprocessors, current within ``with``."""

    def __init__(self, multiprocessors):
        from torch.cuda.green_contexts import GreenContext

        torch.zeros((), device="cuda")
        self.context = GreenContext.create(num_sms=multiprocessors, device_id=0)

    def __enter__(self):
        torch.cuda.synchronize()
        self.context.set_context()

    def __exit__(self, *_):
        torch.cuda.synchronize()
        self.context.pop_context()


# One head over several thread blocks, by every way to exchange, and one in a block.
SIZES = [(16, 20, 1, 768), (64, 9, 3, 256), (256, 9, 1, 768), (200, 9, 2, 520), (16, 20, 4, 64)]


@needs_green
@pytest.mark.parametrize("backend", ["cuda_fused", "cuda"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("multiprocessors", [8, 16, 64])
def test_in_a_green_context(backend, sizes, multiprocessors):
    """A plan that does not fit there is replaced by one that does, with right results."""
    inputs = random_inputs("lstm", *sizes, torch.bfloat16, "cuda")
    with torch.no_grad(), Green(multiprocessors):
        before = current()
        assert before[1] <= multiprocessors + 8
        if backend == "cuda_fused" and multiprocessors == 8 and sizes[3] == 768:
            # Eight multiprocessors hold less than a third of its R.
            with pytest.raises(ValueError, match="does not find room on this GPU"):
                call("lstm", inputs, backend=backend)
            backend = "auto"
        given = call("lstm", inputs, backend=backend)
        assert current() == before
        torch.cuda.synchronize()
    truth = call("lstm", inputs.to(torch.float64), backend="vanilla")
    plain = call("lstm", inputs, backend="vanilla")
    for mine, near, exact in zip(given, plain, truth, strict=True):
        allowed = 2 * (near.double() - exact).norm() + 1e-6 * exact.norm()
        assert (mine.double() - exact).norm() <= allowed
    hold_to_vanilla(backend, "lstm", *sizes, torch.bfloat16, "cuda")


@needs_green
def test_on_a_green_contexts_stream():
    """The context that is current is the primary one, the stream's has few multiprocessors."""
    green = Green(16)
    if not hasattr(green.context, "Stream"):
        pytest.skip("needs a PyTorch whose green contexts have streams")
    inputs = random_inputs("lstm", 16, 20, 1, 768, torch.bfloat16, "cuda")
    with torch.no_grad():
        expected = call("lstm", inputs, backend="vanilla")
        torch.cuda.synchronize()
        with torch.cuda.stream(green.context.Stream()):
            given = call("lstm", inputs, backend="cuda_fused")
        torch.cuda.synchronize()
    assert (given[0].float() - expected[0].float()).abs().max() < 0.05


@needs_green
def test_auto_takes_what_has_room_in_a_green_context():
    inputs = random_inputs("lstm", 4, 3, 1, 2048, torch.bfloat16, "cuda")
    with torch.no_grad(), Green(8):
        call("lstm", inputs)
        with pytest.raises(ValueError, match="2048 units"):
            call("lstm", inputs, backend="cuda_fused")
    with torch.no_grad():
        call("lstm", inputs, backend="cuda_fused")


@pytest.mark.parametrize("backend", ["cuda_fused", "cuda"])
@pytest.mark.parametrize("D", [64, 256])
def test_a_threads_first_call_leaves_the_callers_context(backend, D):
    """Of green contexts, too; and a thread that has none gets the primary one."""
    inputs = random_inputs("lstm", 4, 3, 1, D, torch.bfloat16, "cuda")
    found = []

    def work():
        with torch.no_grad():
            call("lstm", inputs, backend=backend)
            found.append(current()[1])
            torch.cuda.synchronize()

    def work_in_green():
        with torch.no_grad(), Green(16):
            before = current()
            call("lstm", inputs, backend=backend)
            found.append(current() == before)

    works = [work, work_in_green] if hasattr(torch._C, "_CUDAGreenContext") else [work]
    for one in works:
        thread = threading.Thread(target=one)
        thread.start()
        thread.join()
    count = torch.cuda.get_device_properties(0).multi_processor_count
    assert found == [count, True][: len(works)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["cuda_fused", "triton", "cuda"])
def test_a_second_gpu_while_a_context_of_the_first_is_current(backend):
    inputs = random_inputs("lstm", 4, 3, 1, 64, torch.bfloat16, "cuda:1")
    with torch.no_grad():
        call("lstm", inputs, backend=backend)
        before = current()
        call("lstm", inputs, backend=backend)
    assert current() == before and torch.cuda.current_device() == 0
    hold_to_vanilla(backend, "lstm", 4, 3, 1, 64, torch.bfloat16, "cuda:1")


def test_the_driver_tells_clusters():
    """As many as it launched at once on an H100 and an H200, or nearly."""
    device = torch.device("cuda", 0)
    major = torch.cuda.get_device_capability(device)[0]
    clusters = plans.gpu_of(Problem(lstm.traced, 1, 1, 1, 256, torch.bfloat16, device)).clusters
    if major not in (9, 10):
        assert clusters == ()
        return
    count = torch.cuda.get_device_properties(device).multi_processor_count
    assert len(clusters) == 17 and list(clusters[2:]) == sorted(clusters[2:], reverse=True)
    assert all(size * clusters[size] <= count for size in range(2, 17))
    if count == 132:
        assert clusters[2] >= 60 and clusters[8] >= 14 and clusters[16] >= 6


# ---- what stays


def test_a_graph_of_the_users_outlives_its_kernels_in_the_caches():
    """They are forgotten, and what is forgotten is unloaded; but not these."""
    inputs = random_inputs("lstm", 4, 9, 2, 64, torch.bfloat16, "cuda")
    graphs = []
    with torch.no_grad():
        for backend in ("cuda_fused", "cuda"):
            expected = call("lstm", inputs, backend=backend)[0].clone()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                given = call("lstm", inputs, backend=backend)[0]
            graphs.append((graph, given, expected))
    _forget()
    for graph, given, expected in graphs:
        given.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(given, expected)


def test_unloading_does_not_disturb_another_threads_capture():
    inputs = random_inputs("lstm", 4, 9, 2, 64, torch.bfloat16, "cuda")
    x = torch.ones(8, device="cuda")
    with torch.no_grad():
        expected = call("lstm", inputs, backend="cuda_fused")[0].clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            given = call("lstm", inputs, backend="cuda_fused")[0]
            thread = threading.Thread(target=_forget)
            thread.start()
            thread.join()
            x.add_(1)
    given.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(given, expected) and x[0] == 2


def _forget():
    """Drop every kernel, and load so many that those before are unloaded."""
    of_cuda = cuda._stepper, cuda._shared_stepper, cuda._program
    for cached in (*cuda_fused.KERNELS, *steps.KERNELS, *tables.KERNELS, *of_cuda):
        cached.cache_clear()
    calls.kept.clear()
    runs._steppers.clear()
    gc.collect()
    parts = {"k": 'extern "C" __global__ void k() {}'}
    cubin = nvrtc.compile_program(parts, launch.architecture(0))
    for _ in range(2 * launch._MOST_FORGOTTEN):
        launch.Program(cubin, ["k"], 0)


@alone
def test_memory_and_time_of_many_calls_level_off():
    """New sizes above all; new clip values, a few dozen new cells, equal cells made anew."""

    def made(factor):
        @cell(states=("h",), gates=("g",), name=f"scaled_{factor}")
        def scaled(states, gates):
            return (torch.tanh(factor * gates[0]),)

        return scaled

    new = [made(1 + k / 64) for k in range(30)]
    numbers = torch.Generator().manual_seed(0)

    def draw(most):
        return int(torch.randint(1, most, (), generator=numbers))

    count, seconds, free, resident = 1500, [], [], []
    # All tilings of the sizes below, once, and PyTorch's own pools.
    for k in range(-300, count):
        if k >= 0 and k % (count // 3) == 0:
            torch.cuda.synchronize()
            free.append(torch.cuda.mem_get_info()[0])
            resident.append(_resident())
            start = time.perf_counter()
        B, T, D = draw(256), draw(40), (64, 256)[k % 2]
        config = FlashRNNConfig(forward_clipval=1 + k / 7) if k > 0 and k % 5 == 0 else None
        function = new[k % len(new)] if k % 50 == 7 else made(1.5) if k % 5 == 1 else "elman"
        Wx = torch.zeros(B, T, 1, 1, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        R = torch.zeros(1, 1, D, D, device="cuda", dtype=torch.bfloat16)
        b = torch.zeros(1, 1, D, device="cuda", dtype=torch.bfloat16)
        backend = ("cuda", "cuda_fused")[k // 2 % 2]
        states, _ = flashrnn(Wx, R, b, function=function, config=config, backend=backend)
        states.sum().backward()
        if k >= 0 and k % (count // 3) == count // 3 - 1:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    torch.cuda.empty_cache()
    free.append(torch.cuda.mem_get_info()[0])
    resident.append(_resident())
    assert seconds[2] <= 1.5 * seconds[0], seconds
    assert free[1] - free[3] <= 300 << 20, free
    assert resident[3] - resident[1] <= 300 << 20, resident


def _resident():
    """Bytes of memory that the process has."""
    rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if row.startswith("VmRSS")]
    return 1024 * int(row.split()[1])


def test_equal_cells_made_anew_share_their_kernels():
    inputs = random_inputs("lstm", 4, 3, 1, 40, torch.bfloat16, "cuda")
    gradients(call("lstm", inputs, backend="cuda_fused"), inputs)
    before = scans.scan_kernel.cache_info().misses
    problem = Problem(
        replace(lstm.traced), 4, 3, 1, 40, torch.bfloat16, torch.device("cuda", 0), True
    )
    with torch.no_grad():
        states = torch.zeros(2, 4, 1, 1, 40, device="cuda")
        cuda_fused.forward(problem, inputs.Wx, inputs.R, inputs.b, states)
    assert scans.scan_kernel.cache_info().misses == before
