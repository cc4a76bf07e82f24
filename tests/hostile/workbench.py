# SPDX-License-Identifier: Apache-2.0
"""What the cases of tests/hostile/cases are made of: small models, runs and files, each made where it is first named.

A case is a line of ``name``, ``call``, ``error`` and ``message``, separated by tabs: an expression that must raise the
error of the family (:mod:`wavedp.errors`) with that message, in which ``…`` stands for anything. The calls of
``command_line.tsv`` are arguments of ``wavedp``, and their error is the exit status.
"""

from __future__ import annotations

import builtins
import csv
import math
import shlex
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import wavedp
from wavedp import compat, data, errors, models, optim, pipeline, privacy, storage, superres, training
from wavedp.data import folder as data_folder
from wavedp.data import idx, picture_file
from wavedp.data.picture_file import decode_picture
from wavedp.evaluation import small as evaluation
from wavedp.privacy import accounting
from wavedp.training import loop, pictures, results, runs, trainable
from wavedp.training import private as private_training
from wavedp.training import superres as superres_training
from wavedp.weights_file import read_tensors

HERE = Path(__file__).parent
GOOD = {
    "sample_rate": 0.1,
    "steps": 5,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "expected_batch_size": 2.0,
    "delta": 1e-6,
    "dataset_size_bound": 20,
}


@dataclass(frozen=True)
class Case:
    area: str
    name: str
    call: str
    error: str
    message: str


def read_cases() -> list[Case]:
    """Every case, by area in the order of the file names."""
    cases = []
    for file in sorted((HERE / "cases").glob("*.tsv")):
        area = file.stem.split("_", 1)[1].replace("_", " ")
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            cases += [Case(area, **row) for row in rows]
    return cases


def says(text: str, pattern: str) -> bool:
    """Whether the parts of ``pattern`` between its ``…`` are in ``text``, in their order."""
    at = 0
    for part in pattern.split("…"):
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


class Workbench(dict[str, Any]):
    """The names that a call may use; `tmp` is a folder that is empty for every case."""

    def __init__(self, tmp: Path) -> None:
        super().__init__(
            wavedp=wavedp, torch=torch, math=math, nan=math.nan, inf=math.inf, tmp=tmp, np=np, nn=nn, Path=Path,
            compat=compat, data=data, models=models, optim=optim, pipeline=pipeline, privacy=privacy,
            storage=storage, superres=superres, training=training, idx=idx, folder=data_folder,
            accounting=accounting, evaluation=evaluation, loop=loop, pictures=pictures, results=results,
            runs=runs, private_training=private_training, trainable=trainable, superres_training=superres_training,
            decode_picture=decode_picture, read_tensors=read_tensors, GOOD=GOOD, first=first, writes=writes,
            safetensors=safetensors_file, config=replaced, png=png, spec=spec, nothing=None,
        )  # fmt: skip

    def __missing__(self, name: str) -> Any:
        if name not in MADE:
            raise KeyError(name)
        self[name] = MADE[name](self)
        return self[name]


def first(*steps: Any) -> Any:
    """The last of its arguments: for what happens before the call that is refused."""
    return steps[-1]


def writes(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def safetensors_file(header: str | bytes, body: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + body


def png(width: int, height: int) -> bytes:
    """The head of a PNG of that size, and no pixels."""
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [head, b"IDAT" + zlib.compress(b"\0" * 9), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def replaced(folder: Path, **changes: Any) -> Path:
    """``folder`` after changes to its config.json; a change to ``model`` is merged into it."""
    content = storage.read_json(folder / "config.json")
    for key, value in changes.items():
        content[key] = {**content[key], **value} if key == "model" and isinstance(value, dict) else value
    storage.write_json(folder / "config.json", content)
    return folder


def spec(**changes: Any) -> privacy.PrivacySpec:
    return privacy.PrivacySpec(**{**GOOD, **changes})


def _tokenizer(_: Workbench) -> Any:
    sizes = models.SpectralTokenizerConfig(
        image_size=8, levels=1, grid=2, width=8, heads=2, encoder_depth=1, decoder_depth=1,
        approximation_codes=8, detail_codes=8, code_dim=4,
    )  # fmt: skip
    return models.SpectralTokenizer(sizes).eval()


def _model(_: Workbench) -> Any:
    sizes = models.AutoregressiveConfig(
        num_classes=2, tokens_per_scale=4, num_scales=1, approximation_codes=8, detail_codes=8, width=8, depth=1,
        heads=2, class_names=("a", "b"),
    )  # fmt: skip
    return models.AutoregressiveTransformer(sizes).eval()


def _dataset(_: Workbench) -> Any:
    images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    return data.TensorImageDataset(images, torch.arange(10) % 2, ["a", "b"])


def _private(b: Workbench) -> Any:
    torch.manual_seed(0)
    net = b["net"]
    return privacy.PrivateOptimizer(net, torch.optim.SGD(net.parameters(), lr=0.1), b["the_spec"], sampler=b["sampler"])


def _ready(b: Workbench) -> Any:
    """A private optimizer whose sampler has drawn; `records` is the batch."""
    private = b["private"]
    b["records"] = next(iter(b["sampler"]))
    return private


def _losses(b: Workbench) -> Any:
    return b["net"](torch.ones(len(b["records"]), 3)).sum(1)


def _saved_model(b: Workbench) -> Path:
    models.save_model(b["model"], b["tmp"] / "model")
    return Path(b["tmp"] / "model")


def _saved_tokenizer(b: Workbench) -> Path:
    models.save_model(b["tokenizer"], b["tmp"] / "tokenizer")
    return Path(b["tmp"] / "tokenizer")


def _study(b: Workbench) -> Path:
    recipe = '[finetune]\ndata = "@data"\nhold-out = 9\ntokenizer = "t"\nmodel = "m"\nepsilon = 1\ndelta = 1e-5\n'
    recipe += "max-records = 100\nsample-rate = 0.1\nsteps = 2\nexpected-batch-size = 9\n"
    writes(b["tmp"] / "recipe.toml", recipe)
    rows = 'recipe = "recipe.toml"\n[[row]]\nname = "base"\n[[row]]\nname = "long"\nfinetune = {{ {} = 4 }}\n'
    writes(b["tmp"] / "wrong_study.toml", rows.format("step"))
    return writes(b["tmp"] / "study.toml", rows.format("steps"))


def _saved_espcn(b: Workbench) -> Path:
    b["espcn"].save_pretrained(b["tmp"] / "espcn")
    return Path(b["tmp"] / "espcn")


def _saved_pipeline(b: Workbench) -> Path:
    b["pipe"].save_pretrained(b["tmp"] / "pipeline")
    return Path(b["tmp"] / "pipeline")


def _espcn(_: Workbench) -> Any:
    return superres.EspcnResolver(superres.Espcn(superres.EspcnConfig(scale=2, channels=1, width=4, depth=1)))


MADE: dict[str, Callable[[Workbench], Any]] = {
    "x": lambda b: torch.arange(16.0).reshape(1, 1, 4, 4),
    "grads": lambda b: [torch.ones(3, 2), torch.ones(3)],
    "norms": lambda b: torch.ones(3),
    "key": lambda b: wavedp.NoiseKey.insecure(0),
    "total": lambda b: torch.zeros(4),
    "weight": lambda b: nn.Parameter(torch.zeros(4)),
    "net": lambda b: nn.Linear(3, 2),
    "the_spec": lambda b: spec(sample_rate=1.0),
    "sampler": lambda b: privacy.PoissonSampler(6, 1.0, 5),
    "private": _private,
    "ready": _ready,
    "records": lambda b: first(b["ready"], b["records"]),
    "losses": _losses,
    "opt": lambda b: torch.optim.SGD(b["net"].parameters(), lr=0.1),
    "loader": lambda b: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(6, 3)), batch_size=2),
    "engine": lambda b: privacy.PrivacyEngine(),
    "tokenizer": _tokenizer,
    "model": _model,
    "dataset": _dataset,
    "images": lambda b: torch.zeros(2, 1, 8, 8),
    "espcn": _espcn,
    "pipe": lambda b: pipeline.CoarseToFinePipeline(b["tokenizer"], b["model"], superres.load("bicubic", scale=2)),
    "saved_model": _saved_model,
    "saved_tokenizer": _saved_tokenizer,
    "saved_espcn": _saved_espcn,
    "saved_pipeline": _saved_pipeline,
    "study": _study,
    "wrong_study": lambda b: b["study"].with_name("wrong_study.toml"),
    "tensors": lambda b: storage.load_folder(b["saved_model"])[1],
}


def evaluate(case: Case, tmp: Path) -> BaseException | None:
    """What the call raises; None if it does not."""
    bench = Workbench(tmp)
    try:
        eval(case.call, bench)
    except Exception as error:
        return error
    return None


def command(case: Case, tmp: Path) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of ``wavedp`` with the call as its arguments; {tmp} and {saved_…} are folders."""
    import contextlib
    import io

    from wavedp import cli

    bench = Workbench(tmp)
    names = {name: bench[name] for name in ("tmp", *MADE) if "{" + name + "}" in case.call}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(shlex.split(case.call.format(**names)))
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return status, out.getvalue(), err.getvalue()


def family(name: str) -> type[Exception]:
    """The class of a case's error: of the family, one derived from it, or a builtin."""
    homes = (errors, privacy, data, picture_file, idx, builtins)
    found = next(getattr(home, name) for home in homes if hasattr(home, name))
    assert issubclass(found, Exception)
    return found


def fresh() -> Path:
    return Path(tempfile.mkdtemp(prefix="wavedp-hostile-"))
