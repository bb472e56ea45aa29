"""The tiles of R's gradient of heads that one CTA owns; see ``recurrent_gradient.cu``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import call, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.sizes import tiles_of


@dataclass(frozen=True)
class GradientPlan:
    """Tiles of R's gradient.

    Attributes:
        ENTRY: the kernel's name.
        THREADS: threads of a CTA.
        D: head dimension.
        gates: recurrent gates of a CTA.
        groups: groups of so many gates that a head has.
        parts: parts into which the sum over all steps is cut, each of its own CTA.
        rows: rows of a part: of d_gates and h, one for each step of each sequence.
        stages: slots of the ring: chunks of rows that are being fetched or read.
        shared_memory: a CTA's dynamic shared memory in bytes.
    """

    ENTRY: ClassVar = "recurrent_gradient"
    THREADS: ClassVar = 256

    D: int
    gates: int
    groups: int
    parts: int
    rows: int
    stages: int
    shared_memory: int

    @property
    def compiled(self) -> GradientPlan:
        """The plan without what is not compiled in, for a cache of kernels."""
        return replace(self, parts=1, rows=0)

    def source(
        self,
        cell: TracedCell,
        precision: str,
        piece_bytes: int,
        options: source.Options = (("GATHERED", False),),
    ) -> dict[str, str]:
        """The program's text in parts, each under the name that an error gives it.

        Args:
            cell: the cell.
            precision: out of ``source.PRECISIONS``.
            piece_bytes: see :meth:`flashrnn.kernels.plan.Plan.source`.
            options: of ``source.gradient_options``.
        """
        constants = {
            "D": self.D,
            "GATES": self.gates,
            "STAGES": self.stages,
            "SHARED_MEMORY": self.shared_memory,
            "PIECE_BYTES": piece_bytes,
            **dict(options),
        }
        record = call.RECURRENT_GRADIENT
        if any(dict(options).values()):
            record = record.complete
        kernel = "single_cta/recurrent_gradient.cu"
        return source.program(kernel, cell, precision, constants, record)

    def grid(self, N: int) -> int:
        """CTAs of a launch."""
        return N * self.groups * self.parts


# Rows of a part. Each product that the tensor core adds to a sum cuts up to a unit off the sum's
# last place. Over millions of rows that is seen in the first digits.
_MOST_ROWS = 2**14
# Sums of a CTA: 64 registers of each thread. A thread has 128, since two CTAs share a
# multiprocessor (__launch_bounds__ of the kernel).
_SUMS = 64 * GradientPlan.THREADS
_CTAS_A_MULTIPROCESSOR = 2
# Slots of the ring, and bytes of a gate's unit in a chunk: 32 rows of 16-bit elements.
_STAGES = 3
_CHUNK_BYTES = 64
# Chunks of a part, if there are enough rows: so many that the time to write the part's sums does
# not matter.
_FEWEST_CHUNKS = 8
# Up to so many chunks are one part. Several parts need another launch to be added up, which is
# reckoned to take as long.
_WHOLE_CHUNKS = 16
# Elements of padding of a chunk's row (recurrent_gradient.cu): 8 for the gates and 8 for h.
_PADDING = 16


def plan_gradient(
    recurrent: int, rows: int, N: int, D: int, itemsize: int, gpu: GPU
) -> GradientPlan:
    """The tiles of R's gradient for heads of at most ``LARGEST_HEAD`` units.

    Args:
        recurrent: gates that R feeds.
        rows: B · T, what the sum runs over.
        N: number of heads.
        D: head dimension.
        itemsize: bytes of an element of the tensors.
        gpu: the device.
    """
    BLOCK_D, chunk = 16 * tiles_of(D, 16), _CHUNK_BYTES // itemsize
    # A row of a chunk has BLOCK_D elements for each gate and for h.
    row_elements = gpu.shared_memory // (_STAGES * chunk * itemsize)
    gates_in_memory = (row_elements - BLOCK_D - _PADDING) // BLOCK_D
    gates_in_registers = _SUMS // (BLOCK_D * BLOCK_D)
    gates = max(1, min(recurrent, gates_in_registers, gates_in_memory))
    groups = tiles_of(recurrent, gates)
    rows_a_part = chunk * tiles_of(rows, chunk * _parts(rows, N * groups, chunk, gpu))
    return GradientPlan(
        D=D,
        gates=gates,
        groups=groups,
        parts=tiles_of(rows, rows_a_part),
        rows=rows_a_part,
        stages=_STAGES,
        shared_memory=_STAGES * chunk * ((gates + 1) * BLOCK_D + _PADDING) * itemsize,
    )


def _parts(rows: int, ctas: int, chunk: int, gpu: GPU) -> int:
    """How many parts the sum has, each of so many CTAs: as many as run at once, if rows allow."""
    if rows <= _WHOLE_CHUNKS * chunk:
        return 1
    at_once = _CTAS_A_MULTIPROCESSOR * gpu.multiprocessors
    parts = max(1, min(at_once // ctas, tiles_of(rows, _FEWEST_CHUNKS * chunk)))
    return max(parts, tiles_of(rows, _MOST_ROWS))
