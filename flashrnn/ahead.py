"""Kernels compiled ahead of their first call, with no GPU: :func:`compile_ahead`, ``compile``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flashrnn.cells.spec import resolve
from flashrnn.config import FlashRNNConfig, parse_dtype
from flashrnn.problem import Problem

if TYPE_CHECKING:
    from flashrnn.kernels.gpu import GPU

BACKENDS = ("cuda_fused", "cuda")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_PRECISIONS = ("bfloat16", "float16", "float32", "tf32")


class Kernel(NamedTuple):
    """A kernel that a shape needs.

    Attributes:
        shape: the shape that asked for it first.
        name: its file, and what it is for.
        seconds: that it took to compile; ``None`` if it was there already.
    """

    shape: str
    name: str
    seconds: float | None


def compile_ahead(
    shapes: Iterable[str],
    gpu: str | None = None,
    *,
    backend: str = "cuda_fused",
    forward_only: bool = False,
    config: FlashRNNConfig | None = None,
    shared: bool = False,
) -> list[Kernel]:
    """Compile the kernels of calls that are to come, and keep them in the cache folder.

    A process that finds them there compiles nothing at its first call. It must have the same
    version of this package and of NVRTC, and a GPU of that model, all of whose multiprocessors are
    its own. (GPUs of one model may differ in how many clusters run at once. Then those few heads
    whose kernels depend on it, such as LSTM 1×2048, are compiled at their first call.) Kernels are
    those of inputs whose rows begin at multiples of 16 bytes, where D allows it. Triton's kernels
    are not among them.

    Args:
        shapes: of each call the cell, B, N, D and the dtype, in any order:
            ``"lstm,B=16,N=12,D=64,bfloat16"``. T may be given and does not matter. The cell is one
            out of :func:`flashrnn.available_functions`; one of your own, after
            :func:`flashrnn.register`. The dtype is bfloat16, float16, float32, or tf32 for float32
            where PyTorch is set to round products' factors so; bf16, fp16 and fp32 are short names.
            Calls with options of sequences have kernels of their own: add ``reset``, ``lengths``,
            ``cu_seqlens`` or ``reverse``, all of those that a call has. A layer with two directions
            is a call of twice the heads with ``reverse``; one of a packed batch has ``cu_seqlens``.
        gpu: a GPU's model, ``"H200"``; ``None``: this machine's current GPU.
        backend: ``"cuda_fused"`` or ``"cuda"``.
        forward_only: only what calls without gradients need; else that, and what training needs.
        config: the calls' options. Of clip values only whether there are any matters.
        shared: let other users read the folder and these kernels, as in an image that root builds
            and another user runs.

    Returns:
        All kernels, each once: those of calls that return all states, and those of calls that
        return h alone, as layers do.

    Raises:
        ValueError: a shape, a model or a backend that is none, or a shape that the backend cannot
            do; says why and what is accepted.
        RuntimeError: there is no NVRTC, or the folder takes no files.
    """
    from flashrnn.jit import launch, nvrtc
    from flashrnn.jit.folder import cache_folder
    from flashrnn.kernels.gpu import MODELS

    if reason := nvrtc.unavailable():
        raise RuntimeError(f"nothing can be compiled: {reason}")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}; accepted are {', '.join(BACKENDS)}")
    limits: GPU | None = None
    if gpu is not None:
        if gpu not in MODELS:
            raise ValueError(
                f"GPU {gpu!r}; known are {', '.join(MODELS)}. For another, run this where there is "
                "one, without naming it"
            )
        arch, limits = MODELS[gpu]
    elif torch.cuda.is_available():
        arch = launch.architecture(torch.cuda.current_device())
    else:
        raise ValueError(f"this machine has no GPU: name one out of {', '.join(MODELS)}")

    wanted: dict[str, tuple[str, str, dict[str, str]]] = {}
    for shape in shapes:
        for name, parts in _programs(shape, limits, backend, forward_only, config):
            wanted.setdefault(nvrtc.join(parts), (shape, name, parts))

    def work(one: tuple[str, str, dict[str, str]]) -> Kernel:
        shape, name, parts = one
        if nvrtc.kept_as(parts, arch):
            return Kernel(shape, name, None)
        start = time.perf_counter()
        nvrtc.compile_program(parts, arch)
        return Kernel(shape, name, time.perf_counter() - start)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = list(threads.map(work, wanted.values()))
    kept = [nvrtc.kept_as(parts, arch) for *_, parts in wanted.values()]
    if None in kept:
        raise RuntimeError(
            f"the kernels were compiled, but {cache_folder()} does not take their files. Name a "
            "folder in FLASHRNN_CACHE_DIR that is yours and that nobody else may write"
        )
    if shared:
        for path in filter(None, kept):
            path.chmod(0o644)
            path.parent.chmod(0o755)
    return found


def _programs(
    shape: str,
    gpu: GPU | None,
    backend: str,
    forward_only: bool,
    config: FlashRNNConfig | None,
) -> Iterator[tuple[str, dict[str, str]]]:
    """The programs of a shape, each under the name of its file and what it is for."""
    from flashrnn import backends
    from flashrnn.jit import launch
    from flashrnn.kernels import padding, registry

    problem, precision = _parsed(shape, config or FlashRNNConfig())
    module: Any = backends.load(backend)
    # Of one state h is all there is.
    of_h = [(problem._replace(returned=1), ", h alone")] if len(problem.cell.states) > 1 else []
    for one, returned in ((problem, ""), *of_h):
        training = one._replace(needs_gradient=True)
        purposes = [(one, False, "")]
        if not forward_only:
            purposes += [(training, False, ", training"), (training, True, "")]
        for each, backward, purpose in purposes:
            for units in _units(module, each):
                wide = each._replace(D=units)
                if units != problem.D:
                    yield "padding/padding.cu" + purpose + returned, padding.program()
                for parts in module.programs(wide, gpu, precision, backward):
                    yield list(parts)[-1] + purpose + returned, parts
    if backend == "cuda_fused" and not registry.is_small(problem.D):
        yield "a question to the driver", launch.PROBE


def _units(module: Any, problem: Problem) -> list[int]:
    """With how many units heads are computed: of few steps, and of many."""
    if not hasattr(module, "most_units"):
        return [problem.D]
    return sorted({problem.D, module.most_units(problem)})


def _parsed(shape: str, config: FlashRNNConfig) -> tuple[Problem, str]:
    """A problem that needs no gradient, and the precision."""
    sizes: dict[str, int] = {}
    names = []
    options: dict[str, Any] = {}
    for field in shape.replace(" ", "").split(","):
        key, equals, value = field.partition("=")
        if field in _OPTIONS:
            options |= _OPTIONS[field]
        elif not equals:
            names.append(_SHORT.get(field, field))
        elif key not in ("B", "T", "N", "D") or not value.isdecimal() or not int(value):
            raise ValueError(f"{field!r} in shape {shape!r}; {_ACCEPTED}")
        else:
            sizes[key] = int(value)
    dtypes = [name for name in names if name in _PRECISIONS]
    cells = [name for name in names if name not in _PRECISIONS]
    if not {"B", "N", "D"} <= set(sizes) or len(dtypes) != 1 or len(cells) != 1:
        raise ValueError(f"shape {shape!r}; {_ACCEPTED}")
    cell = resolve(cells[0]).traced
    if options:
        options["returned"] = len(cell.states)
    problem = Problem(
        cell=cell,
        B=sizes["B"],
        T=1,
        N=sizes["N"],
        D=sizes["D"],
        dtype=parse_dtype("float32" if dtypes[0] == "tf32" else dtypes[0]),
        device=torch.device("cuda"),
        gradient_recurrent_cut=config.gradient_recurrent_cut,
        gradient_recurrent_clipval=config.gradient_recurrent_clipval,
        forward_clipval=config.forward_clipval,
        **options,
    )
    return problem, dtypes[0]


# A problem's fields by the argument of a call. Which heads run backwards is no matter.
_OPTIONS: dict[str, dict[str, Any]] = {
    "reset": {"resets": True},
    "lengths": {"ragged": True},
    "cu_seqlens": {"ragged": True, "packed": True},
    "reverse": {"reverse": True},
}
_ACCEPTED = (
    "accepted are a cell, B, N and D, of 1 and more, a dtype out of "
    f"{', '.join(_PRECISIONS)}, and what the call has of {', '.join(_OPTIONS)}: "
    "'lstm,B=16,N=12,D=64,bfloat16'"
)

DESCRIPTION = """\
Compiles the kernels of calls that are to come and keeps them in the cache folder: that which
FLASHRNN_CACHE_DIR names, or flashrnn in the user's cache folder. No GPU is needed. A process that
finds them there compiles nothing at its first call, if it has the same version of flashrnn and of
NVRTC (python -m flashrnn info), and a GPU of that model, all of whose multiprocessors are its own.
Calls that return all states and calls that return h alone, as layers do, are both provided for, and
so are a layer's products over few rows.

A SHAPE is a call's cell, B, N, D and dtype: lstm,B=16,N=12,D=64,bfloat16. T does not matter. A B
has its own kernels only where it is tiled in another way. The dtype is bfloat16, float16, float32,
or tf32 for float32 where PyTorch is set to round products' factors so. Calls with reset, lengths,
cu_seqlens or reverse have kernels of their own: add these words. A layer with two directions is a
call of twice the heads with reverse: lstm,B=16,N=2,D=64,bfloat16,reverse. Rows of inputs are taken
to begin at multiples of 16 bytes where D allows it. Triton's kernels are not compiled: Triton keeps
its own.

  FLASHRNN_CACHE_DIR=/opt/flashrnn python -m flashrnn compile --gpu H200 --shared \\
      lstm,B=16,N=12,D=64,bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the sub-command and declare its options."""
    from flashrnn.kernels.gpu import MODELS

    parser.description = DESCRIPTION
    add = parser.add_argument
    add("shapes", nargs="+", metavar="SHAPE", help="see above")
    add("--gpu", metavar="MODEL", help=f"{', '.join(MODELS)}; default: this machine's GPU")
    add("--backend", choices=BACKENDS, default=BACKENDS[0], help="default: %(default)s")
    add("--forward-only", action="store_true", help="only what calls without gradients need")
    add("--recurrent-cut", action="store_true", help="calls have gradient_recurrent_cut")
    add("--recurrent-clip", action="store_true", help="calls have a gradient_recurrent_clipval")
    add("--forward-clip", action="store_true", help="calls have a forward_clipval")
    add(
        "--shared",
        action="store_true",
        help="let other users read the folder and the kernels, which are this user's else",
    )


def run(options: argparse.Namespace) -> int:
    """Compile and print what was; returns the exit code."""
    config = FlashRNNConfig(
        gradient_recurrent_cut=options.recurrent_cut,
        gradient_recurrent_clipval=1.0 if options.recurrent_clip else None,
        forward_clipval=1.0 if options.forward_clip else None,
    )
    start = time.perf_counter()
    try:
        found = compile_ahead(
            options.shapes,
            options.gpu,
            backend=options.backend,
            forward_only=options.forward_only,
            config=config,
            shared=options.shared,
        )
    except (ValueError, RuntimeError) as error:
        print(f"flashrnn compile: {error}", file=sys.stderr)
        return 2
    print(as_text(found))
    print(f"{time.perf_counter() - start:.1f} s in all")
    return 0


def as_text(found: list[Kernel]) -> str:
    """What :func:`compile_ahead` returned, for people."""
    rows = [
        (one.shape, one.name, "was there" if one.seconds is None else f"{one.seconds:.2f} s")
        for one in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
