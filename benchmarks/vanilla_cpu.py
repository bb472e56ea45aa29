"""Time of the vanilla backend over that of torch.nn.LSTM, on the CPU, in one run.

torch.nn.LSTM multiplies its input by W itself. So flashrnn is timed with a linear layer that
does the same ("with Wx"), and on a Wx that is there already ("recurrence alone").

    .venv/bin/python benchmarks/vanilla_cpu.py [--T 256] [--B 32] [--D 128] [--repetitions 15]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashrnn import flashrnn

Run = Callable[[], Tensor]


def contenders(T: int, B: int, D: int) -> tuple[dict[str, Run], list[Tensor]]:
    """What is timed, each giving h at all steps, and the tensors that gradients are taken of."""
    torch.manual_seed(0)
    lstm = nn.LSTM(D, D, batch_first=True)
    W, R, b_input, b_recurrent = (p.detach().clone() for p in lstm.parameters())
    R, b = R.view(4, 1, D, D), (b_input + b_recurrent).view(4, 1, D)
    x = torch.randn(B, T, D)
    Wx = linear(x, W).view(B, T, 4, 1, D)
    leaves = [x, W, R, b, Wx]
    for leaf in leaves:
        leaf.requires_grad_()

    def recurrence(inputs: Tensor) -> Tensor:
        states, _ = flashrnn(inputs, R, b, function="lstm", backend="vanilla")
        return states[0].flatten(2)

    return {
        "torch.nn.LSTM": lambda: lstm(x)[0],
        "flashrnn with Wx": lambda: recurrence(linear(x, W).view(B, T, 4, 1, D)),
        "flashrnn, recurrence alone": lambda: recurrence(Wx),
    }, [*leaves, *lstm.parameters()]


def forward_only(run: Run, leaves: list[Tensor], gradient: Tensor) -> None:
    with torch.no_grad():
        run()


def forward_and_backward(run: Run, leaves: list[Tensor], gradient: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    run().backward(gradient)


def measure(runs: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Median seconds of each, their repetitions taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repetition >= 2:  # The first two warm up.
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("T", 256), ("B", 32), ("D", 128), ("repetitions", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()

    runs, leaves = contenders(options.T, options.B, options.D)
    with torch.no_grad():
        outputs = [run() for run in runs.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    gradient = torch.randn_like(outputs[0])

    print(
        f"T={options.T} B={options.B} D={options.D} float32, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    print(f"{'':28}{'forward':>20}{'forward + backward':>24}")
    columns = [
        measure(
            {name: partial(mode, run, leaves, gradient) for name, run in runs.items()},
            options.repetitions,
        )
        for mode in (forward_only, forward_and_backward)
    ]
    reference = next(iter(runs))
    for name in runs:
        cells = [f"{c[name] * 1e3:8.1f} ms {c[name] / c[reference]:6.2f} x" for c in columns]
        print(f"{name:28}{cells[0]:>20}{cells[1]:>24}")


if __name__ == "__main__":
    main()
