# SPDX-License-Identifier: Apache-2.0
"""Puts made-up canaries through the private step of a finished run and says how large epsilon is at least; exits with 1
if that is more than the run claims.

RUN is a folder that 'wavedp finetune' wrote. Its specification, its model and its trainable parameters are used, in
runs of their own: real sampling, clipping, noise and optimizer, new keys. Each canary is a record by a fair coin, and
its score is the sum of the noisy means along its gradient. The run's data are not opened and its ledger is not
charged. docs/audit.md says what the three bounds assume, and what an audit cannot see.

  wavedp audit runs/mine --plot audit.png
  wavedp audit runs/mine --canaries 2000 --repeats 10       sharper
  wavedp audit runs/mine --steps 20                         shorter: beside the claim for 20 steps
"""

import argparse
import math
from pathlib import Path

from wavedp.audit import audit_mechanism, open_run
from wavedp.audit.plot import draw
from wavedp.cli import arguments as shared
from wavedp.errors import InvalidValueError
from wavedp.extras import import_extra

CANARIES = 1000
PLOT_FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--canaries", type=shared.bounded(int, minimum=10), metavar="N",
        help=f"canaries in each run (default: {CANARIES}, or as many as the run's bounds allow)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=shared.positive_int, default=1, metavar="N", help="runs")
    parser.add_argument("--steps", type=shared.positive_int, help="steps of each run (default: all of the run's)")
    parser.add_argument(
        "--confidence",
        type=shared.bounded(float, minimum=0.5, below=1),
        default=0.95,
        help="probability that all bounds hold together",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw scores and bounds (.png, .pdf or .svg)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--threads", type=shared.bounded(int, minimum=1, maximum=1024), metavar="N", help="CPU threads")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    device = shared.prepare_device(arguments)
    audited = open_run(arguments.run_folder, device)
    spec = audited.spec
    most = min(spec.dataset_size_bound, spec.truncated_batch_size or spec.dataset_size_bound)
    steps = arguments.steps or spec.steps
    from tqdm import tqdm

    with tqdm(total=arguments.repeats * steps, desc="audit", unit="step", disable=arguments.no_progress) as bar:
        report, found, plan = audit_mechanism(
            audited.model,
            spec,
            canaries=arguments.canaries or min(CANARIES, most),
            repeats=arguments.repeats,
            steps=steps,
            confidence=arguments.confidence,
            claimed_by_run=audited.claimed if math.isfinite(audited.claimed) else None,
            progress=bar.update,
        )
    print(report.to_json() if arguments.json else report.to_text())
    if arguments.plot is not None:
        draw(arguments.plot, report, found, plan, spec)
    return 1 if report.violation else 0


def _check_plot(path: Path) -> None:
    import_extra("matplotlib.figure", "account")
    if path.suffix.lower() not in PLOT_FORMATS:
        raise InvalidValueError(f"--plot {path} must end in one of {', '.join(PLOT_FORMATS)}")
    if not path.parent.is_dir():
        raise InvalidValueError(f"--plot {path}: there is no folder {path.parent}")
