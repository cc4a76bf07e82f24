# SPDX-License-Identifier: Apache-2.0
"""A run folder: the configuration a command ran with, its log, its models, pictures and statements."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wavedp.storage import read_json, write_json


class RunFolder:
    """Owns one folder. Opening it with a configuration that differs from the stored one raises, so that a resumed run
    never mixes two settings."""

    def __init__(self, path: Path | str, config: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        stored = self.path / "config.json"
        if stored.exists() and not overwrite:
            previous = read_json(stored)
            if previous != self.config:
                changed = sorted(key for key in {*previous, *self.config} if previous.get(key) != self.config.get(key))
                raise ValueError(
                    f"{self.path} was started with other settings ({', '.join(changed)} differ); use another folder, "
                    "or repeat the settings to resume"
                )
        write_json(stored, self.config)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


class CsvLog:
    """Appends rows to a CSV file, flushed one by one; a resumed run drops the rows it is about to repeat."""

    def __init__(self, path: Path, columns: tuple[str, ...], *, resume_before: int = 0) -> None:
        self.path = path
        self.columns = columns
        kept = [row for row in read_log(path) if int(row["step"]) < resume_before] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def append(self, **row: float | int) -> None:
        values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(values)


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a `CsvLog`."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
