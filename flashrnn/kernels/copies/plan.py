"""How the CTAs of ``copies.cu`` share several copies."""

from __future__ import annotations

from collections.abc import Sequence

from flashrnn.kernels import call, source
from flashrnn.kernels.sizes import tiles_of

ENTRY = "copies"
THREADS = 256
MOST = 6
"""Copies of a launch."""

_ELEMENTS_A_THREAD, _MOST_CTAS = 4, 512

RECORD = call.Record(
    "CopiesCall",
    tuple(
        call.Operand(f"{name}{i}", kind)
        for i in range(MOST)
        for name, kind in (("from", "const Element"), ("plus", "const Element"), ("to", "Element"))
    ),
    {
        f"{name}{i}": kind
        for i in range(MOST)
        for name, kind in (("count", "long long"), ("end", "int"))
    },
)
"""The addresses of all copies, and then how many elements each has and where its CTAs end. What is
no copy has zeros."""


def share(counts: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The numbers of copies of so many elements each, as a launch gets them, and its CTAs."""
    numbers: list[int] = []
    end = 0
    for count in counts:
        end += min(_MOST_CTAS, tiles_of(count, THREADS * _ELEMENTS_A_THREAD))
        numbers += count, end
    return (*numbers, *(0, end) * (MOST - len(counts))), end


def program(precision: str) -> dict[str, str]:
    """The program's text in parts, each under the name that an error gives it."""
    fields = "from", "plus", "to", "count", "end"
    copies = (", ".join(f"{name}{i}" for name in fields) for i in range(MOST))
    listed = ", ".join(f"{{{copy}}}" for copy in copies)
    generated = {"copies/all.cuh": f"#define COPIES {listed}"}
    constants = {"THREADS": THREADS, "MOST": MOST}
    return source.program("copies/copies.cu", None, precision, constants, RECORD, generated)
