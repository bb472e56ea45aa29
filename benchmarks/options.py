"""What options of sequences cost on a GPU: the table of docs/sequences.md, "What it costs".

    python benchmarks/options.py [--kernels]

prints, for 12 heads of 64 units and one of 768, milliseconds of GPU time of LSTM in bfloat16, T =
1024, without gradients and forward + backward, and in proportion to a plain call. With
``--kernels`` the profiler says what each kernel of a training step takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flashrnn import flashrnn

T, MANY = 1024, 64
SAMPLES = 9


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of calls. The GPU is kept busy until the host has enqueued each."""
    for _ in range(3):
        run()
    found = []
    for _ in range(SAMPLES):
        torch.cuda._sleep(6_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return sorted(found)[SAMPLES // 2]


class Call:
    """A call of B sequences with options, whose h alone is given a gradient."""

    def __init__(self, B: int, N: int, D: int, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        whole: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self._leaves = [
            x.requires_grad_()
            for x in (
                torch.randn(B, T, 4, N, D, **whole),
                torch.randn(4, N, D, D, **whole) / D**0.5,
                torch.randn(4, N, D, **whole),
            )
        ]
        self._options = {"backend": "cuda_fused", **options}
        self._gradient = torch.randn_like(self._h())

    def _h(self) -> Tensor:
        states = flashrnn(*self._leaves, **self._options)[0]
        # A view of h alone: the gradient of a choice takes zeros and a copy.
        return states[0] if len(states) > 1 else states.squeeze(0)

    def forward(self) -> None:
        """Without gradients."""
        with torch.no_grad():
            flashrnn(*self._leaves, **self._options)

    def both(self) -> None:
        """Forward and backward."""
        torch.autograd.grad(self._h(), self._leaves, self._gradient)

    def times(self) -> tuple[float, float]:
        """Milliseconds of both."""
        return milliseconds(self.forward), milliseconds(self.both)

    def print_kernels(self) -> None:
        """What a training step consists of, in microseconds."""
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(3):
                self.both()
            torch.cuda.synchronize()
        events = [event for event in seen.key_averages() if event.device_time_total]
        for event in sorted(events, key=lambda event: -event.device_time_total)[:9]:
            print(
                f"    {event.device_time_total / 3:9.1f}  {event.count / 3:.0f}x {event.key[:70]}"
            )


def options_of() -> dict[str, dict[str, Any]]:
    """Of 64 sequences, by what a table calls them."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(1, T + 1, (MANY,), generator=generator).cuda()
    cuts = torch.rand(MANY, T, device="cuda") < 0.01
    return {
        "plain": {},
        "h alone": {"return_states": "h"},
        "reset, one in a hundred": {"reset": cuts},
        "reset, none set": {"reset": torch.zeros_like(cuts)},
        "lengths, all T, on the CPU": {"lengths": torch.full((MANY,), T)},
        "lengths, all T, on the GPU": {"lengths": torch.full((MANY,), T, device="cuda")},
        "lengths, uniform": {"lengths": uniform},
    }


def main() -> None:
    """Print all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="what each kernel takes, too")
    kernels = parser.parse_args().kernels
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "CUDA", torch.version.cuda)
    for N, D in ((12, 64), (1, 768)):
        plain = None
        for name, options in options_of().items():
            call = Call(MANY, N, D, options)
            times = call.times()
            plain = plain or times
            print(row(f"{N}x{D}, B = {MANY}, {name}", times, plain), flush=True)
            if kernels:
                call.print_kernels()
        one = Call(16, N, D, {}).times()
        both = Call(16, 2 * N, D, {"reverse": [n >= N for n in range(2 * N)]}).times()
        two = 2 * one[0], 2 * one[1]
        print(row(f"{N}x{D}, B = 16, both directions, of two calls", both, two), flush=True)


def row(name: str, times: tuple[float, float], plain: tuple[float, float]) -> str:
    """Times and their proportions."""
    forward, both = (found / of for found, of in zip(times, plain, strict=True))
    return f"{name}: {times[0]:.4f} / {times[1]:.4f} ms, {forward:.3f} / {both:.3f}"


if __name__ == "__main__":
    main()
