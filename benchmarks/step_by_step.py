"""Calls of many sequences by persistent kernels and step by step, with what was predicted.

    python benchmarks/step_by_step.py

needs a GPU. For each shape it prints what a step takes, part by part, and what a layer takes in
each way, as chosen, and by torch.nn. Each layer's results are checked before they are timed. The
predictions are for an H200; ``docs/cost-model.md`` says what they were reckoned from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashrnn import calls, nn
from flashrnn.backends import steps
from flashrnn.backends.fused import plans
from flashrnn.bench.case import Case, tf32_allowed
from flashrnn.bench.contender import BOTH, FORWARD
from flashrnn.bench.layers import Stack
from flashrnn.cells import resolve
from flashrnn.kernels import registry, source
from flashrnn.kernels.per_step.cell_plan import CellPlan, estimated_cycles
from flashrnn.problem import Problem, without_autocast

SECONDS = 1.0
GPU_CLOCK = 1980


class Row(NamedTuple):
    """A shape, and what was predicted of it: microseconds of a step, milliseconds of a layer."""

    case: Case
    products: tuple[float, float]
    cells: tuple[float, float]
    layer: tuple[float, float]


bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
ROWS = [
    Row(Case("lstm", 642, 35, 1, 1408, f16), (17.9, 17.9), (8.7, 7.1), (1.44, 4.19)),
    Row(Case("lstm", 578, 79, 1, 1112, f16), (12.1, 12.3), (6.5, 5.4), (2.10, 5.94)),
    Row(Case("lstm", 1024, 64, 1, 1024, bf16), (15.8, 17.4), (9.9, 8.0), (2.40, 7.04)),
    Row(Case("lstm", 1024, 64, 1, 768, bf16), (9.8, 10.7), (7.7, 6.3), (1.53, 4.39)),
    Row(Case("lstm", 4096, 32, 1, 512, bf16), (15.8, 15.8), (18.6, 14.9), (1.43, 4.13)),
    Row(Case("gru", 1024, 64, 1, 768, bf16), (9.8, 8.5), (6.5, 6.3), (1.33, 3.69)),
    Row(Case("lstm", 64, 256, 1, 2048, bf16), (12.2, 12.2), (2.3, 2.1), (4.51, 10.94)),
    Row(Case("lstm", 1024, 64, 1, 768, f32, True), (17.1, 18.8), (10.8, 9.7), (2.57, 7.86)),
    Row(Case("lstm", 64, 256, 1, 2048, f32, True), (22.3, 22.3), (2.8, 2.6), (8.00, 19.82)),
    Row(Case("gru", 1208, 3, 1, 1216, f32, True), (39.0, 44.9), (15.8, 17.2), (0.25, 0.78)),
]


@contextmanager
def way(name: str) -> Iterator[None]:
    """Within it ``cuda_fused`` computes as is chosen, by persistent kernels, or step by step."""
    ways: dict[str, Callable[..., CellPlan | None]] = {
        "chosen": plans.steps_of,
        "persistent": lambda problem, gpu, backward: None,
        "steps": lambda problem, gpu, backward: CellPlan(backward, problem.D),
    }
    before, plans.steps_of = plans.steps_of, ways[name]
    calls.kept.clear()
    try:
        yield
    finally:
        plans.steps_of = before
        calls.kept.clear()


def microseconds(run: Callable[[], Any], count: int) -> tuple[float, float]:
    """Of the GPU and of the host, a ``count``-th of a run; the GPU is busy while the host works."""
    busy = torch.zeros(10_240, 10_240, dtype=torch.float16, device="cuda")
    of_gpu, of_host = [], []
    for _ in range(9):
        for _ in range(4):
            torch.mm(busy, busy)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        run()
        of_host.append(time.perf_counter() - begin)
        end.record()
        torch.cuda.synchronize()
        of_gpu.append(start.elapsed_time(end))
    return 1e3 * sorted(of_gpu)[4] / count, 1e6 * sorted(of_host)[4] / count


def parts_of_a_step(row: Row) -> None:
    """Print the times of both directions' scans, their products and their cells."""
    case = row.case
    cell, device = resolve(case.function), torch.device("cuda")
    problem = Problem(
        *(cell.traced, case.B, case.T, 1, case.D, case.dtype, device), needs_gradient=True
    )
    gpu, precision = plans.gpu_of(problem), source.precision_of(problem)
    S, Gr = len(cell.states), len(cell.fed_by("R"))

    def normal(*sizes: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    Wx = normal(case.B, case.T, len(cell.fed_by("Wx")), 1, case.D)
    R, b = normal(Gr, 1, case.D, case.D) / case.D**0.5, normal(len(cell.fed_by("b")), 1, case.D)
    initial = normal(S, case.B, 1, 1, case.D, dtype=torch.float32)
    states, _, gates = steps.forward(problem, CellPlan(False, case.D), Wx, R, b, initial)
    given = (R, initial, states, gates, torch.ones_like(states[:1]), None)
    multiply, complete = steps.multiply, steps.complete
    # What follows a backward scan is the same in both ways.
    steps.complete = lambda *_: None
    for backward in (False, True):
        plan = CellPlan(backward, case.D)

        def scan(plan: CellPlan = plan) -> None:
            if plan.backward:
                steps.backward(problem, plan, *given)
            else:
                steps.forward(problem, plan, Wx, R, b, initial)

        whole, host = microseconds(scan, case.T)
        steps.multiply = lambda *_: None
        without, _ = microseconds(scan, case.T)
        steps.multiply = multiply
        cautious = estimated_cycles(problem, precision, gpu, backward) / GPU_CLOCK
        persistent = registry.best_plan(plans.planned(problem, case.B), gpu, backward)
        print(
            f"  {'backward' if backward else 'forward'}, a step, us: {whole:.1f}; "
            f"cell alone {without:.1f} (predicted {row.cells[backward]}), "
            f"so product {whole - without:.1f} (predicted {row.products[backward]}); "
            f"host {host:.1f}; plans' estimates: steps {cautious:.1f}, "
            f"persistent {persistent.estimated_cycles / GPU_CLOCK:.1f}"
        )
    steps.complete = complete


def main() -> None:
    """Print all rows."""
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "CUDA", torch.version.cuda)
    for row in ROWS:
        print(row.case)
        with tf32_allowed(row.case.tf32), without_autocast("cuda"):
            parts_of_a_step(row)
            for name in ("persistent", "steps", "chosen"):
                with way(name):
                    report(name, Stack(nn, 1, 1).times(row.case, device, SECONDS))
            report("torch.nn", Stack(torch.nn, 1, 1).times(row.case, device, SECONDS))
        print(f"  {'predicted':10} {row.layer[0]:.2f} / {row.layer[1]:.2f} ms by steps")


def report(name: str, found: dict[str, Any]) -> None:
    """Print the times of a layer, or why there are none."""
    times = [
        found[key].reason or f"{found[key].value:.3f} (error {found[key].error:.1e})"
        for key in (FORWARD, BOTH)
    ]
    print(f"  {name:10} {' / '.join(times)} ms", flush=True)


if __name__ == "__main__":
    main()
