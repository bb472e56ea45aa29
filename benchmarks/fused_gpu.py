"""Times of the fused backends on a GPU: B = 16, T = 1024, medians by CUDA events.

Forward runs under torch.no_grad(); forward + backward is states[0].sum().backward() with gradients
of Wx, R and b. The product of the input and W is in neither.

    .venv/bin/python benchmarks/fused_gpu.py [--repetitions 15]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from flashrnn import flashrnn
from flashrnn.cells import resolve

B, T = 16, 1024
ROWS = [
    ("triton", "lstm", 24, 32, torch.bfloat16),
    ("triton", "lstm", 12, 64, torch.bfloat16),
    ("triton", "lstm", 6, 128, torch.bfloat16),
    ("triton", "gru", 12, 64, torch.bfloat16),
    ("triton", "elman", 12, 64, torch.bfloat16),
    ("triton", "slstm", 12, 64, torch.bfloat16),
    ("triton", "lstm", 12, 64, torch.float32),
    ("cuda", "lstm", 12, 64, torch.bfloat16),
    ("cuda", "lstm", 1, 768, torch.bfloat16),
    ("cuda", "gru", 12, 64, torch.bfloat16),
]


def median(run: Callable[[], object], repetitions: int) -> float:
    """Milliseconds, after four runs that warm up."""
    events = []
    for _ in range(repetitions + 4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[4:])


def measure(
    backend: str, function: str, N: int, D: int, dtype: torch.dtype, repetitions: int
) -> tuple[float, float]:
    """Forward, and forward and backward."""
    cell = resolve(function)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    Wx = normal(B, T, len(cell.fed_by("Wx")), N, D)
    R, b = normal(len(cell.fed_by("R")), N, D, D) / D**0.5, normal(len(cell.fed_by("b")), N, D)
    leaves = [x.requires_grad_() for x in (Wx, R, b)]

    def run() -> torch.Tensor:
        return flashrnn(*leaves, function=function, backend=backend)[0][0]

    @torch.no_grad()
    def forward() -> None:
        run()

    def forward_and_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        run().sum().backward()

    return median(forward, repetitions), median(forward_and_backward, repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, B={B} T={T}")
    print(f"{'':32}{'forward':>12}{'forward + backward':>22}")
    for backend, function, N, D, dtype in ROWS:
        forward, both = measure(backend, function, N, D, dtype, options.repetitions)
        name = f"{backend} {function} {N}x{D} {str(dtype).removeprefix('torch.')}"
        print(f"{name:32}{forward:9.3f} ms{both:19.3f} ms")


if __name__ == "__main__":
    main()
