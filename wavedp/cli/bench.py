# SPDX-License-Identifier: Apache-2.0
"""Times every op beside its rivals and beside a floor, such as a copy of the same bytes, on this machine.

A row's bar is its fraction of the floor; │ marks the floor itself. Rivals that are not installed are
left out: pip install 'wavedp[bench]' brings them. Every result is checked before it is timed.

  wavedp bench wavelet                        all cases, some minutes
  wavedp bench wavelet wavedec2 coarse-L3     one op at every level, and one case
  wavedp bench wavelet small                  what a call costs on one small image
  wavedp bench dp                             private training steps by each library, and the functions alone
  wavedp bench noise                          normals, and optimizer steps that make their noise
  wavedp bench sampling                       images a second by the autoregressive model, for prefixes of its scales
  wavedp bench wavelet --list                 what cases there are
"""

import argparse

from wavedp.benchmarks import run as benchmarks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> None:
    benchmarks.run(arguments)
