# SPDX-License-Identifier: Apache-2.0
"""Planted bugs are caught, are gone afterwards, and the right code raises no alarm."""

import importlib
import pkgutil
import threading
from collections.abc import Callable
from typing import Any

import pytest

import wavedp.privacy
from wavedp import noise_key, private_step, storage
from wavedp.ops import noise as noise_ops
from wavedp.selftest import BUGS, DETECTORS, run_selftest
from wavedp.selftest.alarms import Alarm
from wavedp.selftest.planting import Bug, Planted
from wavedp.selftest.run import look_at_bug, look_at_right_code

# Reported bugs, and classes that every such list has, each by the plant that has it.
KNOWN = {
    "no clipping": "no_clip",
    "clipping of the batch": "batch_clip",
    "C for each layer": "per_layer_full_bound",
    "max_grad_norm ignored": "ignores_max_grad_norm",
    "ghost norm of a bias": "ghost_bias_norm",
    "bias not clipped": "bias_unclipped",
    "accumulation alias": "accumulation_alias",
    "NaN passes": "nan_passes",
    "denominator of the drawn batch": "denominator_from_batch",
    "empty batch skipped": "empty_batch_skipped",
    "no noise": "no_noise",
    "noise 1 % low": "noise_one_percent_low",
    "noise over the batch size": "noise_over_drawn_batch",
    "noise in bfloat16": "bfloat16_noise",
    "uniform noise": "uniform_noise",
    "tail cut at 4": "tail_cut_at_4",
    "noise replayed after a resume": "same_noise_after_resume",
    "same noise for every tensor": "same_noise_for_every_tensor",
    "same noise for every shard": "same_noise_for_every_shard",
    "backpropagation clipping, arXiv 2202.12219": "clips_gradient_of_mean",
    "Opacus #313": "closure_drops_noise",
    "Opacus 95fdb35a": "divided_twice",
    "Opacus #571, #819, PR #838": "denominator_from_data_set",
    "Opacus: a record that is not finite": "nan_times_zero",
    "Opacus: empty batches dropped": "empty_batches_dropped",
    "Opacus: pickles": "pickle_executed",
    "Opacus #616": "no_grid",
    "TF-Privacy #620, #81": "microbatch_clip",
    "TF-Privacy #153": "noise_scaled_for_mean",
    "jax_privacy: key of 31 bits": "key_of_31_bits",
    "jax_privacy: epsilon_from_gdp": "central_limit_accountant",
    "Fed-BioMed": "per_parameter_norms",
    "SmartNoise: odometer": "odometer_since_resume",
    "SmartNoise: covariance": "clipped_copy_unused",
    "DPWGAN": "no_clip",
}

MODULES = [
    noise_key,
    private_step,
    storage,
    noise_ops,
    *(importlib.import_module(f"wavedp.privacy.{one.name}") for one in pkgutil.iter_modules(wavedp.privacy.__path__)),
]


def contents() -> dict[tuple[str, str], Any]:
    """Everything that a bug may replace: what modules and their classes hold."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name in ("__builtins__", "_live"):
                continue
            found[module.__name__, name] = value
            if isinstance(value, type):
                found.update({(f"{module.__name__}.{name}", key): part for key, part in vars(value).items()})
    return found


def test_at_least_60_bugs_and_the_known_ones_among_them() -> None:
    assert len(BUGS) >= 60
    assert set(KNOWN.values()) <= set(BUGS)
    assert {bug.kind for bug in BUGS.values()} == {"clipping", "norms", "noise", "sampling", "ledger", "accounting"}
    assert all(bug.what.endswith(".") and bug.source for bug in BUGS.values())


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_active_and_caught_and_then_gone(name: str) -> None:
    before = contents()
    result = look_at_bug(name)
    after = contents()
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] is not after[key]] == []
    assert result.active, "the planted code did not run"
    assert result.found, "no detector noticed"
    assert not result.found[0].refused, result.found[0].said
    assert result.caught


@pytest.mark.parametrize("seed", range(12))
def test_right_code_raises_no_alarm(seed: int) -> None:
    assert look_at_right_code(seed) == []


def test_false_alarms_are_rare_by_construction() -> None:
    assert 60 * sum(one.false_alarm for one in DETECTORS) < 1e-4


def test_a_bug_is_gone_after_an_error() -> None:
    before = contents()

    def fail() -> None:
        with BUGS["no_noise"].planted():
            assert contents() != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert contents() == before


def test_every_kind_of_attribute_is_replaced_and_put_back() -> None:
    class Owner:
        def method(self) -> int:
            return 1

        @classmethod
        def of_class(cls) -> int:
            return 1

        @property
        def read(self) -> int:
            return 1

    class Heir(Owner):
        pass

    planted = Planted()
    inside = dict(vars(Owner))

    def more(original: Callable[..., int], *arguments: Any) -> int:
        planted.mark()
        return original(*arguments) + 1

    for name in ("method", "of_class", "read"):
        planted.replace(Owner, name, more)
    planted.replace(Heir, "method", more)
    assert (Owner().method(), Owner.of_class(), Owner().read, Heir().method()) == (2, 2, 2, 3)
    assert planted.runs == 5
    planted.undo()
    assert dict(vars(Owner)) == inside
    assert "method" not in vars(Heir)
    assert (Owner().method(), Owner.of_class(), Owner().read, Heir().method()) == (1, 1, 1, 1)


def test_a_bug_that_does_not_run_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUGS, "idle", Bug("idle", "noise", "nobody", "Does nothing.", lambda planted: None))
    result = look_at_bug("idle")
    assert not result.active
    assert result.found == ()
    assert not result.caught


def test_a_bug_that_breaks_its_own_code_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def plant(planted: Planted) -> None:
        def broken(original: object, *arguments: object, **options: object) -> None:
            planted.mark()
            raise AttributeError("a typing error")

        planted.replace(noise_key.NoiseKey, "from_os", broken)

    monkeypatch.setitem(BUGS, "broken", Bug("broken", "noise", "nobody", "Raises.", plant))
    with pytest.raises(AttributeError, match="a typing error"):
        look_at_bug("broken")
    assert look_at_right_code(0) == []


def test_a_report_fails_for_a_missed_bug_and_for_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = Bug("idle", "noise", "nobody", "Runs and changes nothing.", lambda planted: planted.mark())
    monkeypatch.setitem(BUGS, "idle", idle)
    missed = run_selftest(seeds=0, bugs=["idle"])
    assert not missed.passed
    assert missed.bugs[0].active

    def alarm(seed: int) -> None:
        raise Alarm("always")

    monkeypatch.setattr("wavedp.selftest.run.DETECTORS", (DETECTORS[0]._replace(detect=alarm),))
    report = run_selftest(seeds=2, bugs=[])
    assert [seed for seed, _ in report.false_alarms] == [0, 1]
    assert not report.passed


def test_an_unknown_bug_is_named() -> None:
    with pytest.raises(ValueError, match="no planted bug 'no_such_bug'"):
        run_selftest(seeds=0, bugs=["no_such_bug"])


def test_nothing_is_left_in_the_process() -> None:
    import logging

    import torch

    level, threads, state = logging.getLogger("wavedp.privacy").level, torch.get_num_threads(), torch.get_rng_state()
    children = threading.active_count()
    report = run_selftest(seeds=1, bugs=["no_noise"])
    assert report.passed
    assert logging.getLogger("wavedp.privacy").level == level
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == children
