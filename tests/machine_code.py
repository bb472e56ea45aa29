"""The machine code of a CUDA program, read without a GPU."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import pytest

from flashrnn.jit import nvrtc

needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"needs NVRTC: {nvrtc.INSTALL}"
)

Code = list[tuple[int, str]]
"""Addresses and instructions."""
Loop = tuple[int, int]
"""The addresses of its first and last instruction."""


def spills_in_a_loop(parts: Mapping[str, str], arch: str) -> bool:
    """Whether a loop spills registers to memory. Outside of loops spills hardly cost time."""
    return _spills(parts, arch, lambda code, loops: loops, some=0)


def spills_in_the_loop_of_products(parts: Mapping[str, str], arch: str) -> bool:
    """As :func:`spills_in_a_loop`, of the innermost loop that has most tensor core instructions.

    That is a persistent kernel's loop over time. Around it there may be one that loads R, once for
    many steps: nobody would notice a few spills there either. Nor that of an address or two which
    stay the same, and are read back at each step: one instruction in a hundred may be such.
    """
    return _spills(parts, arch, _innermost_with_most_products, some=0.01)


def local_memory(parts: Mapping[str, str], arch: str) -> tuple[int, int]:
    """Bytes of a thread's local memory, and bytes that spills store and load there.

    ``sinf``, ``cosf`` and ``tanf`` keep an array there, with which they reduce large arguments.
    """
    _, frame, spilled = _assemble(parts, arch)
    return frame, spilled


def loop_of_products(parts: Mapping[str, str], arch: str) -> list[str]:
    """The instructions of the innermost loop that has all tensor core instructions.

    It must be the only one: code that the compiler has moved behind it, and that jumps back into
    its middle, looks like a loop too, but has not all of them.
    """
    code = _disassemble(_assemble(parts, arch)[0])
    products = [address for address, instruction in code if re.search(r"HG?MMA", instruction)]
    around = [x for x in _loops(code) if x[0] <= products[0] and products[-1] <= x[1]]
    begin, end = min(around, key=lambda loop: loop[1] - loop[0])
    return [instruction for address, instruction in code if begin <= address <= end]


def operations_of_steps(parts: Mapping[str, str], arch: str) -> list[Counter[str]]:
    """How often each operation stands in a step, for each copy of its code.

    A copy is an innermost loop that has tensor core instructions.
    """
    code = _disassemble(_assemble(parts, arch)[0])
    with_products = [
        (begin, end)
        for begin, end in _loops(code)
        if any(begin <= at <= end and re.search(r"HG?MMA", text) for at, text in code)
    ]
    innermost = [
        (begin, end)
        for begin, end in with_products
        if not any((begin, end) != x and begin <= x[0] and x[1] <= end for x in with_products)
    ]
    found = []
    for begin, end in innermost:
        step = [re.sub(r"^@\S+ ", "", text) for at, text in code if begin <= at <= end]
        found.append(Counter(re.split(r"[. ]", text)[0] for text in step))
    return found


def instructions(parts: Mapping[str, str], arch: str, words: str) -> list[str]:
    """The names of those that have the words in them."""
    return [name for name in in_order(parts, arch) if words in name]


def in_order(parts: Mapping[str, str], arch: str) -> list[str]:
    """The names of all instructions."""
    code = _disassemble(_assemble(parts, arch)[0])
    return [re.sub(r"^@\S+ ", "", instruction).split()[0] for _, instruction in code]


def _spills(
    parts: Mapping[str, str],
    arch: str,
    choose: Callable[[Code, list[Loop]], list[Loop]],
    some: float,
) -> bool:
    cubin, _, spilled = _assemble(parts, arch)
    if not spilled:
        return False
    code = _disassemble(cubin)
    assert len(code) > 100
    local = [address for address, instruction in code if re.search(r"\b(LDL|STL)\b", instruction)]
    for begin, end in choose(code, _loops(code)):
        spilled = sum(begin <= address <= end for address in local)
        if spilled > some * sum(begin <= address <= end for address, _ in code):
            return True
    return False


def registers(parts: Mapping[str, str], arch: str) -> int:
    """Registers of a thread, as the kernel is launched."""
    return _assembled(nvrtc.join(parts), arch)[3]


def _assemble(parts: Mapping[str, str], arch: str) -> tuple[bytes, int, int]:
    """The machine code, and bytes of the stack frames and of the spills."""
    return _assembled(nvrtc.join(parts), arch)[:3]


# A test may ask several questions about a program.
@lru_cache(maxsize=4)
def _assembled(text: str, arch: str) -> tuple[bytes, int, int, int]:
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    options = ProgramOptions(arch=arch, std="c++17", ptxas_options=["-v"])
    cubin = Program(text, "c++", options).compile("cubin", logs=log)
    frames, spills = (
        re.findall(rf"(\d+) bytes {of}", log.getvalue()) for of in ("stack frame", "spill")
    )
    used = re.findall(r"Used (\d+) registers", log.getvalue())
    assert frames and spills and used, log.getvalue()
    return bytes(cubin.code), sum(map(int, frames)), sum(map(int, spills)), max(map(int, used))


def _loops(code: Code) -> list[Loop]:
    loops = []
    for address, instruction in code:
        target = re.search(r"BRA.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    return loops


def _innermost_with_most_products(code: Code, loops: list[Loop]) -> list[Loop]:
    """The compiler may have peeled a loop's first iteration."""
    products = [address for address, instruction in code if re.search(r"HG?MMA", instruction)]

    def most(loop: Loop) -> bool:
        return 2 * sum(loop[0] <= product <= loop[1] for product in products) >= len(products)

    return [min(filter(most, loops), key=lambda loop: loop[1] - loop[0])]


def _disassemble(cubin: bytes) -> Code:
    """Addresses and instructions, by the disassembler that comes with Triton."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler, "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)
    return [(int(address, 16), instruction) for address, instruction in found]
