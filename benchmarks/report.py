# SPDX-License-Identifier: Apache-2.0
"""Results as text: a block for each case and input, with a bar for the fraction of the floor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

BAR = 16  # cells up to the floor; twice as many are drawn
HEADINGS = {
    "copy_": "into existing tensors; the floor is copy_ of as many bytes",
    "clone": "fresh results; the floor is clone() of as many bytes",
    "sum": "less comes out than goes in; the floor is sum() of as many bytes as the input has",
    "torch.mul": "one small image x; the floor is torch.mul(x, x)",
    "mm": "fresh results; the floor is the product alone",
    "Tensor.normal_": "normals into an existing tensor; the floor is Tensor.normal_",
    "AdamW, no noise": "steps from clipped sums; the floor is torch's fused step without noise",
    "SGD, no noise": "steps from clipped sums; the floor is torch's fused step without noise",
    "wavedp": "sampling; the floor is this package, not compiled",
    "non-private": "training steps; the floor is the step without clipping and noise",
}
Row = Mapping[str, str]


def block(rows: Sequence[Row], stream: TextIO) -> Iterator[str]:
    """The lines for one case and input: each floor, then those that are compared with it."""
    if not rows:
        return
    own = any(row.get("passes") for row in rows)  # each moves bytes of its own
    last = rows[-1]  # a provider, whose bytes are the operation's; those of a floor may be fewer
    moved = f", {human_bytes(int(last['bytes']))} to move" if last["bytes"] and not own else ""
    booked = f", {human_bytes(int(last['booked_bytes']))} of output gradients" if last.get("booked_bytes") else ""
    yield f"\n{last['case']}   {last['shape']} {last['dtype']}{moved}{booked}"
    for floor in dict.fromkeys(row["floor"] for row in rows):
        here = [row for row in rows if row["floor"] == floor]
        heading, cost = ("passes      moved", passes_and_bytes) if own else COSTS.get(floor, ("GB/s", rate))
        width = max(9, len(heading))
        yield f"  {HEADINGS[floor]}"
        yield (
            f"    {'':<26} {'median':>9} {'20%':>9} {'80%':>9} {heading:>{width}} {'x floor':>8}  fraction of the floor"
        )
        least = next(row for row in here if row["provider"] == floor)
        for row in here:
            ratio = float(row["floor_ratio"])
            times = " ".join(f"{human_time(row[column]):>9}" for column in ("median_ms", "q20_ms", "q80_ms"))
            shown = f"{cost(row, least):>{width}} {short(ratio):>7}x"
            yield f"    {row['provider']:<26} {times} {shown}  {bar(ratio, stream)}"


def short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def rate(row: Row, floor: Row) -> str:
    return f"{float(row['gb_per_s']):.1f}"


def over_floor(row: Row, floor: Row) -> str:
    return f"{(float(row['median_ms']) - float(floor['median_ms'])) * 1e3:.1f} us"


def images_per_second(row: Row, floor: Row) -> str:
    return f"{int(row['shape']) / float(row['median_ms']) * 1e3:.4g}"


def times_as_long_and_memory(row: Row, floor: Row) -> str:
    peak = human_bytes(int(row["peak_bytes"])) if row["peak_bytes"] else "-"
    return f"{1 / float(row['floor_ratio']):.2f} {peak:>10}"


def passes_and_bytes(row: Row, floor: Row) -> str:
    moved = human_bytes(int(row["bytes"])) if row["bytes"] else "-"
    return f"{row['passes'] or '-':>6} {moved:>10}"


# floor: what stands beside the times, its heading and its value
COSTS: dict[str, tuple[str, Callable[[Row, Row], str]]] = {
    "wavedp": ("images/s", images_per_second),
    "torch.mul": ("over torch.mul", over_floor),
    "non-private": ("times as long  peak memory", times_as_long_and_memory),
}


def bar(ratio: float, stream: TextIO) -> str:
    """``ratio`` of the floor's speed, with a mark at the floor; cut off at twice the floor."""
    full, mark = ("█", "│") if (stream.encoding or "").lower().startswith("utf") else ("#", "|")
    cells = min(round(ratio * BAR), 2 * BAR)
    return (full * min(cells, BAR)).ljust(BAR) + mark + full * max(0, cells - BAR)


def human_time(milliseconds: str) -> str:
    value = float(milliseconds)
    return f"{value * 1e3:.1f} us" if value < 1 else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def human_bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


class Progress:
    """One line on stderr that says what is being done; nothing where stderr is not a terminal."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.shown = sys.stderr.isatty()

    def __call__(self, what: str, *, keep: bool = False) -> None:
        if keep:
            self.close()
            print(f"{self.prefix}: {what}", file=sys.stderr, flush=True)
        elif self.shown:
            sys.stderr.write(f"\r\033[K{self.prefix}: {what}")
            sys.stderr.flush()

    def close(self) -> None:
        if self.shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
