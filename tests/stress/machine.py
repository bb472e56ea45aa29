"""What else goes on on the machine: other kernels, streams, graphs, processes, threads, contexts.

Every result is held to the bits that the same call gives alone.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashrnn import Cell
from tests.problems import Inputs, call, random_inputs, random_weights, relative_error
from tests.stress.cells import new_cell
from tests.stress.fuzz import same_bits

# Every regime of every backend: a head in a block, in a cluster, over the grid, and so on.
PROBLEMS: dict[str, list[tuple[str, tuple[int, int, int, int], torch.dtype]]] = {
    "cuda_fused": [
        ("lstm", (16, 64, 12, 64), torch.bfloat16),
        ("slstm", (7, 40, 2, 128), torch.float32),
        ("lstm", (16, 64, 3, 256), torch.bfloat16),
        ("gru", (9, 30, 1, 320), torch.float16),
        ("lstm", (16, 64, 1, 768), torch.bfloat16),
        ("lstm", (5, 20, 1, 512), torch.float32),
        ("lstm", (250, 9, 1, 512), torch.bfloat16),
        ("gru", (260, 6, 1, 1000), torch.float16),
        ("lstm", (9, 16, 1, 2048), torch.bfloat16),
    ],
    "triton": [
        ("lstm", (16, 64, 12, 64), torch.bfloat16),
        ("gru", (9, 33, 2, 128), torch.float32),
    ],
    "cuda": [
        ("lstm", (16, 64, 12, 64), torch.bfloat16),
        ("gru", (9, 150, 1, 330), torch.float32),
        ("lstm", (40, 20, 1, 1024), torch.float16),
    ],
}


@dataclass
class Run:
    """A problem, and what its results are when nothing else goes on."""

    name: str
    backend: str
    kind: str | Cell
    inputs: Inputs
    weights: list[Tensor]
    expected: list[Tensor]

    def again(self) -> list[Tensor]:
        """Outputs and gradients, without the graph, whose nodes would tie them to a stream."""
        outputs = call(self.kind, self.inputs, backend=self.backend)
        leaves = list(self.inputs.tensors().values())
        found = torch.autograd.grad(outputs, leaves, self.weights)
        return [*(x.detach() for x in outputs), *found]

    def hold(self, found: list[Tensor]) -> None:
        for k, (x, y) in enumerate(zip(found, self.expected, strict=True)):
            different = 0 if same_bits(x, y) else int((x != y).sum())
            assert same_bits(x, y), (
                f"{self.name}: result {k} has {different} elements of other bits"
            )


def prepared(
    backend: str,
    kind: str | Cell,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cuda",
) -> Run:
    """A run that nobody has computed yet."""
    inputs = random_inputs(kind, *sizes, dtype, device)
    B, T, N, D = sizes
    S = inputs.states.shape[0]
    shapes = [(S, B, T, N, D), (S, B, 1, N, D)]
    outputs = (inputs.Wx.new_empty(shapes[0]), inputs.states.new_empty(shapes[1]))
    weights = random_weights(outputs, seed=1)
    if device == "cuda":
        torch.cuda.synchronize()
    return Run(f"{backend} {kind} {sizes} {dtype}", backend, kind, inputs, weights, [])


def runs(backend: str) -> list[Run]:
    """All problems of a backend, computed alone."""
    every = [prepared(backend, *problem) for problem in PROBLEMS[backend]]
    # Processes that begin at once compile one problem each, and find most others' code on disk.
    first = os.getpid() % len(every)
    for run in every[first:] + every[:first]:
        run.expected = run.again()
    torch.cuda.synchronize()
    return every


# ---- foreign kernels


def beside_products(backend: str) -> None:
    """Products that fill the GPU, on four other streams."""
    factor = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    _beside(backend, lambda: factor @ factor)


def beside_spinning_kernels(backend: str) -> None:
    """Kernels that do nothing for five milliseconds."""
    _beside(backend, lambda: torch.cuda._sleep(10_000_000))


def beside_itself(backend: str) -> None:
    """All problems at once, each on a stream of its own: several wait for the whole GPU."""
    every = runs(backend)
    streams = [torch.cuda.Stream() for _ in every]
    for _ in range(10):
        found = []
        for run, stream in zip(every, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run.again())
        torch.cuda.synchronize()
        for run, given in zip(every, found, strict=True):
            run.hold(given)


def _beside(backend: str, work: Callable[[], object]) -> None:
    others = [torch.cuda.Stream() for _ in range(4)]
    own = torch.cuda.Stream()
    for run in runs(backend):
        for _ in range(4):
            for stream in others:
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        work()
            with torch.cuda.stream(own):
                found = [run.again() for _ in range(3)]
            torch.cuda.synchronize()
            for given in found:
                run.hold(given)


def at_two_priorities(backend: str) -> None:
    """The same calls on streams of high and of low priority at once."""
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1, 0, -1)]
    every = runs(backend)
    for _ in range(5):
        found = []
        for run in every:
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append((run, run.again()))
        torch.cuda.synchronize()
        for run, given in found:
            run.hold(given)


# ---- graphs


@dataclass
class Captured:
    """A graph, with all that it reads and writes."""

    run: Run
    graph: torch.cuda.CUDAGraph
    results: list[Tensor]


def captured(run: Run, stream: torch.cuda.Stream | None = None) -> Captured:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run.again()
    return Captured(run, graph, found)


def replayed(backend: str) -> None:
    """Graphs of forward and backward, in turn, with other inputs, while other calls go on."""
    side = torch.cuda.Stream()
    every = runs(backend)
    graphs = [captured(run, stream) for run in every for stream in (None, side)]
    for turn in range(4):
        for run in every:
            change(run, seed=turn)
        _other_calls(backend, turn)
        garbage = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(8)]
        del garbage
        if turn == 2:
            gc.collect()
            torch.cuda.empty_cache()
        order = graphs[turn:] + graphs[:turn]
        for one in order:
            one.graph.replay()
        torch.cuda.synchronize()
        for one in order:
            one.run.hold(one.results)
        # Replayed back to back, and on another stream.
        with torch.cuda.stream(side):
            for one in [*order, *order]:
                one.graph.replay()
        torch.cuda.synchronize()
        for one in order:
            one.run.hold(one.results)


def change(run: Run, seed: int) -> None:
    """Other values in the same memory."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        new = torch.randn(run.inputs.Wx.shape, generator=generator)
        run.inputs.Wx.copy_(new)
        run.inputs.R.mul_(0.9)
    run.expected = run.again()


def _other_calls(backend: str, turn: int) -> None:
    """Calls of many other sizes, after which caches hold something else."""
    for k in range(40):
        B, D = 1 + 40 * turn + k, 24 + 8 * (k % 3)
        prepared(backend, "elman", (B, 3, 1, D), torch.bfloat16).again()


def captured_at_the_first_call(backend: str) -> None:
    """A graph of a cell that was never computed before. (Triton compiles at the first call.)"""
    for k, (_, sizes, dtype) in enumerate(PROBLEMS[backend]):
        # PyTorch makes what its own products need when the first one runs.
        prepared(backend, new_cell(210), sizes, dtype).again()
        run = prepared(backend, new_cell(220 + k), sizes, dtype)
        first = captured(run)
        first.graph.replay()
        torch.cuda.synchronize()
        run.expected = run.again()
        run.hold(first.results)


# ---- processes and threads


def for_some_seconds(backend: str, seconds: float = 5.0) -> None:
    """The same bits again and again; two processes do this at once."""
    every, end = runs(backend), time.monotonic() + seconds
    while time.monotonic() < end:
        for run in every:
            run.hold(run.again())


def first_calls_at_once(backend: str) -> None:
    """Threads that begin together, in a process that has computed nothing yet."""
    every = [prepared(backend, *problem) for problem in PROBLEMS[backend] for _ in range(2)]
    _hold_threads(every)


def first_calls_of_one_cell_at_once(backend: str) -> None:
    """Eight threads that want the same new program."""
    _hold_threads([prepared(backend, new_cell(200), (5, 6, 2, 48), torch.bfloat16)] * 8)


def _hold_threads(every: list[Run]) -> None:
    """A thread and a stream for each, all at once; then each alone."""
    ready = threading.Barrier(len(every))

    def work(run: Run) -> list[list[Tensor]]:
        stream = torch.cuda.Stream()
        ready.wait(60)
        with torch.cuda.stream(stream):
            found = [run.again() for _ in range(5)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(len(every)) as pool:
        results = list(pool.map(work, every))
    for run, given in zip(every, results, strict=True):
        run.expected = run.again()
        for found in given:
            run.hold(found)


# ---- contexts


def on_the_cpu_without_cuda() -> None:
    """A call on CPU tensors leaves the GPUs alone."""
    assert not torch.cuda.is_initialized(), "this check needs a process that has not used CUDA"
    _on_the_cpu()
    assert not torch.cuda.is_initialized(), "a call on CPU tensors initialised CUDA"


def _on_the_cpu() -> None:
    run = prepared("auto", "lstm", (2, 3, 1, 8), torch.float32, "cpu")
    # Without backward, which PyTorch refuses in a forked child.
    with torch.no_grad():
        given, expected = (call("lstm", run.inputs, backend=name) for name in ("auto", "vanilla"))
    assert all(map(same_bits, given, expected)), "backend auto is another than vanilla on the CPU"


def in_a_forked_child() -> None:
    """A call on CPU tensors in a child of a process that has used CUDA."""
    if torch.cuda.is_available():
        torch.ones(1, device="cuda").sum().item()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            _on_the_cpu()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"a call on CPU tensors in a forked child ended with exit code {code}"


def in_a_thread_with_another_context(backend: str) -> None:
    """A thread's context is the same one after a call, whether the call could be done or not.

    Unless PyTorch's own functions, of which vanilla is made, already change it.
    """
    from cuda.bindings import driver

    every = runs(backend)

    def stays(run: Run, own: Any) -> bool:
        try:
            run.again()
        except Exception as error:
            print(f"{run.name}: {error!r}")
        (now,) = _checked(driver.cuCtxGetCurrent())
        return int(now) == int(own)

    def work() -> None:
        (device,) = _checked(driver.cuDeviceGet(0))
        (own,) = _created(driver, device)
        # Else another thread computes gradients, on the stream of the same number in the device's
        # primary context; nothing orders the two, and each may get memory that the other uses.
        with torch.autograd.set_multithreading_enabled(False):
            if stays(prepared("vanilla", "lstm", (2, 3, 1, 16), torch.float32), own):
                for run in every:
                    assert stays(run, own), f"{run.name}: the thread's context is another one"
        _checked(driver.cuCtxSynchronize())

    _in_a_thread(work)


def in_a_thread_with_no_context(backend: str) -> None:
    """A new thread's first call is right, and its later ones too."""
    every = runs(backend)

    def work() -> None:
        for run in every:
            run.hold(run.again())

    _in_a_thread(work)


def in_a_green_context(backend: str) -> dict[str, list[str]]:
    """A part of the GPU: whatever plan fits there, its results are right and the same twice."""
    every = runs(backend)
    with green_context(32) as there:
        if not there:
            return {"green contexts": ["none in this PyTorch"]}
        for run in every:
            try:
                found, again = run.again(), run.again()
            except ValueError as error:
                # A head that has no plan on so few multiprocessors is refused by name.
                if f"backend {backend!r} cannot do this call" in str(error):
                    continue
                raise
            torch.cuda.synchronize()
            for x, y, expected in zip(found, again, run.expected, strict=True):
                assert same_bits(x, y), f"{run.name}: other bits the second time"
                # Both are near the truth, and so near each other.
                error = relative_error(x, expected)
                assert error < 2e-2, f"{run.name}: {error:.3g} from what the whole GPU gives"
    return {"green contexts": [backend]}


@contextmanager
def green_context(multiprocessors: int) -> Iterator[bool]:
    """A part of the GPU is the current context, where PyTorch can make one; whether it is."""
    try:
        from torch.cuda.green_contexts import SUPPORTED, GreenContext
    except ImportError:
        SUPPORTED = False
    if not SUPPORTED:
        yield False
        return
    part = GreenContext.create(num_sms=multiprocessors, device_id=0)
    torch.cuda.synchronize()
    part.set_context()
    try:
        # Else another thread computes gradients, on the stream of the same number in its own
        # context, the whole GPU's; nothing orders the two.
        with torch.autograd.set_multithreading_enabled(False):
            yield True
    finally:
        torch.cuda.synchronize()
        part.pop_context()


def _in_a_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def _created(driver: Any, device: Any) -> Sequence[Any]:
    """A new context, which is this thread's current one."""
    try:
        return _checked(driver.cuCtxCreate(None, 0, device))
    except TypeError:  # Before CUDA 13.
        return _checked(driver.cuCtxCreate(0, device))


def _checked(result: tuple[Any, ...]) -> Sequence[Any]:
    error, *values = result
    assert not error, f"the CUDA driver failed: {error!r}"
    return values
