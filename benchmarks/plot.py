# SPDX-License-Identifier: Apache-2.0
"""Draws each results file as a PNG beside it: ``python benchmarks/plot.py benchmarks/results/*.csv``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wavedp.benchmarks.table import Row, distinct, read

# provider -> colour and marker; rivals not named here share the last
LOOKS = {
    "wavedp, out=": ("#b2182b", "D"),
    "wavedp": ("#ef8a62", "o"),
    "wavedp triton, out=": ("#762a83", "<"),
    "wavedp cuda, out=": ("#d6007a", ">"),
    "wavedp triton": ("#af8dc3", "<"),
    "wavedp cuda": ("#f7a6d0", ">"),
    "torch.compile": ("#2166ac", "s"),
    "avg_pool2d, torch.compile": ("#1b7837", "s"),
    "avg_pool2d": ("#7fbf7b", "s"),
    "F.conv2d": ("#67a9cf", "v"),
    "eager": ("#888888", "x"),
    "ptwt": ("#8c510a", "^"),
    "pytorch_wavelets": ("#d8b365", "P"),
    "PyWavelets": ("#01665e", "*"),
    "Opacus hooks": ("#8c510a", "^"),
    "Opacus ew": ("#d8b365", "P"),
    "Opacus ghost": ("#01665e", "*"),
    "torch.func": ("#67a9cf", "v"),
    "fastDP MixOpt": ("#888888", "x"),
    "bmm, T x T Gram": ("#2166ac", "s"),
    "bmm, T x T mask": ("#2166ac", "s"),
    "einsum, B x P gradients": ("#8c510a", "^"),
    "index_add, B x P gradients": ("#8c510a", "^"),
    "one-hot": ("#d8b365", "P"),
    "scale, then mm": ("#67a9cf", "v"),
    "wavedp, std=0": ("#f7a6d0", "o"),
    "wavedp, strict": ("#762a83", "<"),
    "wavedp, with an average": ("#d6007a", ">"),
    "plain torch": ("#2166ac", "s"),
    "torch.randn, out=": ("#67a9cf", "v"),
    "torch.compile of randn": ("#2166ac", "s"),
    "NumPy": ("#d8b365", "P"),
    "Opacus": ("#8c510a", "^"),
    "Opacus, fused": ("#01665e", "*"),
    "Opacus secure mode": ("#8c510a", "^"),
    "wavedp, torch.compile": ("#2166ac", "s"),
    "wavedp, bfloat16": ("#f7a6d0", "o"),
    "no cache": ("#888888", "x"),
    "transformers GPT-2": ("#8c510a", "^"),
}
OTHER = ("#5ab4ac", "*")
FLOORS = {
    "copy_": "copy_ for out=",
    "clone": "clone() for fresh results",
    "sum": "sum() of the input where less comes out",
    "torch.mul": "torch.mul(x, x) for the small image",
    "mm": "the product alone",
    "non-private": "the step without privacy",
    "Tensor.normal_": "Tensor.normal_",
    "AdamW, no noise": "torch's fused AdamW without noise",
    "SGD, no noise": "torch's fused SGD without noise",
    "wavedp": "this package's sampling, not compiled",
}


def draw(path: Path) -> Path:
    """A panel for each input, a line for each case, a mark for each provider: its rate relative to its floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read([path])
    found = panels(rows, path.name.partition("-")[0])
    counts = [len(distinct(here, "line")) for here in found.values()]
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(10, sum(0.34 * count + 1.0 for count in counts) + 1.2),
        height_ratios=[count + 1 for count in counts],
        squeeze=False,
        sharex=not any(row.get("booked_bytes") for row in rows),  # training steps and functions are apart
        layout="constrained",
    )
    for panel, (title, here) in zip(axes[:, 0], found.items()):
        draw_panel(panel, here)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    floors = ", ".join(FLOORS[floor] for (floor,) in distinct(rows, "floor"))
    label = f"rate relative to the floor: {floors} (log scale; whiskers: 20% to 80% of the samples)"
    axes[-1, 0].set_xlabel("\n".join(textwrap.wrap(label, 90)))
    named: dict[str, Any] = {}
    for panel in axes[:, 0]:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles))
    order = sorted(named, key=lambda name: list(LOOKS).index(name) if name in LOOKS else len(LOOKS))
    figure.legend([named[name] for name in order], order, loc="outside lower center", ncols=4, frameon=False)
    first = rows[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    figure.suptitle(f"{first['device']}{threads}, torch {first['torch']}, {first['date']}", fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def panels(rows: Sequence[Row], suite: str) -> dict[str, list[Row]]:
    """What is drawn together, by title, each row with the name of its ``line``.

    Images share a panel, whose lines are the cases. Training steps, whose inputs are each model's own, share one too,
    and so do the functions of private training.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        size = f"{row['shape']} {row['dtype']}"
        kind = "training steps" if row["floor"] == "non-private" else "functions"
        title, line = (kind, f"{row['case']} {size}") if suite == "dp" else (size, row["case"])
        found.setdefault(title, []).append({**row, "line": line})
    return found


def draw_panel(panel: Any, rows: Sequence[Row]) -> None:
    """Marks at the median, with whiskers from the 20% to the 80% quantile; the floor is the line at 1."""
    from matplotlib.ticker import LogLocator, NullLocator

    cases = [line for (line,) in distinct(rows, "line")]
    providers = [name for (name,) in distinct(rows, "provider") if name not in {row["floor"] for row in rows}]
    for name in providers:
        if name.startswith(("copy_", "mm of")):
            continue
        mine = [row for row in rows if row["provider"] == name]
        colour, marker = LOOKS.get(name, OTHER)
        rates = [float(row["floor_ratio"]) for row in mine]
        medians, lows, highs = ([float(row[key]) for row in mine] for key in ("median_ms", "q20_ms", "q80_ms"))
        whiskers = [
            [rate * (1 - min(1.0, median / high)) for rate, median, high in zip(rates, medians, highs)],
            [rate * (max(1.0, median / low) - 1) for rate, median, low in zip(rates, medians, lows)],
        ]
        panel.errorbar(
            rates,
            [cases.index(row["line"]) for row in mine],
            xerr=whiskers,
            linestyle="",
            marker=marker,
            markersize=8 if name.startswith("wavedp") else 6,
            color=colour,
            elinewidth=1,
            label=name,
            zorder=4 if name.startswith("wavedp") else 3,
        )
    panel.axvline(1, color="black", linewidth=1.2, zorder=2)
    panel.annotate("floor", (1, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
    panel.set(xscale="log", yticks=range(len(cases)), yticklabels=cases, ylim=(len(cases) - 0.5, -0.5))
    low, high = panel.get_xlim()
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    panel.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="x", labelbottom=True)
    panel.grid(axis="x", which="both", color="#e4e4e4", linewidth=0.6)
    panel.grid(axis="y", color="#f0f0f0", linewidth=0.6)
    panel.set_axisbelow(True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} CSV ...")
    for name in sys.argv[1:]:
        print(draw(Path(name)))
