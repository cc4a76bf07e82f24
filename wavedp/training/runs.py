# SPDX-License-Identifier: Apache-2.0
"""A run folder: the configuration a command ran with, its log, its models, pictures and statements."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wavedp.errors import BadFileError, InvalidValueError
from wavedp.storage import CONFIG_FILE, read_json, write_bytes, write_json

RUN_FILE = "run.json"


class RunFolder:
    """Owns one folder and what is in it, by its ``run.json``.

    Opening it with settings that differ from the stored ones raises, so that a resumed run never mixes two. With
    ``overwrite`` the settings may differ, but not the ``command``: no command writes over the run of another.
    ``reads`` has the digests of the models that the run is made from, by their option: one that was replaced by another
    in the same place raises as well.
    """

    def __init__(
        self,
        path: Path | str,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        reads: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps({**config, **({"reads": dict(reads)} if reads else {})}))
        stored = self.path / RUN_FILE
        if stored.exists():
            previous = read_json(stored)
            if not isinstance(previous, dict):
                raise BadFileError(f"{stored} is no record of a run: it was damaged; use another folder")
            keys = {*previous, *self.config} - {"reads"}
            changed = sorted(key for key in keys if previous.get(key) != self.config.get(key))
            if "command" in changed:
                raise InvalidValueError(
                    f"{self.path} belongs to a run of 'wavedp {previous.get('command')}'; use another folder"
                )
            self._refuse_replaced(previous.get("reads"), reads)
            if "reads" not in previous:  # of an earlier version: what it was made from is not known
                self.config.pop("reads", None)
            if changed and not overwrite:
                raise InvalidValueError(
                    f"{self.path} was started with other settings ({', '.join(changed)} differ); use another folder, "
                    "or repeat the settings to resume"
                )
        elif (self.path / CONFIG_FILE).exists():
            raise InvalidValueError(f"{self.path} holds a saved model; use another folder for the run")
        write_json(stored, self.config)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def _refuse_replaced(self, before: Any, reads: Mapping[str, str]) -> None:
        known = before if isinstance(before, dict) else {}
        replaced = sorted(name for name in known.keys() & reads.keys() if known[name] != reads[name])
        if replaced:
            raise InvalidValueError(
                f"{self.path} was made from another {' and '.join(replaced)}, which was replaced since; use another "
                "folder, or put the former one back to resume"
            )


class CsvLog:
    """Appends rows to a CSV file, flushed one by one; a resumed run drops the rows it is about to repeat.

    ``private``: only the file's owner may read it.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, resume_before: int = 0, private: bool = False) -> None:
        self.path = path
        self.columns = columns
        kept = [row for row in read_log(path) if int(row["step"]) < resume_before] if path.exists() else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_bytes(path, text.getvalue().encode(), private=private)

    def append(self, **row: float | int) -> None:
        values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(values)


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a `CsvLog`; a row that a crash tore is left out."""
    with path.open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    return [row for row in rows if row["step"] and row["step"].isdecimal() and all(row.values()) and None not in row]
