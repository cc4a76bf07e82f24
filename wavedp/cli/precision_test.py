# SPDX-License-Identifier: Apache-2.0
"""Looks for what the last bits of a noisy sum tell of the sum, here and in Opacus if it is installed.

One coordinate, one step, noise of deviation 1, and a record that adds 1 or is not there. An event that occurs
without the record and never with it tells the record's absence, whatever epsilon an accountant gives. The table
has, for each mechanism, how often an output is not (what becomes of) a multiple of 2^-24, the event of this kind that
shows most, and the delta that it shows at epsilon 4; the Gaussian mechanism's own is 4.7e-5, and a mechanism that
shows no more has "none". Exits with 1 if one of this package shows more.

  wavedp precision-test                      two million trials each: half a minute
"""

import argparse
import json

from wavedp.benchmarks import precision
from wavedp.cli import arguments as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=shared.positive_int, default=2_000_000, help="with the record, and without")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    own = precision.ours()
    found = {name: precision.events(one, arguments.trials) for name, one in precision.mechanisms().items()}
    allowed = precision.gaussian_delta(precision.EPSILON)
    if arguments.json:
        shown = {
            name: [
                {"exponent": e.exponent, "without": e.without, "with_record": e.with_record, "delta_shown": e.shown}
                for e in here
            ]
            for name, here in found.items()
        }
        answer = {"trials": arguments.trials, "epsilon": precision.EPSILON, "delta": allowed, "events": shown}
        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(precision.table(found)))
    return 1 if any(event.shown > allowed for name in own for event in found[name]) else 0
