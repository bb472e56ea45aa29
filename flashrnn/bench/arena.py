"""Random problems of real use: sizes drawn log-uniformly, bounded by memory."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import torch

from flashrnn.bench.case import Case
from flashrnn.bench.peers import DTYPES, MODULES

B, T, D = (1, 4096), (1, 2048), (16, 2048)
# Bytes per element of B·T·D: twice what a training step keeps in float32, or its check in float64.
BYTES = 256
# The most that B·T·D may be, however much memory there is: a call of this size takes long enough.
LARGEST = {"cuda": 1 << 27, "cpu": 1 << 12}
SHAPES = 95


def cases(
    count: int,
    seed: int,
    device: str,
    functions: Sequence[str] = tuple(MODULES),
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Case]:
    """Random cases of one head; a larger count begins with the cases of a smaller one.

    Args:
        count: how many.
        seed: of the random numbers.
        device: ``"cuda"`` or ``"cpu"``, whose memory they are for.
        functions: out of which one is drawn for each.
        dtypes: likewise.
    """
    draw = random.Random(seed)
    largest = LARGEST[device]
    if device == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        largest = min(largest, memory // 2 // BYTES)
    found: list[Case] = []
    while len(found) < count:
        b, t, d = (round(math.exp(draw.uniform(*map(math.log, ends)))) for ends in (B, T, D))
        function, dtype = draw.choice(functions), draw.choice(dtypes)
        if b * t * d <= largest:
            found.append(Case(function, B=b, T=t, N=1, D=d, dtype=dtype))
    return found


class Budget:
    """Seconds for all shapes, shared among those that are still to be measured."""

    def __init__(self, seconds: float, shapes: int) -> None:
        self._end, self._left = time.perf_counter() + seconds, shapes

    def share(self) -> float | None:
        """Seconds for the next shape; ``None`` when the time is up."""
        left, shapes = self._end - time.perf_counter(), self._left
        self._left -= 1
        return left / shapes if left > 0 else None
