# SPDX-License-Identifier: Apache-2.0
"""Epsilon is not below what is known without an accountant, and is of the mechanism that ran.

Known are one release and compositions at sample rate 1 in closed form, and one sampled composition between two bounds
that other programs gave. Nothing here is a test of chance.
"""

import math
from typing import Any

from torch import nn

from wavedp.privacy import PoissonSampler, PrivateOptimizer
from wavedp.selftest.alarms import require, require_close
from wavedp.selftest.cases import DELTA, Recorder, specification
from wavedp.selftest.exact import gaussian_epsilon, sampled_gaussian_epsilon

GOLDEN = {"sample_rate": 0.1, "noise_multiplier": 4.0, "steps": 100}
GOLDEN_BOUNDS = (0.9823, 0.9829)
"""Of :data:`GOLDEN` at delta 1e-5: privacy-loss distributions on a grid of 1e-5, rounded down and up."""


def detect(seed: int) -> None:
    closed_forms()
    golden = specification(**GOLDEN)
    found = golden.epsilon()
    require(found >= GOLDEN_BOUNDS[0], f"epsilon {found:.6g} is below {GOLDEN_BOUNDS[0]}, which is known to be spent")
    require(found <= 1.01 * GOLDEN_BOUNDS[1], f"epsilon {found:.6g} is above {GOLDEN_BOUNDS[1]}")
    charges(found)
    calibration()
    spent_by_run()


def closed_forms() -> None:
    exact = gaussian_epsilon(math.sqrt(100) / 20.0, DELTA)
    spec = specification(noise_multiplier=20.0, sample_rate=1.0, steps=100)
    _check("100 releases", spec, exact)
    lower, upper = spec.epsilon_bounds()
    require(lower <= exact, f"the lower bound of 100 releases, {lower:.6g}, is above their exact {exact:.6g}")
    require(upper == spec.epsilon(), f"epsilon of 100 releases is {spec.epsilon():.6g} here and {upper:.6g} there")
    for multiplier, rate in ((8.0, 1.0), (4.0, 0.5)):
        exact = sampled_gaussian_epsilon(rate, multiplier, DELTA)
        _check("one release", specification(noise_multiplier=multiplier, sample_rate=rate, steps=1), exact)


def _check(what: str, spec: Any, exact: float) -> None:
    stated = spec.epsilon()
    require(stated >= exact * (1.0 - 1e-9), f"epsilon of {what} is {stated:.6g}, below its exact {exact:.6g}")
    require(stated <= exact * 1.02, f"epsilon of {what} is {stated:.6g}, above its exact {exact:.6g}")


def charges(golden: float) -> None:
    """What a run releases beside plain steps costs something, as its event says."""
    labels = specification(**GOLDEN, label_noise_multiplier=4.0)
    alone = gaussian_epsilon(1.0 / 4.0, DELTA)
    found = labels.epsilon()
    require(found > 1.05 * golden, f"a label histogram of epsilon {alone:.3g} takes {golden:.6g} to {found:.6g}")
    cut = specification(**GOLDEN, truncated_batch_size=1_010)
    require(
        cut.epsilon() > 1.05 * golden, f"batches that are often cut cost {cut.epsilon():.6g}, and whole {golden:.6g}"
    )
    strict = specification(**GOLDEN, noise_mode="strict", trainable_parameters=10_000)
    law = strict.law_epsilon()
    require(0.0 < law < 0.05, f"the law of strict noise is charged with {law:.3g}")
    require(strict.epsilon() > golden, f"strict noise costs {strict.epsilon():.6g}, and standard noise {golden:.6g}")
    half = specification(**GOLDEN).epsilon(steps=50)
    require(0.5 * golden <= half < golden, f"50 of 100 steps cost {half:.6g} of {golden:.6g}")
    require(specification(**GOLDEN).epsilon(steps=0) == 0.0, "no steps cost something")
    (phase,) = specification(**GOLDEN).phases()
    event = (phase.sample_rate, phase.noise_multiplier, phase.steps)
    require(event == tuple(GOLDEN[key] for key in ("sample_rate", "noise_multiplier", "steps")), f"charged is {event}")


def calibration() -> None:
    values = {"sample_rate": 1.0, "steps": 25}
    spec = specification(noise_multiplier=0.0, **values).calibrated(2.0)
    exact = gaussian_epsilon(5.0 / spec.noise_multiplier, DELTA)
    require(0.97 * 2.0 <= exact <= 2.0, f"noise found for epsilon 2 costs {exact:.6g}")


def spent_by_run() -> None:
    """A run reports its own steps and those before it was resumed."""
    spec = specification(sample_rate=1.0, noise_multiplier=20.0, steps=100)
    model = nn.Linear(2, 1)
    with PrivateOptimizer(model, Recorder(model.parameters()), spec) as private:
        for _ in range(3):
            private.step()
        state = private.state_dict()
    with PrivateOptimizer(model, Recorder(model.parameters()), spec) as private:
        private.load_state_dict(state)
        private.step()
        spent = private.privacy_spent()
    charged, planned = spent["epsilon_charged"], spent["epsilon"]
    assert charged is not None
    assert planned is not None
    exact = gaussian_epsilon(math.sqrt(4) / 20.0, DELTA)
    require(charged >= exact, f"4 steps of two processes are reported as epsilon {charged:.6g}, below {exact:.6g}")
    require_close(planned, gaussian_epsilon(0.5, DELTA), 0.02, "epsilon of the plan")
    sampler = PoissonSampler.for_spec(spec, 10)
    require(
        sampler.sample_rate == spec.sample_rate and sampler.steps == spec.steps and spent["steps_charged"] == 4,
        "the sampler draws another mechanism than is charged",
    )
