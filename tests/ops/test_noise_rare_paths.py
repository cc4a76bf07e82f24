# SPDX-License-Identifier: Apache-2.0
"""Keys and optimizers of noise in cases that hardly come up."""

from __future__ import annotations

import builtins
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavedp
from wavedp import noise_key, optim
from wavedp.functional import NoiseKey


class Short:
    """A device that gives half of what is asked for."""

    def __enter__(self) -> Short:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def readinto(self, memory: memoryview) -> int:
        memory[:16] = b"\1" * 16
        return 16


def test_a_short_read_of_the_device_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = builtins.open
    monkeypatch.setattr(
        builtins,
        "open",
        lambda path, *args, **kwargs: Short() if path == "/dev/urandom" else opened(path, *args, **kwargs),
    )
    drawn: list[int] = []
    monkeypatch.setattr(os, "urandom", lambda size: drawn.append(size) or bytes(range(size)))
    with NoiseKey.from_os() as key:
        assert bytes(key._bytes().tolist()) == bytes(range(32))
    assert drawn == [32]


def test_a_key_of_another_process_is_wiped_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    key = NoiseKey.from_os()
    memory = key._bytes()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="another process: draw a new one after forking"):
        wavedp.gaussian_noise((3,), 1.0, key=key)
    assert key.is_wiped
    assert not memory.any()


def test_what_a_fork_calls_wipes_every_key() -> None:
    keys = [NoiseKey.from_os(), NoiseKey.insecure(1)]
    memories = [key._bytes() for key in keys]
    noise_key._wipe_all()
    assert all(key.is_wiped for key in keys)
    assert not any(bool(memory.any()) for memory in memories)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"shape": "34"}, TypeError, "a shape as a sequence of integers, not '34'"),
        ({"shape": (3,), "device": "nowhere"}, ValueError, "a torch device, such as 'cpu' or 'cuda', not 'nowhere'"),
        ({"shape": (3,), "std": 10**400}, ValueError, "a finite std >= 0, not inf"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        wavedp.gaussian_noise(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": 10**400}, ValueError, "DPAdam takes a finite lr >= 0, not inf"),
        ({"lr": "fast"}, TypeError, "DPAdam takes a number as lr, not 'fast'"),
        ({"betas": 0.9}, TypeError, "two numbers in betas, not 0.9"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        optim.DPAdam([nn.Parameter(torch.zeros(2))], **options)


def test_an_optimizer_of_nothing_or_of_integers() -> None:
    with pytest.raises(ValueError, match="takes at least one parameter, and was given none"):
        optim.DPSGD([])
    whole = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match=r"float32 or float64, not torch\.int64"):
        optim.DPSGD([whole]).step(sums=[torch.zeros(2)], std=1.0, denominator=1.0)


def test_a_state_may_hold_what_is_no_tensor() -> None:
    def made() -> tuple[optim.DPSGD, Tensor]:
        p = nn.Parameter(torch.zeros(2))
        return optim.DPSGD([p], lr=1.0, momentum=0.5), p

    first, p = made()
    first.step(sums=[torch.ones(2)], std=0.0, denominator=1.0)
    first.state[p]["note"] = 0.5
    second, q = made()
    second.load_state_dict(first.state_dict())
    assert second.state[q]["note"] == 0.5
    assert torch.equal(second.state[q]["momentum_buffer"], torch.ones(2))
