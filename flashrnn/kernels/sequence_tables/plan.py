"""How CTAs share the tables of ``tables.cu``, and the rows of ``h_before.cu``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashrnn.kernels import call, source
from flashrnn.kernels.sizes import tiles_of

TABLES, H_BEFORE = "make_tables", "h_before"
"""The kernels' names."""
THREADS = 256
"""Of a CTA of either kernel."""
MOST_SEQUENCES = 4096
"""Of lengths of their own: a CTA has all lengths in shared memory, and compares each with all."""

_WARPS = THREADS // 32
_ROWS_A_CTA = 4 * THREADS


class Tiles(NamedTuple):
    """CTAs of the tables, in this order.

    Attributes:
        order: a warp has a sequence.
        rows: a CTA has the next rows.
        starts: a warp has a start.
    """

    order: int
    rows: int
    starts: int


def plan_tables(sequences: int, rows: int, starts: int) -> Tiles:
    """How many CTAs have the order of so many sequences, so many rows and starts."""
    return Tiles(tiles_of(sequences, _WARPS), tiles_of(rows, _ROWS_A_CTA), tiles_of(starts, _WARPS))


def h_before_grid(rows: int, N: int) -> int:
    """CTAs of a launch."""
    return tiles_of(rows * N, _WARPS)


def program(entry: str, dtype: torch.dtype) -> dict[str, str]:
    """The text of a kernel's program in parts, each under the name that an error gives it."""
    precision = str(dtype).removeprefix("torch.")
    if entry == H_BEFORE:
        kernel, constants, record = "h_before.cu", {"THREADS": THREADS}, call.H_BEFORE
    else:
        kernel, record = "tables.cu", call.SEQUENCE_TABLES
        constants = {"MOST_SEQUENCES": MOST_SEQUENCES, "ROWS_A_CTA": _ROWS_A_CTA}
        constants |= {"THREADS": THREADS}
    return source.program(f"sequence_tables/{kernel}", None, precision, constants, record)
