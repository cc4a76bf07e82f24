# SPDX-License-Identifier: Apache-2.0
"""Draws normals through the public functions and tests their law; exits with 1 if a test fails.

Moments, distribution function, tail, correlations within a stream and between keys, steps and offsets, and
the residues of released sums on their grid. Right noise fails a run with the chance --false-alarm. Keys are
the operating system's, so that every run is a new test. docs/noise.md says what each test sees.

  wavedp noise-law --draws 1e8                              what this machine uses: 10 to 30 s
  wavedp noise-law --draws 1e8 --instructions avx2          the C++ library on another instruction set
  wavedp noise-law --draws 1e7 --backend reference          the definition
  wavedp noise-law --draws 1e8 --mode strict                strict noise
"""

import argparse
import contextlib
import json
import sys

import torch

import wavedp
from wavedp.cli import arguments as shared
from wavedp.errors import InvalidValueError
from wavedp.privacy import noise_law


def draws(text: str) -> int:
    return int(shared.bounded(float, minimum=noise_law.LEAST_DRAWS, maximum=1e12)(text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=draws, default=100_000_000, metavar="N", help="how many normals, as 1e8")
    parser.add_argument("--backend", default="auto", help="who makes them: native, reference, triton, cuda")
    parser.add_argument("--instructions", help="of the C++ library: baseline, avx2, avx512 or amx")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="float32; strict: float64")
    parser.add_argument("--mode", choices=("standard", "strict"), default="standard", help="of the noise")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument(
        "--false-alarm",
        type=shared.bounded(float, above=0, below=1),
        default=noise_law.FALSE_ALARM,
        help="chance that right noise fails, all tests together",
    )
    parser.add_argument("--seed", type=shared.seed, help="the same numbers in every run, instead of fresh keys")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    backend = arguments.backend
    if arguments.instructions is not None and backend not in ("auto", "native"):
        raise InvalidValueError(f"--instructions are those of the backend native, not of {backend}")
    dtype = arguments.dtype or ("float64" if arguments.mode == "strict" else "float32")
    chosen = (
        wavedp.ops.use_backend(backend)
        if arguments.instructions is None
        else wavedp.ops.use_instructions(arguments.instructions)
    )
    source = noise_law.public_source(
        dtype=getattr(torch, dtype), mode=arguments.mode, device=arguments.device, seed=arguments.seed
    )
    with chosen, contextlib.closing(ProgressLine()) as progress:
        tests = noise_law.check_noise_law(
            source, arguments.draws, false_alarm=arguments.false_alarm, progress=progress.show
        )
    failed = [test for test in tests if not test.passed]
    what = {
        "draws": arguments.draws,
        "backend": backend if arguments.instructions is None else "native",
        "instructions": arguments.instructions,
        "dtype": dtype,
        "mode": arguments.mode,
        "device": arguments.device,
        "false_alarm": arguments.false_alarm,
    }
    if arguments.json:
        shown = [{**test._asdict(), "passed": test.passed} for test in tests]
        print(json.dumps({**what, "passed": not failed, "tests": shown}, indent=2))
    else:
        print(", ".join(f"{name} {value}" for name, value in what.items() if value is not None))
        for line in table(tests):
            print(line)
        print(f"{len(failed)} of {len(tests)} tests failed" if failed else f"all {len(tests)} tests passed")
    return 1 if failed else 0


def table(tests: list[noise_law.LawTest]) -> list[str]:
    """A line for each test."""
    width = max(len(test.name) for test in tests)
    lines = [f"{'':{width}} {'measured':>13} {'expected':>13} {'p-value':>10}"]
    for test in tests:
        verdict = "" if test.passed else f"   FAILED: below {test.false_alarm:.1e}"
        lines.append(f"{test.name:{width}} {test.measured:13.7g} {test.expected:13.7g} {test.p_value:10.2g}{verdict}")
    return lines


class ProgressLine:
    """One line on stderr; nothing where stderr is not a terminal."""

    def show(self, what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.show("")
