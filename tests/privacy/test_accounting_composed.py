# SPDX-License-Identifier: Apache-2.0
"""Phases in one epsilon: against closed forms, other accountants, exact small mechanisms, and invariants."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from wavedp.privacy import accounting, phases, pld
from wavedp.privacy.accounting import Phase, composed_epsilon, composed_epsilon_bounds, composed_epsilon_rdp

TRAINING = Phase(1.0, 0.01, 1000)
HISTOGRAM = Phase(20.0)
CUT = Phase(1.0, 0.01, 1000, truncated_batch_size=150, dataset_size_bound=10_000)


def analytic_epsilon(mu: float, delta: float) -> float:
    """epsilon of the Gaussian mechanism with sensitivity / deviation = mu (Balle and Wang 2018)."""

    def log_delta(epsilon: float) -> float:
        above, below = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(above + np.log1p(-np.exp(below - above)))

    return float(brentq(lambda epsilon: log_delta(epsilon) - math.log(delta), 1e-3, 200.0, xtol=1e-12))


def test_one_phase_is_what_epsilon_gives() -> None:
    arguments = {"sample_rate": 0.02, "noise_multiplier": 1.0, "steps": 200, "delta": 1e-5}
    phase = Phase(1.0, 0.02, 200)
    assert composed_epsilon([phase], 1e-5) == accounting.epsilon(**arguments)
    assert composed_epsilon_bounds([phase], 1e-5) == accounting.epsilon_bounds(**arguments)
    assert composed_epsilon_rdp([phase], 1e-5) == accounting.epsilon_rdp(**arguments)
    assert accounting.composed_event([phase]) == accounting.gaussian_event(0.02, 1.0, 200)
    assert composed_epsilon([], 1e-5) == 0.0


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_unlike_gaussians_enclose_the_closed_form(delta: float) -> None:
    """Releases of all records compose to one Gaussian, mu^2 = sum of steps / sigma^2: exact, and small at the tails."""
    parts = [Phase(20.0, 1.0, 100), Phase(30.0, 1.0, 50), Phase(3.0)]
    exact = analytic_epsilon(math.sqrt(sum(part.steps / part.noise_multiplier**2 for part in parts)), delta)
    lower, upper = composed_epsilon_bounds(parts, delta)
    assert 0.99 * exact <= lower <= exact <= upper <= 1.001 * exact


@pytest.mark.parametrize(
    "parts", [[TRAINING, HISTOGRAM], [TRAINING, Phase(2.0, 0.05, 100), Phase(10.0, 1.0, 3)], [Phase(1.0), HISTOGRAM]]
)
def test_unlike_phases_agree_with_dp_accounting(parts: list[Phase]) -> None:
    from dp_accounting.pld import PLDAccountant

    theirs = PLDAccountant().compose(accounting.composed_event(parts)).get_epsilon(1e-5)
    ours = composed_epsilon(parts, 1e-5)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert ours <= composed_epsilon_rdp(parts, 1e-5)
    # Together they cost more than the dearest alone, and less than all epsilons and deltas added up.
    alone = [composed_epsilon([part], 1e-5 / len(parts)) for part in parts]
    assert max(composed_epsilon([part], 1e-5) for part in parts) < ours < sum(alone)


def test_the_transform_is_off_by_less_than_is_set_aside() -> None:
    """Against the same convolution in extended precision."""
    from scipy import fft

    question = phases.merged([Phase(1.0, 0.05, 1000), Phase(3.0, 0.3, 20), HISTOGRAM])
    interval = pld._interval_for(question, 1e-3)
    parts = [pld._Part(pld._dense(pld._single_step(p, interval, True)[0]), p.steps) for p in question]
    low, high = pld._window(parts)
    composed = pld._convolved(parts)
    length = fft.next_fast_len(max(high - low + 1, *(part.pmf.size for part in parts)), real=True)
    transforms = [fft.rfft(part.pmf._probs.astype(np.longdouble), length) ** part.steps for part in parts]
    exact = np.roll(fft.irfft(math.prod(transforms), length), -low)[: high - low + 1]
    tails = np.cumsum((composed._probs - exact)[::-1])
    assert np.abs(tails).max() < phases.uncertain_mass(1021, 3) - 2 * phases.TRUNCATED_MASS
    # And the window holds all but what was to be truncated.
    assert 1.0 - float(exact.sum()) < 2 * phases.TRUNCATED_MASS + sum(p.steps * p.pmf._infinity_mass for p in parts)


@settings(max_examples=4, deadline=None)
@given(
    sigma=st.floats(1.0, 5.0),
    rate=st.floats(0.001, 1.0),
    steps=st.integers(1, 100),
    parts=st.integers(2, 5),
    delta=st.floats(1e-8, 1e-2),
)
def test_equal_phases_are_one_with_all_their_steps(
    sigma: float, rate: float, steps: int, parts: int, delta: float
) -> None:
    one = Phase(sigma, rate, steps)
    assert composed_epsilon([one] * parts, delta) == composed_epsilon([replace(one, steps=parts * steps)], delta)
    # Nearly equal ones take the other path, and may not differ by more.
    near = composed_epsilon([one, Phase(sigma * (1 + 1e-9), rate, steps)], delta)
    assert near == pytest.approx(composed_epsilon([replace(one, steps=2 * steps)], delta), rel=1e-5, abs=1e-5)


@settings(max_examples=4, deadline=None)
@given(
    sigma=st.floats(1.0, 5.0),
    rate=st.floats(0.001, 0.7),
    steps=st.integers(1, 100),
    other=st.floats(1.0, 50.0),
    delta=st.floats(1e-8, 1e-2),
)
def test_epsilon_is_monotone_and_between_its_bounds(
    sigma: float, rate: float, steps: int, other: float, delta: float
) -> None:
    base, rest = Phase(sigma, rate, steps), Phase(other)
    upper = composed_epsilon([base, rest], delta)
    assert upper == composed_epsilon([rest, base], delta)
    assert upper <= composed_epsilon_rdp([base, rest], delta) * (1 + 1e-3)
    lower = pld.lower_epsilon(phases.merged([base, rest]), delta, 1e-3)
    assert 0.0 <= lower <= upper
    for dearer in (
        replace(base, steps=2 * steps),
        replace(base, sample_rate=1.3 * rate),
        replace(base, noise_multiplier=0.7 * sigma),
    ):
        assert composed_epsilon([dearer, rest], delta) >= upper - 1e-4


def hockey_stick(p: np.ndarray, q: np.ndarray, sigma: float, epsilon: float) -> float:
    """delta(epsilon) of two mixtures of Gaussians whose means are p's and q's indices: exact up to a fine grid."""
    x = np.linspace(-12 * sigma - len(p), 12 * sigma + len(p), 20_001)
    edges = ndtr((x[:, None] - np.arange(len(p))) / sigma)
    mass = np.diff(edges, axis=0)
    return float(np.maximum(mass @ p - math.exp(epsilon) * (mass @ q), 0.0).sum())


def sums(others: int, rate: float, size: int, joins: bool) -> np.ndarray:
    """Law of (sum + size) over truncated Poisson batches: each of ``others`` adds -1, the one that may join +1."""
    law = np.zeros(2 * size + 3)
    for drawn in range(others + 1):
        weight = binom.pmf(drawn, others, rate)
        for own in (0, 1) if joins else (0,):
            chance = weight * (1.0 if not joins else rate if own else 1 - rate)
            total = drawn + own
            kept = min(total, size)
            inside = kept / total if own else 0.0
            law[size - kept] += chance * (1 - inside)
            law[size - kept + 2] += chance * inside
    return law


@pytest.mark.parametrize(
    ("size", "bound", "rate", "sigma"),
    [(1, 3, 0.5, 2.0), (2, 6, 0.3, 0.9), (5, 10, 1.0, 2.0), (3, 4, 0.9, 1.5), (2, 30, 0.2, 3.0)],
)
def test_a_truncated_release_is_bounded_for_every_data_set_within_the_bound(
    size: int, bound: int, rate: float, sigma: float
) -> None:
    """Exactly: records that pull the other way, in a data set of any size up to the bound, one record more or less."""
    delta = 1e-3
    phase = Phase(sigma, rate, 1, size, bound)
    lower, upper = composed_epsilon_bounds([phase], delta)
    worst = 0.0
    for others in range(bound):
        without, joined = sums(others, rate, size, False), sums(others, rate, size, True)
        assert without.sum() == pytest.approx(1.0)
        assert joined.sum() == pytest.approx(1.0)
        for p, q in itertools.permutations((without, joined)):
            assert hockey_stick(p, q, sigma, upper) <= delta
            worst = max(worst, hockey_stick(p, q, sigma, lower))
    # The lower bound is one: some such data set does not have it as its epsilon.
    assert worst >= delta * (1 - 1e-3)


def test_the_truncated_exact_law_is_what_sampling_gives() -> None:
    generator = np.random.default_rng(0)
    others, rate, size, draws = 4, 0.6, 2, 20_000
    counts = np.zeros(2 * size + 3)
    for _ in range(draws):
        batch = [-1] * int(generator.binomial(others, rate)) + [1] * int(generator.random() < rate)
        generator.shuffle(batch)
        counts[size + sum(batch[:size])] += 1
    law = sums(others, rate, size, True)
    assert np.abs(counts / draws - law).max() < 6 * math.sqrt(0.25 / draws)


def test_truncation_costs_and_vanishes_with_room() -> None:
    from dp_accounting.pld import PLDAccountant

    plain = composed_epsilon([TRAINING], 1e-5)
    cut = composed_epsilon([CUT], 1e-5)
    theirs = PLDAccountant().compose(accounting.composed_event([CUT])).get_epsilon(1e-5)
    assert plain < cut == pytest.approx(theirs, rel=1e-3)
    assert cut <= composed_epsilon_rdp([CUT], 1e-5)
    # A batch as large as the data set is never cut.
    roomy = replace(CUT, truncated_batch_size=10_000)
    assert composed_epsilon([roomy], 1e-5) == plain
    assert phases.merged([roomy, TRAINING]) == (replace(TRAINING, steps=2000),)
    # Composed with itself under another name, it is the same.
    assert composed_epsilon([replace(CUT, steps=400), replace(CUT, steps=600)], 1e-5) == cut
    assert composed_epsilon([replace(CUT, noise_multiplier=0.09)], 1e-5) == math.inf


def test_a_smaller_data_set_can_be_worse_than_the_bound() -> None:
    """dp-accounting's event is for one size; what is reported here covers the worst of the smaller ones."""
    from dp_accounting.pld import PLDAccountant

    phase = Phase(2.0, 1.0, 10, truncated_batch_size=5, dataset_size_bound=1000)
    at_the_bound = PLDAccountant().compose(phase.event()).get_epsilon(1e-5)
    lower, upper = composed_epsilon_bounds([phase], 1e-5)
    assert at_the_bound < lower == pytest.approx(analytic_epsilon(math.sqrt(10) / 2, 1e-5), rel=1e-2)
    assert upper <= composed_epsilon_rdp([phase], 1e-5)


@pytest.mark.parametrize("others", [[Phase(2.3)], [Phase(1.5, 0.02, 300), HISTOGRAM]])
def test_calibration_beside_other_phases_lands_within_one_percent_below(others: list[Phase]) -> None:
    arguments = {"target_epsilon": 2.0, "sample_rate": 0.01, "delta": 1e-5, "other_phases": others}
    sigma = accounting.noise_multiplier_for(steps=1000, **arguments)
    assert 1.98 <= composed_epsilon([Phase(sigma, 0.01, 1000), *others], 1e-5) <= 2.0
    steps = accounting.steps_for(noise_multiplier=sigma, **arguments)
    assert steps >= 1000
    assert composed_epsilon([Phase(sigma, 0.01, steps), *others], 1e-5) <= 2.0
    assert composed_epsilon([Phase(sigma, 0.01, steps + 1), *others], 1e-5) > 2.0


def test_calibration_of_truncated_batches() -> None:
    cut = {"truncated_batch_size": 150, "dataset_size_bound": 10_000}
    sigma = accounting.noise_multiplier_for(target_epsilon=1.0, sample_rate=0.01, steps=500, delta=1e-5, **cut)
    reached = composed_epsilon([Phase(sigma, 0.01, 500, **cut)], 1e-5)
    assert 0.99 <= reached <= 1.0


def test_calibration_says_when_the_other_phases_leave_nothing() -> None:
    others = [Phase(2.0)]
    for invert in (
        lambda: accounting.noise_multiplier_for(
            target_epsilon=1.5, sample_rate=0.1, steps=5, delta=1e-5, other_phases=others
        ),
        lambda: accounting.steps_for(
            target_epsilon=1.5, sample_rate=0.1, noise_multiplier=1.0, delta=1e-5, other_phases=others
        ),
    ):
        with pytest.raises(ValueError, match=r"the other phases alone have epsilon 1\.99"):
            invert()


def test_the_table_holds_the_figures_of_its_steps() -> None:
    rows = accounting.epsilon_table(Phase(1.0, 0.05), 1e-5, [50, 10, 100], other_phases=[HISTOGRAM])
    assert [row["steps"] for row in rows] == [50, 10, 100]
    for row in rows:
        parts = [Phase(1.0, 0.05, row["steps"]), HISTOGRAM]
        assert row["epsilon"] == composed_epsilon(parts, 1e-5)
        assert row["epsilon_rdp"] == composed_epsilon_rdp(parts, 1e-5)
        assert 0.98 * row["epsilon"] < row["epsilon_lower_bound"] <= row["epsilon"]
    assert rows[2]["epsilon_lower_bound"] == composed_epsilon_bounds(parts, 1e-5)[0]
    assert accounting.epsilon_table(Phase(1.0, 0.05), 1e-5, []) == []


def bad_phases() -> Iterator[tuple[dict[str, object], str]]:
    yield {"noise_multiplier": -1.0}, "noise_multiplier"
    yield {"noise_multiplier": math.nan}, "noise_multiplier"
    yield {"noise_multiplier": "1"}, "noise_multiplier"
    yield {"noise_multiplier": 1.0, "sample_rate": 0.0}, "sample_rate"
    yield {"noise_multiplier": 1.0, "sample_rate": 1.5}, "sample_rate"
    yield {"noise_multiplier": 1.0, "steps": -1}, "steps"
    yield {"noise_multiplier": 1.0, "steps": 1.0}, "steps"
    yield {"noise_multiplier": 1.0, "truncated_batch_size": 5}, "come together"
    yield {"noise_multiplier": 1.0, "dataset_size_bound": 5}, "come together"
    yield {"noise_multiplier": 1.0, "truncated_batch_size": 0, "dataset_size_bound": 5}, "truncated_batch_size"
    yield {"noise_multiplier": 1.0, "truncated_batch_size": 5, "dataset_size_bound": True}, "dataset_size_bound"


@pytest.mark.parametrize(("fields", "message"), list(bad_phases()))
def test_a_phase_refuses_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Phase(**fields)  # type: ignore[arg-type]


def test_a_composition_refuses_what_it_cannot_account() -> None:
    with pytest.raises(TypeError, match="phases must be Phase objects"):
        composed_epsilon([(1.0, 0.1, 10)], 1e-5)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="too small to be accounted for 2000 steps"):
        composed_epsilon([TRAINING, replace(TRAINING, noise_multiplier=2.0)], 1e-12)
    assert composed_epsilon([Phase(0.0, 0.1, 1), HISTOGRAM], 1e-5) == math.inf
    assert composed_epsilon_bounds([Phase(0.0, 0.1, 0)], 1e-5) == (0.0, 0.0)
