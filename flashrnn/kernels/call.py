"""The record of a call: its tensors and sizes, as kernels get them.

A kernel's list of parameters, a C struct of the same fields, and their values come from one table.
Every field is passed in 8 bytes: an address, a stride in elements, or a size.

Persistent kernels have a parameter for each field. With ``__restrict__`` the compiler may assume
that no two parameters point to the same memory; on a struct's members that word has no effect.
The kernels of a step (:mod:`flashrnn.kernels.per_step`) read the struct from device memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

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


@dataclass(frozen=True, eq=False)
class Record:
    """The fields of a call.

    Attributes:
        name: the struct's name.
        operands: its tensors.
        numbers: its other fields, and their types as parameters.
        absent: operands that kernels name and that it lacks.
    """

    name: str
    operands: tuple[Operand, ...]
    numbers: Mapping[str, str]
    absent: tuple[Operand, ...] = ()

    @property
    def complete(self) -> Record:
        """The same with the operands that it lacks."""
        return _complete(self)

    def pack(self, tensors: Mapping[str, Tensor], **numbers: int) -> list[int]:
        """The fields' values; 0 for what is not given."""
        values: list[int] = []
        for name, strides in self._places:
            tensor = tensors.get(name)
            if tensor is None:
                values += [0] * (1 + len(strides))
                continue
            values.append(tensor.data_ptr())
            if strides:
                of_dims = tensor.stride()
                values += [of_dims[dim] for dim in strides]
        values += [numbers.get(name, 0) for name in self.numbers]
        return values

    @cached_property
    def _places(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The name of each tensor, and the dimensions whose strides follow its address."""
        return tuple(
            (operand.name, tuple(i for i, dim in enumerate(operand.dims) if dim != "1"))
            for operand in self.operands
        )

    @property
    def size(self) -> int:
        """How many fields it has."""
        return sum(1 + len(dims) for _, dims in self._places) + len(self.numbers)

    @property
    def parameters(self) -> str:
        """The macro ``CALL``, a kernel's list of parameters."""
        found = []
        for operand in self.operands:
            found.append(f"{operand.element}* __restrict__ {operand.name}")
            found += [f"long long {stride}" for stride in operand.strides]
        found += [f"{kind} {number}" for number, kind in self.numbers.items()]
        return f"#define CALL {', '.join(found)}"

    @property
    def struct(self) -> str:
        """The definition of the struct."""
        fields = []
        for operand in self.operands:
            fields.append(f"    {operand.element}* {operand.name};")
            fields += [f"    long long {stride};" for stride in operand.strides]
        for number, kind in self.numbers.items():
            # All of them have 8 bytes.
            fields.append(f"    {kind if number == 'clips' else 'long long'} {number};")
        return "struct {} {{\n{}\n}};".format(self.name, "\n".join(fields))


@cache
def _complete(record: Record) -> Record:
    numbers = {_ALL_ROWS: "long long", **record.numbers}
    return replace(record, operands=(*record.operands, *record.absent), numbers=numbers, absent=())


_ALL_ROWS = "rows_of_all"
"""How many rows all sequences have together: a number that only complete records have."""


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
``done`` is for kernels of a step: the number of steps before the recorded run. What it lacks says
how sequences run (``common/sequence.cuh``), and is passed where a call has such options;
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

RECURRENT_GRADIENT = Record(
    "RecurrentGradientCall",
    (
        Operand("d_gates", "const Element"),
        Operand("h_initial", "const Element"),
        Operand("h", "const Element"),
        Operand("parts", "float"),
    ),
    {"rows_a_part": "int", "T": "unsigned", "B": "long long", "N": "int"},
    absent=(*_BEFORE, Operand("runs_backwards", "const int")),
)
"""Of the kernel of R's gradient.

What it lacks is passed where a call has options of sequences; see :data:`FORWARD`.
"""
