# SPDX-License-Identifier: Apache-2.0
"""Draws each results file as bars in a PNG beside it: ``python benchmarks/plot.py FILE.csv ...``."""

from __future__ import annotations

import sys
from pathlib import Path

from table import distinct, read


def draw(path: Path) -> Path:
    """Bars of each provider's rate relative to a copy of the same bytes, a panel for each input."""
    import matplotlib.pyplot as plt

    rows = read([path])
    inputs = distinct(rows, "shape", "dtype")
    providers = [provider for (provider,) in distinct(rows, "provider") if provider != "copy_"]
    width = 0.8 / len(providers)
    size = (9, 3 * len(inputs))
    figure, panels = plt.subplots(len(inputs), 1, figsize=size, squeeze=False, layout="constrained")
    for panel, (shape, dtype) in zip(panels[:, 0], inputs):
        here = [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)]
        cases = [case for (case,) in distinct(here, "case")]
        for i, provider in enumerate(providers):
            mine = [row for row in here if row["provider"] == provider]
            at = [cases.index(row["case"]) + (i - (len(providers) - 1) / 2) * width for row in mine]
            panel.bar(at, [float(row["copy_ratio"]) for row in mine], width, label=provider)
        panel.axhline(1, color="black", linewidth=1)
        panel.set(title=f"{shape} {dtype}", ylabel="rate / copy_", yscale="log", xticks=range(len(cases)))
        panel.set_xticklabels(cases)
    panels[0, 0].legend(ncols=len(providers))
    figure.suptitle(rows[0]["device"])
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} CSV ...")
    for name in sys.argv[1:]:
        print(draw(Path(name)))
