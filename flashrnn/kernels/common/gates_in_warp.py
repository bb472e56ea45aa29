"""What plans need of ``gates_in_warp.cuh``."""

from __future__ import annotations


def padded(recurrent: int) -> int:
    """Rows of R for each unit of a warp's tile, where R feeds so many gates."""
    return recurrent if recurrent <= 2 else 4
