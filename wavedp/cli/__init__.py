# SPDX-License-Identifier: Apache-2.0
"""The ``wavedp`` command. Every sub-command is a module with ``add_arguments(parser)`` and ``run(arguments)``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from wavedp import WavedpError, __version__
from wavedp.data.picture_file import printable

# command -> one line of help; the module is wavedp.cli.<command>, with _ for -
COMMANDS = {
    "demo": "the whole method on handwritten digits: minutes on a CPU, needs nothing",
    "recipe": "run all stages of a recipe file, from public and private images to an evaluation",
    "study": "run a recipe with one thing changed at a time, and compare; every row spends its own privacy budget",
    "tokenizer": "train a spectral image tokenizer on public images",
    "pretrain": "train the autoregressive model on public images",
    "finetune": "fine-tune the autoregressive model on sensitive images with differential privacy",
    "espcn": "train the package's own small super-resolution network on public images",
    "sample": "sample coarse images and super-resolve them",
    "upscale": "super-resolve a folder of images",
    "evaluate": "train a classifier on synthetic images and test it on real ones",
    "ceilings": "what each stage of the method allows on a data set, by one classifier",
    "bench": "time every op beside its rivals and beside a copy of the same bytes",
    "ledger": "what the runs of a privacy ledger have spent, and whether it was forked",
    "account": "epsilon for a noise multiplier, noise for an epsilon, or steps for an epsilon",
    "audit": "how large epsilon is at least, by canaries through the private step of a run",
    "noise-law": "test the law of the noise on many draws",
    "selftest": "plant known privacy bugs into this package, one at a time, and show that its checks catch them",
    "precision-test": "look for what the last bits of a noisy sum tell, here and in Opacus",
}

EXIT_UNFORESEEN = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage, which --help shows."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"{self.prog}: error: {in_one_line(message)}; see {self.prog} --help\n")


def in_one_line(text: object) -> str:
    """``text`` without line breaks and with what a terminal would obey escaped."""
    return printable(" ".join(str(text).split()))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="wavedp", description="Coarse-to-fine private image generation.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"wavedp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        module = importlib.import_module("wavedp.cli." + name.replace("-", "_"))
        command = commands.add_parser(
            name,
            help=summary,
            description=(module.__doc__ or "").strip(),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and adds every default to its help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        hidden = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        return text if hidden or not action.option_strings else f"{text} (default: %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    Bad input is one line on stderr and 2; what nobody foresaw is one line too, and 1. ``--traceback`` raises both.
    """
    arguments = build_parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
    except KeyboardInterrupt:
        print(
            "\nwavedp: stopped; a training command continues from its checkpoint when run again",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except Exception as error:
        if arguments.traceback:
            raise
        expected = isinstance(error, (WavedpError, ValueError, TypeError, RuntimeError, ImportError, OSError))
        what = in_one_line(error)
        if not expected:
            what = f"{type(error).__name__} that was not foreseen ({what}); repeat it with --traceback and report it"
        print(f"wavedp {arguments.command}: error: {what}", file=sys.stderr)
        return EXIT_ERROR if expected else EXIT_UNFORESEEN
    return int(status or 0)
