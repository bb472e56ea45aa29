"""Arithmetic of sizes."""

from __future__ import annotations


def tiles_of(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def one_of_few(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    Example:
        >>> [one_of_few(count) for count in (1, 3, 5, 7, 9, 13)]
        [1, 3, 6, 8, 12, 16]
    """
    power = power_of_two(count)
    return 3 * power // 4 if count <= 3 * power // 4 else power
