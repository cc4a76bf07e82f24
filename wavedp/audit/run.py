# SPDX-License-Identifier: Apache-2.0
"""What an audit takes from a run's folder: its specification, its model, and what it claims. Nothing is written there,
and the ledger is read and not charged."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wavedp.errors import InvalidValueError, MissingFileError
from wavedp.models import AutoregressiveTransformer, load_autoregressive
from wavedp.privacy import PrivacySpec
from wavedp.storage import read_json
from wavedp.training.trainable import choose_trainable

STATEMENT = "privacy.json"
LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class AuditedRun:
    """``claimed`` is the epsilon of the run's privacy statement; ``model`` is frozen as it was in the run."""

    path: Path
    spec: PrivacySpec
    model: AutoregressiveTransformer
    claimed: float


def open_run(path: Path, device: torch.device | str = "cpu") -> AuditedRun:
    """Open a folder that ``wavedp finetune`` wrote.

    The specification is the first line of its ledger, and has to be the one that the statement was made for.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, by its file.
    """
    for name in (STATEMENT, LEDGER, "model"):
        if not (path / name).exists():
            inside = [folder.parent for folder in sorted(path.glob(f"*/{LEDGER}"))]
            hint = f"; {inside[0]} has a ledger" if inside else ""
            raise MissingFileError(f"{path} has no {name}: give the folder of a finished 'wavedp finetune'{hint}")
    statement = read_json(path / STATEMENT)
    try:
        claimed = float(statement["epsilon"])
        batch_size = float(statement["expected_batch_size"])  # a resumed run may have changed it
        fingerprint = str(statement["spec_fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValueError(f"{path / STATEMENT} is not a privacy statement: {error}") from error
    spec = replace(_recorded_spec(path / LEDGER), expected_batch_size=batch_size)
    if spec.fingerprint() != fingerprint:
        raise InvalidValueError(
            f"{path / STATEMENT} was made for another specification than {path / LEDGER} has: one of them was changed "
            f"or comes from another run"
        )
    model = load_autoregressive(path / "model", device)
    choose_trainable(model, **_trainable(path))
    return AuditedRun(path, spec, model, claimed)


def _recorded_spec(ledger: Path) -> PrivacySpec:
    with ledger.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        header: dict[str, Any] = json.loads(line)
        return PrivacySpec.from_dict(header["spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValueError(f"{ledger} does not begin with a specification: {error}") from error


def _trainable(path: Path) -> dict[str, Any]:
    """What 'wavedp finetune' was told to train; the demo trains everything."""
    settings = read_json(path / "run.json") if (path / "run.json").exists() else {}
    settings = settings if isinstance(settings, dict) else {}
    rank, alpha = settings.get("lora_rank"), settings.get("lora_alpha")
    return {
        "trainable": str(settings.get("trainable", ".*")),
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_targets": settings.get("lora_targets"),
    }
