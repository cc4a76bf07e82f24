# SPDX-License-Identifier: Apache-2.0
"""Writes results/kernels.txt: registers, spills, shared memory and accesses of every GPU kernel. Needs no GPU."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from wavedp.benchmarks.launches import CAPABILITIES, CASES, Case, Launch  # noqa: E402
from wavedp.benchmarks.machine_code import WIDTHS, MachineCode, kernels_of  # noqa: E402

INTRODUCTION = """\
What the GPU kernels were compiled to. Made by `python benchmarks/kernel_report.py`, without a GPU: nothing here is
a time. Triton {triton}; the CUDA library as it is built.

regs      registers a thread              local   accesses to local memory: spills, or arrays that are indexed
shared    bytes of shared memory a block  s.acc   accesses to shared memory
shfl      shuffles                        bar     barriers of a block (for one warp nearly free)
generic   accesses to memory that the compiler could not tell: global, or arguments by index
mma       instructions for tensor cores, of any width
loads and stores: accesses to global memory in the code by their width in bytes, `n x width`; those of one thread,
loops and branches counted once. Triton's tiles are pixels, rows x columns, of one block of {warp} threads; those of
per-sample kernels are the sizes of blocks in the order of their arguments, and the warps of a block.
"""

INSTRUCTIONS = """\
Noise, sm_90: instructions an element, read off the code, and what an H200 needs for them on paper, in picoseconds

all       instructions that a lane issues (128 lanes a clock), cold paths of roots and quotients included
int       of those, integer, comparison and selection (64 a clock)     fp64      float64 (64 a clock)
special   approximate functions and conversions                       bytes     that must be moved, at 4.3 TB/s
bound     the largest of the four times. 132 multiprocessors at 1.98 GHz. Nothing here was run on a GPU.
"""


def accesses(counts: Counter[int]) -> str:
    return " ".join(f"{counts[width]}x{width}" for width in WIDTHS if counts[width]) or "-"


def row(name: str, tile: str, code: MachineCode, shared: int) -> tuple[str, ...]:
    counts = (
        code.registers,
        code.spills,
        shared,
        code.shared_accesses,
        code.shuffles,
        code.barriers,
        code.generic,
        code.tensor,
    )
    return (name, tile, *map(str, counts), accesses(code.loads), accesses(code.stores))


def table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = [
        ("", "tile", "regs", "local", "shared", "s.acc", "shfl", "bar", "generic", "mma", "loads", "stores"),
        *rows,
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [c.rjust(w) if 2 <= i <= 9 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text) + "\n"


def tile_of(launch: Launch) -> str:
    constants = launch.keywords
    if "LEVELS" not in constants:
        sizes = (str(n) for name, n in constants.items() if name == "ROWS" or name.startswith("BLOCK"))
        return f"{'x'.join(sizes)} {constants['num_warps']}w"
    scale = 1 << constants["LEVELS"]
    return f"{constants['BLOCK_H'] * scale}x{constants['BLOCK_W'] * scale}"


def compiled_code(launch: Launch, capability: int) -> tuple[MachineCode, int]:
    """The machine code of a launch, and its bytes of shared memory."""
    compiled = launch.compile(capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (code,) = kernels_of(path, capability).values()
    return code, compiled.metadata.shared


def triton_rows(cases: Iterable[Case], capability: int) -> Iterator[tuple[str, ...]]:
    for case in cases:
        launches = case.launches(importlib.import_module(f"wavedp.kernels.{case.stem}"))
        for i, launch in enumerate(launches):
            name = case.name if len(launches) == 1 else f"{case.name}, launch {i + 1}"
            yield row(name, tile_of(launch), *compiled_code(launch, capability))


# Opcodes by the unit that they wait for, and what one H200 does in a second: 132 multiprocessors at 1.98 GHz, with 128
# instructions a clock, of which 64 are integer or comparison and 64 of float64; and memory, as measured elsewhere.
INTEGER = {
    *("LOP3", "SHF", "IADD3", "VIADD", "LEA", "ISETP", "FSETP", "PLOP3", "P2R", "R2P"),
    *("FSEL", "SEL", "PRMT", "VIMNMX", "VIADDMNMX", "FMNMX", "IABS", "I2FP"),
}
FLOAT64 = {"DADD", "DMUL", "DFMA", "DSETP"}
SPECIAL = {"MUFU", "F2F", "I2F", "F2I"}  # and conversions
CLOCKS = 132 * 1.98e9
BANDWIDTH = 4.3e12
CHACHA_TURNS = 2  # of the loop that the rounds are left in


def instruction_rows(cases: Iterable[Case], capability: int) -> Iterator[tuple[str, ...]]:
    """Instructions of a lane for each of its elements, and what they and the memory take at least, in picoseconds."""
    for case in cases:
        if not case.numbers:
            continue
        for launch in case.launches(importlib.import_module(f"wavedp.kernels.{case.stem}")):
            code, _ = compiled_code(launch, capability)
            executed = code.executed(CHACHA_TURNS)
            total = sum(executed.values())
            units = [sum(executed[opcode] for opcode in unit) for unit in (INTEGER, FLOAT64, SPECIAL)]
            counts = [n / case.numbers for n in (total, *units)]
            times = [1e12 * x for x in (counts[0] / 128 / CLOCKS, counts[1] / 64 / CLOCKS, counts[2] / 64 / CLOCKS)]
            memory = 1e12 * case.moved / BANDWIDTH
            cells = (*counts, case.moved, *times, memory, max(*times, memory))
            yield (case.name, *(f"{x:.1f}" for x in cells[:5]), *(f"{x:.2f}" for x in cells[5:]))


def instruction_table(cases: Iterable[Case], capability: int) -> str:
    head = ("", "all", "int", "fp64", "special", "bytes", "issue", "int", "fp64", "memory", "bound")
    lines = [head, *instruction_rows(cases, capability)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    cells = ([c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells) + "\n"


def demangled(names: list[str]) -> list[str]:
    """Names as in the source, without namespaces, parameters and casts of template arguments."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return names
    text = subprocess.run([tool, *names], check=True, capture_output=True, text=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|wavedp::|^void |std::", "", line) for line in text.splitlines()]
    return [re.sub(r"\((?:int|bool|\w+)\)(?=-?\w)", "", line).partition("(")[0] for line in short]


def cuda_rows(library: Path, capability: int) -> list[tuple[str, ...]]:
    kernels = kernels_of(library, capability)
    names = demangled(list(kernels))
    return sorted(row(name, "", code, code.shared) for name, code in zip(names, kernels.values()))


def report() -> str:
    import triton

    parts = [INTRODUCTION.format(triton=triton.__version__, warp=32)]
    for capability in sorted(CAPABILITIES, key=lambda c: c != 90):
        cases = [case for case in CASES if case.main or capability == 90]
        parts.append(f"Triton, sm_{capability}\n\n{table(triton_rows(cases, capability))}")
    parts.append(f"{INSTRUCTIONS}\n{instruction_table(CASES, 90)}")
    spec = importlib.util.find_spec("wavedp._csrc_cuda")
    if spec is None or spec.origin is None:
        parts.append("CUDA: wavedp._csrc_cuda is not built here\n")
    else:
        for capability in sorted(CAPABILITIES, key=lambda c: c != 90):
            parts.append(f"CUDA, sm_{capability}\n\n{table(cuda_rows(Path(spec.origin), capability))}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.txt")
    out = parser.parse_args().out
    out.write_text(report())
    print(out.read_text())


if __name__ == "__main__":
    main()
