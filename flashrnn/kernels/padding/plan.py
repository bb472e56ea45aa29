"""What ``padding.cu`` copies, and how CTAs share it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from flashrnn.kernels import call, source
from flashrnn.kernels.sizes import tiles_of

ENTRY = "pad"
THREADS = 256
MOST = 7
"""Copies of a launch."""
MOST_PIECES = 2**31 - 1
"""Pieces that a copy may have."""

_PIECES_A_THREAD, _MOST_CTAS = 2, 2048


class Copy(NamedTuple):
    """A copy with rows of another length.

    Attributes:
        sizes: of the new tensor, which has five dimensions and is contiguous.
        strides: of the given one, five.
        rows: indices of the fourth dimension of the given one. Those behind repeat its first.
        columns: elements of a row of the given one.
        repeats: whether behind them its first element comes again, in place of zeros.
        itemsize: bytes of an element, 2 or 4.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    rows: int
    columns: int
    repeats: bool
    itemsize: int

    @property
    def pieces(self) -> int:
        """Of 16 bytes each, or elements."""
        return prod(self.sizes) * self.itemsize // self._piece_bytes

    @property
    def numbers(self) -> tuple[int, ...]:
        """Its numbers in :data:`RECORD`, but for the last."""
        *_, width = self.sizes
        pieces_a_row = width * self.itemsize // self._piece_bytes
        kind = self.rows, self.columns, self.repeats, self.itemsize == 4, self._piece_bytes
        return *self.strides, *self.sizes[1:4], *kind, pieces_a_row, self.pieces

    @property
    def _piece_bytes(self) -> int:
        row = self.sizes[-1] * self.itemsize
        return self.itemsize if row % _PIECE else _PIECE


_PIECE = 16
_NUMBERS = {
    **{f"stride{i}_": "long long" for i in range(5)},
    **{f"size{i}_": "unsigned" for i in range(1, 4)},
    **{f"{name}_": "unsigned" for name in ("rows", "columns", "repeats", "of_words")},
    **{f"{name}_": "unsigned" for name in ("piece_bytes", "pieces_a_row", "pieces")},
    "end": "int",
}

RECORD = call.Record(
    "PaddingCall",
    tuple(
        call.Operand(f"{name}{i}", kind)
        for i in range(MOST)
        for name, kind in (("from", "const void"), ("to", "void"))
    ),
    {f"{name}{i}": kind for i in range(MOST) for name, kind in _NUMBERS.items()},
)
"""The addresses of all copies, and then their numbers. What is no copy has zeros."""


def share(copies: Sequence[Copy]) -> tuple[tuple[int, ...], int]:
    """The numbers of the copies, as a launch gets them, and its CTAs."""
    numbers: list[int] = []
    end = 0
    for copy in copies:
        end += min(_MOST_CTAS, tiles_of(copy.pieces, THREADS * _PIECES_A_THREAD))
        numbers += *copy.numbers, end
    none = *[0] * (len(_NUMBERS) - 1), end
    return (*numbers, *none * (MOST - len(copies))), end


def program() -> dict[str, str]:
    """The program's text in parts, each under the name that an error gives it."""
    fields = "from", "to", *_NUMBERS
    copies = (", ".join(f"{name}{i}" for name in fields) for i in range(MOST))
    listed = ", ".join(f"{{{copy}}}" for copy in copies)
    generated = {"padding/all.cuh": f"#define COPIES {listed}"}
    constants = {"THREADS": THREADS, "MOST": MOST}
    # It copies words, whatever they are.
    return source.program("padding/padding.cu", None, "float32", constants, RECORD, generated)
