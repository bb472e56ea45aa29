"""The record of a call: its tensors and sizes, as kernels get them.

A kernel's list of parameters, a C struct of the same fields, and their values come from one table.
Every field is passed in 8 bytes: an address, a stride in elements, or a size.

Persistent kernels have a parameter for each field. With ``__restrict__`` the compiler may assume
that no two parameters point to the same memory; on a struct's members that word has no effect.
The kernels of a step (:mod:`flashrnn.kernels.per_step`) read the struct from device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, reduce
from math import gcd
from operator import itemgetter, or_
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Operand:
    """A tensor of a call.

    Attributes:
        name: the field with the address of its first element.
        element: the C type of its elements.
        dims: a letter for each dimension whose stride the record has, and ``1`` for each dimension
            of size 1. Empty for a contiguous tensor, whose strides follow from its sizes.
    """

    name: str
    element: str
    dims: str = ""

    @property
    def strides(self) -> tuple[str, ...]:
        """The fields with its strides."""
        return tuple(f"{self.name}_{dim}" for dim in self.dims if dim != "1")

    @property
    def absent(self) -> str:
        """Constants in the place of its fields, for a kernel whose record does not have it."""
        address = f"constexpr {self.element}* {self.name} = nullptr;"
        return " ".join([address, *(f"constexpr long long {x} = 0;" for x in self.strides)])


class Layout(NamedTuple):
    """What a launch depends on besides its tensors' addresses.

    Attributes:
        names: the operands that are given.
        strides: those of the given operands whose strides the record has.
        offsets: how many bytes behind a multiple of 16 each of them begins; empty if none does.
    """

    names: tuple[str, ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]

    def with_scratch(self, scratch: Scratch) -> Layout:
        """The same, and behind the operands the scratch memory that is not of size 0."""
        found = [name for name, size in zip(scratch._fields, scratch, strict=True) if size]
        return self._replace(names=(*self.names, *found))


class Scratch(NamedTuple):
    """Global memory that launches need for themselves, in units of 16 bytes, by operands' names.

    Attributes:
        packets: packets, or buffers and counters, by which CTAs of a scan send each other values;
            all zeros at first.
        counters: those of tiles that CTAs share; all zeros at first.
        R_in_memory: fragments of R for which registers and shared memory have no room.
        parts: those of R's gradient.
        sums: those of tiles that CTAs share.
    """

    packets: int = 0
    counters: int = 0
    R_in_memory: int = 0
    parts: int = 0
    sums: int = 0


class Packing(NamedTuple):
    """The values of a record's fields, but for the addresses.

    Attributes:
        constants: a zero, the strides and the numbers.
        order: puts addresses and constants into the order of the fields.
    """

    constants: tuple[int, ...]
    order: Callable[[Any], tuple[int, ...]]

    def __call__(self, addresses: list[int]) -> tuple[int, ...]:
        """The fields' values."""
        return self.order((*addresses, *self.constants))

    def places(self, first: int, count: int) -> tuple[int, ...]:
        """Which fields the first few of so many addresses become."""
        order = self.order(range(count + len(self.constants)))
        return tuple(map(order.index, range(first)))


@dataclass(frozen=True, eq=False)
class Record:
    """The fields of a call.

    Attributes:
        name: the struct's name.
        operands: its tensors.
        numbers: its other fields, and their types as parameters.
        absent: operands that kernels mention but the record does not have; constants replace them.
    """

    name: str
    operands: tuple[Operand, ...]
    numbers: Mapping[str, str]
    absent: tuple[Operand, ...] = ()

    @property
    def complete(self) -> Record:
        """The record with the absent operands."""
        return _complete(self)

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[list[int], Layout]:
        """The tensors' addresses, in their order, and what else of them a launch depends on.

        Args:
            tensors: by the operands' names; those that a call lacks are missing. Of one with more
                dimensions than its operand, the first element of the others is meant: no view has
                to be made of it.
        """
        addresses = [*map(Tensor.data_ptr, tensors.values())]
        strides = [tensors[name].stride()[n:] for name, n in self._strided if name in tensors]
        offsets = [address % 16 for address in addresses] if reduce(or_, addresses, 0) % 16 else ()
        return addresses, Layout((*tensors,), (*strides,), (*offsets,))

    def packing(self, layout: Layout, **numbers: int) -> Packing:
        """How the fields' values follow from the addresses of tensors of one layout.

        Args:
            layout: the tensors'. It may have more than the record; those are left out.
            numbers: the other fields; 0 for those that are not given.
        """
        constants = [0]
        for strides in layout.strides:
            constants += strides
        constants += [numbers.get(name, 0) for name in self.numbers]
        return Packing((*constants,), self._orders(layout.names))

    @cached_property
    def _orders(self) -> Callable[[tuple[str, ...]], itemgetter[Any]]:
        return cache(self._order)

    def _order(self, given: tuple[str, ...]) -> itemgetter[Any]:
        """What puts the given operands' addresses and a packing's constants in order."""
        zero = len(given)
        place = zero + 1
        order: list[int] = []
        for operand in self.operands:
            is_given = operand.name in given
            order.append(given.index(operand.name) if is_given else zero)
            strides = [place + i if is_given else zero for i in range(len(operand.dims))]
            order += [i for i, dim in zip(strides, operand.dims, strict=True) if dim != "1"]
            place += len(operand.dims) if is_given else 0
        return itemgetter(*order, *range(place, place + len(self.numbers)))

    def rows_begin_at(
        self, multiple: int, names: Collection[str], layout: Layout, D: int, size: int
    ) -> bool:
        """Whether tensors' rows are contiguous, and begin and end at multiples of some bytes.

        Args:
            multiple: up to 16 bytes.
            names: of the operands that are asked for; those that are not given do not count.
            layout: the given tensors'.
            D: elements of a row.
            size: bytes of an element.
        """
        if D * size % multiple:
            return False
        if any(
            offset % multiple
            for name, offset in zip(layout.names, layout.offsets, strict=False)
            if name in names
        ):
            return False
        strided = (name for name, _ in self._strided if name in layout.names)
        return all(
            strides[-1] == 1 and gcd(*strides[:-1]) * size % multiple == 0
            for name, strides in zip(strided, layout.strides, strict=True)
            if name in names
        )

    def piece_bytes(self, names: Collection[str], layout: Layout, D: int, size: int) -> int:
        """The largest pieces, of 16, 8 or 4 bytes or an element's, that tensors' rows consist of.

        Args:
            names: of the operands that are asked for.
            layout: the given tensors', whose rows are contiguous.
            D: elements of a row.
            size: bytes of an element.
        """
        possible = (x for x in (16, 8, 4) if self.rows_begin_at(x, names, layout, D, size))
        return next(possible, size)

    @cached_property
    def _strided(self) -> tuple[tuple[str, int], ...]:
        """The operands whose strides it has, and where the strides of their dimensions begin,
        counted from the last."""
        return tuple(
            (operand.name, -len(operand.dims)) for operand in self.operands if operand.dims
        )

    @property
    def size(self) -> int:
        """How many fields it has."""
        return sum(1 + len(operand.strides) for operand in self.operands) + len(self.numbers)

    @property
    def parameters(self) -> str:
        """The macro ``CALL``, a kernel's list of parameters."""
        numbers = [f"{kind} {name}" for name, kind in self.numbers.items()]
        return f"#define CALL {', '.join([*self._tensors(' __restrict__'), *numbers])}"

    @property
    def struct(self) -> str:
        """The definition of the struct."""
        # All of them have 8 bytes.
        numbers = [f"{'Clips' if x == 'clips' else 'long long'} {x}" for x in self.numbers]
        fields = "".join(f"    {field};\n" for field in (*self._tensors(""), *numbers))
        return f"struct {self.name} {{\n{fields}}};"

    def _tensors(self, qualifier: str) -> Iterator[str]:
        """The declarations of the tensors' addresses and strides."""
        for operand in self.operands:
            yield f"{operand.element}*{qualifier} {operand.name}"
            yield from (f"long long {stride}" for stride in operand.strides)


@cache
def _complete(record: Record) -> Record:
    numbers = {_ALL_ROWS: "long long", **record.numbers}
    return replace(record, operands=(*record.operands, *record.absent), numbers=numbers, absent=())


_ALL_ROWS = "rows_of_all"
"""The number of rows of all sequences together, which only complete records have."""


_NUMBERS = {
    "T": "long long",
    "B": "long long",
    "N": "int",
    "clips": "Clips",
    "groups": "int",
    "done": "long long",
}

_SEQUENCES = (
    Operand("sequence_order", "const int"),
    Operand("sequence_rows", "const int"),
    Operand("sequence_lengths", "const int"),
    Operand("runs_backwards", "const int"),
    Operand("reset_flags", "const int"),
    Operand("reset_states", "const float", "sbtnd"),
)

_BEFORE = (Operand("before_rows", "const int"), Operand("h_starts", "const Element"))

FORWARD = Record(
    "ForwardCall",
    (
        Operand("Wx", "const Element", "btgnd"),
        Operand("R", "const Element"),
        Operand("b", "const Element"),
        Operand("initial", "const float", "sb1nd"),
        Operand("h_initial", "const Element"),
        Operand("states", "Element"),
        Operand("last_states", "float"),
        Operand("gates", "Element"),
        Operand("packets", "void"),
        Operand("R_in_memory", "void"),
    ),
    _NUMBERS,
    absent=(*_SEQUENCES, *_BEFORE),
)
"""Of a forward scan.

``h_initial`` is h before the first step, rounded, for kernels that read h from memory. ``packets``
and ``R_in_memory`` are a plan's scratch memory. ``groups`` is the number of CTA groups of a launch.
``done`` is for kernels of a step: the number of steps before the recorded run. The absent operands
say how sequences run (``common/sequence.cuh``). They are passed if a call has such options;
``before_rows`` and ``h_starts`` say where h before each step is
(:class:`flashrnn.backends.gradients.Before`).
"""

BACKWARD = Record(
    "BackwardCall",
    (
        Operand("R", "const Element"),
        Operand("initial", "const float", "sb1nd"),
        Operand("states", "const Element"),
        Operand("gates", "const Element"),
        Operand("d_states", "const Element", "sbtnd"),
        Operand("d_last", "const float", "sb1nd"),
        Operand("d_gates", "Element"),
        Operand("d_initial", "float"),
        Operand("d_bias", "float"),
        Operand("packets", "void"),
        Operand("R_in_memory", "void"),
    ),
    _NUMBERS,
    absent=(*_SEQUENCES, Operand("d_reset_states", "float", "sbt1d")),
)
"""Of a backward scan; see :data:`FORWARD`."""

CELL_FORWARD = replace(
    FORWARD,
    name="CellForwardCall",
    operands=(*FORWARD.operands, Operand("product", "const float")),
)
"""Of a step's cell where a library computes the product: ``[N, B, Gr, D]`` in float32."""

CELL_BACKWARD = replace(
    BACKWARD,
    name="CellBackwardCall",
    operands=(
        *BACKWARD.operands,
        Operand("product", "const float"),
        Operand("factors", "Element"),
    ),
)
"""As :data:`CELL_FORWARD`: a product ``[N, B, D]``, and what the next one reads,
``[N, B, Gr, D]``."""

RECURRENT_GRADIENT = Record(
    "RecurrentGradientCall",
    (
        Operand("d_gates", "const Element"),
        Operand("h_initial", "const float", "b1nd"),
        Operand("h", "const Element"),
        Operand("parts", "float"),
        Operand("d_bias", "const float"),
        Operand("d_R", "Element"),
        Operand("d_b", "Element"),
    ),
    {
        "rows_a_part": "int",
        "R_ctas": "int",
        "b_rows": "long long",
        "b_columns": "long long",
        "b_shares": "int",
        "T": "unsigned",
        "B": "long long",
        "N": "int",
    },
    absent=(
        *_BEFORE,
        Operand("runs_backwards", "const int"),
        Operand("reset_flags", "const int"),
        Operand("lengths", "const int"),
    ),
)
"""Of the kernel of R's gradient. In float32 ``h_initial`` is contiguous. ``parts`` are given where
there are several; else ``d_R``, and what the bias's gradient needs.

What it lacks is passed where a call has options of sequences: the flags and the sequences'
``lengths``, or the others in the place of ``h_initial``; see ``source.gradient_options``.
"""

GRADIENT_SUMS = Record(
    "GradientSumsCall",
    (
        Operand("parts", "const float"),
        Operand("d_bias", "const float"),
        Operand("d_R", "Element"),
        Operand("d_b", "Element"),
    ),
    {
        "R_rows": "long long",
        "R_columns": "long long",
        "R_shares": "int",
        "R_ctas": "int",
        "b_columns": "long long",
        "b_shares": "int",
        "B": "long long",
        "N": "int",
        "D": "int",
    },
)
"""Of the sums that complete the gradients of R and of the bias."""

FEW_ROWS_PRODUCT = Record(
    "FewRowsProductCall",
    (
        Operand("x", "const Element"),
        Operand("W", "const Element"),
        Operand("bias", "const Element"),
        Operand("Wx", "Element"),
    ),
    {"x_pitch": "long long", "rows": "int", "columns": "int", "I": "int"},
)
"""Of the input product of a layer over few rows, which lie ``x_pitch`` elements from each other.
``W``, ``bias`` and ``Wx`` are contiguous. Of a layer without a bias of its input none is given."""

FEW_ROWS_GRADIENTS = Record(
    "FewRowsGradientsCall",
    (
        Operand("d_gates", "const Element"),
        Operand("x", "const Element", "bti"),
        Operand("W", "const Element"),
        Operand("h_initial", "const float", "b1nd"),
        Operand("h", "const Element"),
        Operand("d_bias", "const float"),
        Operand("d_x", "Element"),
        Operand("d_W", "Element"),
        Operand("d_R", "Element"),
        Operand("d_b", "Element"),
        Operand("counters", "unsigned"),
        Operand("sums", "float"),
    ),
    {
        "rows": "int",
        "columns": "int",
        "W_gate": "int",
        "x_ctas": "int",
        "W_ctas": "int",
        "R_ctas": "int",
        "x_shares": "int",
        "W_shares": "int",
        "R_shares": "int",
        "b_columns": "long long",
        "b_shares": "int",
        "T": "unsigned",
        "B": "long long",
        "N": "int",
        "D": "int",
        "I": "int",
    },
)
"""Of the gradients that follow from the gates' of a call over few rows.

What is not asked for is not given, and has no CTAs. ``counters`` and ``sums`` are of tiles that
several CTAs share.
"""

SEQUENCE_TABLES = Record(
    "SequenceTablesCall",
    (
        Operand("given", "const void", "b"),
        Operand("reset", "const unsigned char", "bt"),
        Operand("initial", "const float", "b1nd"),
        Operand("reset_states", "const float", "btnd"),
        Operand("order", "int"),
        Operand("first_rows", "int"),
        Operand("sorted_lengths", "int"),
        Operand("lengths", "int"),
        Operand("flags", "int"),
        Operand("before_rows", "int"),
        Operand("h_starts", "Element"),
        Operand("idle", "Element"),
    ),
    {
        "rows": "long long",
        "T": "long long",
        "B": "int",
        "N": "int",
        "D": "int",
        "is_wide": "int",
        "is_packed": "int",
        "directions": "int",
        "starts": "long long",
        "starts_a_sequence": "int",
        "idle_width": "long long",
        "idle_spans": "int",
        "order_ctas": "int",
        "row_ctas": "int",
    },
)
"""Of the tables of a call's options (:mod:`flashrnn.backends.tables`).

``given`` are ``lengths`` or ``cu_seqlens``, of 8 bytes each if ``is_wide``. ``reset_states`` have
``starts_a_sequence`` starts in their second dimension; with those of the sequences and of zeros
there are ``starts`` of them. ``idle`` has ``idle_spans`` times ``rows`` rows of ``idle_width``
elements.
"""

H_BEFORE = Record(
    "HBeforeCall",
    (
        Operand("h", "const Element"),
        Operand("h_initial", "const float", "b1nd"),
        Operand("before_rows", "const int"),
        Operand("h_starts", "const Element"),
        Operand("runs_backwards", "const int"),
        Operand("before", "Element"),
    ),
    {
        "rows": "long long",
        "T": "long long",
        "N": "int",
        "D": "int",
        "repeated": "int",
        "piece_bytes": "int",
    },
)
"""Of the copy of h before each step. ``h_initial`` is given where no ``before_rows`` are."""
