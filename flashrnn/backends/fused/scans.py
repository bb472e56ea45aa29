"""The launches of a direction: the persistent kernel, and what goes before and behind it.

Forward a layer's input product may go before, and copies of results behind; backward follow the
gradients of R and the bias, or h before each step for a product of the library's.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from flashrnn.backends import copies, few_rows, tables
from flashrnn.backends.fused import compiled, plans
from flashrnn.backends.gradients import number_of
from flashrnn.backends.launches import LaunchTemplate
from flashrnn.backends.protocols import Factors
from flashrnn.cells.traced import TracedCell, clipped
from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel, launch_in_turn
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import call, gradient_sums, registry, single_cta, source
from flashrnn.kernels.gpu import GPU
from flashrnn.kernels.plan import Plan
from flashrnn.kernels.sizes import tiles_of
from flashrnn.problem import Problem, as_compiled


class Prepared(NamedTuple):
    """A direction's launches.

    Attributes:
        launches: in order.
        scratch: global memory that they need for themselves.
        copied: the tensors that are to be copied first, since the kernel cannot read their rows.
    """

    launches: tuple[LaunchTemplate, ...]
    scratch: call.Scratch = call.Scratch()
    copied: tuple[str, ...] = ()

    def enqueue(self, addresses: list[int], like: Tensor) -> None:
        """Launch them, for tensors at these addresses, of which ``like`` is one."""
        zeros = None
        if any(self.scratch):
            # Held until all is enqueued.
            _held, of_scratch, zeros = scratch_memory(self.scratch, like)
            addresses = addresses + of_scratch
        launches = [(kernel, shape, pack(addresses)) for kernel, shape, pack in self.launches]
        launch_in_turn(launches, zeros)


def scratch_memory(
    scratch: call.Scratch, like: Tensor
) -> tuple[list[Tensor], list[int], launch.Zeros | None]:
    """The memory that launches need for themselves, its addresses, and what of it is to be zero."""
    packets, counters, *others = scratch
    memory, addresses, zeros = [], [], None
    if packets or counters:
        # Flags and counters count from 1, and h that nobody sends is zero.
        memory.append(like.new_empty(packets + counters, 4, dtype=torch.int32))
        first = memory[0].data_ptr()
        zeros = launch.Zeros(first, 4 * (packets + counters))
        addresses += [first] if packets else []
        addresses += [first + 16 * packets] if counters else []
    for size in others:
        if size:
            memory.append(like.new_empty(size, 4, dtype=torch.int32))
            addresses.append(memory[-1].data_ptr())
    return memory, addresses, zeros


def enqueue(
    problem: Problem,
    gpu: GPU,
    backward: bool,
    tensors: dict[str, Tensor],
    options: source.Options,
    product: few_rows.Product | None = None,
    asked: few_rows.Asked | None = None,
    ahead: bool = False,
) -> None:
    """Launch a direction's kernels.

    Args:
        problem: what is computed.
        gpu: the GPU, or the part of it, that it is computed on.
        backward: the direction.
        tensors: those of the direction's records, but for scratch memory.
        options: constants out of :mod:`flashrnn.kernels.source`.
        product: a layer's input product, if it is over few rows.
        asked: the gradients that are products over few rows.
        ahead: whether backward will compute R's gradient as for few rows.
    """
    record = record_of(problem, backward)
    precision = source.precision_of(problem)
    given = problem, gpu, backward, precision, options
    addresses, layout = record.read(tensors)
    prepared = prepare(*given, layout, product, asked, ahead)
    if prepared.copied:
        for name in prepared.copied:
            # A copy also of a contiguous tensor that begins at an unaligned address.
            tensors[name] = tensors[name].clone(memory_format=torch.contiguous_format)
        addresses, layout = record.read(tensors)
        prepared = prepare(*given, layout, product, asked, ahead)
    prepared.enqueue(addresses, tensors["R"])


def record_of(problem: Problem, backward: bool) -> call.Record:
    """The record of a direction's persistent kernel."""
    record = call.BACKWARD if backward else call.FORWARD
    return record.complete if problem.is_sequenced else record


# Whose rows scans copy in pieces, and whose R's gradient.
_IN_PIECES = ("Wx", "states", "gates", "d_states", "d_gates")
_IN_PIECES_OF_R = ("d_gates", "h_initial", "h_starts", "h")


# What launches depend on is all here, but for addresses, stream and context.
@lru_cache(maxsize=512)
def prepare(
    problem: Problem,
    gpu: GPU,
    backward: bool,
    precision: str,
    options: source.Options,
    layout: call.Layout,
    product: few_rows.Product | None = None,
    asked: few_rows.Asked | None = None,
    ahead: bool = False,
    in_place: bool = False,
) -> Prepared:
    """A direction's launches, by the arguments of :func:`enqueue`.

    ``layout`` is that of the tensors; ``in_place``: last states take the place of the initial ones.
    """
    if problem.needs_gradient and not backward:
        compiled.begin_backward(as_compiled(problem), gpu, precision, ahead)
    B, T, N = problem.B, problem.T, problem.N
    record = record_of(problem, backward)
    plan = plans.plan_of(problem, backward, gpu)
    if T == 1 and not in_place and plans.may_be_one_step(problem, backward):
        plan = plan.of_one_step(B, N)
    cell = problem.cell if problem.forward_clipval is None else clipped(problem.cell)
    D, size = problem.D, problem.dtype.itemsize
    copied = tuple(
        name
        for name, multiple in _alignments(plan, backward, D * size)
        if multiple > 1 and not record.rows_begin_at(multiple, (name,), layout, D, size)
    )
    in_pieces = [name for name in _IN_PIECES if name not in copied]
    # Kernels of large heads do not ask for it.
    piece_bytes = record.piece_bytes(in_pieces, layout, D, size) if registry.is_small(D) else 16
    clips = source.clips(problem.gradient_recurrent_clipval, problem.forward_clipval)
    kernel = scan_kernel(cell, precision, plan, options, piece_bytes, problem.device)
    of_R = None
    if backward and registry.is_small(D) and not (asked is not None and asked.of_R):
        of_R = plan_of_R(problem, gpu)
    scratch = plan.scratch(B, N, gpu)
    if of_R is not None:
        scratch = scratch._replace(parts=units_of_parts(problem, of_R))
    if asked is not None:
        of_gradients = few_rows.scratch(problem, asked)
        scratch = scratch._replace(counters=of_gradients.counters, sums=of_gradients.sums)
    layout = layout.with_scratch(scratch)
    groups = plan.groups(B, N, gpu)
    packing = record.packing(layout, T=T, B=B, N=N, clips=clips, groups=groups)
    launches = [LaunchTemplate(kernel, kernel.shape._replace(grid=plan.grid(B, N, gpu)), packing)]
    if product is not None:
        launches.insert(0, few_rows.product(problem, product, layout))
    if backward:
        if asked is None or not asked.of_R:
            launches += after_scan(problem, of_R, precision, layout)
        if "before" in layout.names:
            launches.append(tables.behind_scan(problem, layout))
        if asked is not None:
            launches.append(few_rows.gradients(problem, asked, layout))
    else:
        launches += copies.behind_scan(problem, layout)
    return Prepared((*launches,), scratch, copied)


def _alignments(plan: Plan, backward: bool, row: int) -> list[tuple[str, int]]:
    """At which multiples rows of so many bytes must begin, of the tensors that are copied else."""
    # Rows of an odd number of 16-bit elements begin anywhere.
    of_rows = gcd(plan.ROW_ALIGNMENT, row)
    # Kernels load R in the largest pieces, up to 16 bytes, of which rows have a whole number.
    of_R = gcd(16, row)
    given = ("states", "gates", "d_states") if backward else ("Wx",)
    return [*((name, of_rows) for name in given), ("R", of_R)]


def plan_of_R(problem: Problem, gpu: GPU) -> single_cta.GradientPlan:
    """How R's gradient of small heads is computed."""
    recurrent, (B, T) = len(problem.cell.fed_by("R")), problem.rows
    size = problem.dtype.itemsize
    return single_cta.plan_gradient(recurrent, B * T, problem.N, problem.D, size, gpu)


def units_of_parts(problem: Problem, of_R: single_cta.GradientPlan) -> int:
    """Units of 16 bytes that the parts of R's gradient take, where there are several."""
    if of_R.parts == 1:
        return 0
    elements = len(problem.cell.fed_by("R")) * problem.N * problem.D**2
    return tiles_of(of_R.parts * elements, 4)


def after_scan(
    problem: Problem, of_R: single_cta.GradientPlan | None, precision: str, layout: call.Layout
) -> list[LaunchTemplate]:
    """The launches that give the gradients of the bias and, of small heads, of R.

    Of few rows that is one. Else R's gradient is in parts, which a second launch sums up.

    Args:
        problem: what is computed.
        of_R: the plan of R's gradient; ``None``: that is computed otherwise.
        precision: how products are computed.
        layout: that of the backward scan's tensors and scratch memory.
    """
    cell, (B, T), (N, D) = problem.cell, problem.rows, (problem.N, problem.D)
    if of_R is None:
        return sums(problem, precision, 0, layout)
    size, record = problem.dtype.itemsize, call.RECURRENT_GRADIENT
    if problem.is_sequenced:
        record = record.complete
    of_sums, layout = layout, _as_gradient_reads(layout, N, D)
    # Of the initial h, which is float32 also beside 16 bits, single elements are read there.
    in_pieces = [x for x in _IN_PIECES_OF_R if x != "h_initial" or size == 4]
    piece_bytes = record.piece_bytes(in_pieces, layout, D, size)
    options = source.gradient_options(problem)
    kernel = gradient_kernel(cell, precision, of_R.compiled, piece_bytes, options, problem.device)
    ctas = of_R.grid(N)
    numbers = {"rows_a_part": of_R.rows, "R_ctas": ctas, "T": T, "B": B, "N": N}
    rest = sums(problem, precision, of_R.parts, of_sums) if of_R.parts > 1 else []
    if not rest:
        columns = len(cell.fed_by("b")) * N * D
        of_bias = gradient_sums.plan_sums(0, 0, problem.B, columns)
        ctas += of_bias.b_ctas
        numbers |= {"b_rows": problem.B, "b_columns": columns, "b_shares": of_bias.b_shares}
    shape = kernel.shape._replace(grid=ctas)
    return [LaunchTemplate(kernel, shape, record.packing(layout, **numbers)), *rest]


def _as_gradient_reads(layout: call.Layout, N: int, D: int) -> call.Layout:
    """The layout of a backward scan's tensors, by the names of R's gradient's record."""
    names = {"states": "h"}
    if "h_initial" in layout.names:
        # Contiguous, [B, 1, N, D].
        strides: tuple[int, ...] = (N * D, N * D, D, 1)
    else:
        names["initial"] = "h_initial"
        strides = layout.strides[0][1:]
    return layout._replace(
        names=tuple(names.get(name, name) for name in layout.names), strides=(strides,)
    )


def sums(problem: Problem, precision: str, parts: int, layout: call.Layout) -> list[LaunchTemplate]:
    """The launch that sums up the bias's gradient over sequences, and R's over so many parts, if
    there is anything to sum."""
    cell, (B, N, D) = problem.cell, (problem.B, problem.N, problem.D)
    R_columns = len(cell.fed_by("R")) * N * D * D if parts else 0
    b_columns = len(cell.fed_by("b")) * N * D
    plan = gradient_sums.plan_sums(parts, R_columns, B, b_columns)
    if not plan.grid:
        return []
    kernel = sums_kernel(cell, precision, problem.device)
    packing = call.GRADIENT_SUMS.packing(
        layout._replace(strides=()),
        R_rows=parts,
        R_columns=R_columns,
        R_shares=plan.R_shares,
        R_ctas=plan.R_ctas,
        b_columns=b_columns,
        b_shares=plan.b_shares,
        B=B,
        N=N,
        D=D,
    )
    return [LaunchTemplate(kernel, kernel.shape._replace(grid=plan.grid), packing)]


def backward_options(problem: Problem, given: dict[str, Tensor]) -> source.Options:
    """The usual constants of a backward scan."""
    clips, d_states = problem.gradient_recurrent_clipval is not None, given.get("d_states")
    upstream = number_of(d_states), "d_last" in given
    return source.backward_options(problem.gradient_recurrent_cut, clips, *upstream)


def new_gradients(
    problem: Problem,
    states_initial: Tensor,
    gates: Tensor,
    asked: few_rows.Asked | None,
    factors: Factors | None,
) -> dict[str, Tensor]:
    """Memory for the gradients that launches give, by the operands' names."""
    cell, (N, D) = problem.cell, (problem.N, problem.D)
    found = {
        "d_gates": torch.empty_like(gates),
        "d_initial": torch.empty_like(states_initial, memory_format=torch.contiguous_format),
        "d_bias": states_initial.new_empty(problem.B, len(cell.gates), N, D),
    }
    if asked is not None and factors is not None:
        if asked.of_x:
            found["d_x"] = torch.empty_like(factors.x, memory_format=torch.contiguous_format)
        if asked.of_W:
            found["d_W"] = torch.empty_like(factors.W)
    if registry.is_small(D) or (asked is not None and asked.of_R):
        found["d_R"] = gates.new_empty(len(cell.fed_by("R")), N, D, D)
    else:
        found["before"] = tables.new_h_before(problem, gates)
    found["d_b"] = gates.new_empty(len(cell.fed_by("b")), N, D)
    return found


def reads_contiguous_start(problem: Problem, asked: few_rows.Asked | None) -> bool:
    """Whether R's gradient of small heads is computed of float32, and by a kernel of its own."""
    by_kernel = registry.is_small(problem.D) and not (asked is not None and asked.of_R)
    return by_kernel and problem.dtype == torch.float32


# A kernel that leaves these caches is unloaded, unless a CUDA graph of the user's may launch it or
# a call of it is kept (calls.kept).


@lru_cache(maxsize=512)
def scan_kernel(
    cell: TracedCell,
    precision: str,
    plan: Plan,
    options: source.Options,
    piece_bytes: int,
    device: torch.device,
) -> Kernel:
    """The persistent kernel of a plan."""
    shape = launch.Shape(
        grid=0,
        threads=plan.threads,
        shared_memory=plan.shared_memory,
        cooperative=plan.cooperative,
        cluster_size=plan.cluster_size,
    )
    return _kernel(plan.entry, plan.source(cell, precision, options, piece_bytes), shape, device)


@lru_cache(maxsize=256)
def gradient_kernel(
    cell: TracedCell,
    precision: str,
    plan: single_cta.GradientPlan,
    piece_bytes: int,
    options: source.Options,
    device: torch.device,
) -> Kernel:
    """The kernel of R's gradient."""
    shape = launch.Shape(grid=0, threads=plan.THREADS, shared_memory=plan.shared_memory)
    return _kernel(plan.ENTRY, plan.source(cell, precision, piece_bytes, options), shape, device)


@lru_cache(maxsize=256)
def sums_kernel(cell: TracedCell, precision: str, device: torch.device) -> Kernel:
    """The kernel of :func:`sums`."""
    plan = gradient_sums.SumsPlan
    shape = launch.Shape(grid=0, threads=plan.THREADS)
    return _kernel(plan.ENTRY, gradient_sums.program(cell, precision), shape, device)


KERNELS = prepare, scan_kernel, gradient_kernel, sums_kernel
"""The caches that hold kernels."""
