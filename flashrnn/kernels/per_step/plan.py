"""How a launch computes one step, product and cell.

What sizes registers and shared memory is compiled in and follows from a :class:`StepPlan`. B, T, N,
D and all addresses are known at run time. Of these only N and D are arguments of each launch. The
kernel reads the others from the record of the call (:mod:`flashrnn.kernels.call`), which the kernel
``set_call`` writes to device memory. So a recorded run of launches serves every call, with batches
of many sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.sizes import one_of_few, tiles_of

# Registers of a thread for chunks that are being loaded. It has 128 if two CTAs of 256 threads
# share a multiprocessor, as they must: the next step's CTA starts beside this one's.
_REGISTERS_FOR_CHUNKS = 72
_REGISTERS_FOR_SUMS = 64
_REGISTERS_FOR_BOTH = 110
# Without asking the driver for more.
_MOST_SHARED_MEMORY = 48 * 1024
_CHUNK_BYTES = 64
_MOST_N_TILES = 4
# From an H200's times of LSTM: 4.2 us forward at B = 16, 1x768, and 181 us forward and 169 us
# backward at B = 1024, 1x1024. Bytes are of a multiprocessor and cycle.
_LAUNCH_CYCLES = 3500
_READ_RATE = 18
# CTAs below which a larger tile of sequences would leave multiprocessors idle.
_ENOUGH_CTAS = 64


@dataclass(frozen=True)
class StepPlan:
    """Tiles of a step kernel.

    Attributes:
        backward: the direction.
        units: units of a head that a CTA computes.
        tiles: tiles of 16 rows of the product.
        n_tiles: n-tiles of 8 sequences.
        segments: segments of D elements of the dimension that the product sums over.
        warps: warps of a CTA.
        depth: chunks of the operands that a warp has under way.
        aligned: whether every row begins at a multiple of 16 bytes.
        sequenced: whether calls have options of sequences.
    """

    backward: bool
    units: int
    tiles: int
    n_tiles: int
    segments: int
    warps: int
    depth: int
    aligned: bool
    sequenced: bool = False

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "step_backward" if self.backward else "step_forward"

    @property
    def record(self) -> call.Record:
        """The record that it reads."""
        record = call.BACKWARD if self.backward else call.FORWARD
        return record.complete if self.sequenced else record

    def grid(self, B: int, N: int, D: int) -> int:
        """CTAs of a launch. Batches of a few sizes share it; CTAs beyond the batch do nothing."""
        return tiles_of(D, self.units) * N * one_of_few(tiles_of(B, 8 * self.n_tiles))

    def estimated_cycles(self, B: int, N: int, D: int, itemsize: int, gpu: GPU) -> float:
        """Of a step. Its CTAs read their parts of R and of the other operand from the L2 cache."""
        rows = 16 * self.tiles + 8 * self.n_tiles
        operands = self.grid(B, N, D) * rows * self.segments * D * itemsize
        return _LAUNCH_CYCLES + operands / (_READ_RATE * gpu.multiprocessors)

    def source(self, cell: TracedCell, precision: str, options: source.Options) -> dict[str, str]:
        """The program's text in parts, each under the name that an error gives it.

        Args:
            cell: the cell.
            precision: out of ``source.PRECISIONS``.
            options: out of :func:`flashrnn.kernels.source.forward_options` or ``backward_options``.
        """
        constants = {
            "UNITS": self.units,
            "TILES": self.tiles,
            "N_TILES": self.n_tiles,
            "SEGMENTS": self.segments,
            "THREADS": self.threads,
            "DEPTH": self.depth,
            "ALIGNED": self.aligned,
            "CHUNK_BYTES": _CHUNK_BYTES,
            "SHARED_MEMORY": _shared_memory(self.warps, self.tiles, self.n_tiles),
            "CLIP": False,
            "STORED": len(cell.states),
            **dict(options),
        }
        direction = "backward" if self.backward else "forward"
        kernel = f"per_step/{direction}.cu"
        return source.program(kernel, cell, precision, constants, self.record)


def _shared_memory(warps: int, tiles: int, n_tiles: int) -> int:
    """Bytes of the warps' partial sums; ``product.cuh`` asserts it of them."""
    return warps * 8 * n_tiles * (16 * tiles + 4) * 4


def plan_step(
    cell: TracedCell,
    B: int,
    N: int,
    D: int,
    precision: str,
    backward: bool,
    sequenced: bool = False,
) -> StepPlan:
    """The tiles of a step kernel for a problem.

    Args:
        cell: the cell.
        B: batch size.
        N: number of heads.
        D: head dimension.
        precision: ``"float16"``, ``"bfloat16"``, ``"tf32"`` or ``"float32"``.
        backward: whether for the backward scan.
        sequenced: whether calls have options of sequences.
    """
    recurrent = len(cell.fed_by("R"))
    # Forward two gates share a tile of 16 rows, 8 units of each.
    units, tiles, segments = (16, 1, recurrent) if backward else (8, tiles_of(recurrent, 2), 1)
    itemsize = source.itemsize_of(precision)
    chunks = segments * tiles_of(D * itemsize, _CHUNK_BYTES)
    # A lane's sums of a tile and n-tile; without tensor cores it has more of them.
    sums = 16 if precision == "float32" else 4
    n_tiles = 1
    while (
        2 * n_tiles <= _MOST_N_TILES
        and 2 * n_tiles * tiles * sums <= _REGISTERS_FOR_SUMS
        and 8 * n_tiles < B
        and tiles_of(D, units) * N * tiles_of(B, 16 * n_tiles) >= _ENOUGH_CTAS
    ):
        n_tiles *= 2
    # Backward has more chunks in a step, and is faster if each warp loads few of them. With two
    # CTAs of 16 warps on a multiprocessor, a thread has 64 registers.
    most_warps = 16 if backward and n_tiles * tiles * sums <= 16 else 8
    warps = min(most_warps, 1 << (chunks - 1).bit_length())
    while _shared_memory(warps, tiles, n_tiles) > _MOST_SHARED_MEMORY:
        warps //= 2
    registers = min(_REGISTERS_FOR_CHUNKS, _REGISTERS_FOR_BOTH - n_tiles * tiles * sums)
    depth = min(tiles_of(chunks, warps), registers // (4 * (2 * tiles + n_tiles)))
    depth = 1 if warps > 8 else max(1, depth)
    return StepPlan(
        backward=backward,
        units=units,
        tiles=tiles,
        n_tiles=n_tiles,
        segments=segments,
        warps=warps,
        depth=depth,
        aligned=D * itemsize % 16 == 0,
        sequenced=sequenced,
    )
