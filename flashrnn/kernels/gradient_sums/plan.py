"""How CTAs share the sums of ``gradient_sums.cu``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.sizes import tiles_of

# Rows that a thread adds up before more threads share a column, and the most that do: with them the
# lines of 32 bytes that a warp reads are still whole.
_ROWS_A_THREAD = 8
_MOST_SHARES = 32


@dataclass(frozen=True)
class SumsPlan:
    """How CTAs share two sums over rows of equal columns.

    Attributes:
        ENTRY: the kernel's name.
        THREADS: threads of a CTA.
        R_shares: threads that share a column of R's gradient.
        b_shares: threads that share a column of the bias's.
        R_ctas: CTAs of R's gradient, the first of the launch.
        b_ctas: CTAs of the bias's.
    """

    ENTRY: ClassVar = "gradient_sums"
    THREADS: ClassVar = 256

    R_shares: int
    b_shares: int
    R_ctas: int
    b_ctas: int

    @property
    def grid(self) -> int:
        """CTAs of a launch."""
        return self.R_ctas + self.b_ctas


def plan_sums(parts: int, R_columns: int, B: int, b_columns: int) -> SumsPlan:
    """How the sums are shared.

    Args:
        parts: rows of R's gradient.
        R_columns: its elements; 0 where it needs no sum.
        B: rows of the bias's gradient.
        b_columns: its elements.
    """
    R_shares, R_ctas = plan_shares(parts, R_columns, SumsPlan.THREADS)
    b_shares, b_ctas = plan_shares(B, b_columns, SumsPlan.THREADS)
    return SumsPlan(R_shares, b_shares, R_ctas, b_ctas)


def plan_shares(rows: int, columns: int, threads: int) -> tuple[int, int]:
    """How many threads share a column of a sum over rows, and the CTAs of so many threads."""
    shares = 1
    while shares < _MOST_SHARES and rows > _ROWS_A_THREAD * shares:
        shares *= 2
    return shares, tiles_of(columns * shares, threads)


def program(cell: TracedCell, precision: str) -> dict[str, str]:
    """The program's text in parts, each under the name that an error gives it."""
    constants = {"THREADS": SumsPlan.THREADS}
    return source.program(
        "gradient_sums/gradient_sums.cu", cell, precision, constants, call.GRADIENT_SUMS
    )
