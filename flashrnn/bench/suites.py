"""The suites and their cases."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flashrnn import available_functions, nn
from flashrnn.bench import arena, sequenced
from flashrnn.bench.case import Case
from flashrnn.bench.contender import BOTH, FORWARD, Contender
from flashrnn.bench.in_turns import FORWARD_ALONE, GRAPH, HOST, WALL, Measure
from flashrnn.bench.layers import Layer, Stack
from flashrnn.bench.memory import HELD, MIB
from flashrnn.bench.ours import WITH_PRODUCT, Ours
from flashrnn.bench.peers import DTYPES, MODULES, TorchNN
from flashrnn.bench.sequenced import PackedTorchNN, Sequenced, TorchRL
from flashrnn.bench.single_step import Stepping
from flashrnn.cells import resolve
from flashrnn.config import parse_dtype

# Of each row: what the best peer reached on one H200, measured apart from this package or
# published, and what this package aims for there, in milliseconds.
GOALS = Path(__file__).with_name("goals.csv")
B, T, WIDTH = 16, 1024, 768
HEADS = (48, 24, 12, 6, 3, 2, 1)
WIDER = (1024, 1280, 1536, 2048, 2560)
# Heads and units a head, of the suites that vary something else.
MANY, ONE = (12, 64), (1, 768)


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; ``None``: the suite's own choice.

    Attributes:
        function: the cell.
        dtype: of the inputs.
        quick: fewer cases, or smaller ones.
        device: ``"cuda"`` or ``"cpu"``, for the suites that run on either.
        shapes: how many random ones.
        seed: of the random ones.
    """

    function: str | None = None
    dtype: torch.dtype | None = None
    quick: bool = False
    device: str = "cuda"
    shapes: int = arena.SHAPES
    seed: int = 0

    def case(self, N: int, D: int, B: int = B, T: int = T) -> Case:
        """A case with the function and dtype that were asked for, or LSTM in bfloat16."""
        return Case(self.function or "lstm", B, T, N, D, self.dtype or torch.bfloat16)

    def beside_torch(self, N: int, D: int, B: int, T: int) -> Case:
        """The same, by default in torch.nn's fastest dtype; on the CPU with few steps and units."""
        usual = torch.float16 if self.device == "cuda" else torch.float32
        if self.device == "cpu":
            T, D = min(T, 8), min(D, 64)
        return Case(self.function or "lstm", B, T, N, D, self.dtype or usual)

    @property
    def functions(self) -> tuple[str, ...]:
        """The one that was asked for, or all."""
        return (self.function,) if self.function else available_functions()


@dataclass(frozen=True)
class Mark:
    """What a measured value is compared with.

    Attributes:
        goal: what this package aims for.
        peer: what somebody else reaches, and who; not measured in the same run.
        peer_value: ...
    """

    goal: float | None
    peer: str
    peer_value: float | None


@dataclass(frozen=True)
class Entry:
    """A case, and how it is measured if not as its suite says.

    Attributes:
        case: the case.
        backends: who is measured, where that is not all.
        alone: whether no peers are, nor other backends than these.
        marks: by measure.
        contenders: in suites that measure in turns, who is measured: ours first, then peers.
    """

    case: Case
    backends: tuple[str, ...] | None = None
    alone: bool = False
    marks: Mapping[str, Mark] = field(default_factory=dict)
    contenders: tuple[Contender, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A set of cases.

    Attributes:
        title: what it is, in a line.
        entries: its cases.
        kind: ``"time"``, ``"memory"`` or ``"cold start"``.
        device: ``"cuda"`` or ``"cpu"``, or ``"any"``: the GPU where there is one.
        axis: what its figure has on the horizontal axis, a field of a case; ``None``: no figure.
        measures: what is measured of the contenders of an entry in turns; then ``kind`` says
            nothing.
        shared_time: whether all its cases share the time that the command line gives.
    """

    title: str
    entries: Callable[[Selection], list[Entry]]
    kind: str = "time"
    device: str = "cuda"
    axis: str | None = None
    measures: tuple[Measure, ...] = ()
    shared_time: bool = False


def head_dim(selection: Selection) -> list[Entry]:
    """Heads that share a width of 768, and single ones beyond."""
    heads, wider = ((12, 3, 1), (1536,)) if selection.quick else (HEADS, WIDER)
    shapes = [*((N, WIDTH // N) for N in heads), *((1, D) for D in wider)]
    return [Entry(selection.case(N, D)) for N, D in shapes]


def batch(selection: Selection) -> list[Entry]:
    """Few sequences and many."""
    if selection.quick:
        return [Entry(selection.case(*MANY, B=B)) for B in (1, 64)]
    shapes = [(MANY, (1, 2, 4, 8, 16, 32, 64, 128, 256)), (ONE, (1, 4, 16, 64, 256))]
    return [Entry(selection.case(*shape, B=B)) for shape, sizes in shapes for B in sizes]


def length(selection: Selection) -> list[Entry]:
    """Short sequences and long ones."""
    shapes, lengths = (
        ((MANY,), (256, 1024)) if selection.quick else ((MANY, ONE), (256, 512, 1024, 2048, 4096))
    )
    return [Entry(selection.case(*shape, T=T)) for shape in shapes for T in lengths]


def functions(selection: Selection) -> list[Entry]:
    """Every cell, small heads and one large."""
    shapes = (MANY,) if selection.quick else (MANY, ONE)
    dtype = selection.dtype or torch.bfloat16
    return [
        Entry(Case(function, B, T, N, D, dtype))
        for N, D in shapes
        for function in selection.functions
    ]


def goals(selection: Selection) -> list[Entry]:
    """Every row of goals.csv, for the backend that has the goal."""
    entries = []
    with GOALS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            B, T, N, D = (int(row[name]) for name in "BTND")
            tf32 = row["dtype"] == "tf32"
            dtype = torch.float32 if tf32 else parse_dtype(row["dtype"])
            case = Case(row["function"], B, T, N, D, dtype, tf32)
            marks = {
                measure: Mark(
                    float(row[f"goal_{short}_ms"]),
                    row["best_peer"],
                    float(row[f"peer_{short}_ms"]) if row[f"peer_{short}_ms"] else None,
                )
                for measure, short in ((FORWARD, "fw"), (BOTH, "fwbw"))
            }
            entries.append(Entry(case, (row["backend"],), True, marks))
    return [
        entry
        for entry in entries
        if entry.case.function in selection.functions
        and selection.dtype in (None, entry.case.dtype)
    ]


def memory(selection: Selection) -> list[Entry]:
    """Every cell, beside what upstream keeps for backward: all states and gates."""
    entries = []
    for entry in functions(selection):
        case = entry.case
        cell = resolve(case.function)
        kept = (len(cell.states) + len(cell.gates)) * case.B * case.T * case.N * case.D
        scheme = Mark(None, "upstream's scheme, computed", kept * case.dtype.itemsize / MIB)
        entries.append(replace(entry, marks={HELD: scheme}))
    return entries


def cold_start(selection: Selection) -> list[Entry]:
    """A small head and a large one."""
    shapes = (MANY,) if selection.quick else (MANY, ONE)
    return [Entry(selection.case(*shape)) for shape in shapes]


def cpu(selection: Selection) -> list[Entry]:
    """Every cell at a size that a CPU computes at once."""
    T = 64 if selection.quick else 256
    dtype = selection.dtype or torch.float32
    own = ("vanilla", f"vanilla{WITH_PRODUCT}")
    return [Entry(Case(function, 32, T, 1, 128, dtype), own) for function in selection.functions]


def host(selection: Selection) -> list[Entry]:
    """Calls whose time on the GPU is shorter than on the host."""
    entries = []
    for N, D, B, T in ((2, 64, 4, 8),) if selection.quick else ((2, 64, 4, 8), (12, 64, 16, 8)):
        case = selection.beside_torch(N, D, B, T)
        entries.append(Entry(case, contenders=(Ours("auto"), TorchNN(case.dtype, False))))
    case = selection.beside_torch(1, 120, 9, 1)
    entries.append(Entry(case, contenders=(Layer(), TorchNN(case.dtype, False))))
    return entries


def short(selection: Selection) -> list[Entry]:
    """Short sequences, where what comes before the first step and after the last counts."""
    lengths = (1, 64) if selection.quick else (1, 2, 4, 8, 16, 32, 64)
    cases = [selection.beside_torch(*shape, B=B, T=T) for shape in (MANY, ONE) for T in lengths]
    return [Entry(case, contenders=(Ours("auto"), TorchNN(case.dtype, False))) for case in cases]


def step(selection: Selection) -> list[Entry]:
    """A step at a time, of one sequence and of several."""
    shapes = (MANY,) if selection.quick else ((1, 256), ONE, MANY, (4, 128))
    cases = [selection.beside_torch(*shape, B=B, T=1) for shape in shapes for B in (1, 16)]
    return [
        Entry(case, contenders=(Stepping(), Ours("auto"), TorchNN(case.dtype, False)))
        for case in cases
    ]


def random_shapes(selection: Selection) -> list[Entry]:
    """Random shapes."""
    cases = arena.cases(
        min(selection.shapes, 12) if selection.quick else selection.shapes,
        selection.seed,
        selection.device,
        (selection.function,) if selection.function else tuple(MODULES),
        (selection.dtype,) if selection.dtype else DTYPES,
    )
    return [Entry(case, contenders=(Layer(), TorchNN(case.dtype, False))) for case in cases]


def layers(selection: Selection) -> list[Entry]:
    """One layer and several, one direction and both."""
    counts, widths = ((1, 2), (128,)) if selection.quick else ((1, 2, 4), (128, 512, 1024))
    entries = []
    for count in counts:
        for directions in (1, 2):
            for D in widths:
                for B in (16,) if selection.quick else (16, 64):
                    case = selection.beside_torch(1, D, B, T)
                    stacks = tuple(Stack(each, count, directions) for each in (nn, torch.nn))
                    entries.append(Entry(case, contenders=stacks))
    return entries


def sequences(selection: Selection) -> list[Entry]:
    """Every option of sequences beside the plain call of the same shape, torch.nn and torchrl."""
    shapes = (MANY,) if selection.quick else (MANY, ONE)
    ragged, many = (B, B) if selection.quick else (64, 256)
    asked = [(option, ragged, shape) for shape in shapes for option in _SEQUENCED]
    asked += [(sequenced.BOTH, B, shape) for shape in shapes]
    asked += [(sequenced.H, many, MANY)]
    entries = []
    for option, count, shape in asked:
        case = selection.beside_torch(*shape, B=count, T=T)
        peer: Contender = TorchNN(case.dtype, False)
        if option == sequenced.BOTH:
            peer = Stack(torch.nn, 1, 2)
        elif option != sequenced.RESET and option != sequenced.H:
            peer = PackedTorchNN(case.dtype, False, option == sequenced.EQUAL)
        peers = (TorchRL(), peer) if option == sequenced.RESET else (peer,)
        contenders = (Sequenced(option), Sequenced(sequenced.PLAIN), *peers)
        entries.append(Entry(case, contenders=contenders))
    return entries


_SEQUENCED = (sequenced.RESET, sequenced.EQUAL, sequenced.UNIFORM, sequenced.PACKED)


SUITES = {
    "head-dim": Suite(
        f"over the head dimension: {WIDTH} units in all, and single heads beyond",
        head_dim,
        axis="D",
    ),
    "batch": Suite("over the batch size", batch, axis="B"),
    "length": Suite("over the length of the sequences", length, axis="T"),
    "functions": Suite("every cell", functions, axis="function"),
    "goals": Suite("every row of the table of goals, by the backend that has the goal", goals),
    "memory": Suite("GPU memory of a training step", memory, kind="memory"),
    "cold-start": Suite("first results of fresh processes", cold_start, kind="cold start"),
    "host": Suite(
        "host time of a call beside torch.nn, small shapes",
        host,
        device="any",
        measures=(*HOST, *WALL),
    ),
    "short": Suite(
        "short sequences beside torch.nn, T from 1 to 64",
        short,
        device="any",
        measures=(*GRAPH, *WALL),
    ),
    "step": Suite(
        "a single step of flashrnn.Stepper, beside calls of T = 1",
        step,
        device="any",
        measures=FORWARD_ALONE,
    ),
    "arena": Suite(
        "random shapes, whole layers beside torch.nn",
        random_shapes,
        device="any",
        measures=WALL,
        shared_time=True,
    ),
    "layers": Suite(
        "1 to 4 layers of flashrnn.nn beside torch.nn, one direction and both",
        layers,
        device="any",
        measures=WALL,
    ),
    "sequences": Suite(
        "resets, lengths, packed batches and directions beside plain calls and torch.nn",
        sequences,
        device="any",
        measures=WALL,
    ),
    "cpu": Suite("vanilla and torch.nn on the CPU", cpu, device="cpu", axis="function"),
}
