# SPDX-License-Identifier: Apache-2.0
"""``python -m wavedp``."""

import sys

from wavedp.cli import main

sys.exit(main())
