"""Times of xlstm's sLSTM layer and of TiRex's forecasts: with cells of ours, and with their own.

    pip install . xlstm==2.0.6 tirex-ts==1.4.2
    python benchmarks/clients.py [xlstm] [tirex] [--T 512 2048] [--seconds 2]

prints a table in Markdown. It needs an NVIDIA GPU; their CUDA cells also need nvcc and ninja, and
are compiled when they are first made. What cannot run has a row that says why. All contenders of
a problem have the same random weights. TiRex has the sizes of the published model, NX-AI/TiRex:
12 blocks of 512 units in 4 heads, patches of 32 points, a context of 2048, which shorter series
are padded to.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

import flashrnn.compat.tirex
import flashrnn.compat.xlstm

EMBEDDING, HEADS, B = 768, 4, 16
SERIES, POINTS, AHEAD = 64, 512, 64
# Rounding to bfloat16 makes smaller ones: beyond this something else is computed.
LARGEST_ERROR = 0.1

Result = TypeVar("Result")


@dataclass
class Contender:
    """A call, the module that patches the cells for it if they are ours, its error."""

    run: Callable[[], Tensor]
    ours: ModuleType | None
    error: float


@contextmanager
def cells(ours: ModuleType | None) -> Iterator[None]:
    """Have the cells be ours, if a module to patch them with is given."""
    if ours:
        ours.patch()
    try:
        yield
    finally:
        if ours:
            ours.unpatch()


def attempt(step: Callable[[], Result], ours: ModuleType | None) -> Result | str:
    """What the step gives, or why it cannot: other packages may fail in any way."""
    try:
        with cells(ours):
            return step()
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"


def true(run: Callable[[], Tensor]) -> Tensor:
    """A layer's result in float64: by xlstm's plain cells, or where these take more memory than
    there is, by ours."""
    found = attempt(run, None)
    if isinstance(found, str):
        found = attempt(run, flashrnn.compat.xlstm)
    if isinstance(found, str):
        sys.exit(f"There is nothing to compare with: {found}")
    return found


def check(run: Callable[[], Tensor], ours: ModuleType | None, truth: Tensor) -> Contender | str:
    """A contender whose result is right, or the reason why there is none."""
    result = attempt(run, ours)
    if isinstance(result, str):
        return result
    error = float((result.double() - truth).norm() / truth.norm())
    if not error <= LARGEST_ERROR:
        return f"its error relative to the truth is {error:.2g}"
    return Contender(run, ours, error)


def measure(
    contenders: dict[str, Contender], seconds: float
) -> dict[str, tuple[float, float, int]]:
    """Medians in ms by CUDA events and by wall clock, and the number of repetitions.

    The contenders take turns; each repeats its call for about ``seconds``, and at least 3 times.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    waiting = dict(contenders)
    while waiting:
        for name, contender in list(waiting.items()):
            with cells(contender.ours):
                contender.run()  # Not counted: patching costs, and the clocks come up.
                torch.cuda.synchronize()
                for _ in range(3):
                    since = time.perf_counter()
                    start.record()
                    contender.run()
                    end.record()
                    end.synchronize()
                    wall = (time.perf_counter() - since) * 1e3
                    taken[name].append((start.elapsed_time(end), wall))
            if sum(wall for _, wall in taken[name]) >= seconds * 1e3:
                del waiting[name]
    return {
        name: (*(statistics.median(column) for column in zip(*times, strict=True)), len(times))
        for name, times in taken.items()
    }


def report(problem: str, found: dict[str, Contender | str], seconds: float) -> None:
    """Measure those that can run, and print the rows of all."""
    able = {name: c for name, c in found.items() if isinstance(c, Contender)}
    times = measure(able, seconds)
    for name, contender in found.items():
        if isinstance(contender, Contender):
            events, wall, repetitions = times[name]
            columns = f"{events:.3g} | {wall:.3g} | {repetitions} | {contender.error:.1e}"
        else:
            columns = f"{contender} | | |"
        print(f"| {problem} | {name} | {columns} |", flush=True)


def xlstm_problems(lengths: list[int], seconds: float) -> None:
    """A layer under autocast to bfloat16, forward, and forward + backward."""
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    def made(backend: str) -> nn.Module:
        config = sLSTMLayerConfig(
            embedding_dim=EMBEDDING,
            num_heads=HEADS,
            backend=backend,
            recurrent_weight_init="standard",  # Else R is 0.
        )
        return sLSTMLayer(config)

    torch.manual_seed(0)
    plain = made("vanilla")
    plain.reset_parameters()

    def alike(backend: str) -> nn.Module:
        """A layer with the parameters of the plain one; each kind keeps R and b in its order."""
        layer = made(backend)
        given, cell = plain.slstm_cell, layer.slstm_cell
        R = given._recurrent_kernel_int2ext(given._recurrent_kernel_)
        b = given._bias_int2ext(given._bias_)
        own = {
            "slstm_cell._recurrent_kernel_": cell._recurrent_kernel_ext2int(R),
            "slstm_cell._bias_": cell._bias_ext2int(b),
        }
        layer.load_state_dict(plain.state_dict() | own)
        return layer.cuda()

    layers = {
        name: (attempt(partial(alike, backend), ours), ours)
        for name, backend, ours in (
            ("xlstm, `vanilla`", "vanilla", None),
            ("xlstm, `cuda`", "cuda", None),
            ("xlstm with our cells", "cuda", flashrnn.compat.xlstm),
        )
    }
    exact = alike("vanilla").double()
    for steps in lengths:
        x = torch.randn(B, steps, EMBEDDING, device="cuda")
        for what, call in (("forward", forward), ("forward + backward", forward_and_backward)):
            truth = true(partial(call, exact, x.double()))
            found = {
                name: layer
                if isinstance(layer, str)
                else check(partial(call, layer, x), ours, truth)
                for name, (layer, ours) in layers.items()
            }
            report(f"layer, T = {steps}, {what}", found, seconds)


def output(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):  # Leaves float64 as it is.
        return layer(x)


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return output(layer.eval(), x)


def forward_and_backward(layer: nn.Module, x: Tensor) -> Tensor:
    """The gradient of x, computed with those of all parameters."""
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    y = output(layer.train(), leaves[0])
    weights = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype)
    return torch.autograd.grad(y, leaves, weights.expand_as(y))[0]


def tirex_problem(seconds: float) -> None:
    """A forecast, with the copies of the series to the GPU and of the quantiles back."""
    from tirex.models.tirex import TiRexZero

    series = torch.randn(SERIES, POINTS, generator=torch.Generator().manual_seed(1)).cumsum(1)

    def forecast(backend: str) -> Callable[[], Tensor]:
        torch.manual_seed(0)
        model = TiRexZero(
            backend=backend,
            model_config={
                "input_patch_size": 32,
                "output_patch_size": 32,
                "quantiles": [tenth / 10 for tenth in range(1, 10)],
                "block_kwargs": {"embedding_dim": 512, "num_heads": 4, "num_blocks": 12},
                "input_ff_dim": 2048,
            },
            train_ctx_len=2048,
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "slstm_cell" in name:  # These come uninitialised.
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model = model.cuda().eval()
        return lambda: model.forecast(series, prediction_length=AHEAD)[0]

    flashrnn.compat.tirex.patch(backend="vanilla", dtype=None)
    truth = forecast("torch")().double()
    flashrnn.compat.tirex.unpatch()
    found = {
        name: check(forecast(backend), ours, truth)
        for name, backend, ours in (
            ("TiRex, `torch`", "torch", None),
            ("TiRex, `cuda`", "cuda", None),
            ("TiRex with our cells", "torch", flashrnn.compat.tirex),
        )
    }
    report("forecast", found, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("packages", nargs="*", help="xlstm, tirex; default: both")
    parser.add_argument("--T", type=int, nargs="+", default=[512, 2048], help="of xlstm's layer")
    parser.add_argument("--seconds", type=float, default=2, help="to repeat each call for")
    options = parser.parse_args()
    packages = options.packages or ["xlstm", "tirex"]
    if unknown := set(packages) - {"xlstm", "tirex"}:
        parser.error(f"no package {unknown.pop()!r} is measured here; xlstm and tirex are")
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no NVIDIA GPU here, and times of these are what this measures.")

    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {platform.python_version()}, flashrnn {flashrnn.__version__}. Layer: B = {B}, "
        f"{EMBEDDING} units in {HEADS} heads, autocast to bfloat16; errors relative to float64. "
        f"Forecast: {SERIES} series of {POINTS} points, {AHEAD} points ahead; errors relative to "
        "float32. Medians in ms.\n"
    )
    print("| problem | contender | events | wall clock | repetitions | error |")
    print("|---|---|---|---|---|---|")
    if "xlstm" in packages:
        xlstm_problems(options.T, options.seconds)
    if "tirex" in packages:
        tirex_problem(options.seconds)


if __name__ == "__main__":
    main()
