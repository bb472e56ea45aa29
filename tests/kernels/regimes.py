"""The regimes of kernels as ``test_regimes.py`` runs them: emulated, each by its own plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from flashrnn import Cell, calls
from flashrnn.backends.fused import plans, scans
from flashrnn.kernels import cluster, grid, registry, single_cta, streamed
from flashrnn.kernels.cluster import mma_plan, wgmma_backward_plan, wgmma_plan
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.grid import wgmma_plan as grid_wgmma_plan
from flashrnn.kernels.plan import Counts, Plan
from flashrnn.kernels.streamed import plan as streamed_plan
from flashrnn.problem import Problem
from tests.fused import DTYPES, poison
from tests.gpus import H200, LARGER, SMALL, planned
from tests.problems import BUILT_IN, sparse, wide
from tests.steps import by_steps

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Regime:
    """A regime, and sizes at which all of it is used but little is computed.

    Attributes:
        name: of a test's parameter.
        backend: whose kernels they are.
        forward: plans the forward scan.
        backward: plans the backward scan.
        gpu: for which GPU.
        dtypes: that it takes.
        cells: that it is held to ``vanilla`` with.
        B: sequences of which some tile is not full.
        D: a head's units, of which some tile is not full.
        sizes: B, T, N and D of further problems.
        by_steps: whether a library computes the product, wherever it can.
    """

    name: str
    backend: str = "cuda_fused"
    forward: registry.Regime | None = None
    backward: registry.Regime | None = None
    gpu: GPU = SMALL
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)
    cells: tuple[str | Cell, ...] = (*BUILT_IN, sparse)
    B: int = 3
    D: int = 131
    sizes: tuple[tuple[int, int, int, int], ...] = ()
    by_steps: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def most_states(self) -> str:
        """The built-in cell of most states among those that it takes."""
        return "slstm" if "slstm" in self.cells else "lstm"

    def plans(self, problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
        """The regime's plan of a direction."""
        plan = self.backward if backward else self.forward
        assert plan is not None
        return plan(problem, gpu, backward)


def _cluster_mma(size: int, n_tiles: int) -> registry.Regime:
    """Plans of clusters of so many CTAs that own so many n-tiles, or of the next best."""

    def plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
        if isinstance(found := cluster.plan_mma_forward(problem, gpu, backward), str):
            return found
        plans = mma_plan.possible_plans(Counts.of_problem(problem), problem.D, gpu)
        return min(plans, key=lambda plan: (plan.size != size, plan.n_tiles != n_tiles))

    return plan


def _cluster_wgmma(warpgroups: int, n_tiles: int, parts: int, buffers: int) -> registry.Regime:
    """Plans of such a shape; with one buffer some of R lies in shared memory too."""

    def plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
        if isinstance(found := cluster.plan_wgmma_forward(problem, gpu, backward), str):
            return found
        for plan in wgmma_plan.possible_plans(Counts.of_problem(problem), problem.D, gpu):
            if (plan.warpgroups, plan.n_tiles, plan.parts) != (warpgroups, n_tiles, parts):
                continue
            if buffers == plan.buffers:
                return plan
            kept = plan.size * plan.units // 16 // 3
            plan = replace(plan, buffers=buffers, in_registers=kept)
            memory = wgmma_plan.shared_memory_of(plan, Counts.of_problem(problem))
            return replace(plan, shared_memory=memory)
        return "one CTA has all units"

    return plan


def _tiles_of(columns: int) -> registry.Regime:
    """Plans of CTAs that have several tiles, of at most so many sequences, where there are any."""

    def plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
        plans = single_cta.possible_plans(problem, gpu, backward)
        several = [x for x in plans if x.tiles > 1 and x.sequences <= columns * x.tiles]
        return (several or plans)[-1]

    return plan


def _grid_wgmma(
    size: int, warpgroups: int, n_tiles: int, batch_tiles: int, in_registers: int
) -> registry.Regime:
    """Plans of such a shape, with at most so much of R in registers."""

    def plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
        if isinstance(found := grid.plan_wgmma_forward(problem, gpu, backward), str):
            return found
        for plan in grid_wgmma_plan.possible_plans(Counts.of_problem(problem), problem.D, gpu):
            shape = plan.size, plan.warpgroups, plan.n_tiles, plan.batch_tiles
            if shape == (size, warpgroups, n_tiles, batch_tiles):
                kept = replace(plan, in_registers=min(in_registers, plan.in_registers))
                memory = grid_wgmma_plan.shared_memory_of(kept, Counts.of_problem(problem))
                return replace(kept, shared_memory=memory)
        return "no such plan"

    return plan


def _streamed(units: int, stages: int) -> registry.Regime:
    """Plans of such a shape, as far as a cell's gates allow."""

    def plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
        if isinstance(found := streamed.plan_forward(problem, gpu, backward), str):
            return found
        counts = Counts.of(problem.cell)
        plans = streamed_plan.possible_plans(counts, problem.D, problem.dtype.itemsize, gpu)
        plan = max((x for x in plans if x.units <= units), key=lambda plan: plan.units)
        plan = replace(plan, stages=min(stages, plan.stages))
        memory = streamed_plan.shared_memory_of(plan, counts)
        return replace(plan, shared_memory=memory)

    return plan


def _cluster_wgmma_backward(
    warpgroups: int, columns: int, n_tiles: int, ahead: int, in_registers: int
) -> registry.Regime:
    """Plans of such a shape, with so much of R in registers, or more where all needs room."""

    def plan(problem: Problem, gpu: GPU, backward: bool) -> Plan | str:
        if isinstance(found := cluster.plan_wgmma_backward(problem, gpu, backward), str):
            return found
        values = wgmma_backward_plan.Values.of(problem.cell)
        for plan in wgmma_backward_plan.possible_plans(values, problem.D, gpu):
            if (plan.warpgroups, plan.columns, plan.n_tiles) != (warpgroups, columns, n_tiles):
                continue
            for kept in range(min(in_registers, plan.in_registers), plan.in_registers + 1):
                changed = replace(plan, ahead=ahead, in_registers=kept)
                memory = wgmma_backward_plan.shared_memory_of(changed, values)
                if memory <= gpu.shared_memory:
                    return replace(changed, shared_memory=memory)
        return "no such plan"

    return plan


PER_STEP = Regime(
    "per_step",
    backend="cuda",
    cells=(*BUILT_IN, sparse, wide),
    B=7,
    D=40,
    sizes=(
        (1, 1, 1, 1),
        (2, 5, 3, 17),
        (25, 2, 1, 41),
        # A warp's chunks are more than it keeps on their way.
        (2, 2, 1, 420),
        (2, 2, 1, 840),
        # Several n-tiles in a tile of sequences; many tiles.
        (70, 2, 1, 136),
        # More steps than the longest recording.
        (1, 130, 1, 8),
        # Five tiles of sequences by the launch for six.
        (33, 2, 2, 8),
    ),
)
# Odd heads and options of sequences cannot be computed so: backend cuda's own kernels do.
STEPS = Regime(
    "steps",
    backend="cuda",
    by_steps=True,
    cells=(*BUILT_IN, sparse, wide),
    B=7,
    D=40,
    sizes=(
        (1, 1, 1, 8),
        (2, 5, 3, 24),
        # Several CTAs; a bit more than one, of which one has a single thread with units.
        (70, 2, 1, 136),
        (41, 2, 1, 200),
    ),
)
SINGLE_CTA = Regime(
    "single_cta",
    forward=single_cta.plan_scan,
    backward=single_cta.plan_scan,
    gpu=H200,
    cells=(*BUILT_IN, sparse, wide),
    B=7,
    D=40,
    sizes=(
        (1, 1, 1, 1),
        # Rows that begin anywhere.
        (2, 5, 3, 17),
        # Tiles of 4, of 8, and more steps than the ring has stages.
        (70, 2, 12, 16),
        (200, 12, 12, 16),
        # The largest head.
        (3, 2, 1, 128),
    ),
)
SINGLE_CTA_TILES = [
    Regime(
        f"single_cta_tiles-{columns}",
        forward=_tiles_of(columns),
        backward=_tiles_of(columns),
        gpu=H200,
        dtypes=tuple(SIXTEEN_BITS),
        # Four tiles a CTA. The last CTA lacks some sequences of one and all of others.
        B=4 * columns + columns + 1,
        D=40,
        sizes=(
            # A single step and sequence.
            (1, 1, 1, 64),
            # All exist, and more steps than the ring has stages.
            (3 * columns, 11, 2, 64),
            # Rows that begin anywhere, and forward twelve tiles.
            (13 * columns - 1, 3, 1, 9),
            (6 * columns + 3, 3, 2, 32),
        ),
    )
    for columns in (4, 8)
]
_LARGE_SIZES = (
    (3, 2, 1, 200),
    # A single step, and the smallest of these heads.
    (2, 1, 1, 129),
    # More heads and sequences than CTA groups at once.
    (20, 2, 3, 131),
)
GRID = Regime(
    "grid", forward=grid.plan_scan, backward=grid.plan_scan, B=9, D=131, sizes=_LARGE_SIZES
)
GRID_WGMMA = [
    Regime(
        f"grid_wgmma-{size}x{warpgroups}x{n_tiles}x{batch_tiles}",
        forward=_grid_wgmma(size, warpgroups, n_tiles, batch_tiles, in_registers),
        backward=grid.plan_scan,
        gpu=LARGER,
        dtypes=tuple(SIXTEEN_BITS),
        B=8 * n_tiles * batch_tiles + 9,
        D=136,
        sizes=(
            # A single step, and few sequences.
            (2, 1, 1, 136),
            # All units and sequences exist.
            (8 * n_tiles * batch_tiles, 3, 1, 160),
            # Another head after the first, whose last batch tiles lack sequences or are missing.
            (8 * n_tiles + 1, 3, 3, 152),
        ),
    )
    for size, warpgroups, n_tiles, batch_tiles, in_registers in [
        *[(2, 2, 2, 2, 3), (4, 2, 4, 1, 100), (2, 1, 4, 2, 100)],
    ]
]
STREAMED = [
    Regime(
        f"streamed-{units}x{stages}",
        forward=_streamed(units, stages),
        backward=grid.plan_scan,
        gpu=gpu,
        dtypes=tuple(SIXTEEN_BITS),
        cells=(*(kind for kind in BUILT_IN if kind != "slstm"), sparse),
        # The second tile of sequences is not full, as is the last tile of units.
        B=130,
        D=136,
        sizes=(
            # A single step; a tile without any sequence.
            (2, 1, 1, 136),
            # All exist. More chunks than the ring has room for.
            (128, 3, 1, 192),
            # More work tiles than clusters, of several heads, and an odd number of stripes.
            (257, 2, 2, 152),
        ),
    )
    for units, stages, gpu in [(64, 2, SMALL), (32, 4, LARGER), (48, 3, SMALL)]
]
CLUSTER_MMA = [
    Regime(
        f"cluster_mma-{size}x{n_tiles}",
        forward=_cluster_mma(size, n_tiles),
        backward=cluster.plan_backward,
        dtypes=tuple(SIXTEEN_BITS),
        B=9,
        D=136,
        sizes=(
            # A single step, and the smallest of these heads.
            (2, 1, 1, 136),
            # All units and sequences exist.
            (16, 3, 1, 192),
            # The last CTA lacks some of its units, and sequences.
            (20, 2, 3, 152),
        ),
    )
    for size, n_tiles in [(4, 2), (2, 1), (2, 2), (4, 1)]
]
CLUSTER_WGMMA = [
    Regime(
        f"cluster_wgmma-{warpgroups}x{n_tiles}x{parts}x{buffers}",
        forward=_cluster_wgmma(warpgroups, n_tiles, parts, buffers),
        backward=cluster.plan_backward,
        gpu=LARGER,
        dtypes=tuple(SIXTEEN_BITS),
        B=17,
        D=136,
        sizes=(
            # A single step, and few sequences.
            (2, 1, 1, 136),
            # All units exist, and the last cluster's sequences are fewer.
            (41, 3, 1, 192),
            # The last CTA lacks some of its units.
            (20, 2, 3, 152),
        ),
    )
    for warpgroups, n_tiles, parts, buffers in [
        *[(2, 3, 2, 2), (1, 4, 1, 2), (2, 3, 2, 1), (3, 5, 1, 1)],
        *[(2, 2, 1, 2), (1, 4, 2, 2), (3, 5, 2, 1)],
    ]
]
CLUSTER_BACKWARD = Regime(
    "cluster_backward",
    forward=grid.plan_scan,
    backward=cluster.plan_backward,
    B=9,
    D=131,
    sizes=_LARGE_SIZES,
)
CLUSTER_WGMMA_BACKWARD = [
    Regime(
        f"cluster_wgmma_backward-{warpgroups}x{columns}x{n_tiles}",
        forward=grid.plan_scan,
        backward=_cluster_wgmma_backward(warpgroups, columns, n_tiles, ahead, in_registers),
        gpu=gpu,
        dtypes=tuple(SIXTEEN_BITS),
        cells=(*BUILT_IN, sparse, wide),
        B=9,
        D=D,
        sizes=(
            # A single step, and few sequences.
            (2, 1, 1, D),
            # Several clusters, in the last of which most sequences do not exist.
            (8 * n_tiles + 1, 3, 1, D + 5),
            # More heads; the last CTA has no unit or lacks some.
            (20, 2, 3, D - 1),
        ),
    )
    for warpgroups, columns, n_tiles, ahead, in_registers, gpu, D in [
        (2, 2, 1, 2, 7, SMALL, 131),
        (1, 4, 3, 2, 100, LARGER, 131),
        (3, 4, 2, 1, 5, LARGER, 193),
        (2, 4, 1, 1, 1, LARGER, 131),
        # More rows of CTAs than a CTA has warps, each of which sends a tile.
        (1, 2, 1, 2, 100, LARGER, 325),
    ]
]
REGIMES = [
    *[PER_STEP, STEPS, SINGLE_CTA, GRID, GRID_WGMMA[0], STREAMED[0]],
    *[CLUSTER_MMA[0], CLUSTER_WGMMA[0]],
    *[CLUSTER_BACKWARD, CLUSTER_WGMMA_BACKWARD[0]],
]
VARIANTS = [
    *SINGLE_CTA_TILES,
    *CLUSTER_MMA[1:],
    *CLUSTER_WGMMA[1:],
    *GRID_WGMMA[1:],
    *STREAMED[1:],
    *CLUSTER_WGMMA_BACKWARD[1:],
]
"""The same kernels with other constants."""


def has_plans(regime: Regime, kind: str | Cell, *sizes: int, dtype: torch.dtype) -> bool:
    """Whether the regime takes a problem; not all shapes exist for each cell."""
    if regime.backend != "cuda_fused":
        return True
    B, _, N, D = sizes
    problem = planned(kind, B, N, D, dtype)
    return not any(isinstance(regime.plans(problem, regime.gpu, x), str) for x in (False, True))


@pytest.fixture
def take(
    fused_emulation: None, emulation: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Regime], Regime]:
    """``take(regime)`` has the backends emulated, by this regime's plans and no other's.

    What a backend allocates is NaN.
    """
    poison(monkeypatch)

    def take(regime: Regime) -> Regime:
        regimes = (regime.plans,)
        monkeypatch.setattr(registry, "SMALL_HEADS", regimes)
        monkeypatch.setattr(registry, "LARGE_HEADS", regimes)
        monkeypatch.setattr(plans, "gpu_of", lambda problem: regime.gpu)
        registry.best_plan.cache_clear()
        scans.prepare.cache_clear()
        calls.kept.clear()
        if regime.by_steps:
            by_steps(monkeypatch)
        return regime

    return take
