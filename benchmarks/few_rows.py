"""Products over few rows beside the library's, and small layers beside torch.nn's.

    python benchmarks/few_rows.py [products] [layers]

For each size of a layer ``products`` prints what its input product and all its gradients take the
GPU within a CUDA graph, by the kernels of ``flashrnn/kernels/few_rows`` and by PyTorch, whether or
not a call of that size is computed so, and how far their results are apart. ``layers`` prints what
small layers take by the wall clock, forward and forward + backward: ``recurrent_layer()``,
``flashrnn.nn`` and torch.nn, in turns, and at the end how many times as fast as torch.nn ours are,
in the geometric mean. ``docs/benchmarks.md`` has the results.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashrnn import nn, recurrent_layer
from flashrnn.backends import few_rows, tables
from flashrnn.backends.gradients import recurrent_gradient
from flashrnn.backends.protocols import Factors
from flashrnn.bench import clocks
from flashrnn.cells import resolve
from flashrnn.jit.kernel import launch_in_turn
from flashrnn.kernels import call
from flashrnn.kernels.few_rows import plan
from flashrnn.problem import Problem

ROUNDS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {
    "lstm": (nn.LSTM, torch.nn.LSTM),
    "gru": (nn.GRU, torch.nn.GRU),
    "elman": (nn.RNN, torch.nn.RNN),
}


class Size(NamedTuple):
    """That of a layer, whose inputs have as many features as a head has units."""

    kind: str
    B: int
    T: int
    N: int
    D: int
    dtype: torch.dtype = torch.float16


PRODUCTS = [
    Size("lstm", 9, 1, 1, 120),
    Size("lstm", 16, 8, 12, 64),
    Size("lstm", 16, 8, 1, 256),
    Size("lstm", 1, 1000, 1, 64),
    Size("lstm", 128, 8, 1, 256),
    Size("lstm", 256, 8, 1, 128),
    Size("lstm", 64, 8, 1, 512),
    Size("lstm", 16, 1, 1, 2048),
    Size("elman", 212, 33, 1, 132),
    Size("lstm", 54, 256, 1, 22),
    Size("lstm", 64, 64, 1, 128),
    Size("lstm", 26, 216, 1, 61),
    Size("lstm", 128, 8, 1, 256, torch.float32),
]
LAYERS = [
    Size("lstm", 9, 1, 1, 120),
    Size("elman", 3, 5, 1, 100),
    Size("gru", 2, 11, 1, 188),
    Size("gru", 15, 2, 1, 276),
    Size("elman", 254, 1, 1, 436, torch.float32),
    Size("gru", 61, 11, 1, 154),
    Size("lstm", 53, 2, 1, 632),
    Size("gru", 162, 19, 1, 20),
    Size("lstm", 16, 8, 1, 64),
    Size("lstm", 1, 30, 1, 56),
    Size("lstm", 62, 7, 1, 359, torch.float32),
]


def named(size: Size) -> str:
    """A size in words."""
    kind, B, T, N, D, dtype = size
    return f"{kind} {N}×{D}, B = {B}, T = {T}, {str(dtype).removeprefix('torch.')}"


def products(size: Size) -> None:
    """Print what the products of a layer take."""
    kind, B, T, N, D, dtype = size
    cell, rows = resolve(kind).traced, B * T
    problem = Problem(cell, B, T, N, D, dtype, DEVICE, needs_gradient=True)
    gates, columns, on = len(cell.gates), len(cell.fed_by("Wx")) * N * D, {"device": DEVICE}

    def random(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, **on).to(of)

    x, W = random(B, T, D), random(len(cell.fed_by("Wx")), N, D, D) / D**0.5
    d_gates, states = random(B, T, gates, N, D), random(len(cell.states), B, T, N, D)
    initial = random(len(cell.states), B, 1, N, D, of=torch.float32)
    found = {
        "d_R": random(len(cell.fed_by("R")), N, D, D),
        "d_b": random(len(cell.fed_by("b")), N, D),
        "d_x": torch.empty_like(x),
        "d_W": torch.empty_like(W),
    }
    tensors = {"initial": initial, "states": states, "d_gates": d_gates, "x": x, "W": W, **found}
    tensors["d_bias"] = random(B, gates, N, D, of=torch.float32)
    asked = few_rows.Asked(True, True, True, x.stride(), D, few_rows._precision(problem))
    _, counters, _, _, sums = few_rows.scratch(problem, asked)
    if counters:
        tensors["counters"] = torch.zeros(counters, 4, dtype=torch.int32, **on)
        tensors["sums"] = torch.empty(sums, 4, **on)
    addresses, layout = call.BACKWARD.read(tensors)
    kernel, shape, packing = few_rows.gradients(problem, asked, layout)

    def product() -> Tensor:
        return few_rows.multiply(problem, Factors(x, W))

    def library_product() -> Tensor:
        return linear(x, W.flatten(0, 2))

    def gradients() -> list[Tensor]:
        if counters:
            tensors["counters"].zero_()
        launch_in_turn([(kernel, shape, packing(addresses))])
        return [found["d_x"].view(rows, D), found["d_W"].view(columns, D), found["d_R"]]

    def library_gradients() -> list[Tensor]:
        of_rows = d_gates.view(rows, columns)
        return [
            torch.mm(of_rows, W.flatten(0, 2)),
            torch.mm(of_rows.t(), x.view(rows, D)),
            recurrent_gradient(cell, d_gates, tables.h_before(problem, None, initial, states)),
        ]

    pairs = [(product().view(rows, columns), library_product().view(rows, columns))]
    pairs += zip(gradients(), library_gradients(), strict=True)
    apart = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)
    ways = [product, library_product, gradients, library_gradients]
    samples = [clocks.graph(lambda count, run=run: [run] * count, DEVICE) for run in ways]
    of_ours, of_library, of_all, of_theirs = (
        statistics.median(sample() for _ in range(ROUNDS)) for sample in samples
    )
    print(
        f"{named(size):45} product {of_ours:6.1f} µs, library {of_library:6.1f}; gradients "
        f"{of_all:6.1f}, library {of_theirs:6.1f}; apart by {apart:.1e}"
    )


def layers(size: Size) -> dict[str, tuple[float, float]]:
    """Print what a layer takes forward and forward + backward, and return torch.nn's time as a
    multiple of ours."""
    kind, B, T, N, D, dtype = size
    cell, (ours, theirs) = resolve(kind), KINDS[kind]

    def weight(*sizes: int) -> Tensor:
        return (torch.randn(sizes, device=DEVICE) / D**0.5).to(dtype).requires_grad_()

    W, R = (weight(len(cell.fed_by(source)), N, D, D) for source in ("Wx", "R"))
    x, b = weight(B, T, D), weight(len(cell.fed_by("b")), N, D)
    by_time = x.detach().transpose(0, 1).contiguous().requires_grad_()
    of_nn, of_torch = (made(D, D).to(DEVICE, dtype) for made in (ours, theirs))
    runs: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "recurrent_layer": (
            lambda: recurrent_layer(x, W, R, b, function=kind, return_states="h")[0][0, :, :, 0],
            [x, W, R, b],
        ),
        "flashrnn.nn": (lambda: of_nn(by_time)[0], [by_time, *of_nn.parameters()]),
        "torch.nn": (lambda: of_torch(by_time)[0], [by_time, *of_torch.parameters()]),
    }

    def training(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
        slope = torch.randn_like(run())

        def both() -> None:
            run().backward(slope)
            for leaf in leaves:
                leaf.grad = None

        return both

    samples = {}
    for name, (run, leaves) in runs.items():
        forward = torch.no_grad()(run)
        for index, way in enumerate((forward, training(run, leaves))):
            samples[name, index] = clocks.wall(lambda count, way=way: [way] * count, DEVICE)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in samples}
    for _ in range(ROUNDS):
        for key, sample in samples.items():
            taken[key].append(sample())
    medians = {key: statistics.median(found) for key, found in taken.items()}
    times = [f"{name} {medians[name, 0]:6.0f} / {medians[name, 1]:6.0f}" for name in runs]
    print(f"{named(size):45} µs, forward / both: {', '.join(times)}")
    return {
        name: tuple(medians["torch.nn", way] / medians[name, way] for way in (0, 1))
        for name in ("recurrent_layer", "flashrnn.nn")
    }


def main(parts: list[str]) -> None:
    """Run the parts that are named, or all."""
    if "products" in parts or not parts:
        without = {"most": math.inf, "most_of_pieces": math.inf}
        of_any = {size: times._replace(**without) for size, times in plan._OF_PRODUCT.items()}
        with mock.patch.dict(plan._OF_PRODUCT, of_any):
            for size in PRODUCTS:
                products(size)
    if "layers" in parts or not parts:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        found = [layers(size) for size in LAYERS]
        for name in found[0]:
            for index, way in enumerate(("forward", "forward + backward")):
                of_all = [ratios[name][index] for ratios in found]
                mean = math.exp(statistics.fmean(map(math.log, of_all)))
                won = sum(ratio > 1 for ratio in of_all)
                print(f"{name}, {way}: {mean:.2f} times as fast, {won} of {len(of_all)} faster")


if __name__ == "__main__":
    main(sys.argv[1:])
