# SPDX-License-Identifier: Apache-2.0
"""Noise is used once: nothing correlates between steps, tensors, parts of a tensor, runs, resumed runs or forks."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from wavedp.functional import NoiseKey, gaussian_noise
from wavedp.privacy import PrivateOptimizer, release_label_histogram
from wavedp.privacy import noise_law_statistics as statistics
from wavedp.selftest.alarms import require, require_likely, require_refusal
from wavedp.selftest.cases import EXPECTED_BATCH_SIZE, Recorder, specification
from wavedp.selftest.detect_noise import BOUND, MULTIPLIER, Releases, TwoTables

_LENGTH = 1 << 13
_ROWS = 128
_KEYS = 32
KEY_BYTES = 32


def detect(seed: int) -> None:
    torch.manual_seed(seed)
    one, another, fused = Releases(rows=_ROWS), Releases(rows=_ROWS, steps=1), Releases("sgd", rows=_ROWS, steps=2)
    rows = {}
    for title, releases in (("a run", one), ("another run", another), ("DPSGD", fused)):
        for step, parts in enumerate(releases.noise):
            for number, part in enumerate(parts):
                rows[f"step {step + 1} of {title}, tensor {number + 1}"] = part.flatten()[:_LENGTH]
    rows["a resumed run"] = resumed(one).flatten()[:_LENGTH]
    spec = specification(label_noise_multiplier=3.0)
    rows["a label histogram"] = release_label_histogram(torch.zeros(0, dtype=torch.int64), _LENGTH, spec)
    check_rows(rows)
    for releases in (one, fused):
        _, _, p_value = statistics.largest_autocorrelation(_unit(releases.noise[0][0].flatten()))
        require_likely(p_value, "a tensor's noise comes twice in it")
    check_keys()
    check_seeds(seed)
    check_forks()


def check_rows(rows: dict[str, Tensor]) -> None:
    names = list(rows)
    stacked = np.stack([_unit(row).numpy() for row in rows.values()])
    products = stacked @ stacked.T / np.sqrt(_LENGTH)
    np.fill_diagonal(products, 0.0)
    first, second = np.unravel_index(int(np.abs(products).argmax()), products.shape)
    _, _, p_value = statistics.largest_correlation(stacked)
    require_likely(p_value, f"the noise of {names[first]} is in that of {names[second]}")


def _unit(x: Tensor) -> Tensor:
    deviation = x.double().std()
    require(float(deviation) > 0.0, "there is no noise")
    return x.double() / deviation


def resumed(run: Releases) -> Tensor:
    """The noise of the step after a checkpoint, in a process that starts again."""
    model = TwoTables(_ROWS)
    recorder = Recorder(model.parameters())
    with PrivateOptimizer(model, recorder, run.spec) as private:
        private.load_state_dict(run.state)
        private.step()
    return recorder.seen[0][0].double() * EXPECTED_BATCH_SIZE


def check_keys() -> None:
    """Keys have 256 random bits, and none is left in memory after its release."""
    keys = [NoiseKey.from_os() for _ in range(_KEYS)]
    bits = np.unpackbits(np.stack([key._bytes().numpy().copy() for key in keys]), axis=1)
    ones = bits.sum(0)
    # A bit is the same in all keys with a chance of 2 * 2^-32; four at once with one below 1e-20.
    constant = int(((ones == 0) | (ones == _KEYS)).sum())
    require(constant < 4, f"{constant} of 256 bits of a key never change")
    memory = keys[0]._bytes()
    with keys[0]:
        pass
    require(not bool(memory.any()), "a key stays in memory after its release")
    require_refusal("a wiped key", lambda: gaussian_noise((4,), key=keys[0]))


def check_seeds(seed: int) -> None:
    """Noise does not follow the seeds of anybody's generators."""
    with _seeded(seed):
        first = _step_noise()
    with _seeded(seed):
        second = _step_noise()
    require(not torch.equal(first, second), "noise repeats when NumPy's, Python's and torch's generators are seeded")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python, numpy, here = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(here)


def _step_noise() -> Tensor:
    model = torch.nn.Linear(16, 4, bias=False)
    recorder = Recorder(model.parameters())
    with PrivateOptimizer(model, recorder, specification(noise_multiplier=MULTIPLIER, max_grad_norm=BOUND)) as private:
        private.step()
    return recorder.seen[0][0]


def check_forks() -> None:
    """A forked process draws keys of its own, and cannot go on with its parent's run."""
    if not hasattr(os, "fork"):
        return
    model = torch.nn.Linear(2, 2, bias=False)
    with PrivateOptimizer(model, Recorder(model.parameters()), specification()) as private:

        def go_on() -> bytes:
            key = draw()
            try:
                private.step()
            except RuntimeError:
                return key
            return key + b"stepped"

        theirs = in_child(go_on)
    require(len(theirs) >= KEY_BYTES, "a forked process cannot draw a key")
    require(len(theirs) == KEY_BYTES, "a forked process spends its parent's steps")
    require(theirs != draw(), "a forked process draws the key that its parent draws next")


def draw() -> bytes:
    with NoiseKey.from_os() as key:
        return bytes(key._bytes().tolist())


def in_child(work: Callable[[], bytes]) -> bytes:
    """What ``work`` returns in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer
