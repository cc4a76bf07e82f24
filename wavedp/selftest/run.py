# SPDX-License-Identifier: Apache-2.0
"""Every detector on the right code, and on each planted bug until one raises an alarm."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from wavedp.errors import InvalidValueError
from wavedp.selftest import (
    bugs_accounting,
    bugs_clipping,
    bugs_ledger,
    bugs_noise,
    bugs_norms,
    bugs_sampling,
    detect_accounting,
    detect_canary,
    detect_ledger,
    detect_noise,
    detect_refusals,
    detect_replay,
    detect_sampling,
    detect_uniqueness,
)
from wavedp.selftest.alarms import LEVEL, Alarm
from wavedp.selftest.planting import Bug


class Detector(NamedTuple):
    """``detect(seed)`` raises an :class:`~wavedp.selftest.alarms.Alarm`; it knows nothing of what is planted."""

    name: str
    what: str
    tests: int
    """Tests of chance in one run: it alarms on right code with at most that many times 1e-8."""
    detect: Callable[[int], None]

    @property
    def false_alarm(self) -> float:
        return self.tests * LEVEL


DETECTORS = (
    Detector("sampling", "batches follow the binomial law, word for word", 10, detect_sampling.detect),
    Detector("canary", "a z-test on gradients of their own directions", 1, detect_canary.detect),
    Detector("ledger", "charges are on disk before releases, and stay", 0, detect_ledger.detect),
    Detector("refusals", "misuse raises", 0, detect_refusals.detect),
    Detector("noise law", "moments, distribution, tail, grid, radii of the noise", 40, detect_noise.detect),
    Detector("uniqueness", "nothing correlates between any two uses of noise", 3, detect_uniqueness.detect),
    Detector("replay", "a record moves sums by C and nothing else", 0, detect_replay.detect),
    Detector("accounting", "epsilon is not below what is known otherwise", 0, detect_accounting.detect),
)

BUGS: dict[str, Bug] = {
    bug.name: bug
    for module in (bugs_clipping, bugs_norms, bugs_noise, bugs_sampling, bugs_ledger, bugs_accounting)
    for bug in module.registry.bugs
}

FIRST_SEED_OF_BUGS = 10_000

# What the package raises where it refuses to go on. Anything else would be a defect of a detector or of a bug.
_REFUSALS = (RuntimeError, ValueError, OSError)


class Finding(NamedTuple):
    """What one detector said."""

    detector: str
    said: str
    refused: bool
    """The package itself refused to go on, in correct use."""


@dataclass(frozen=True)
class Caught:
    """One bug: what said so, and what that took."""

    bug: str
    kind: str
    source: str
    what: str
    active: bool
    """Whether the planted code ran."""
    found: tuple[Finding, ...]
    seconds: float
    """Of this process's CPU time."""

    @property
    def caught(self) -> bool:
        return self.active and bool(self.found)


@dataclass(frozen=True)
class Report:
    """What a self-test found."""

    bugs: tuple[Caught, ...]
    seeds: int
    false_alarms: tuple[tuple[int, Finding], ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every bug was caught and the right code raised no alarm."""
        return all(bug.caught for bug in self.bugs) and not self.false_alarms

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        bugs = [
            {**asdict(bug), "caught": bug.caught, "found": [finding._asdict() for finding in bug.found]}
            for bug in self.bugs
        ]
        alarms = [{"seed": seed, **finding._asdict()} for seed, finding in self.false_alarms]
        detectors = [{"name": one.name, "what": one.what, "false_alarm": one.false_alarm} for one in DETECTORS]
        return {
            "passed": self.passed,
            "bugs": bugs,
            "seeds": self.seeds,
            "false_alarms": alarms,
            "detectors": detectors,
            "seconds": self.seconds,
        }


def run_selftest(
    *,
    seeds: int = 60,
    bugs: Iterable[str] | None = None,
    every_detector: bool = False,
    processes: int = 1,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Run all detectors on the right code, and on each bug.

    Bugs are planted by replacing functions of the package for a moment: with ``processes`` of 1 in this process, so do
    not use the package from other threads meanwhile.

    Args:
        seeds: how many times the right code is looked at, with other models, batches and keys each time.
        bugs: names in :data:`BUGS`; all if ``None``.
        every_detector: go on after the first detector that catches a bug.
        processes: how many to work with; above 1, they are new ones.
        progress: called with a line that says what was done.

    Raises:
        ValueError: a bug that is not known.
    """
    names = list(BUGS) if bugs is None else list(bugs)
    unknown = [name for name in names if name not in BUGS]
    if unknown:
        raise InvalidValueError(f"there is no planted bug {unknown[0]!r}; wavedp selftest --list shows them")
    began = time.perf_counter()
    found: dict[str, Caught] = {}
    alarms: list[tuple[int, Finding]] = []
    with _workers(processes) as each:
        for seed, findings in each(_clean, range(seeds)):
            alarms += [(seed, finding) for finding in findings]
            progress(f"right code, seed {seed + 1} of {seeds}")
        for name, result in each(_bug_of(every_detector), names):
            found[name] = result
            progress(f"{len(found)} of {len(names)} bugs: {name}")
    ordered = tuple(found[name] for name in names)
    return Report(ordered, seeds, tuple(alarms), time.perf_counter() - began)


def look_at_right_code(seed: int) -> list[Finding]:
    """Run every detector on the code as it is."""
    return [finding for one in DETECTORS if (finding := _said(one, seed)) is not None]


def look_at_bug(name: str, *, every_detector: bool = False) -> Caught:
    """Plant one bug, run detectors until one raises an alarm, and take it out again."""
    bug = BUGS[name]
    seed = FIRST_SEED_OF_BUGS + list(BUGS).index(name)
    found: list[Finding] = []
    began = time.process_time()
    with bug.planted() as planted:
        for one in DETECTORS:
            finding = _said(one, seed)
            if finding is not None:
                found.append(finding)
                if not finding.refused and not every_detector:
                    break
    # A refusal is the weaker evidence where another detector saw the harm itself.
    found.sort(key=lambda finding: finding.refused)
    seconds = time.process_time() - began
    return Caught(name, bug.kind, bug.source, bug.what, planted.runs > 0, tuple(found), seconds)


def _said(detector: Detector, seed: int) -> Finding | None:
    try:
        detector.detect(seed)
    except Alarm as alarm:
        return Finding(detector.name, str(alarm), refused=False)
    except _REFUSALS as error:
        return Finding(detector.name, f"correct use raised {type(error).__name__}: {error}", refused=True)
    return None


def _clean(seed: int) -> tuple[int, list[Finding]]:
    return seed, look_at_right_code(seed)


def _planted(name: str) -> tuple[str, Caught]:
    return name, look_at_bug(name)


def _planted_for_all(name: str) -> tuple[str, Caught]:
    return name, look_at_bug(name, every_detector=True)


def _bug_of(every_detector: bool) -> Callable[[str], tuple[str, Caught]]:
    return _planted_for_all if every_detector else _planted


@contextlib.contextmanager
def _workers(processes: int) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]]:
    if processes == 1:
        threads, logger = torch.get_num_threads(), logging.getLogger("wavedp.privacy")
        level = logger.level
        generator = torch.get_rng_state()
        try:
            _prepare()
            yield lambda work, items: map(work, items)
        finally:
            torch.set_num_threads(threads)
            logger.setLevel(level)
            torch.set_rng_state(generator)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        yield lambda work, items: pool.map(work, items)


def _prepare() -> None:
    """One thread, as the tensors are small; and no warning about layers that are run record by record."""
    torch.set_num_threads(1)
    logging.getLogger("wavedp.privacy").setLevel(logging.ERROR)
