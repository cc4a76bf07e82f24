# SPDX-License-Identifier: Apache-2.0
"""The table of a self-test, for a terminal and for the documentation."""

from collections.abc import Iterator

from wavedp.selftest.planting import Bug
from wavedp.selftest.run import DETECTORS, Caught, Report


def table(report: Report) -> Iterator[str]:
    """Lines for a terminal."""
    width = max((len(bug.bug) for bug in report.bugs), default=3)
    sources = max((len(bug.source) for bug in report.bugs), default=6)
    yield f"{'bug':{width}}  {'class':10}  {'source':{sources}}  {'seconds':>7}  caught by"
    for bug in report.bugs:
        yield f"{bug.bug:{width}}  {bug.kind:10}  {bug.source:{sources}}  {bug.seconds:7.2f}  {_verdict(bug)}"
    yield ""
    for one in DETECTORS:
        yield f"{one.name:11} {one.what}; false alarms at most {one.false_alarm:.1g}"
    yield ""
    for seed, finding in report.false_alarms:
        yield f"FALSE ALARM, seed {seed}: {finding.detector}: {finding.said}"
    yield summary(report)


def summary(report: Report) -> str:
    caught = sum(bug.caught for bug in report.bugs)
    clean = f"{len(report.false_alarms)} false alarms in {report.seeds} seeds of all detectors on the right code"
    return f"{caught} of {len(report.bugs)} planted bugs caught; {clean}; {report.seconds:.0f} seconds"


def markdown(report: Report) -> Iterator[str]:
    """The same as a table of a document."""
    yield "| bug | class | source | what the code does | caught by | seconds |"
    yield "|---|---|---|---|---|---|"
    for bug in report.bugs:
        what = bug.what.replace("|", "\\|")
        source = bug.source.replace("|", "\\|")
        yield f"| `{bug.bug}` | {bug.kind} | {source} | {what} | {_verdict(bug)} | {bug.seconds:.2f} |"


def listing(bugs: dict[str, Bug]) -> Iterator[str]:
    """A line for each bug that can be planted."""
    width = max(len(name) for name in bugs)
    for bug in bugs.values():
        yield f"{bug.name:{width}}  {bug.kind:10}  {bug.what} ({bug.source})"


def _verdict(bug: Caught) -> str:
    if not bug.active:
        return "NOT ACTIVE"
    if not bug.found:
        return "MISSED"
    seen = list(dict.fromkeys(finding.detector for finding in bug.found if not finding.refused))
    refused = [finding.detector for finding in bug.found if finding.refused]
    return ", ".join(seen) if seen else f"{refused[0]}, where the package refuses to go on"
