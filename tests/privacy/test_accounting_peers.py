# SPDX-License-Identifier: Apache-2.0
"""Known figures of other accountants, each under its name, and what explains where they differ."""

import math
import sys

import numpy as np
import pytest
from scipy.special import logsumexp

from wavedp.privacy import accounting, pld
from wavedp.privacy.accounting import Phase

REFERENCE = {"sample_rate": 0.01, "noise_multiplier": 1.0, "steps": 1000, "delta": 1e-5}
SECOND = {"sample_rate": 0.04, "noise_multiplier": 1.5, "steps": 2250, "delta": 1e-5}


def exact_divergence(q: float, sigma: float, order: float) -> float:
    """Renyi divergence of one subsampled Gaussian step, by quadrature of its definition (Mironov et al. 2019)."""
    x = np.linspace(-30 * sigma, 30 * sigma + order, 400_001)
    density = -0.5 * (x / sigma) ** 2 - 0.5 * math.log(2 * math.pi * sigma**2)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    return float(logsumexp(density + order * log_ratio) + math.log(x[1] - x[0])) / (order - 1)


def test_prv_of_the_reference_point() -> None:
    pytest.importorskip("opacus")
    coarse = accounting.epsilon_prv(**REFERENCE)
    fine = accounting.epsilon_prv(**REFERENCE, eps_error=0.001)
    assert coarse == pytest.approx(1.83837, abs=1e-5)
    assert fine == pytest.approx(1.82937, abs=1e-5)
    # Its upper end lies above the PLD by a little more than its own error.
    upper = accounting.epsilon(**REFERENCE)
    assert upper + 0.01 < coarse < upper + 0.011
    assert upper + 0.001 < fine < upper + 0.002


def test_the_second_point_by_prv() -> None:
    """6.7774 is Opacus' own test figure: its ``90 // 0.04`` steps are 2,249, not 2,250."""
    pytest.importorskip("opacus")
    assert 90 // 0.04 == 2249
    assert accounting.epsilon_prv(**{**SECOND, "steps": 2249}) == pytest.approx(6.7774, abs=1e-4)
    assert accounting.epsilon_prv(**SECOND) == pytest.approx(6.7791, abs=1e-4)
    assert accounting.epsilon(**SECOND) == pytest.approx(6.7688, abs=1e-4)


def test_the_second_point_by_rdp() -> None:
    """7.3291 is exact at order 3.9 and Opacus'; dp-accounting bounds fractional orders and has 7.3293 at the same."""
    order = 3.9
    exact = SECOND["steps"] * exact_divergence(0.04, 1.5, order)
    converted = exact + math.log1p(-1 / order) - math.log(1e-5 * order) / (order - 1)
    assert converted == pytest.approx(7.3291, abs=5e-5)
    assert accounting.epsilon_rdp(**SECOND) == pytest.approx(7.3293, abs=5e-5)
    assert accounting.epsilon_rdp(**SECOND) > converted
    opacus = pytest.importorskip("opacus.accountants")
    theirs = opacus.RDPAccountant()
    theirs.history = [(1.5, 0.04, 2250)]
    assert theirs.get_privacy_spent(delta=1e-5) == pytest.approx((converted, order), abs=1e-8)


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
def test_the_central_limit_accountant_understates() -> None:
    """Below a proven lower bound: why it is not offered."""
    opacus = pytest.importorskip("opacus.accountants")
    theirs = opacus.GaussianAccountant()
    theirs.history = [(1.0, 0.01, 1000)]
    lower = pld.lower_epsilon((Phase(1.0, 0.01, 1000),), 1e-5, 1e-4)
    assert theirs.get_epsilon(delta=1e-5) == pytest.approx(1.6177, abs=1e-4)
    assert theirs.get_epsilon(delta=1e-5) < lower


def test_prv_of_unlike_phases() -> None:
    pytest.importorskip("opacus")
    parts = [Phase(1.0, 0.01, 1000), Phase(1.2, 0.02, 100)]
    ours = accounting.composed_epsilon(parts, 1e-5)
    assert ours < accounting.composed_epsilon_prv(parts, 1e-5) < ours + 0.011
    assert accounting.composed_epsilon_prv([], 1e-5) == 0.0


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase(2.0), "releases from all records"),
        (Phase(1.0, 0.01, 10, truncated_batch_size=150, dataset_size_bound=10_000), "truncated Poisson"),
        (Phase(0.01, 0.1, 10), "too small"),
    ],
)
def test_prv_refuses_what_it_does_not_know(phase: Phase, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accounting.composed_epsilon_prv([phase], 1e-5)


def test_without_opacus_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"pip install 'wavedp\[account\]'"):
        accounting.epsilon_prv(**REFERENCE)


class Hidden:
    """An import finder for which Opacus is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "opacus":
            raise ImportError("No module named 'opacus'", name="opacus")
