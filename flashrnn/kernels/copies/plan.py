"""How the CTAs of ``copies.cu`` share several copies."""

from __future__ import annotations

from collections.abc import Sequence

from flashrnn.kernels import call, source
from flashrnn.kernels.sizes import tiles_of

ENTRY = "copies"
THREADS = 256
MOST = 6
"""Copies of a launch."""

MOST_RESULTS = 2**20
"""Elements of a scan's results that are copied. PyTorch's operations take less time for more."""

_ELEMENTS_A_THREAD, _MOST_CTAS = 4, 512

RECORD = call.Record(
    "CopiesCall",
    (
        *(
            call.Operand(f"{name}{i}", kind)
            for i in range(MOST)
            for name, kind in (
                ("from", "const Element"),
                ("plus", "const Element"),
                ("to", "Element"),
            )
        ),
        call.Operand("states", "const Element"),
        call.Operand("h_by_time", "Element"),
        call.Operand("last_states", "const float"),
        call.Operand("last_rounded", "Element"),
    ),
    {
        **{
            f"{name}{i}": kind
            for i in range(MOST)
            for name, kind in (("count", "long long"), ("end", "int"))
        },
        **dict.fromkeys(("T", "B", "width"), "unsigned"),
        "h_count": "long long",
        "h_end": "int",
        "last_count": "long long",
        "last_end": "int",
    },
)
"""The addresses of all copies, those of a scan's results last, and then how many elements each has
and where its CTAs end. What is no copy has zeros."""


def share(counts: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The numbers of copies of so many elements each, as a launch gets them, and its CTAs."""
    numbers: list[int] = []
    end = 0
    for count in counts:
        end += _ctas(count)
        numbers += count, end
    numbers += (0, end) * (MOST - len(counts))
    return (*numbers, *(0,) * (len(RECORD.numbers) - len(numbers))), end


def share_results(h_count: int, last_count: int) -> tuple[dict[str, int], int]:
    """The same of a launch that copies so much of a scan's results, by the numbers' names."""
    h_end = _ctas(h_count)
    end = h_end + _ctas(last_count)
    return {"h_count": h_count, "h_end": h_end, "last_count": last_count, "last_end": end}, end


def _ctas(count: int) -> int:
    """The CTAs of so many elements."""
    return min(_MOST_CTAS, tiles_of(count, THREADS * _ELEMENTS_A_THREAD))


def program(precision: str) -> dict[str, str]:
    """The program's text in parts, each under the name that an error gives it."""
    fields = "from", "plus", "to", "count", "end"
    copies = (", ".join(f"{name}{i}" for name in fields) for i in range(MOST))
    listed = ", ".join(f"{{{copy}}}" for copy in copies)
    generated = {"copies/all.cuh": f"#define COPIES {listed}"}
    constants = {"THREADS": THREADS, "MOST": MOST}
    return source.program("copies/copies.cu", None, precision, constants, RECORD, generated)
