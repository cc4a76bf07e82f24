# SPDX-License-Identifier: Apache-2.0
"""Writes docs/sharp_edges.md from the cases: ``python tests/hostile/sharp_edges.py``; a test compares the two."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from workbench import Case, read_cases

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "sharp_edges.md"
USES = ROOT / "tests" / "odd_use" / "uses.tsv"
LONGEST = 150  # of a call, characters

HEAD = """# Sharp edges

What can be got wrong, and what happens then: {count} cases, each a test. The table is written by
`python tests/hostile/sharp_edges.py` from `tests/hostile/cases`, and a test holds the page to them.

## What holds everywhere

- **One family of errors.** Whatever this package refuses, it refuses with a `wavedp.WavedpError`. Each member is also
  the builtin it stands for, so that `except ValueError` goes on working:

  | error | also | when |
  |---|---|---|
  | `InvalidValueError` | `ValueError` | an argument out of range, or a shape, dtype or combination without a meaning |
  | `BadFileError` | `ValueError` | a damaged or hostile file (`IdxError`, `BadImageError`: its kinds for data) |
  | `InvalidTypeError` | `TypeError` | an argument of a wrong type |
  | `StateError` | `RuntimeError` | right in itself, at the wrong time: a spent key, a missing backend |
  | `MissingFileError`, `NotAFolderError` | `OSError` | a file that is not there; a file where a folder is needed |
  | `MissingPackageError` | `ImportError` | an optional package; the message has the command that installs it |

  `LedgerError` is a `StateError`. What the operating system refuses (no permission, disk full) stays its `OSError`.
- **Nothing is half done.** Arguments are checked before data is read, a step is charged or a file is written.
- **The command** prints one line, without control characters, and exits with 2; with 1 for an error that nobody
  foresaw. `--traceback` raises instead.
- **Files from elsewhere.** Pictures are judged by their header before a pixel is decoded: at most 2^26 pixels, 2^15 a
  side, 64 MiB a file. Weights are safetensors alone, judged by their header before anything is allocated: at most
  16 MiB and 100,000 tensors, plain names that come once, ranges that are the tensors' sizes and cover the file without
  gap or overlap; their SHA-256 stands in `config.json`, whose sizes are compared with the header before a model is
  made. Nothing is ever unpickled. Archives are read in place and never unpacked; links that lead out of an image folder
  are refused.
- **Mutated files** (`tests/hostile/test_mutations.py`, fixed seeds): 5,000 pictures, 20,000 safetensors headers and
  2,000 saved models load or raise `BadFileError` or another of the family, and nothing else.

## What is not caught

- A value that is wrong and possible: a `delta` that is too large for the data, an `expected_batch_size` counted from
  the private records, losses that depend on other records (`check_records_independent` looks for these).
- NaN and infinity in images and gradients of a loop of your own: `clip_and_sum` gives such a record the weight 0, and
  the transforms pass them on.
- More memory than there is, for sizes that are right: that is torch's own error.

`…` in a message stands for what depends on the machine. The calls use the names of `tests/hostile/workbench.py`.
"""


ODD_USE = """
## Odd use of private training

Each raises an error of the family, or is exact: the step is the clipped sum of a loop over the records in float64, and
one record contributes at most C. Tests are in `tests/`.

| use | what happens | test |
|---|---|---|
"""


def read_uses() -> list[dict[str, str]]:
    """What can be done oddly in a training loop: ``use``, ``what happens``, and ``test``, a file and a name in it."""
    with USES.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def page(cases: Sequence[Case]) -> str:
    """The whole page."""
    parts = [HEAD.format(count=len(cases))]
    for area, members in groupby(cases, key=lambda case: case.area):
        first = "command (`wavedp …`)" if area == "command line" else "call"
        answer = "exit status" if area == "command line" else "error"
        lines = [f"\n## {area.capitalize()}\n", f"| case | {first} | {answer} | message |", "|---|---|---|---|"]
        lines += [f"| {_cell(c.name)} | {_code(c.call)} | `{c.error}` | {_cell(c.message)} |" for c in members]
        parts.append("\n".join(lines) + "\n")
    uses = [f"| {_cell(u['use'])} | {_cell(u['what happens'])} | `{u['test']}` |\n" for u in read_uses()]
    return "".join([*parts, ODD_USE, *uses])


def _cell(text: str) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    for character in "\\|<>*_[]`":
        text = text.replace(character, "\\" + character)
    return text


def _code(text: str) -> str:
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else ""


if __name__ == "__main__":
    PAGE.write_text(page(read_cases()), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
