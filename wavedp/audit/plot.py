# SPDX-License-Identifier: Apache-2.0
"""The picture of an audit: scores of canaries in and out beside what is claimed of them, and the bounds."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from wavedp.audit.mechanism import CanaryScores, auditable
from wavedp.audit.plan import ClaimedScores, GuessingPlan
from wavedp.audit.report import AuditReport
from wavedp.extras import import_extra
from wavedp.privacy import PrivacySpec

_IN, _OUT, _CLAIM = "#d95f02", "#1f5fa8", "#b2182b"


def draw(path: Path, report: AuditReport, found: CanaryScores, plan: GuessingPlan, spec: PrivacySpec) -> None:
    """Draw into ``path``; its suffix decides the format."""
    size = {"figsize": (10.0, 4.2), "dpi": 130, "layout": "constrained"}
    figure = import_extra("matplotlib.figure", "account").Figure(**size)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _scores(left, found, plan, auditable(spec, report.steps))
    _bounds(right, report)
    figure.savefig(path)


def _scores(axes: Any, found: CanaryScores, plan: GuessingPlan, spec: PrivacySpec) -> None:
    scores = found.scores / (spec.noise_multiplier * math.sqrt(spec.steps))
    bins = np.linspace(scores.min(), scores.max(), 60)
    at, law = np.linspace(bins[0], bins[-1], 500), ClaimedScores(spec)
    for members, color, name in ((~found.members, _OUT, "out"), (found.members, _IN, "in")):
        count = int(members.sum())
        axes.hist(scores[members], bins, density=True, color=color, alpha=0.35, label=f"{name}: {count} canaries")
        axes.plot(at, law.density(at, member=name == "in"), color=color, linewidth=1.6, label=f"{name}, as claimed")
    axes.axvline(plan.threshold, color="#555555", linestyle=":", linewidth=1.2, label="threshold, fixed before")
    axes.set(xlabel="score, in deviations of the claimed noise", ylabel="density", title="scores of canaries")
    axes.set_ylim(0.0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, loc="upper center", framealpha=0.9, edgecolor="none", fontsize=8)


def _bounds(axes: Any, report: AuditReport) -> None:
    names = [bound.method for bound in report.bounds]
    values = [bound.epsilon for bound in report.bounds]
    color = _CLAIM if report.violation else _OUT
    bars = axes.barh(names, values, color=color, alpha=0.75, height=0.55)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], label_type="center")
    right = 1.18 * max(report.claimed, *values)
    axes.axvline(report.claimed, color=_CLAIM, linewidth=1.6)
    side = "right" if report.claimed > 0.5 * right else "left"
    claim = f"  claimed: at most {report.claimed:.3g}  "
    axes.text(report.claimed, 0.5, claim, color=_CLAIM, fontsize=9, ha=side, va="center")  # between two bars
    axes.set(
        xlabel=f"epsilon at delta = {report.delta:g}",
        xlim=(0.0, right),
        title=f"lower bounds, together {100 * report.confidence:g} %" + (": VIOLATION" if report.violation else ""),
    )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
