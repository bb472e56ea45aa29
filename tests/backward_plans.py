"""Time the plans of backward scans of many sequences: ``python -m tests.backward_plans``.

For each problem it forces the plan of each regime in turn, holds a short call to ``vanilla`` in
float64, and prints the microseconds of a step, forward + backward, beside the regimes' estimates.
(Forward is the same in each line, so differences are those of the backward scans.) The first run of
a kernel belongs behind a time limit, since one that waits for what never comes does not end:

    timeout 300 python -m pytest -x tests/test_gpu.py -k backward_by_wgmma
    timeout 900 python -m tests.backward_plans

With ``all`` it times all plans of the ``wgmma`` kernel, to fit their estimate to.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from flashrnn import calls
from flashrnn.backends import cuda_fused
from flashrnn.backends.fused import plans
from flashrnn.bench.timing import measure
from flashrnn.cells import resolve
from flashrnn.functional import flashrnn
from flashrnn.kernels import cluster, grid, registry
from flashrnn.kernels.cluster import wgmma_backward_plan
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.per_step import cell_plan
from flashrnn.kernels.plan import Plan
from flashrnn.problem import Problem
from tests.fused import hold_to_vanilla

REGIMES: dict[str, registry.Regime] = {
    "grid all-gather": grid.plan_scan,
    "cluster backward": cluster.plan_backward,
    "cluster wgmma": cluster.plan_wgmma_backward,
}
PROBLEMS = [
    *[("lstm", B, 768) for B in (64, 128, 256, 512, 1024)],
    *[("lstm", B, 512) for B in (64, 128, 256, 1024)],
    *[("gru", B, D) for D in (512, 768) for B in (64, 256, 1024)],
    *[("slstm", 256, 768), ("elman", 256, 1024), ("lstm", 256, 256)],
]
# A step is the difference of two lengths, divided by that of their steps.
SHORT, LONG = 64, 320


ALL, STEPS = registry.LARGE_HEADS, registry.plan_steps


def force(plan: Plan | None) -> None:
    """Have every backward scan computed by a plan, or again by what takes fewest cycles."""

    def steps(
        problem: Problem, precision: str, gpu: GPU, backward: bool
    ) -> cell_plan.CellPlan | None:
        return None if backward and plan else STEPS(problem, precision, gpu, backward)

    def forced(regime: registry.Regime) -> registry.Regime:
        return lambda problem, gpu, backward: (
            plan if backward and plan else regime(problem, gpu, backward)
        )

    registry.LARGE_HEADS = tuple(map(forced, ALL))
    registry.plan_steps = steps
    for cache in (registry.best_plan, *cuda_fused.KERNELS):
        cache.cache_clear()
    calls.kept.clear()


def milliseconds(kind: str, B: int, T: int, D: int) -> float:
    """Forward + backward of one head, in bfloat16."""
    cell = resolve(kind)
    inputs, recurrent = len(cell.fed_by("Wx")), len(cell.fed_by("R"))
    options = {"device": "cuda", "dtype": torch.bfloat16}
    Wx = torch.randn(B, T, inputs, 1, D, **options).requires_grad_()
    R = (torch.randn(recurrent, 1, D, D, **options) / D**0.5).requires_grad_()
    b = torch.randn(len(cell.fed_by("b")), 1, D, **options).requires_grad_()

    def run(Wx: torch.Tensor, R: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return flashrnn(Wx, R, b, function=kind, backend="cuda_fused")[0]

    return measure(run, [Wx], [R, b], backward=True, seconds=1.0).median


def main() -> None:
    """Print a line for each problem and regime."""
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    print("problem | regime | estimated cycles | us a step, both | plan", flush=True)
    for kind, B, D in PROBLEMS:
        problem = Problem(
            resolve(kind).traced, B, LONG, 1, D, torch.bfloat16, device, needs_gradient=True
        )
        gpu = plans.gpu_of(problem)
        for name, regime in REGIMES.items():
            plan = regime(problem, gpu, True)
            if isinstance(plan, str):
                print(f"{kind} B={B} 1x{D} | {name} | {plan}", flush=True)
                continue
            taken = [plan]
            if isinstance(plan, cluster.ClusterWgmmaBackwardPlan) and "all" in sys.argv[1:]:
                values = wgmma_backward_plan.Values.of(problem.cell)
                taken = [
                    replace(
                        x,
                        estimated_cycles=wgmma_backward_plan.estimated_cycles(x, values, B, 1, gpu),
                    )
                    for x in wgmma_backward_plan.possible_plans(values, D, gpu)
                ]
            for chosen in taken:
                force(chosen)
                hold_to_vanilla("cuda_fused", kind, B, 5, 1, D, torch.bfloat16, "cuda")
                short, long = (milliseconds(kind, B, T, D) for T in (SHORT, LONG))
                step = 1e3 * (long - short) / (LONG - SHORT)
                cycles = chosen.estimated_cycles
                print(
                    f"{kind} B={B} 1x{D} | {name} | {cycles:.0f} | {step:.2f} | {chosen}",
                    flush=True,
                )
        force(None)


if __name__ == "__main__":
    main()
