"""Sizes past 2³¹, memory that is full, NaN in a corner, and thousands of calls."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashrnn import Cell, FlashRNNConfig, flashrnn
from flashrnn.jit import context
from tests.fused import hold_to_vanilla, largest_error
from tests.problems import Inputs, call, random_inputs, relative_error
from tests.residuals import backward_from_residuals
from tests.stress.cells import CELLS, new_cell
from tests.stress.fuzz import INFINITE, same_bits
from tests.stress.machine import PROBLEMS, Run, prepared

PAST = 2**31

# ---- indices


def large_problem(
    name: str,
    B: int,
    T: int,
    N: int,
    D: int,
    backend: str,
    sums: float = 2**-8,
    device: str = "cuda",
) -> None:
    """Forward and backward, held to vanilla in a few sequences, heads and stretches of time.

    A sequence does not depend on others, nor a head; and a step not on one that is long past. The
    incoming gradients are the states themselves, which take no further memory.

    Args:
        name: of the cell.
        B, T, N, D: the sizes.
        backend: the backend.
        sums: what the errors of R's and b's gradients may be: sums of B·T terms.
        device: the device.
    """
    kind = CELLS[name]
    if device == "cuda":
        _give_back()
    inputs = _large_inputs(kind, B, T, N, D, device)
    states, _ = call(kind, inputs, backend=backend)
    d_Wx, d_R, d_b, d_states = torch.autograd.grad(
        states,
        list(inputs.tensors().values()),
        states.detach(),
        allow_unused=True,
        materialize_grads=True,
    )
    states = states.detach()
    for start in sorted({0, max(0, T - _WINDOW)}):
        _hold_window(kind, inputs, states, d_Wx, d_states, start)
    for n in sorted({0, N - 1}):
        _hold_sums(inputs, states, d_Wx, d_R, d_b, n, sums)


_WINDOW = 192
_SETTLED = 64
"""Steps after which no trace is left of where a window began or will end."""


def _large_inputs(kind: str | Cell, B: int, T: int, N: int, D: int, device: str) -> Inputs:
    """Inputs whose traces vanish: b is so small that no unit's gates stay open by it."""
    small = random_inputs(kind, 1, 1, N, D, torch.bfloat16, device)
    S, Gw = small.states.shape[0], small.Wx.shape[2]
    torch.manual_seed(0)
    Wx = torch.empty(B, T, Gw, N, D, dtype=torch.bfloat16, device=device).normal_()
    states = torch.empty(S, B, 1, N, D, device=device).uniform_(-1, 1)
    b = (small.b.detach() / 4).requires_grad_()
    return Inputs(Wx.requires_grad_(), small.R, b, states.requires_grad_())


def _hold_window(
    kind: str | Cell,
    inputs: Inputs,
    states: Tensor,
    d_Wx: Tensor,
    d_states: Tensor,
    start: int,
) -> None:
    """Some steps of the first and last sequence, in the first and last head."""
    _, B, T, N, _ = states.shape
    end = min(T, start + _WINDOW)
    sequences, heads = sorted({0, B - 1}), sorted({0, N - 1})

    def window(x: Tensor, batch: int, head: int, steps: slice) -> Tensor:
        """x has sequences in dimension ``batch``, and steps in the next one."""
        chosen = torch.stack([x.select(batch, b) for b in sequences], batch)
        chosen = chosen.narrow(batch + 1, steps.start, steps.stop - steps.start)
        return torch.stack([chosen.select(head, n) for n in heads], head).detach()

    first, every = slice(0, 1), slice(start, end)
    initial = window(inputs.states, 1, 3, first)
    if start:
        initial = window(states, 1, 3, slice(start - 1, start)).float()
    leaves = Inputs(window(inputs.Wx, 0, 3, every), inputs.R[:, heads], inputs.b[:, heads], initial)
    given = {"states": window(states, 1, 3, every), "d_Wx": window(d_Wx, 0, 3, every)}
    if start == 0:
        given["d_states"] = window(d_states, 1, 3, first)

    def by_vanilla(dtype: torch.dtype) -> dict[str, Tensor]:
        own = leaves.to(dtype)
        outputs, _ = call(kind, own, backend="vanilla")
        asked = given["states"].to(dtype)
        found = torch.autograd.grad(outputs, [own.Wx, own.states], asked)
        return {"states": outputs.detach(), "d_Wx": found[0], "d_states": found[1]}

    truth, plain = by_vanilla(torch.float64), by_vanilla(torch.bfloat16)
    with backward_from_residuals():
        kept = by_vanilla(torch.bfloat16)
    settled = slice(_SETTLED if start else 0, end - start - (_SETTLED if end < T else 0))
    for name, x in given.items():
        batch = 0 if name == "d_Wx" else 1
        for (i, b), (k, n) in itertools.product(enumerate(sequences), enumerate(heads)):

            def part(y: Tensor, batch: int = batch, i: int = i, k: int = k) -> Tensor:
                y = y.select(3, k).select(batch, i)
                return y[(slice(None),) * batch + (settled,)] if y.shape[batch] > 1 else y

            right = part(truth[name])
            error = relative_error(part(x), right)
            near = max(relative_error(part(y[name]), right) for y in (plain, kept))
            bound = largest_error(name, near, torch.bfloat16, right.numel(), T=0)
            where = (
                f"sequence {b}, head {n}, steps {start + settled.start} to {start + settled.stop}"
            )
            assert error <= bound, (
                f"{name}: error {error:.3g}, at most {bound:.3g} is right, {where}"
            )


def _hold_sums(
    inputs: Inputs, states: Tensor, d_Wx: Tensor, d_R: Tensor, d_b: Tensor, n: int, bound: float
) -> None:
    """R's and b's gradients of a head follow from those of the pre-activations, which Wx has."""
    B, T, G, _, D = d_Wx.shape
    right_R = torch.zeros(G, D, D, dtype=torch.float64, device=d_Wx.device)
    right_b = torch.zeros(G, D, dtype=torch.float64, device=d_Wx.device)
    steps = max(1, min(T, (1 << 26) // (B * G * D)))
    for start in range(0, T, steps):
        end = min(T, start + steps)
        d_gates = d_Wx[:, start:end, :, n].double()
        before = states[0, :, max(0, start - 1) : end - 1, n].double()
        if start == 0:
            initial = inputs.states[0, :, :, n].detach().to(states.dtype).double()
            before = torch.cat([initial, before], dim=1)
        right_R += torch.einsum("btgd,btp->gdp", d_gates, before)
        right_b += d_gates.sum((0, 1))
    for name, given, right in (("d_R", d_R[:, n], right_R), ("d_b", d_b[:, n], right_b)):
        if given.numel():
            error = relative_error(given, right)
            assert error < bound, f"{name}: error {error:.3g} of head {n}, below {bound} is right"


def far_apart(kind: str, B: int, T: int, N: int, D: int, backend: str) -> None:
    """Few numbers, whose strides and the products of those pass 2³¹."""

    _give_back()

    def spread(x: Tensor, dim: int) -> Tensor:
        """Along one dimension, the last elements are 2³¹ from the first ones."""
        strides = list(x.detach().contiguous().stride())
        strides[dim] = PAST // (x.shape[dim] - 1) // 64 * 64 + 64
        room = (x.shape[dim] - 1) * strides[dim] + x.numel()
        view = torch.empty(room, dtype=x.dtype, device=x.device).as_strided(x.shape, strides)
        return view.copy_(x.detach()).requires_grad_()

    for dim in range(3):

        def change(inputs: Inputs, dim: int = dim) -> Inputs:
            return Inputs(spread(inputs.Wx, dim), inputs.R, inputs.b, inputs.states)

        hold_to_vanilla(backend, kind, B, T, N, D, torch.bfloat16, "cuda", change)

    def change_states(inputs: Inputs) -> Inputs:
        return Inputs(inputs.Wx, inputs.R, inputs.b, spread(inputs.states, 1))

    hold_to_vanilla(backend, kind, B, T, N, D, torch.bfloat16, "cuda", change_states)

    inputs = random_inputs(kind, B, T, N, D, torch.bfloat16, "cuda")
    for dim in range(1, 3):
        states, _ = call(kind, inputs, backend=backend)
        asked = torch.randn_like(states)
        near, far = (
            torch.autograd.grad(states, inputs.Wx, x, retain_graph=True)[0]
            for x in (asked, spread(asked, dim).detach())
        )
        assert same_bits(near, far), f"incoming gradients far apart along {dim}: other bits"


def _give_back() -> None:
    """What earlier checks left in PyTorch's hands; another process may need it."""
    gc.collect()
    torch.cuda.empty_cache()


def more_rows_than_32_bits_count(backend: str) -> None:
    """B·T past 2³², of one unit. Right, or refused with a reason.

    It takes most of a GPU of 80 GB, and so waits until nobody else has much.
    """
    _give_back()
    end = time.monotonic() + 60
    while torch.cuda.mem_get_info()[0] < 70 * 2**30 and time.monotonic() < end:
        time.sleep(0.1)
    try:
        # So many terms are not summed to the last digit.
        large_problem("elman", 1 << 16, (1 << 16) + 3, 1, 1, backend, sums=2**-5)
    except ValueError as error:
        if "cannot do this call" not in str(error):
            raise


# ---- memory


@contextmanager
def all_but(megabytes: int) -> Iterator[None]:
    """Nothing is free of the GPU's memory but so much, and less than 2 MiB besides."""
    _give_back()
    with _taken(megabytes * 2**20):
        yield


@contextmanager
def most_memory_taken() -> Iterator[None]:
    """A few gigabytes are free, so that to fill them, again and again, takes little time."""
    _give_back()
    with _taken(4 * 2**30):
        yield


@contextmanager
def _taken(left: int) -> Iterator[None]:
    """The driver gives all memory but so many bytes. It gives pages of 2 MiB."""
    driver, pieces = context.driver(), []

    def take(size: int) -> bool:
        error, address = driver.cuMemAlloc(size)
        if not error:
            pieces.append(address)
        return not error

    torch.cuda.synchronize()
    _in_pieces(left, 1 << 21, take)
    try:
        yield
    finally:
        for address in pieces:
            context.check(driver.cuMemFree(address))


def _kept_by_pytorch(left: int) -> None:
    """PyTorch asks for all memory but so many bytes, and nobody needs it.

    Less than 10 MiB it never asks for at once, but for 20.
    """
    pieces = []

    def take(size: int) -> bool:
        try:
            pieces.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            return False
        return True

    _in_pieces(left, 1 << 24, take)


def _in_pieces(left: int, smallest: int, take: Callable[[int], bool]) -> None:
    """Take all free memory but so many bytes, in ever smaller pieces: what is said to be free is
    not to be had in one.

    Args:
        left: the bytes.
        smallest: size of a piece.
        take: whether a piece of so many bytes could be taken.
    """
    size = 1 << 40
    while size >= smallest:
        free, _ = torch.cuda.mem_get_info()
        if free - left < size or not take(size):
            size //= 2


def calls_that_do_not_fit(backend: str) -> None:
    """Too large a call says that memory is out, and the next smaller one is right; repeatedly."""
    with most_memory_taken():
        for problem in PROBLEMS[backend]:
            _a_call_that_does_not_fit(prepared(backend, *problem), *problem)


def _a_call_that_does_not_fit(
    run: Run, kind: str, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    run.expected = run.again()
    large = _of_200_megabytes(run.inputs, sizes[2] * sizes[3] * dtype.itemsize)
    # Of so much, forward does not fit; or it does, and perhaps backward does not.
    for free in (160, 700):
        with all_but(free):
            for _ in range(2):
                fits = _fits(kind, large, run.backend)
                assert free == 700 or not fits, f"{run.name}: 500 MB fit into {free}"
                gc.collect()
                run.hold(run.again())


def _of_200_megabytes(inputs: Inputs, row: int) -> Inputs:
    """The first step of the first sequence again and again, so that Wx takes so much."""
    B, T = 16, 200 * 2**20 // (16 * inputs.Wx.shape[2] * row)
    Wx = inputs.Wx.detach()[:1, :1].expand(B, T, -1, -1, -1).contiguous()
    states = inputs.states.detach()[:, :1].expand(-1, B, -1, -1, -1)
    return Inputs(Wx.requires_grad_(), inputs.R, inputs.b, states)


def _fits(kind: str | Cell, inputs: Inputs, backend: str) -> bool:
    try:
        states, _ = call(kind, inputs, backend=backend)
        torch.autograd.grad(states, inputs.Wx, states.detach())
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    return True


def first_calls_when_memory_is_full(backend: str) -> None:
    """Kernels are loaded when next to nothing is free, or PyTorch keeps all of it for later.

    The call is right, or says that memory is out; and it is right once there is memory.
    """
    with most_memory_taken():
        # What PyTorch itself loads is there then.
        _small(backend, 100).again()
        for k, megabytes in enumerate((64, 16, 4, 1)):
            in_use, kept = (_small(backend, 101 + 2 * k + i) for i in range(2))
            with all_but(megabytes):
                found = _if_it_fits(in_use)
            _hold_if_any(in_use, found)
            _kept_by_pytorch(megabytes * 2**20)
            with _taken(megabytes * 2**20):
                found = _if_it_fits(kept)
            torch.cuda.empty_cache()
            _hold_if_any(kept, found)


def _small(backend: str, k: int) -> Run:
    """A call of the k-th new cell."""
    return prepared(backend, new_cell(k), (3, 5, 1, 48), torch.bfloat16)


def compile_first_calls(backend: str) -> None:
    """What :func:`first_calls_when_memory_is_full` then finds on disk, and has only to load."""
    for k in range(100, 109):
        _small(backend, k).again()


def _if_it_fits(run: Run) -> list[Tensor] | None:
    try:
        found = run.again()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return found


def _hold_if_any(run: Run, found: list[Tensor] | None) -> None:
    run.expected = run.again()
    if found is not None:
        run.hold(found)


# ---- NaN


def isolated(backend: str, device: str) -> None:
    """NaN and inf of one unit stay in its sequence and head, and at first in the unit.

    Elsewhere are the bits of the call without them.
    """
    for kind, sizes, dtype in PROBLEMS[backend] if device == "cuda" else _SMALL:
        run = prepared(backend, kind, sizes, dtype, device)
        expected = run.again()
        for value in INFINITE:
            rng = random.Random(f"{sizes} {value}")
            b, t, n, d = (rng.randrange(size) for size in sizes)
            t = min(t, sizes[1] - 2)
            tensors = {name: x.detach().clone() for name, x in run.inputs.tensors().items()}
            tensors["Wx"][b, t, 0, n, d] = value
            own = Inputs(**{name: x.requires_grad_() for name, x in tensors.items()})
            outputs = call(kind, own, backend=backend)
            found = [
                *(x.detach() for x in outputs),
                *torch.autograd.grad(outputs, list(tensors.values()), run.weights),
            ]
            where = f"{run.name} with {value} at sequence {b}, step {t}, head {n}, unit {d}"
            _hold_elsewhere(where, found, expected, b, t, n, d)

            weights = [x.clone() for x in run.weights]
            weights[0][0, b, t, n, d] = value
            outputs = call(kind, run.inputs, backend=backend)
            leaves = list(run.inputs.tensors().values())
            found = [*expected[:2], *torch.autograd.grad(outputs, leaves, weights)]
            _hold_elsewhere(f"gradient of {where}", found, expected, b, -1, n, d)
            after = found[2][b, t + 1 :], expected[2][b, t + 1 :]
            assert same_bits(*after), f"gradient of {where}: reached later steps"
            at_once = found[2][b, t, :, n].clone(), expected[2][b, t, :, n].clone()
            for x in at_once:
                x[:, d] = 0
            assert same_bits(*at_once), f"gradient of {where}: reached other units at once"


_SMALL = [
    ("lstm", (9, 4, 2, 8), torch.bfloat16),
    ("slstm", (3, 3, 2, 17), torch.float32),
]


def _hold_elsewhere(
    where: str, found: list[Tensor], expected: list[Tensor], b: int, t: int, n: int, d: int
) -> None:
    """What one sequence, head, unit and step cannot reach has the bits that were expected."""
    B, N = found[0].shape[1], found[0].shape[3]
    others = [k for k in range(B) if k != b]
    heads = [k for k in range(N) if k != n]

    def same(what: str, k: int, *index: Any) -> None:
        x, y = found[k][index], expected[k][index]
        assert same_bits(x, y), f"{where}: reached {what} of result {k}"

    every = slice(None)
    for k, batch in ((0, 1), (1, 1), (2, 0), (5, 1)):
        lead = (every,) * batch
        same("other sequences", k, *lead, others)
        same("other heads", k, *lead, every, every, *(every,) * (1 - batch), heads)
    same("other heads", 3, every, heads)
    same("other heads", 4, every, heads)
    if t >= 0:
        same("earlier steps", 0, every, b, slice(0, t))
        units = [k for k in range(found[0].shape[4]) if k != d]
        same("other units at once", 0, every, b, t, n, units)


# ---- growth


CALLS = 3000
_ANEW = 0.1
"""How often a cell is built again. Tracing it takes ten times as long as the rest of a call."""


def many_calls(backend: str, device: str) -> None:
    """Memory and host time level off over thousands of calls of new sizes, clips and cells.

    In the first third all cells come that there are. Now and then an equal one is built again.
    """
    count, marks = _count(device), {}
    seconds: list[tuple[bool, float]] = []
    forgotten: list[weakref.ref[Cell]] = []
    for k, taken in enumerate(_calls(backend, device, forgotten)):
        seconds.append(taken)
        if k in (count // 2, count - 1):
            marks[k] = _memory(device)
    (host, gpu), (host_last, gpu_last) = marks.values()
    assert host_last - host < 48, (
        f"the process grew by {host_last - host:.0f} MB in {count // 2} calls"
    )
    assert gpu_last - gpu < 24, f"the GPU's memory filled by {gpu_last - gpu:.0f} MB"
    # A cache may keep the first of equal ones.
    kept = sum(cell() is not None for cell in forgotten)
    assert kept <= _cells(backend, device), (
        f"{kept} of {len(forgotten)} cells are still there, in whose place equal ones came"
    )
    if device == "cpu":
        # So few calls of an interpreter take as long as they happen to be large.
        return
    quarter = count // 4
    for built in (False, True):
        before, after = (
            _usual(x, built) for x in (seconds[quarter * 2 : quarter * 3], seconds[-quarter:])
        )
        assert after < 1.25 * before + 2e-5, (
            f"a call{' of a cell built again' if built else ''} takes {1e6 * after:.0f} µs, "
            f"once {1e6 * before:.0f}"
        )
    slow = sum(x > 0.05 for _, x in seconds[count // 2 :])
    assert slow <= count // 100, f"{slow} calls of cells that were there took 50 ms and more"


def _usual(seconds: list[tuple[bool, float]], built: bool) -> float:
    """The median of the calls; of the few for which a cell was built, the shortest.

    Tracing a cell takes 15 ms of Python, which other processes make longer, and never shorter.
    """
    of_kind = [x for anew, x in seconds if anew == built]
    return min(of_kind) if built else statistics.median(of_kind)


def compile_many_calls(backend: str, device: str) -> None:
    """What :func:`many_calls` then finds on disk: the calls of its first third."""
    for _ in itertools.islice(_calls(backend, device, []), _count(device) // 3):
        pass


def _count(device: str) -> int:
    return CALLS if device == "cuda" else CALLS // 60


def _cells(backend: str, device: str) -> int:
    """How many cells are tried. Of each, five or six kernels are compiled."""
    return 3 if device == "cpu" else 4 if backend == "triton" else 12


def _calls(
    backend: str, device: str, forgotten: list[weakref.ref[Cell]]
) -> Iterator[tuple[bool, float]]:
    """Calls: whether a cell was built for it, and how long it took.

    Args:
        backend: the backend.
        device: the device.
        forgotten: gets the cells in whose place equal ones came.
    """
    count, cells = _count(device), _cells(backend, device)
    rng = random.Random(0)
    every = {D: random_inputs("gru", 16, 24, 3, D, torch.bfloat16, device) for D in (24, 40)}
    built: dict[int, Cell] = {}
    for k in range(count):
        number = (k * cells) // (count // 3) if k < count // 3 else rng.randrange(cells)
        anew = number not in built or rng.random() < _ANEW
        if anew:
            if number in built:
                forgotten.append(weakref.ref(built[number]))
            built[number] = new_cell(number)
        D = (24, 40)[number % 2]
        B, T = rng.randint(1, 16), rng.randint(1, 24)
        N = 1 if backend == "triton" else rng.choice((1, 2, 3))
        x = every[D]
        arguments = (x.Wx[:B, :T, :2, :N], x.R[:2, :N], x.b[:2, :N])
        config = None
        if k % 4 == 0:
            clip = {
                rng.choice(("gradient_recurrent_clipval", "forward_clipval")): rng.random() + 0.1
            }
            config = FlashRNNConfig(**clip)
        start = time.perf_counter()
        states, _ = flashrnn(*arguments, function=built[number], backend=backend, config=config)
        torch.autograd.grad(states, x.Wx, states.detach())
        del states
        yield anew, time.perf_counter() - start


def _memory(device: str) -> tuple[float, float]:
    """Megabytes of the process, and of the GPU that are in use, PyTorch's spare ones apart."""
    gc.collect()
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    used = 0.0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        used = (total - free) / 2**20
    return int(fields[0]) / 1024, used
