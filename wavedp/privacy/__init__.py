# SPDX-License-Identifier: Apache-2.0
"""Differentially private training: specification, exact clipping, noise, accounting, ledger, statement."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wavedp.privacy.accounting import (
        Phase,
        composed_epsilon,
        composed_epsilon_bounds,
        composed_epsilon_rdp,
        epsilon,
        epsilon_bounds,
        epsilon_prv,
        epsilon_rdp,
        noise_multiplier_for,
        steps_for,
    )
    from wavedp.privacy.bookkeeping import GradientBook
    from wavedp.privacy.clipping import (
        AutomaticClipping,
        Clipping,
        FlatClipping,
        NormalisedClipping,
        clip_and_sum,
    )
    from wavedp.privacy.clipping_adaptive import AdaptiveClipping, AdaptiveSession, noise_multiplier_beside_count
    from wavedp.privacy.clipping_groups import PerGroupClipping, PerLayerClipping
    from wavedp.privacy.clipping_rules import ClippingRule
    from wavedp.privacy.engine import EngineOptimizer, PrivacyEngine
    from wavedp.privacy.entropy import Entropy
    from wavedp.privacy.histogram import (
        label_probabilities,
        load_label_histogram,
        release_label_histogram,
    )
    from wavedp.privacy.independence import check_records_independent
    from wavedp.privacy.ledger import LedgerError, PrivacyLedger
    from wavedp.privacy.ledger_budget import PrivacyBudget
    from wavedp.privacy.ledger_contents import check_not_forked, read_ledger
    from wavedp.privacy.loader import PrivateLoader
    from wavedp.privacy.noise import gaussian_noise, grid_step, round_to_grid
    from wavedp.privacy.optimizer import PrivateOptimizer
    from wavedp.privacy.rounding import SUM_ROUNDING_ALLOWANCE, records_per_block
    from wavedp.privacy.sampling import PoissonSampler, physical_batches
    from wavedp.privacy.spec import PrivacySpec
    from wavedp.privacy.statement import PrivacyStatement

_HOMES = {
    "SUM_ROUNDING_ALLOWANCE": "rounding",
    "AdaptiveClipping": "clipping_adaptive",
    "AdaptiveSession": "clipping_adaptive",
    "AutomaticClipping": "clipping",
    "Clipping": "clipping",
    "ClippingRule": "clipping_rules",
    "EngineOptimizer": "engine",
    "Entropy": "entropy",
    "FlatClipping": "clipping",
    "GradientBook": "bookkeeping",
    "LedgerError": "ledger",
    "NormalisedClipping": "clipping",
    "PerGroupClipping": "clipping_groups",
    "PerLayerClipping": "clipping_groups",
    "Phase": "accounting",
    "PoissonSampler": "sampling",
    "PrivacyBudget": "ledger_budget",
    "PrivacyEngine": "engine",
    "PrivacyLedger": "ledger",
    "PrivacySpec": "spec",
    "PrivacyStatement": "statement",
    "PrivateLoader": "loader",
    "PrivateOptimizer": "optimizer",
    "check_not_forked": "ledger_contents",
    "check_records_independent": "independence",
    "clip_and_sum": "clipping",
    "composed_epsilon": "accounting",
    "composed_epsilon_bounds": "accounting",
    "composed_epsilon_rdp": "accounting",
    "epsilon": "accounting",
    "epsilon_bounds": "accounting",
    "epsilon_prv": "accounting",
    "epsilon_rdp": "accounting",
    "gaussian_noise": "noise",
    "grid_step": "noise",
    "label_probabilities": "histogram",
    "load_label_histogram": "histogram",
    "noise_multiplier_beside_count": "clipping_adaptive",
    "noise_multiplier_for": "accounting",
    "physical_batches": "sampling",
    "read_ledger": "ledger_contents",
    "records_per_block": "rounding",
    "release_label_histogram": "histogram",
    "round_to_grid": "noise",
    "steps_for": "accounting",
}

__all__ = [
    "SUM_ROUNDING_ALLOWANCE",
    "AdaptiveClipping",
    "AdaptiveSession",
    "AutomaticClipping",
    "Clipping",
    "ClippingRule",
    "EngineOptimizer",
    "Entropy",
    "FlatClipping",
    "GradientBook",
    "LedgerError",
    "NormalisedClipping",
    "PerGroupClipping",
    "PerLayerClipping",
    "Phase",
    "PoissonSampler",
    "PrivacyBudget",
    "PrivacyEngine",
    "PrivacyLedger",
    "PrivacySpec",
    "PrivacyStatement",
    "PrivateLoader",
    "PrivateOptimizer",
    "check_not_forked",
    "check_records_independent",
    "clip_and_sum",
    "composed_epsilon",
    "composed_epsilon_bounds",
    "composed_epsilon_rdp",
    "epsilon",
    "epsilon_bounds",
    "epsilon_prv",
    "epsilon_rdp",
    "gaussian_noise",
    "grid_step",
    "label_probabilities",
    "load_label_histogram",
    "noise_multiplier_beside_count",
    "noise_multiplier_for",
    "physical_batches",
    "read_ledger",
    "records_per_block",
    "release_label_histogram",
    "round_to_grid",
    "steps_for",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
