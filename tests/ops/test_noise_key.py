# SPDX-License-Identifier: Apache-2.0
"""A key is secret, is for one process, and is gone after its use."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

import wavedp
from wavedp import NoiseKey


def test_keys_of_the_system_differ_and_are_secret() -> None:
    keys = [NoiseKey.from_os() for _ in range(100)]
    assert len({bytes(key._bytes().tolist()) for key in keys}) == 100
    assert not keys[0].is_insecure
    bits = sum(bin(byte).count("1") for key in keys for byte in key._bytes().tolist())
    assert abs(bits - 12_800) < 6 * 80  # of 25,600 fair bits, six standard deviations
    for text in (repr(keys[0]), str(keys[0]), f"{keys[0]}"):
        assert text == "<NoiseKey: secret>"
    assert not hasattr(keys[0], "__dict__")


def test_without_the_device_file_the_system_call_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("os.urandom", lambda size: bytes(range(size)))
    assert NoiseKey.from_os()._bytes().tolist() == list(range(32))


def test_wiping_overwrites_the_memory() -> None:
    key = NoiseKey.from_os()
    memory = key._bytes()
    assert memory.count_nonzero() > 10
    key.wipe()
    assert memory.count_nonzero() == 0
    assert key.is_wiped
    assert repr(key) == "<NoiseKey: wiped>"
    key.wipe()
    with pytest.raises(RuntimeError, match="was wiped"):
        wavedp.gaussian_noise((2,), key=key)


def test_a_block_and_the_collector_wipe() -> None:
    with NoiseKey.from_os() as key:
        memory = key._bytes()
    assert memory.count_nonzero() == 0
    key = NoiseKey.from_os()
    memory = key._bytes()
    del key
    assert memory.count_nonzero() == 0


def test_a_key_drawn_for_one_call_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    draw = NoiseKey.from_os

    def watched() -> NoiseKey:
        key = draw()
        drawn.append(key._bytes())
        return key

    monkeypatch.setattr(NoiseKey, "from_os", watched)
    assert not torch.equal(wavedp.gaussian_noise((50,)), wavedp.gaussian_noise((50,)))
    wavedp.add_gaussian_noise_(torch.zeros(3), 1.0)
    wavedp.noisy_mean(torch.zeros(3), 1.0)
    assert len(drawn) == 4
    assert all(memory.count_nonzero() == 0 for memory in drawn)


def test_a_key_is_not_copied() -> None:
    key = NoiseKey.from_os()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            attempt(key)
    with pytest.raises(TypeError, match=r"made by NoiseKey.from_os\(\)"):
        NoiseKey()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_has_no_key() -> None:
    key = NoiseKey.from_os()
    memory = key._bytes()
    child = os.fork()
    if child == 0:
        refused = key.is_wiped and not any(memory.tolist())
        try:
            wavedp.gaussian_noise((2,), key=key)
            refused = False
        except RuntimeError as error:
            refused = refused and "another process" in str(error)
        os._exit(0 if refused else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert wavedp.gaussian_noise((2,), key=key).isfinite().all()


def test_a_seed_marks_its_key() -> None:
    first, again, other = NoiseKey.insecure(5), NoiseKey.insecure(5), NoiseKey.insecure(5 + 2**32)
    assert first.is_insecure
    assert repr(first) == "<NoiseKey: insecure, from a seed>"
    noise = [wavedp.gaussian_noise((64,), key=key) for key in (first, again, other)]
    assert torch.equal(noise[0], noise[1])
    # torch's CPU generator keeps 32 bits of a seed; these seeds differ in bit 32.
    assert not torch.equal(noise[0], noise[2])
    with pytest.raises(TypeError, match="integer as seed"):
        NoiseKey.insecure(1.0)  # type: ignore[arg-type]
