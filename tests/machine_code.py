"""What the assembler made of a CUDA program, without a GPU."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flashrnn.jit import nvrtc

_NOTHING = "0 bytes spill stores, 0 bytes spill loads"


def spills_in_a_loop(parts: Mapping[str, str], arch: str) -> bool:
    """Whether a loop moves registers to memory and back. Outside of loops nobody would notice."""
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    options = ProgramOptions(arch=arch, std="c++17", ptxas_options=["-v"])
    cubin = Program(nvrtc.join(parts), "c++", options).compile("cubin", logs=log)
    lines = [line for line in log.getvalue().splitlines() if "spill" in line]
    assert lines, log.getvalue()
    return any(_NOTHING not in line for line in lines) and _spilling_loop(bytes(cubin.code))


def _spilling_loop(cubin: bytes) -> bool:
    code = _disassemble(cubin)
    assert len(code) > 100
    loops = []
    for address, instruction in code:
        target = re.search(r"BRA.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    local = [address for address, instruction in code if re.search(r"\b(LDL|STL)\b", instruction)]
    return any(begin <= address <= end for begin, end in loops for address in local)


def _disassemble(cubin: bytes) -> list[tuple[int, str]]:
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
