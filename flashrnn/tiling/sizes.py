"""Arithmetic of sizes."""

from __future__ import annotations


def tiles_of(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
