# SPDX-License-Identifier: Apache-2.0
"""Neighbour replay: one private step with a record and without it, everything else alike.

Cebere et al., arXiv 2602.17454. The released sums may differ by C and the rounding that is stated, and what the code
does besides may not differ at all. Sums are also compared with their definition. Nothing here is a test of chance.
"""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from wavedp.privacy import PoissonSampler, PrivateLoader, PrivateOptimizer
from wavedp.selftest.alarms import require
from wavedp.selftest.cases import EXPECTED_BATCH_SIZE, KINDS, SLACK, Case, Outcome, Recorder, Route, norm, specification

RULES: tuple[Any, ...] = (
    "per_layer",
    {"name": "per_group", "bounds": {}},
    {"name": "automatic", "gamma": 0.01},
    "normalised",
    "adaptive",
)
ROUTES = {
    "norm": Route(backward="mean"),
    "embedding": Route(backward="sum", micro_batches=2),
    "group_norm": Route(micro_batches=2),
    "twice": Route(micro_batches=2),
    "conv": Route(backward="two"),
}
HOSTILE = ("bias", "embedding", "norm", "bare")  # kinds of all forms that gradients are kept in
_TOLERANCE = {torch.float64: 1e-6, torch.float32: SLACK}
_NOT_FINITE = (math.nan, math.inf, -math.inf, 1e200)


def detect(seed: int) -> None:
    rng = random.Random(f"replay {seed}")
    for kind in KINDS:
        replay(Case(kind, rng, records=rng.choice([2, 2, 3])), ROUTES.get(kind, Route()), hostile=kind in HOSTILE)
    for rule in RULES:
        replay(Case("linear", rng, records=3, rule=rule), Route(micro_batches=rng.choice([1, 2])))
    replay(Case("norm", rng, records=3), Route(backward="mean", noise_multiplier=1.0, seed=seed))
    replay(Case("linear", rng, records=3), Route(backward="two"))
    replay(Case("linear", rng, records=1), Route(noise_multiplier=1.0, seed=seed))
    replay(Case("norm", rng, records=3, rows_per_record=3), Route())
    replay(Case("linear", rng, records=3), Route(fused=True, noise_multiplier=rng.choice([0.0, 1.0]), seed=seed))
    replay(Case(rng.choice(KINDS[2:]), rng, records=3, dtype=torch.float32), Route(), compare=False)
    aligned_in_bfloat16(rng)
    whole_runs(seed)


def replay(case: Case, route: Route, *, hostile: bool = False, compare: bool = True) -> None:
    """Release all records, all but one, and, if ``hostile``, all with that one not finite."""
    everyone = list(range(case.records))
    gone = case.rng.randrange(case.records)
    kept = [record for record in everyone if record != gone]
    title = f"{case.kind}, {case.rule_name} clipping, {route.backward} backward"
    whole, without = case.releases([everyone, kept], route)
    rounding = 0.0
    if route.noise_multiplier > 0.0:
        std = route.noise_multiplier * case.bound * (1.0 + SLACK)
        coordinates = sum(p.numel() for p in case.parameters.values())
        rounding = std * 2.0**-12 * math.sqrt(coordinates)
    tolerance = _TOLERANCE[case.dtype]
    allowed = case.bound * (1.0 + tolerance) + rounding
    _check_pair(title, whole, without, allowed)
    if case.rule_name == "adaptive":
        check_votes(case, route, everyone, kept)
    if route.noise_multiplier == 0.0 and compare:
        expected = case.expected(everyone)
        error = whole.distance(expected) / (norm(expected) + 1e-3 * case.bound)
        require(error <= 1e-5, f"{title}: clipped sums are off their definition by {error:.2g}")
    if hostile:
        rows = case.rows_of([gone])
        case.scales[rows] = case.rng.choice(_NOT_FINITE)
        (spoilt,) = case.releases([everyone], route)
        require(spoilt.finite, f"{title}: a record that is not finite makes the release so")
        _check_pair(f"{title}, a record not finite", spoilt, without, tolerance * case.bound + rounding)


def _check_pair(title: str, whole: Outcome, without: Outcome, allowed: float) -> None:
    require(whole.finite and without.finite, f"{title}: the release is not finite")
    require(
        whole.trace == without.trace,
        f"{title}: charges and steps depend on a record: {whole.trace} with it, {without.trace} without",
    )
    moved = whole.distance(without)
    require(moved <= allowed, f"{title}: one record moves the release by {moved / allowed:.4g} of what is allowed")


def check_votes(case: Case, route: Route, everyone: Sequence[int], kept: Sequence[int]) -> None:
    """A record moves adaptive clipping's bound by half a vote, with the same noise."""
    seeded = Route(micro_batches=route.micro_batches, noise_multiplier=0.5, seed=case.rng.getrandbits(30))
    case.rule = {"name": "adaptive", "count_noise_stddev": 1.0}
    bounds = [outcome.clipping_state["max_grad_norm"] for outcome in case.releases([everyone, kept], seeded)]
    votes = abs(math.log(bounds[0] / bounds[1])) * EXPECTED_BATCH_SIZE / 0.2
    require(votes <= 0.5 + 2.0**-10, f"a record moves the adaptive bound by {votes:.3g} votes, not half of one")


def aligned_in_bfloat16(rng: random.Random) -> None:
    """Many records of one gradient, where a sum in few digits jumps."""
    case = Case("linear", rng, records=1, dtype=torch.bfloat16)
    case.records = 300
    case.x, case.ids, case.scales = (part[:1].expand(300, *part.shape[1:]) for part in (case.x, case.ids, case.scales))
    case.bound = case.bound / 4
    sums = []
    with PrivateOptimizer(
        case.model, Recorder(case.parameters.values()), case.spec(0.0), without_privacy=True
    ) as private:
        for records in map(torch.arange, range(300, 295, -1)):
            private.backward(case.losses(records), records=records)
            # What is released is rounded to bfloat16 for such parameters: look at the sums before.
            sums.append([total.double() for total in private._sums.values()])
            private.discard()
    moved = max(norm([a - b for a, b in zip(*pair)]) for pair in pairwise(sums)) / case.bound
    require(moved <= 1.0 + SLACK, f"one of 300 bfloat16 records moves their sum by {moved:.4g} C")


def whole_runs(seed: int) -> None:
    """Runs by sampler and loader, on a data set and on it without its last record; most batches are empty."""
    spec = specification(sample_rate=0.2, steps=10, noise_multiplier=0.0)
    releases = [_run(spec, records, seed) for records in (3, 2)]
    for number, (one, other) in enumerate(zip(*releases)):
        moved = norm([a - b for a, b in zip(one, other)]) * EXPECTED_BATCH_SIZE
        require(moved <= 1.0 + SLACK, f"step {number}: one record more in the data set moves the sum by {moved:.4g} C")
        for release in (one, other):
            size = norm(release) * EXPECTED_BATCH_SIZE
            require(
                min(abs(size - count) for count in range(4)) <= 2 * SLACK,
                f"step {number}: records of norm C each give a sum of norm {size:.4g} C",
            )


def _run(spec: Any, records: int, seed: int) -> list[list[torch.Tensor]]:
    model = torch.nn.Linear(2, 1, bias=False)
    data = torch.utils.data.TensorDataset(torch.ones(3, 2)[:records])
    optimizer = Recorder(model.parameters())
    sampler = PoissonSampler.for_spec(spec, records, insecure_seed=seed)
    with PrivateOptimizer(
        model, optimizer, spec, sampler=sampler, without_privacy=True, loss_reduction="mean"
    ) as private:
        loader = PrivateLoader(torch.utils.data.DataLoader(data, batch_size=2), private)
        for _ in range(spec.steps):  # epochs: as many as are needed, at most
            for (x,) in loader:
                (100.0 * model(x)).mean().backward()
                private.step()
        require(
            len(optimizer.seen) == private.steps_charged == spec.steps,
            f"a run of {spec.steps} steps on {records} records stepped {len(optimizer.seen)} times and charged "
            f"{private.steps_charged}",
        )
    return optimizer.seen
