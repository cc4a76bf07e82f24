# SPDX-License-Identifier: Apache-2.0
"""Plants known privacy bugs into the installed package, one at a time, and shows that its detectors catch them.

Each bug replaces functions of this package for a moment, where training runs through them; the detectors do not know
which. They also look at the code as it is, with other models, batches and keys for each seed. Exits with 1 if a bug is
missed or was not active, or if the right code raises an alarm. docs/selftest.md has the table.

  wavedp selftest                          everything: under a minute on two cores
  wavedp selftest --only no_noise          one bug, and no seeds
  wavedp selftest --seeds 1000 --only ""   the right code alone
"""

import argparse
import json
import os
import sys

from wavedp.cli import arguments as shared
from wavedp.cli.noise_law import ProgressLine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds",
        type=shared.bounded(int, minimum=0),
        help="how often to look at the right code (default: 60; 0 with --only)",
    )
    parser.add_argument("--only", action="append", metavar="BUG", help="this bug; may be repeated; '' for none")
    parser.add_argument("--every-detector", action="store_true", help="do not stop at the first that catches a bug")
    parser.add_argument(
        "--processes", type=shared.positive_int, default=min(2, os.cpu_count() or 1), help="to work with"
    )
    parser.add_argument("--list", action="store_true", help="print the bugs and stop")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as in docs/selftest.md")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    from wavedp import selftest
    from wavedp.selftest.report import listing, summary

    if arguments.list:
        print("\n".join(listing(selftest.BUGS)))
        return 0
    chosen = None if arguments.only is None else [name for name in arguments.only if name]
    seeds = arguments.seeds if arguments.seeds is not None else 60 if arguments.only is None else 0
    progress = ProgressLine()
    try:
        report = selftest.run_selftest(
            seeds=seeds,
            bugs=chosen,
            every_detector=arguments.every_detector,
            processes=arguments.processes,
            progress=progress.show,
        )
    finally:
        progress.close()
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print("\n".join(selftest.markdown(report) if arguments.markdown else selftest.table(report)))
        if arguments.markdown:
            print(summary(report), file=sys.stderr)
    return 0 if report.passed else 1
