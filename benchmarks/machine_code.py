# SPDX-License-Identifier: Apache-2.0
"""What a GPU kernel was compiled to, read off its machine code with cuobjdump."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

RESERVED_SHARED = 1024  # bytes that sm_90 and newer add to a kernel's own, where it has any
WIDTHS = (16, 8, 4, 2, 1)  # bytes that a thread moves with one access


@dataclass
class MachineCode:
    """Resources and static counts of instructions of one kernel."""

    registers: int = 0
    stack: int = 0  # bytes of local memory a thread
    shared: int = 0  # bytes of static shared memory
    loads: Counter[int] = field(default_factory=Counter)  # from global memory, by width
    stores: Counter[int] = field(default_factory=Counter)
    generic: int = 0  # accesses to memory that the compiler could not tell: global, or arguments by index
    spills: int = 0  # accesses to local memory
    shared_accesses: int = 0
    tensor: int = 0  # instructions for tensor cores
    shuffles: int = 0
    barriers: int = 0  # of a block; one of a single warp is nearly free
    places: list[tuple[int, str, int | None]] = field(default_factory=list)  # address, opcode, target of a branch

    def bytes_in_16(self) -> tuple[float, float]:
        """Share of the bytes loaded, and of those stored, that move 16 at a time."""
        shares = [16 * c[16] / max(sum(w * n for w, n in c.items()), 1) for c in (self.loads, self.stores)]
        return shares[0], shares[1]

    def executed(self, turns: int) -> Counter[str]:
        """Instructions of a thread that goes through all of the code once, and through loops without memory accesses
        ``turns`` times. Cold paths (subroutines of roots and quotients) count as if taken."""
        loops = []
        for address, _, target in self.places:
            if target is not None and target < address:
                body = [opcode for place, opcode, _ in self.places if target <= place <= address]
                if not {"LDG", "STG"} & set(body):
                    loops.append((target, address))
        total: Counter[str] = Counter()
        for address, opcode, _ in self.places:
            if opcode != "NOP":
                total[opcode] += turns if any(first <= address <= last for first, last in loops) else 1
        return total

    def count(self, opcode: str) -> None:
        name, *modifiers = opcode.split(".")
        if name in ("LDG", "LDGSTS"):  # the second on its way to shared memory
            self.loads[_width(modifiers)] += 1
        elif name == "STG":
            self.stores[_width(modifiers)] += 1
        elif name in ("LD", "ST"):
            self.generic += 1
        elif name in ("LDL", "STL"):
            self.spills += 1
        elif name in ("LDS", "STS", "LDSM", "STSM"):
            self.shared_accesses += 1
        elif name.endswith("MMA"):
            self.tensor += 1
        elif name == "SHFL":
            self.shuffles += 1
        elif name == "BAR":
            self.barriers += 1


def _width(modifiers: list[str]) -> int:
    found = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((found[m] for m in modifiers if m in found), 4)


def cuobjdump() -> str | None:
    """Path of the tool: that of the CUDA toolkit, or the one that Triton brings."""
    on_path = shutil.which("cuobjdump")
    if on_path:
        return on_path
    try:
        from triton import knobs
    except ImportError:
        return None
    return str(knobs.nvidia.cuobjdump.path)


_FUNCTION = re.compile(r"^\s*Function\s*:?\s+([^\s:]+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def kernels_of(binary: Path, capability: int) -> dict[str, MachineCode]:
    """The kernels for ``sm_<capability>`` in a cubin, or in a library, by their mangled names.

    Raises:
        FileNotFoundError: neither the CUDA toolkit nor Triton provides cuobjdump.
    """
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("no cuobjdump: install the CUDA toolkit or Triton")
    arch = [] if binary.suffix == ".cubin" else ["-arch", f"sm_{capability}"]
    found: dict[str, MachineCode] = {}
    for option in ("-res-usage", "-sass"):
        text = subprocess.run([tool, option, *arch, binary], check=True, capture_output=True, text=True).stdout
        current = MachineCode()
        for line in text.splitlines():
            if function := _FUNCTION.match(line):
                current = found.setdefault(function[1], MachineCode())
            elif usage := _USAGE.search(line):
                current.registers, current.stack, shared = map(int, usage.groups())
                current.shared = max(shared - (RESERVED_SHARED if capability >= 90 else 0), 0)
            elif instruction := _INSTRUCTION.match(line):
                current.count(instruction[2])
                opcode, target = instruction[2].split(".")[0], _TARGET.search(instruction[3])
                branch = int(target[1], 16) if opcode == "BRA" and target else None
                current.places.append((int(instruction[1], 16), opcode, branch))
    return found
