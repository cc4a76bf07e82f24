# SPDX-License-Identifier: Apache-2.0
"""The Renyi bound on epsilon, by dp-accounting: independent of the loss distributions, and their cross-check."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

from wavedp.privacy.phases import Phase


@functools.lru_cache(maxsize=1024)
def rdp_epsilon(phases: tuple[Phase, ...], delta: float) -> float:
    """Return the Renyi upper bound on epsilon of merged ``phases``, at dp-accounting's default orders."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    if not phases:
        return 0.0
    if any(phase.too_little_noise() for phase in phases):
        return math.inf
    with _quiet_accountant():
        orders, divergences = zip(*map(_divergences, phases))
        return float(compute_epsilon(orders[0], sum(divergences), delta)[0])


def _divergences(phase: Phase) -> tuple[Any, Any]:
    """Return orders and the phase's Renyi divergences."""
    import numpy as np

    orders, once = _subsampled_gaussian(phase.sample_rate, phase.noise_multiplier)
    cut = phase.cut_probability()
    if cut > 0.0:
        # Moments of a mixture whose component is known: exp((a-1) R) = (1-t) exp((a-1) R1) + t exp((a-1) R2).
        _, filled = _subsampled_gaussian(phase.sample_rate, 0.5 * phase.noise_multiplier)
        spared = math.log1p(-cut) if cut < 1.0 else -math.inf
        once = np.logaddexp(spared + (orders - 1) * once, math.log(cut) + (orders - 1) * filled) / (orders - 1)
    return orders, phase.steps * once


@functools.lru_cache(maxsize=64)
def _subsampled_gaussian(sample_rate: float, noise_multiplier: float) -> tuple[Any, Any]:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant().compose(Phase(noise_multiplier, sample_rate).event())
    return accountant.orders, accountant.rdp


@contextlib.contextmanager
def _quiet_accountant() -> Iterator[None]:
    """Silence the lines on Renyi orders that dp-accounting leaves out, which only loosens the bound."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
