"""Products over few rows, which ``cuda_fused`` launches with its scans.

Of few rows a call of the library's takes the host longer than the product takes the GPU. There a
layer's input product, and the gradients that follow from the gates', are kernels of
``flashrnn/kernels/few_rows``, enqueued together with the scan.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flashrnn.backends.launches import LaunchTemplate
from flashrnn.backends.protocols import Factors
from flashrnn.cells.traced import TracedCell
from flashrnn.jit import launch
from flashrnn.jit.kernel import Kernel, launch_in_turn
from flashrnn.jit.kernel import load as _kernel
from flashrnn.kernels import call, few_rows, gradient_sums, registry, source
from flashrnn.kernels.gpu import GPU, whole
from flashrnn.problem import Problem, matmul_tf32_allowed


class Input(NamedTuple):
    """A layer's input as its product reads it, and where that is written.

    Attributes:
        I: features.
        pitch: how many elements its rows lie from each other.
        sizes: those of ``Wx``.
        strides: likewise; its rows lie in the order of the input's.
    """

    I: int  # noqa: E741
    pitch: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Product(NamedTuple):
    """What the launch of an input product depends on besides the scan's layout.

    Attributes:
        input: the input.
        precision: out of ``source.PRECISIONS``.
    """

    input: Input
    precision: str


class Asked(NamedTuple):
    """Which gradients one launch computes, and what it depends on besides the scan's layout.

    Attributes:
        of_R: whether those of R and the bias are among them.
        of_x: whether that of x is.
        of_W: whether that of W is.
        x_strides: x's; empty without a layer.
        I: features of x; 0 without a layer.
        precision: out of ``source.PRECISIONS``.
    """

    of_R: bool
    of_x: bool
    of_W: bool
    x_strides: tuple[int, ...]
    I: int  # noqa: E741
    precision: str


def multiplies(problem: Problem, x: Tensor, W: Tensor) -> bool:
    """Whether a layer's input product is computed here.

    Args:
        problem: the scan's.
        x: ``[B, T, I]`` of ``problem.dtype``.
        W: see :class:`flashrnn.backends.protocols.Factors`.
    """
    return W.is_contiguous() and _input(problem, x.shape, x.stride()) is not None


@lru_cache(maxsize=1024)
def _input(problem: Problem, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Input | None:
    """An input of such a layout, if its product is computed here."""
    (B, T, I), (of_B, of_T, _) = sizes, strides  # noqa: E741
    taken, _ = _taken(problem, I)
    pitch = _pitch(sizes, strides)
    if not taken or pitch is None:
        return None
    Gw, N, D = len(problem.cell.fed_by("Wx")), problem.N, problem.D
    row, by_time = Gw * N * D, B > 1 and T > 1 and of_T > of_B
    of_rows = (row, B * row) if by_time else (T * row, row)
    return Input(I, pitch, (B, T, Gw, N, D), (*of_rows, N * D, D, 1))


@lru_cache(maxsize=1024)
def _taken(problem: Problem, I: int) -> tuple[bool, bool]:  # noqa: E741
    """Whether an input product of I features is computed here, and whether its gradients are."""
    (B, T), fed = problem.rows, problem.cell.fed_by("Wx")
    if not fed or fed != tuple(range(fed[0], fed[0] + len(fed))):
        return False, False
    columns, gpu = len(fed) * problem.N * problem.D, whole(problem.device)
    if not few_rows.takes_product(B * T, columns, I, problem.dtype.itemsize, gpu):
        return False, False
    return True, _takes(problem, I, of_R=not problem.is_sequenced)


@lru_cache(maxsize=1024)
def gives_R(problem: Problem, I: int) -> bool:  # noqa: E741
    """Whether the gradients of R and of the bias are computed here.

    Those of small heads are one launch anyway. A layer, of I features, has one for its other
    gradients; without a layer I is 0.
    """
    if problem.is_sequenced:
        return False
    if I > 0 and _taken(problem, I)[1]:
        return True
    return not registry.is_small(problem.D) and _takes(problem, 0, of_R=True)


def _takes(problem: Problem, I: int, of_R: bool) -> bool:  # noqa: E741
    """Whether gradients are computed here: those of a layer's x and W if I > 0, and R's."""
    if not problem.B * problem.T:
        return False
    products = _products(problem, I, of_x=I > 0, of_W=I > 0, of_R=of_R)
    size, row = problem.dtype.itemsize, gcd(problem.D, I)
    return few_rows.takes(products, size, row, whole(problem.device))


def _products(
    problem: Problem,
    I: int,  # noqa: E741
    of_x: bool,
    of_W: bool,
    of_R: bool,
) -> list[few_rows.Summed]:
    """Those of the gradients that are asked for: of x, of W, and of R."""
    cell, (B, T), (N, D) = problem.cell, problem.rows, (problem.N, problem.D)
    rows, columns, heads = B * T, len(cell.fed_by("Wx")) * N * D, len(cell.fed_by("R")) * N
    return [
        few_rows.Summed(few_rows.product_tiles(rows, I) if of_x else 0, columns),
        few_rows.Summed(few_rows.product_tiles(columns, I) if of_W else 0, rows),
        few_rows.Summed(heads * few_rows.product_tiles(D, D) if of_R else 0, rows),
    ]


def asked(problem: Problem, factors: Factors | None) -> Asked | None:
    """What is computed here of a call's gradients; ``None``: nothing."""
    if factors is None or not (factors.needs_x or factors.needs_W):
        return _asked(problem, False, False, (), 0, _precision(problem))
    x, _, of_x, of_W, _ = factors
    return _asked(problem, of_x, of_W, x.stride(), x.shape[2], _precision(problem))


@lru_cache(maxsize=1024)
def _asked(
    problem: Problem,
    of_x: bool,
    of_W: bool,
    x_strides: tuple[int, ...],
    I: int,  # noqa: E741
    precision: str,
) -> Asked | None:
    of_R = gives_R(problem, I)
    if I and _taken(problem, I)[1]:
        return Asked(of_R, of_x, of_W, x_strides, I, precision)
    return Asked(of_R, False, False, (), 0, precision) if of_R else None


def precision_beside(of_scan: str) -> str:
    """How these products are computed beside a scan of a precision out of ``source.PRECISIONS``.

    Of float32 by TF32 where that is allowed of all of them: PyTorch's setting says so of the
    library's, which these stand for, and the scan's own of R's gradient.
    """
    return "float32" if of_scan == "tf32" and not matmul_tf32_allowed() else of_scan


def _precision(problem: Problem) -> str:
    return precision_beside(source.precision_of(problem))


def _pitch(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """How many elements the rows of an input lie from each other, in the order in which it has
    them; ``None`` if they do not lie equally far."""
    (B, T, _), (of_B, of_T, of_I) = sizes, strides
    if of_I != 1:
        return None
    if T == 1 or of_B == T * of_T:
        return of_B if T == 1 else of_T
    return of_T if B == 1 else of_B if of_T == B * of_B else None


def multiply(problem: Problem, factors: Factors) -> Tensor:
    """``Wx``, by a launch of its own, of factors for which :func:`multiplies` holds."""
    Wx, given = begun(problem, factors.x)
    addresses, layout = call.FEW_ROWS_PRODUCT.read({**operands(factors), "Wx": Wx})
    kernel, shape, packing = product(problem, given, layout)
    launch_in_turn([(kernel, shape, packing(addresses))])
    return Wx


def operands(factors: Factors) -> dict[str, Tensor]:
    """What the input product reads, by the names of its record."""
    found = {"x": factors.x, "W": factors.W}
    if factors.bias is not None:
        found["bias"] = factors.bias
    return found


def begun(problem: Problem, x: Tensor) -> tuple[Tensor, Product]:
    """Memory for ``Wx`` ``[B, T, Gw, N, D]``, and what its launch depends on, of such an x."""
    of_x = cast(Input, _input(problem, x.shape, x.stride()))
    Wx = x.new_empty_strided(of_x.sizes, of_x.strides)
    return Wx, Product(of_x, _precision(problem))


# Beside most scans it is one of several launches, which are looked up together.
@lru_cache(maxsize=64)
def product(problem: Problem, given: Product, layout: call.Layout) -> LaunchTemplate:
    """The launch of the input product.

    Args:
        problem: the scan's.
        given: how it is computed.
        layout: of the call's tensors, with ``x``, ``W``, ``Wx`` and any ``bias`` among them.
    """
    record, (B, T), size = call.FEW_ROWS_PRODUCT, problem.rows, problem.dtype.itemsize
    (I, pitch, *_), precision = given  # noqa: E741
    # Those of a scan's tensors.
    layout = layout._replace(strides=())
    columns = len(problem.cell.fed_by("Wx")) * problem.N * problem.D
    piece_bytes = record.piece_bytes(("x", "W"), layout, gcd(I, pitch), size)
    kernel = _product_kernel(precision, piece_bytes, problem.device)
    numbers = {"x_pitch": pitch, "rows": B * T, "columns": columns, "I": I}
    packing = record.packing(layout, **numbers)
    grid = few_rows.product_tiles(B * T, columns)
    return LaunchTemplate(kernel, kernel.shape._replace(grid=grid), packing)


def tiles_of(problem: Problem, asked: Asked) -> list[few_rows.Tiles]:
    """The tiles of the gradients that are asked for, of x, of W and of R, and how many CTAs share
    each."""
    products = _products(problem, asked.I, asked.of_x, asked.of_W, asked.of_R)
    return few_rows.shared(products, problem.dtype.itemsize, whole(problem.device))


def scratch(problem: Problem, asked: Asked) -> call.Scratch:
    """The memory that the launch of the gradients needs for itself."""
    counters, sums = few_rows.scratch(tiles_of(problem, asked))
    return call.Scratch(counters=counters, sums=sums)


def gradients(problem: Problem, asked: Asked, layout: call.Layout) -> LaunchTemplate:
    """The launch of the gradients.

    Args:
        problem: the problem.
        asked: what is computed.
        layout: of the backward scan's tensors, with ``x``, ``W``, the gradients and any scratch
            memory among them.
    """
    record, cell, (B, T) = call.FEW_ROWS_GRADIENTS, problem.cell, problem.rows
    tiles = tiles_of(problem, asked)
    (N, D), size, I = (problem.N, problem.D), problem.dtype.itemsize, asked.I  # noqa: E741
    layout = _as_read(layout, asked)
    rows, columns = B * T, len(cell.fed_by("Wx")) * N * D
    # Of the initial h, which may be of another dtype, single elements are read.
    piece_bytes = record.piece_bytes(("d_gates", "h"), layout, D, size)
    numbers = {"rows": rows, "T": T, "B": problem.B, "N": N, "D": D}
    for name, of_kind in zip("xWR", tiles, strict=True):
        numbers |= {f"{name}_ctas": of_kind.ctas, f"{name}_shares": of_kind.shares}
    grid = sum(of_kind.ctas for of_kind in tiles)
    if asked.of_x or asked.of_W:
        piece_bytes = min(piece_bytes, record.piece_bytes(("x", "W"), layout, I, size))
        numbers |= {"columns": columns, "I": I, "W_gate": cell.fed_by("Wx")[0]}
    if asked.of_R:
        b_columns = len(cell.fed_by("b")) * N * D
        b_shares, b_ctas = gradient_sums.plan_shares(problem.B, b_columns, few_rows.THREADS)
        numbers |= {"b_columns": b_columns, "b_shares": b_shares}
        grid += b_ctas
    kernel = _gradients_kernel(cell, asked.precision, piece_bytes, problem.device)
    packing = record.packing(layout, **numbers)
    return LaunchTemplate(kernel, kernel.shape._replace(grid=grid), packing)


def program(
    problem: Problem, precision: str, piece_bytes: int, gpu: GPU, backward: bool
) -> dict[str, str]:
    """The text of a direction's program, in parts."""
    if backward:
        return few_rows.gradients(problem.cell, precision, piece_bytes, gpu).text
    return few_rows.product(precision, piece_bytes, gpu).text


def _as_read(layout: call.Layout, asked: Asked) -> call.Layout:
    """The layout of a backward scan's tensors, by the names of the gradients' record."""
    names = {"states": "h", "initial": "h_initial"}
    # Of the scan's operands with strides the initial states are the first: [S, B, 1, N, D].
    of_x = (asked.x_strides,) if asked.I else ()
    return layout._replace(
        names=tuple(names.get(name, name) for name in layout.names),
        strides=(*of_x, layout.strides[0][1:]),
    )


@lru_cache(maxsize=64)
def _product_kernel(precision: str, piece_bytes: int, device: torch.device) -> Kernel:
    return _load(few_rows.product(precision, piece_bytes, whole(device)), device)


@lru_cache(maxsize=256)
def _gradients_kernel(
    cell: TracedCell, precision: str, piece_bytes: int, device: torch.device
) -> Kernel:
    return _load(few_rows.gradients(cell, precision, piece_bytes, whole(device)), device)


def _load(program: few_rows.Program, device: torch.device) -> Kernel:
    shape = launch.Shape(grid=0, threads=few_rows.THREADS, shared_memory=program.shared_memory)
    return _kernel(program.entry, program.text, shape, device)


KERNELS = (product, _product_kernel, _gradients_kernel)
"""The caches that hold kernels."""
