"""What other kernels read of a call's options: the sequences' order, rows, flags and starts."""

from flashrnn.kernels.sequence_tables.plan import (
    H_BEFORE,
    MOST_SEQUENCES,
    TABLES,
    THREADS,
    Tiles,
    h_before_grid,
    plan_tables,
    program,
)

__all__ = [
    "H_BEFORE",
    "MOST_SEQUENCES",
    "TABLES",
    "THREADS",
    "Tiles",
    "h_before_grid",
    "plan_tables",
    "program",
]
