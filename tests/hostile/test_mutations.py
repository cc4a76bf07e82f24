# SPDX-License-Identifier: Apache-2.0
"""Mutated files, from fixed seeds: each loads or is refused by the family, in bounded memory. The counts are exact."""

from __future__ import annotations

import io
import json
import random
import resource
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import workbench

from wavedp import models, pipeline, storage, superres
from wavedp.data.picture_file import BadImageError, decode_picture
from wavedp.errors import BadFileError, WavedpError
from wavedp.weights_file import read_tensors

PICTURES, HEADERS, SAVED = 5_000, 20_000, 2_000
MOST_MEMORY = 512  # MiB more than before, at the peak

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def bounded_memory() -> object:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MOST_MEMORY, f"{grown:.0f} MiB"


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A few bytes changed, removed, repeated or inserted, or the end cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 9)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif rng.randrange(8) == 0:
            del data[at:]
    return bytes(data)


def outcomes(tries: int, attempt: Callable[[int], object], allowed: type[Exception]) -> Counter[str]:
    """How many attempts succeed and how many raise ``allowed``; anything else fails the test."""
    counts: Counter[str] = Counter()
    for number in range(tries):
        try:
            attempt(number)
        except allowed:
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"attempt {number}: {type(error).__name__}: {error}") from error
        else:
            counts["loaded"] += 1
    return counts


def pictures() -> list[bytes]:
    from PIL import Image

    noise = Image.effect_noise((17, 13), 60)
    made = []
    for picture, options in (
        (noise, {"format": "PNG"}),
        (noise.convert("RGB"), {"format": "JPEG", "quality": 80}),
        (noise.convert("P"), {"format": "GIF"}),
        (noise.convert("RGBA"), {"format": "PNG"}),
        (noise.convert("RGB"), {"format": "JPEG", "progressive": True}),
    ):
        file = io.BytesIO()
        picture.save(file, **options)
        made.append(file.getvalue())
    return made


def test_pictures() -> None:
    seeds, rng = pictures(), random.Random(1)

    def attempt(number: int) -> None:
        pixels = decode_picture(mutated(rng, seeds[number % len(seeds)]), "a.png", 8, 1)
        assert pixels.shape == (1, 8, 8)
        assert pixels.dtype == torch.uint8

    counts = outcomes(PICTURES, attempt, BadImageError)
    assert min(counts["refused"], counts["loaded"]) > PICTURES // 20


def test_headers_of_weights() -> None:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "blocks.0.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
            "blocks.0.bias": {"dtype": "F16", "shape": [3], "data_offsets": [24, 30]},
            "empty": {"dtype": "I64", "shape": [0, 4], "data_offsets": [30, 30]},
        }
    ).encode()
    rng = random.Random(2)

    def attempt(number: int) -> None:
        changed = mutated(rng, header)
        content = workbench.safetensors_file(changed, bytes(30))
        if number % 10 == 0:
            content = mutated(rng, content)
        tensors = read_tensors(content, "w.safetensors")
        assert all("/" not in name and name for name in tensors)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(content)

    counts = outcomes(HEADERS, attempt, BadFileError)
    assert counts["refused"] > HEADERS * 0.8
    assert counts["loaded"] > 0


def mutated_json(rng: random.Random, value: object) -> object:
    """One entry of a JSON value replaced by a value of another kind or size, removed, or renamed."""
    hostile = (
        None,
        True,
        -1,
        0,
        3,
        2**31,
        2**64,
        10**400,
        1e308,
        float("nan"),
        "",
        "../x",
        "a\0b",
        [],
        {},
        [1],
        {"a": 1},
    )
    if isinstance(value, dict) and value and rng.randrange(8):
        key = rng.choice(sorted(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {("x" + k if k == key else k): v for k, v in value.items()}
        return {**value, key: mutated_json(rng, value[key])}
    if isinstance(value, list) and value and rng.randrange(3):
        at = rng.randrange(len(value))
        return [*value[:at], mutated_json(rng, value[at]), *value[at + 1 :]]
    return rng.choice(hostile)


def test_saved_models(tmp_path: Path) -> None:
    """Configurations whose entries are changed, weights under a hash that fits them, and bytes anywhere."""
    bench = workbench.Workbench(tmp_path)
    loaders: list[tuple[Path, Callable[[Path], object]]] = [
        (bench["saved_model"], models.load_model),
        (bench["saved_tokenizer"], models.load_model),
        (bench["saved_espcn"], superres.from_pretrained),
        (bench["saved_pipeline"], pipeline.CoarseToFinePipeline.from_pretrained),
    ]
    rng = random.Random(3)

    def attempt(number: int) -> None:
        folder, load = loaders[number % len(loaders)]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        file = rng.choice(files)
        config, before = file.with_name("config.json"), file.read_bytes()
        kept = config.read_bytes() if config.is_file() else b""
        try:
            if file.suffix == ".json" and rng.randrange(4):
                value = json.loads(before)
                file.write_text(json.dumps(mutated_json(rng, value)))
            else:
                file.write_bytes(mutated(rng, before))
            if file.suffix == ".safetensors" and rng.randrange(4):  # whoever changes weights can hash them too
                value = json.loads(kept)
                config.write_text(json.dumps({**value, "sha256": sha256(file.read_bytes()).hexdigest()}))
            load(folder)
        finally:
            file.write_bytes(before)
            if kept:
                config.write_bytes(kept)

    counts = outcomes(SAVED, attempt, WavedpError)
    assert counts["refused"] > SAVED // 2
    for folder, load in loaders:  # the originals are as they were
        load(folder)
    assert storage.load_folder(loaders[0][0])
