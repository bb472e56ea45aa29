"""The host side of step_forward.cu and step_backward.cu: what they are compiled with.

Both are one step of the recurrence, product and cell in one launch. What sizes their registers
and shared memory is compiled in, and follows from a :class:`StepPlan`; B, T, N, D and all
addresses are run-time arguments. Of them only N and D are arguments of each launch. The others come
in a block of device memory, the call, so that a recorded run of launches serves every call, of many
sizes of a batch: ``set_call`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashrnn.cells.traced import TracedCell
from flashrnn.kernels import program
from flashrnn.tiling.sizes import one_of_few, tiles_of

FORWARD_CALL = (
    *("Wx", "R", "b", "initial", "h_initial", "states", "gates", "carried"),
    *("Wx_b", "Wx_t", "Wx_g", "Wx_n", "Wx_d"),
    *("initial_s", "initial_b", "initial_n", "initial_d"),
    *("B", "T", "clips", "done"),
)
"""The fields of step_forward.cu's call: addresses, strides in elements, sizes, what
:func:`program.clips` gives, and how many steps are done before the run's first launch."""

BACKWARD_CALL = (
    *("R", "initial", "states", "gates", "d_states", "d_last", "d_gates", "d_carried"),
    *("initial_s", "initial_b", "initial_n", "initial_d"),
    *("d_states_s", "d_states_b", "d_states_t", "d_states_n", "d_states_d"),
    *("d_last_s", "d_last_b", "d_last_n", "d_last_d"),
    *("B", "T", "clips", "done"),
)
"""The fields of step_backward.cu's call."""

# Registers that the chunks on their way may take, of the 128 with which two blocks of 256 threads
# share a multiprocessor: the next step's block starts beside this one's.
_REGISTERS_FOR_CHUNKS = 72
_REGISTERS_FOR_SUMS = 64
_REGISTERS_FOR_BOTH = 110
_SHARED_MEMORY = 48 * 1024
_MOST_BLOCKS = 4
# Thread blocks below which a larger tile of sequences would leave multiprocessors idle.
_ENOUGH_BLOCKS = 64


@dataclass(frozen=True)
class StepPlan:
    """Tiles of a step kernel.

    Attributes:
        units: units of a head that a thread block computes.
        tiles: tiles of 16 rows of the product.
        blocks: blocks of 8 sequences.
        segments: segments of D elements of the dimension that the product sums over.
        threads: threads of a block.
        depth: chunks of the operands that a warp keeps on their way.
        aligned: whether every row begins at a multiple of 16 bytes.
    """

    units: int
    tiles: int
    blocks: int
    segments: int
    threads: int
    depth: int
    aligned: bool

    def grid(self, B: int, N: int, D: int) -> int:
        """Thread blocks of a launch, of which those beyond the batch do nothing."""
        return tiles_of(D, self.units) * N * one_of_few(tiles_of(B, 8 * self.blocks))


def plan_step(cell: TracedCell, B: int, N: int, D: int, precision: str, backward: bool) -> StepPlan:
    """The tiles of a step kernel for a problem.

    Args:
        cell: the cell.
        B: batch size.
        N: number of heads.
        D: head dimension.
        precision: ``"float16"``, ``"bfloat16"``, ``"tf32"`` or ``"float32"``.
        backward: whether for step_backward.cu.
    """
    recurrent = len(cell.fed_by("R"))
    # Forward two gates share a tile of 16 rows, 8 units of each.
    units, tiles, segments = (16, 1, recurrent) if backward else (8, tiles_of(recurrent, 2), 1)
    itemsize = program.itemsize_of(precision)
    chunks = segments * tiles_of(D * itemsize, 64)
    # Of a tile and block; a product that no tensor core does keeps more.
    sums = 16 if precision == "float32" else 4
    blocks = 1
    while (
        2 * blocks <= _MOST_BLOCKS
        and 2 * blocks * tiles * sums <= _REGISTERS_FOR_SUMS
        and 8 * blocks < B
        and tiles_of(D, units) * N * tiles_of(B, 16 * blocks) >= _ENOUGH_BLOCKS
    ):
        blocks *= 2
    # Backward sums more at a step, of which each warp had better fetch little. Two thread blocks of
    # 16 warps have 64 registers a lane.
    most_warps = 16 if backward and blocks * tiles * sums <= 16 else 8
    warps = min(most_warps, 1 << (chunks - 1).bit_length())
    while warps * 8 * blocks * (16 * tiles + 4) * 4 > _SHARED_MEMORY:
        warps //= 2
    registers = min(_REGISTERS_FOR_CHUNKS, _REGISTERS_FOR_BOTH - blocks * tiles * sums)
    depth = min(tiles_of(chunks, warps), registers // (4 * (2 * tiles + blocks)))
    depth = 1 if warps > 8 else max(1, depth)
    return StepPlan(
        units=units,
        tiles=tiles,
        blocks=blocks,
        segments=segments,
        threads=32 * warps,
        depth=depth,
        aligned=D * itemsize % 16 == 0,
    )


def forward_source(
    cell: TracedCell, precision: str, plan: StepPlan, save_gates: bool
) -> dict[str, str]:
    """The parts of step_forward.cu's program, each under the name that an error gives it."""
    options = {"SAVE_GATES": save_gates, "CLIP": False}
    return _program("step_forward.cu", FORWARD_CALL, cell, precision, plan, options)


def backward_source(
    cell: TracedCell, precision: str, plan: StepPlan, cut: bool, clip: bool
) -> dict[str, str]:
    """The parts of step_backward.cu's program, each under the name that an error gives it."""
    options = program.gradient_options(cut, clip)
    return _program("step_backward.cu", BACKWARD_CALL, cell, precision, plan, options)


def _program(
    kernel: str,
    call: tuple[str, ...],
    cell: TracedCell,
    precision: str,
    plan: StepPlan,
    options: Mapping[str, bool],
) -> dict[str, str]:
    constants = {
        "UNITS": plan.units,
        "TILES": plan.tiles,
        "BLOCKS": plan.blocks,
        "SEGMENTS": plan.segments,
        "THREADS": plan.threads,
        "DEPTH": plan.depth,
        "ALIGNED": plan.aligned,
        **options,
    }
    files = ("tile.cuh", "clipped.cuh", "product.cuh", kernel)
    return {
        **program.prelude(cell, precision, constants),
        "call": _render_call(call),
        **{name: program.read(name) for name in files},
    }


def _render_call(fields: tuple[str, ...]) -> str:
    """The struct, and the kernel of one thread that writes it in the order of the stream."""
    parameters = ", ".join(f"long long {field}" for field in fields)
    return (
        f"struct Call {{\n    long long {', '.join(fields)};\n}};\n\n"
        f'extern "C" __global__ void set_call(Call* call, {parameters}) {{\n'
        f"    *call = {{{', '.join(fields)}}};\n}}"
    )
