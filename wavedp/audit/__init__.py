# SPDX-License-Identifier: Apache-2.0
"""Lower bounds on epsilon from canaries put through the private step itself, beside what a run claims.

``docs/audit.md`` says how to read them. ``wavedp audit RUN`` is the command.
"""

from wavedp.audit.bounds import (
    Bound,
    guessing_bound,
    noise_bound,
    one_run_bound,
    one_run_p_value,
)
from wavedp.audit.canaries import GradientCanaries
from wavedp.audit.mechanism import CanaryScores, score_canaries
from wavedp.audit.report import AuditReport, audit_mechanism
from wavedp.audit.run import AuditedRun, open_run

__all__ = [
    "AuditReport",
    "AuditedRun",
    "Bound",
    "CanaryScores",
    "GradientCanaries",
    "audit_mechanism",
    "guessing_bound",
    "noise_bound",
    "one_run_bound",
    "one_run_p_value",
    "open_run",
    "score_canaries",
]
