"""What a training step allocates on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HELD, PEAK = "held for backward", "peak of a training step"
MEASURES = (HELD, PEAK)
MIB = 1 << 20


def measure(run: Callable[..., Tensor], leaves: Sequence[Tensor]) -> dict[str, float]:
    """MiB besides the leaves and the output's gradient: after forward, and at the peak.

    Args:
        run: ``run(*leaves)`` gives the output.
        leaves: its arguments, of all of which gradients are asked.
    """
    with torch.no_grad():
        gradient = torch.randn_like(run(*leaves))
    # Run once before: libraries' workspaces stay allocated and are not part of a step.
    torch.autograd.grad(run(*leaves), leaves, gradient)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run(*leaves)
    held = torch.cuda.memory_allocated() - before
    torch.autograd.grad(output, leaves, gradient)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {HELD: held / MIB, PEAK: peak / MIB}
