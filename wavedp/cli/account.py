# SPDX-License-Identifier: Apache-2.0
"""Answers one of three questions about DP-SGD with Poisson sampling, add/remove neighbours:

  epsilon for a noise multiplier   --noise-multiplier and --steps
  noise for an epsilon             --epsilon and --steps
  steps for an epsilon             --epsilon and --noise-multiplier

Epsilon is the pessimistic PLD bound; the optimistic PLD bound and the Renyi bound are shown beside it.
"""

import argparse
import json
import math

from wavedp.cli import arguments as shared
from wavedp.privacy import accounting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample-rate", type=shared.bounded(float, above=0, maximum=1), required=True,
        help="probability of each record to join each batch",
    )  # fmt: skip
    parser.add_argument(
        "--delta", type=shared.bounded(float, above=0, below=1), required=True, help="failure probability"
    )
    parser.add_argument("--noise-multiplier", type=shared.positive_float, help="noise standard deviation / sensitivity")
    parser.add_argument("--epsilon", type=shared.positive_float, help="target epsilon")
    parser.add_argument("--steps", type=shared.positive_int, help="optimizer steps")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")


def run(arguments: argparse.Namespace) -> None:
    question = {"sample_rate": arguments.sample_rate, "delta": arguments.delta}
    noise, epsilon, steps = arguments.noise_multiplier, arguments.epsilon, arguments.steps
    if sum(value is not None for value in (noise, epsilon, steps)) != 2:
        raise ValueError("give exactly two of --noise-multiplier, --epsilon and --steps; the third is the answer")
    if noise is None:
        noise = accounting.noise_multiplier_for(target_epsilon=epsilon, steps=steps, **question)
    if steps is None:
        steps = accounting.steps_for(target_epsilon=epsilon, noise_multiplier=noise, **question)
    lower, upper = accounting.epsilon_bounds(noise_multiplier=noise, steps=steps, **question)
    answer = {
        **question,
        "noise_multiplier": noise,
        "steps": steps,
        "epsilon": upper,
        "epsilon_lower_bound": lower,
        "epsilon_rdp": accounting.epsilon_rdp(noise_multiplier=noise, steps=steps, **question),
    }
    if not math.isfinite(upper):
        raise ValueError(f"noise multiplier {noise:g} gives no finite epsilon; raise it")
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        for name, value in answer.items():
            shown = value if isinstance(value, int) else f"{value:.6g}"
            print(f"{name.replace('_', ' '):20} {shown}")
