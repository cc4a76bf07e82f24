# SPDX-License-Identifier: Apache-2.0
"""Every op timed beside its rivals and beside a copy of the same bytes. Installed as ``wavedp.benchmarks``."""
