"""Which products are over few rows, and how CTAs share them; see ``tile.cuh``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.sizes import tiles_of

THREADS = 512
_TILE = 64
# Bytes of a chunk of the summed dimension; of a chunk of both matrices, with its padding; the most
# chunks of a ring; and the fewest where two CTAs share a multiprocessor.
_CHUNK_BYTES = 256
_SLOT_BYTES = 2 * _CHUNK_BYTES * (_TILE + 8)
_MOST_STAGES, _FEWEST_STAGES = 4, 3

# Chunks of a tile's sum that are worth a CTA of their own, and the most CTAs that share a tile.
_LEAST_CHUNKS = 4
_MOST_SHARES = 32


class _Times(NamedTuple):
    """Of a kernel on an H200, in microseconds.

    Attributes:
        cta: of a multiprocessor for a CTA.
        chunk: of a chunk of its sum.
        most: for all of it. Up to then the host is spared more than the GPU may lose beside the
            library's kernels: in 16 bits about 13 in the product and usually up to 20 in the
            gradients, in float32 next to nothing.
        most_of_pieces: the same where rows are no whole pieces of 16 bytes, which take the
            library's kernels longer too.
    """

    cta: float
    chunk: float
    most: float
    most_of_pieces: float


# By the bytes of an element. A product of float32 is three; by TF32 it takes less.
_OF_PRODUCT = {2: _Times(1.4, 0.7, 19.0, 32.0), 4: _Times(2.2, 1.4, 32.0, 32.0)}
_OF_GRADIENTS = {2: _Times(2.2, 1.1, 60.0, 85.0), 4: _Times(2.2, 2.2, 90.0, 90.0)}
_LAUNCH = 2.0


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


def takes(products: Sequence[Summed], itemsize: int, row: int, gpu: GPU) -> bool:
    """Whether gradients are computed here, all in one launch.

    Args:
        products: those of the gradients.
        itemsize: bytes of an element.
        row: elements of a row, or a divisor of those of all rows.
        gpu: the device.
    """
    times = _times(_OF_GRADIENTS, itemsize, row)
    return _is_fast(shared(products, itemsize, gpu), products, itemsize, times, gpu)


def takes_product(rows: int, columns: int, summed: int, itemsize: int, gpu: GPU) -> bool:
    """Whether the product of ``[rows, summed]`` and ``[summed, columns]`` is computed here."""
    if rows == 0:
        return False
    only = Summed(product_tiles(rows, columns), summed)
    times = _times(_OF_PRODUCT, itemsize, summed)
    # Its tiles are not shared.
    return _is_fast([Tiles(only.tiles, 1)], [only], itemsize, times, gpu)


def _times(of_kernel: Mapping[int, _Times], itemsize: int, row: int) -> _Times:
    """A kernel's times for elements of so many bytes, and rows of so many elements."""
    times = of_kernel[itemsize]
    if row * itemsize % 16:
        times = times._replace(most=times.most_of_pieces)
    # 16-bit rows of odd length are loaded element by element, through registers.
    return times._replace(chunk=2 * times.chunk) if row % 2 and itemsize == 2 else times


def product(precision: str, piece_bytes: int, gpu: GPU) -> Program:
    """The program of the input product.

    Args:
        precision: out of ``source.PRECISIONS``.
        piece_bytes: the largest pieces, of 16, 8 or 4 bytes or an element's, that all rows of the
            operands consist of.
        gpu: the device.
    """
    # Two CTAs have 64 registers for each thread, of which a thread's sums in float32 take more.
    resident = 1 if precision == "float32" else 2
    record = call.FEW_ROWS_PRODUCT
    return _program("product", None, precision, piece_bytes, gpu, record, resident)


def gradients(cell: TracedCell, precision: str, piece_bytes: int, gpu: GPU) -> Program:
    """The program of the gradients; see :func:`product`."""
    return _program("gradients", cell, precision, piece_bytes, gpu, call.FEW_ROWS_GRADIENTS, 1)


def _program(
    name: str,
    cell: TracedCell | None,
    precision: str,
    piece_bytes: int,
    gpu: GPU,
    record: call.Record,
    resident: int,
) -> Program:
    """See :func:`product`; ``resident`` is how many CTAs a multiprocessor is to have."""
    if gpu.shared_memory // _SLOT_BYTES < resident * _FEWEST_STAGES:
        resident = 1
    stages = min(_MOST_STAGES, gpu.shared_memory // resident // _SLOT_BYTES)
    shared_memory = stages * _SLOT_BYTES
    constants = {
        "STAGES": stages,
        "RESIDENT": resident,
        "SHARED_MEMORY": shared_memory,
        "PIECE_BYTES": piece_bytes,
    }
    text = source.program(f"few_rows/{name}.cu", cell, precision, constants, record)
    return Program(f"few_rows_{name}", text, shared_memory)


def product_tiles(rows: int, columns: int) -> int:
    """Tiles of a product ``[rows, columns]``."""
    return tiles_of(rows, _TILE) * tiles_of(columns, _TILE)


class Tiles(NamedTuple):
    """Those of the products of one kind in a launch.

    Attributes:
        number: how many.
        shares: CTAs that share each, which sum over equally many chunks.
    """

    number: int
    shares: int

    @property
    def ctas(self) -> int:
        """CTAs of all of them."""
        return self.number * self.shares


class Summed(NamedTuple):
    """Products of one kind.

    Attributes:
        tiles: of all of them.
        summed: over how many numbers each element sums.
    """

    tiles: int
    summed: int


def shared(products: Sequence[Summed], itemsize: int, gpu: GPU) -> list[Tiles]:
    """How the CTAs of a launch share products, so that none sums over more than an equal share of
    all chunks, or four.

    Args:
        products: what is computed.
        itemsize: bytes of an element.
        gpu: the device, each of whose multiprocessors has a CTA at a time.
    """
    chunks = [_chunks(product, itemsize) for product in products]
    all_chunks = sum(map(mul, (product.tiles for product in products), chunks))
    most = max(_LEAST_CHUNKS, tiles_of(all_chunks, gpu.multiprocessors))
    return [
        Tiles(product.tiles, _shares(count, most) if product.tiles else 1)
        for product, count in zip(products, chunks, strict=True)
    ]


def _shares(chunks: int, most: int) -> int:
    """How many CTAs share a tile of so many chunks, such that each has some, and few more than
    ``most``."""
    of_each = tiles_of(chunks, min(_MOST_SHARES, tiles_of(chunks, most)))
    return tiles_of(chunks, of_each)


def _chunks(product: Summed, itemsize: int) -> int:
    """Of a tile's sum."""
    return tiles_of(product.summed * itemsize, _CHUNK_BYTES)


def _is_fast(
    tiles: Sequence[Tiles], products: Sequence[Summed], itemsize: int, times: _Times, gpu: GPU
) -> bool:
    """Whether a launch takes at most ``times.most``, estimated by all its CTAs on all
    multiprocessors or, if that takes longer, by the longest CTA."""
    of_cta = [
        times.cta + times.chunk * tiles_of(_chunks(product, itemsize), each.shares)
        for each, product in zip(tiles, products, strict=True)
    ]
    of_all = sum(map(mul, (each.ctas for each in tiles), of_cta)) / gpu.multiprocessors
    return _LAUNCH + max(of_all, *of_cta) <= times.most


def scratch(tiles: Sequence[Tiles]) -> tuple[int, int]:
    """The counters and sums of tiles that several CTAs share, in units of 16 bytes."""
    ctas = sum(each.ctas for each in tiles if each.shares > 1)
    return tiles_of(ctas, 4), ctas * _TILE**2 // 4
