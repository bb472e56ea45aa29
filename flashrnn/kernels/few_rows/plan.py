"""Which products are over few rows, and how CTAs share them; see ``tile.cuh``."""

from __future__ import annotations

from typing import NamedTuple

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.sizes import tiles_of

THREADS = 512
_TILE = 64
# Bytes of a chunk of both matrices, with its padding, and the most chunks of a ring.
_SLOT_BYTES = 2 * 256 * (_TILE + 8)
_MOST_STAGES = 4

# Up to so many rows, columns and products of two elements these kernels take the GPU at most a few
# microseconds longer than the library's, whose calls take the host more than that. Elements of 16
# bits in odd numbers are copied one by one.
_MOST_ROWS, _MOST_ODD_ROWS = 1024, 128
_MOST_COLUMNS = 4096
_MOST_PRODUCTS = 2**27


class Program(NamedTuple):
    """A program of one kernel.

    Attributes:
        entry: the kernel's name.
        text: the program's, in parts, each under the name that an error gives it.
        shared_memory: a CTA's dynamic shared memory in bytes.
    """

    entry: str
    text: dict[str, str]
    shared_memory: int


def takes(rows: int, columns: int, summed: int, itemsize: int) -> bool:
    """Whether the product of ``[rows, summed]`` and ``[summed, columns]``, and the gradients of
    both factors, which sum over columns and rows, are computed here.

    Args:
        rows: steps of all sequences.
        columns: units of all gates.
        summed: features.
        itemsize: bytes of an element.
    """
    is_odd = itemsize == 2 and (columns % 2 or summed % 2)
    return (
        takes_product(rows, columns, summed, itemsize)
        and rows <= (_MOST_ODD_ROWS if is_odd else _MOST_ROWS)
        and columns <= _MOST_COLUMNS
    )


def takes_product(rows: int, columns: int, summed: int, itemsize: int) -> bool:
    """The same of the product alone."""
    is_odd = itemsize == 2 and summed % 2
    most = _MOST_PRODUCTS // 8 if is_odd else _MOST_PRODUCTS
    return rows > 0 and rows * columns * summed <= most


def product(precision: str, piece_bytes: int, gpu: GPU) -> Program:
    """The program of the input product.

    Args:
        precision: out of ``source.PRECISIONS``.
        piece_bytes: the largest pieces, of 16, 8 or 4 bytes or an element's, that all rows of the
            operands consist of.
        gpu: the device.
    """
    return _program("product", None, precision, piece_bytes, gpu, call.FEW_ROWS_PRODUCT)


def gradients(cell: TracedCell, precision: str, piece_bytes: int, gpu: GPU) -> Program:
    """The program of the gradients; see :func:`product`."""
    return _program("gradients", cell, precision, piece_bytes, gpu, call.FEW_ROWS_GRADIENTS)


def _program(
    name: str,
    cell: TracedCell | None,
    precision: str,
    piece_bytes: int,
    gpu: GPU,
    record: call.Record,
) -> Program:
    stages = min(_MOST_STAGES, gpu.shared_memory // _SLOT_BYTES)
    shared_memory = stages * _SLOT_BYTES
    constants = {"STAGES": stages, "SHARED_MEMORY": shared_memory, "PIECE_BYTES": piece_bytes}
    text = source.program(f"few_rows/{name}.cu", cell, precision, constants, record)
    return Program(f"few_rows_{name}", text, shared_memory)


def product_ctas(rows: int, columns: int) -> int:
    """CTAs of a product ``[rows, columns]``."""
    return tiles_of(rows, _TILE) * tiles_of(columns, _TILE)
