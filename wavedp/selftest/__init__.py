# SPDX-License-Identifier: Apache-2.0
"""Shows that this package's own checks catch privacy bugs: known ones are planted, one at a time, into the code that
is installed, and detectors that do not know of them have to notice. ``wavedp selftest`` is the command.

Nothing outside of this package imports it, and nothing in it changes the others but within the ``with`` blocks of
:meth:`wavedp.selftest.planting.Bug.planted`.
"""

from wavedp.selftest.report import markdown, table
from wavedp.selftest.run import BUGS, DETECTORS, Report, run_selftest

__all__ = ["BUGS", "DETECTORS", "Report", "markdown", "run_selftest", "table"]
