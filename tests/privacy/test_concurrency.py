# SPDX-License-Identifier: Apache-2.0
"""One optimizer, one process, one thread: no second holder of the same sums or reserved steps."""

import copy
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from wavedp.privacy import PrivacyLedger, PrivacySpec, PrivateOptimizer

MakeSpec = Callable[..., PrivacySpec]


def make(spec: PrivacySpec, ledger: PrivacyLedger | None = None) -> tuple[nn.Linear, PrivateOptimizer]:
    model = nn.Linear(3, 2)
    return model, PrivateOptimizer(model, torch.optim.SGD(model.parameters()), spec, ledger=ledger)


def test_copies_and_forks_cannot_spend_the_same_reservation(spec: MakeSpec, tmp_path: Path) -> None:
    with PrivacyLedger(tmp_path / "ledger", spec()) as ledger:
        _, private = make(spec(), ledger)
        private.step()
        with pytest.raises(TypeError, match="copied"):
            copy.deepcopy(private)
        assert refused_in_a_child(private.step)


def test_a_fork_in_the_middle_of_a_batch_cannot_release_it_too(spec: MakeSpec) -> None:
    model, private = make(spec())
    private.backward(model(torch.randn(4, 3)).sum(1))
    assert refused_in_a_child(private.step)
    assert refused_in_a_child(lambda: private.backward(model(torch.randn(4, 3)).sum(1)))
    private.step()


def refused_in_a_child(call: Callable[[], None]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            call()
        except RuntimeError as error:
            os._exit(17 if "another process" in str(error) else 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


def test_concurrent_use_is_refused(spec: MakeSpec) -> None:
    model, private = make(spec())
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(60)

    hook = private.optimizer.register_step_pre_hook(wait)
    thread = threading.Thread(target=private.step)
    thread.start()
    try:
        assert inside.wait(60)
        for call in (private.step, private.discard, lambda: private.backward(model(torch.randn(4, 3)).sum(1))):
            with pytest.raises(RuntimeError, match="one thread"):
                call()
    finally:
        go_on.set()
        thread.join()
    hook.remove()
    private.step()
    assert private.steps_charged == 2
