# SPDX-License-Identifier: Apache-2.0
"""Answers one of three questions about DP-SGD with Poisson sampling, add/remove neighbours:

  epsilon for a noise multiplier   --noise-multiplier and --steps
  noise for an epsilon             --epsilon and --steps
  steps for an epsilon             --epsilon and --noise-multiplier

Epsilon is the pessimistic PLD bound; the optimistic PLD bound and the Renyi bound are shown beside it, and a table
says how they grow with the epochs. All numbers are public constants: none may be counted from the private records.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from wavedp.cli import arguments as shared
from wavedp.errors import InvalidValueError
from wavedp.extras import import_extra
from wavedp.privacy import accounting
from wavedp.privacy.accounting import Phase

# key of a table row -> its heading, in the order of the columns
COLUMNS = {
    "epoch": "epoch",
    "steps": "steps",
    "epsilon_lower_bound": "epsilon >=",
    "epsilon": "epsilon",
    "epsilon_rdp": "RDP",
    "epsilon_prv": "PRV",
}
PLOT_FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    mechanism = parser.add_argument_group("the mechanism")
    rate = mechanism.add_mutually_exclusive_group(required=True)
    rate.add_argument(
        "--sample-rate", type=shared.bounded(float, above=0, maximum=1),
        help="probability of each record to join each batch",
    )  # fmt: skip
    rate.add_argument(
        "--expected-batch-size", type=shared.positive_float, metavar="B",
        help="expected batch of a data set of --dataset-size-bound records; gives the sample rate B / bound",
    )  # fmt: skip
    mechanism.add_argument(
        "--dataset-size-bound", type=shared.positive_int, metavar="N", help="a public upper bound on the records"
    )
    mechanism.add_argument(
        "--truncated-batch-size", type=shared.positive_int, metavar="N",
        help="larger batches are cut to this size at random (truncated Poisson); needs --dataset-size-bound",
    )  # fmt: skip
    mechanism.add_argument(
        "--label-noise", type=shared.positive_float, metavar="SIGMA",
        help="also charge one histogram of labels, one label a record, with Gaussian noise of this deviation per count",
    )  # fmt: skip
    parser.add_argument(
        "--delta", type=shared.bounded(float, above=0, below=1), required=True, help="failure probability"
    )
    two = parser.add_argument_group("the question: two of these three; the third is the answer")
    two.add_argument("--noise-multiplier", type=shared.positive_float, help="noise standard deviation / sensitivity")
    two.add_argument("--epsilon", type=shared.positive_float, help="target epsilon")
    two.add_argument("--steps", type=shared.positive_int, help="optimizer steps")
    output = parser.add_argument_group("output")
    output.add_argument("--prv", action="store_true", help="also show Opacus' PRV accountant, for comparison")
    output.add_argument(
        "--rows", type=shared.bounded(int, minimum=1, maximum=200), default=10, metavar="N",
        help="rows of the table, at most",
    )  # fmt: skip
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw epsilon over the steps (.png, .pdf or .svg)")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    answer, phase, others = solve(arguments)
    counts = table_steps(phase.steps, phase.sample_rate, arguments.rows)
    # The curve rises steeply before the first row.
    early = [round(counts[0] * part) for part in (0.02, 0.1, 0.3, 0.6)] if arguments.plot and counts else []
    points = table(phase, others, answer["delta"], sorted({max(1, count) for count in early} | set(counts)), arguments)
    answer["table"] = [row for row in points if row["steps"] in counts]
    if arguments.plot:
        draw(arguments.plot, answer, points)
        answer["plot"] = str(arguments.plot)
    print(json.dumps(answer, indent=2) if arguments.json else text(answer))


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be answered before anything is computed."""
    asked = (arguments.noise_multiplier, arguments.epsilon, arguments.steps)
    if sum(value is not None for value in asked) != 2:
        raise InvalidValueError(
            "give exactly two of --noise-multiplier, --epsilon and --steps; the third is the answer"
        )
    bound, batch = arguments.dataset_size_bound, arguments.expected_batch_size
    if bound is None and (batch is not None or arguments.truncated_batch_size is not None):
        option = "--truncated-batch-size" if batch is None else "--expected-batch-size"
        raise InvalidValueError(f"{option} needs --dataset-size-bound, a public upper bound on the number of records")
    if batch is not None and batch > bound:
        raise InvalidValueError(f"--expected-batch-size {batch:g} is larger than --dataset-size-bound {bound}")
    if bound is not None and arguments.delta * bound >= 1:
        raise InvalidValueError(
            f"--delta {arguments.delta:g} must be below 1 / --dataset-size-bound = {1 / bound:.3g}: at that, "
            "publishing one record at random would be private"
        )
    if arguments.prv:
        accounting.composed_epsilon_prv([], arguments.delta)  # raises where Opacus is missing
        if arguments.label_noise is not None or arguments.truncated_batch_size is not None:
            raise InvalidValueError("--prv knows neither --label-noise nor --truncated-batch-size: leave it out")
    if arguments.plot:
        import_extra("matplotlib.figure", "account")
        if arguments.plot.suffix.lower() not in PLOT_FORMATS:
            raise InvalidValueError(f"--plot {arguments.plot} must end in one of {', '.join(PLOT_FORMATS)}")
        if not arguments.plot.parent.is_dir():
            raise InvalidValueError(f"--plot {arguments.plot}: there is no folder {arguments.plot.parent}")


def solve(arguments: argparse.Namespace) -> tuple[dict[str, Any], Phase, list[Phase]]:
    """Return the answer, the training it is about and what else is charged."""
    bound, delta = arguments.dataset_size_bound, arguments.delta
    q = arguments.sample_rate if arguments.sample_rate is not None else arguments.expected_batch_size / bound
    noise, target, steps = arguments.noise_multiplier, arguments.epsilon, arguments.steps
    cut = {"truncated_batch_size": arguments.truncated_batch_size, "dataset_size_bound": bound}
    if arguments.truncated_batch_size is None:
        cut = {}
    others = [] if arguments.label_noise is None else [Phase(arguments.label_noise)]
    asked = {"sample_rate": q, "delta": delta, "other_phases": others, **cut}
    question = "epsilon"
    if noise is None:
        question = "noise_multiplier"
        noise = accounting.noise_multiplier_for(target_epsilon=target, steps=steps, **asked)
    if steps is None:
        question = "steps"
        steps = accounting.steps_for(target_epsilon=target, noise_multiplier=noise, **asked)
    phase = Phase(noise, q, steps, **cut)
    lower, upper = accounting.composed_epsilon_bounds([phase, *others], delta)
    if not math.isfinite(upper):
        raise InvalidValueError(f"noise multiplier {noise:g} gives no finite epsilon; raise it")
    answer: dict[str, Any] = {
        "question": question,
        "sample_rate": q,
        "delta": delta,
        "noise_multiplier": noise,
        "steps": steps,
        "epochs": steps * q,
        "epsilon": upper,
        "epsilon_lower_bound": lower,
        "epsilon_rdp": accounting.composed_epsilon_rdp([phase, *others], delta),
    }
    if arguments.prv:
        answer["epsilon_prv"] = by_prv(phase, delta)
    if target is not None:
        answer["target_epsilon"] = target
    if bound is not None:
        answer["dataset_size_bound"] = bound
    if cut:
        answer["truncated_batch_size"] = arguments.truncated_batch_size
    if others:
        answer["label_noise"] = arguments.label_noise
        answer["epsilon_of_label_histogram"] = accounting.composed_epsilon(others, delta)
    return answer, phase, others


def table_steps(steps: int, sample_rate: float, rows: int) -> list[int]:
    """Return at most ``rows`` numbers of steps, whole epochs as far as there are any, ending with ``steps``."""
    epochs = steps * sample_rate
    if epochs <= 1.5:
        counts = [round(steps * (i + 1) / min(rows, 4)) for i in range(min(rows, 4))]
    else:
        stride = max(1, math.ceil(epochs / rows))
        # A last row a little after another one says nothing new.
        whole = range(stride, math.ceil(epochs - 0.25 * stride), stride)
        counts = [*(round(epoch / sample_rate) for epoch in whole), steps]
    return sorted({count for count in counts if 0 < count <= steps})


def table(
    phase: Phase, others: list[Phase], delta: float, counts: list[int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = accounting.epsilon_table(phase, delta, counts, other_phases=others)
    for row in rows:
        row["epoch"] = row["steps"] * phase.sample_rate
        if arguments.prv:
            row["epsilon_prv"] = by_prv(replace(phase, steps=row["steps"]), delta)
    return [{name: row[name] for name in COLUMNS if name in row} for row in rows]


def by_prv(phase: Phase, delta: float) -> float | None:
    """Return epsilon by Opacus' PRV accountant, or None where that finds none."""
    try:
        return accounting.composed_epsilon_prv([phase], delta)
    except RuntimeError:
        return None


def text(answer: dict[str, Any]) -> str:
    """Return the answer for a person: the figures, then the table."""
    lines = []
    for name, value in answer.items():
        if name in ("table", "question"):
            continue
        mark = "  <- the answer" if name == answer["question"] else ""
        shown = f"{value:.6g}" if isinstance(value, float) else "none found" if value is None else str(value)
        lines.append(f"{name.replace('_', ' '):26} {shown}{mark}")
    if answer["steps"] == 0:
        return "\n".join([*lines, "", "Not even one step stays within the target."])
    columns = [name for name in COLUMNS if name in answer["table"][0]]
    lines += ["", " ".join(f"{COLUMNS[name]:>10}" for name in columns)]
    whole = all(abs(row["epoch"] - round(row["epoch"])) < 0.005 for row in answer["table"])
    shapes = [".0f" if whole else ".2f", "d", *[".4f"] * (len(columns) - 2)]
    for row in answer["table"]:
        cells = [row["epoch"], row["steps"], *(row[name] for name in columns[2:])]
        lines.append(" ".join(f"{'-' if cell is None else format(cell, to):>10}" for cell, to in zip(cells, shapes)))
    return "\n".join(lines)


def draw(path: Path, answer: dict[str, Any], points: list[dict[str, Any]]) -> None:
    """Draw epsilon over the steps: the band between the bounds, RDP, PRV where asked for, and the target."""
    if not points:
        raise InvalidValueError("--plot has nothing to draw: not even one step stays within the target")
    figure = import_extra("matplotlib.figure", "account").Figure(figsize=(7.2, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    start = answer.get("epsilon_of_label_histogram", 0.0)
    steps = [0, *(point["steps"] for point in points)]

    def curve(name: str) -> list[float]:
        return [start, *(math.nan if point[name] is None else point[name] for point in points)]

    axes.plot(steps, curve("epsilon_rdp"), color="#999999", linestyle="--", linewidth=1.4, label="Renyi (RDP)")
    if "epsilon_prv" in answer:
        axes.plot(steps, curve("epsilon_prv"), color="#d95f02", linestyle="-.", linewidth=1.4, label="PRV (Opacus)")
    axes.plot(steps, curve("epsilon"), color="#1f5fa8", linewidth=2.0, label="epsilon (PLD, upper bound)")
    axes.fill_between(
        steps, curve("epsilon_lower_bound"), curve("epsilon"),
        color="#1f5fa8", alpha=0.25, linewidth=0, label="down to the lower bound",
    )  # fmt: skip
    if "target_epsilon" in answer:
        axes.axhline(answer["target_epsilon"], color="#b2182b", linewidth=1.2, linestyle=":", label="target")
    axes.set(
        xlabel="steps",
        ylabel=f"epsilon at delta = {answer['delta']:g}",
        xlim=(0, steps[-1]),
        ylim=(0, None),
        title=f"noise multiplier {answer['noise_multiplier']:.4g}, sample rate {answer['sample_rate']:.4g}",
    )
    rate = answer["sample_rate"]
    epochs = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
    epochs.set_xlabel("epochs")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9, edgecolor="none")
    figure.savefig(path)
