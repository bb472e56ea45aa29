"""The error of a fused backend over that of ``vanilla`` in the same dtype, both to float64.

    python benchmarks/accuracy.py BACKEND

prints, for each cell and 16-bit dtype, the worst ratio over lengths and seeds for the states and
each gradient. Without a GPU: ``TRITON_INTERPRET=1 python benchmarks/accuracy.py triton``; Triton's
interpreter cuts bfloat16 off instead of rounding it, so there only float16 says something.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from flashrnn import flashrnn
from flashrnn.cells import resolve
from flashrnn.problem import carry_dtype

B, N, D = 4, 2, 32
LENGTHS = (1, 16, 64, 256)
SEEDS = 3
NAMES = ("states", "last states", "dWx", "dR", "db", "dstates")


def inputs(function: str, T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Wx, R, b and initial states that a step could have left."""
    cell = resolve(function)
    Gw, Gr, Gb = (len(cell.fed_by(source)) for source in ("Wx", "R", "b"))
    states = torch.tanh(torch.randn(len(cell.states), B, 1, N, D))
    if "n" in cell.states:
        states[cell.states.index("n")].abs_().add_(1)
    given = [
        torch.randn(B, T, Gw, N, D),
        torch.randn(Gr, N, D, D) / D**0.5,
        torch.randn(Gb, N, D),
    ]
    return [*(x.to(device, dtype) for x in given), states.to(device, carry_dtype(dtype))]


def results(
    function: str, backend: str, given: list[Tensor], weights: list[Tensor]
) -> list[Tensor]:
    """Both outputs, and the gradients of a weighted sum of them."""
    leaves = [x.clone().requires_grad_() for x in given]
    outputs = flashrnn(*leaves, function=function, backend=backend)
    gradients = torch.autograd.grad(
        outputs, leaves, [w.to(x) for w, x in zip(weights, outputs, strict=True)]
    )
    return [*(x.detach() for x in outputs), *gradients]


def ratios(function: str, backend: str, T: int, dtype: torch.dtype, device: str) -> Iterator[float]:
    """The ratio of the errors ‖given − truth‖, by ``NAMES``."""
    given = inputs(function, T, dtype, device)
    exact = [x.double() for x in given]
    S = len(resolve(function).states)
    weights = [torch.randn(S, B, steps, N, D, device=device) for steps in (T, 1)]
    truth = results(function, "vanilla", exact, weights)
    ours = results(function, backend, given, weights)
    plain = results(function, "vanilla", given, weights)
    for a, b, x in zip(ours, plain, truth, strict=True):
        yield float((a.double() - x).norm() / (b.double() - x).norm().clamp_min(1e-30))


def main() -> None:
    """Print the table."""
    (backend,) = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(f"{'cell, dtype':18}", *(f"{name:>12}" for name in NAMES))
    for function in ("elman", "lstm", "gru", "slstm"):
        for dtype in (torch.bfloat16, torch.float16):
            found = [
                list(ratios(function, backend, T, dtype, device))
                for T in LENGTHS
                for _ in range(SEEDS)
            ]
            worst = [max(column) for column in zip(*found, strict=True)]
            label = f"{function}, {str(dtype).removeprefix('torch.')}"
            print(f"{label:18}", *(f"{ratio:12.2f}" for ratio in worst), flush=True)


if __name__ == "__main__":
    main()
