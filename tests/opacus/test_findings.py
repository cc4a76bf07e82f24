# SPDX-License-Identifier: Apache-2.0
"""docs/opacus.md: what it says of this package holds, at small sizes, and the measurements see what they look for."""

from __future__ import annotations

import re

import findings as f
import page
import pytest
import torch

from wavedp.selftest import BUGS
from wavedp.selftest.run import look_at_bug

pytestmark = pytest.mark.filterwarnings("ignore")


def cells() -> list[list[str]]:
    """The rows of the page."""
    rows = re.findall(r"^\| \d+ \|.*\|$", page.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [row.strip("| ").split(" | ") for row in rows]


def test_the_page_has_ten_rows_and_no_fault_of_this_package() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert [row[0] for row in cells()] == [str(k) for k in range(1, 11)]
    assert all(len(row) == 5 for row in cells())
    assert f"\n{page.NONE}\n" in text
    assert text.endswith(page.TAIL)
    for name in re.findall(r"\]\(([\w/.-]+\.(?:md|txt))", text):
        assert (page.PAGE.parent / name).is_file(), name


# 1 is tests/house/test_precision.py


def test_2_noise_for_bfloat16_has_the_values_of_the_grid() -> None:
    found = f.our_values(1 << 18)
    assert found.distinct > 20_000
    pytest.importorskip("opacus", reason="needs opacus, of the extra [bench]")
    assert 2_000 < f.their_values(1 << 18).distinct < 5_000


def test_3_the_noise_ends_where_its_delta_does_not_matter() -> None:
    assert f.our_end() == pytest.approx(9.49, abs=0.01)
    assert f.truncation_delta(f.our_end()) < 1e-14
    assert f.truncation_delta(f.LIMIT) == pytest.approx(2.3e-5, rel=0.05)
    assert f.our_tail(1_000_000).largest > 4
    assert f.tail(lambda n: torch.full((n,), -7.0), 10, chunk=4) == f.Values(0, 7.0, 10)


def test_4_a_key_has_256_bits_and_no_seed() -> None:
    assert f.our_key_bits() == 256
    assert not f.our_noise_repeats()
    pytest.importorskip("opacus", reason="needs opacus, of the extra [bench]")
    assert f.their_noise_repeats()


def test_5_the_cipher_costs_less_than_their_generator() -> None:
    times = f.step_times()
    assert times
    for device, of in times.items():
        assert 1 < of["wavedp"] < of["Opacus, fused"], device


def test_6_a_run_under_the_same_seed_has_fresh_noise() -> None:
    found = f.our_replay(200)
    assert found.error > 0.5 * (2 * 200) ** 0.5
    assert found.epsilon == pytest.approx(4.377, abs=0.01)
    pytest.importorskip("opacus", reason="needs opacus, of the extra [bench]")
    assert f.their_replay(200).error < 1e-4


def test_7_constants_do_not_follow_the_data() -> None:
    assert f.our_constants(2560) == f.our_constants(2561) == (0.1, 256)
    pytest.importorskip("opacus", reason="needs opacus, of the extra [bench]")
    assert f.their_constants(2560) == (0.1, 256)
    assert f.their_constants(2561) == (1 / 11, 232)


def test_8_a_shuffling_loader_gets_poisson_batches() -> None:
    found = f.our_epoch(100, 1.0)
    assert 0.25 < found.once < 0.5  # exp(-1), of 400 records
    assert found.epsilon == pytest.approx(0.718, abs=0.001)
    assert f.shuffled_epsilon(100, 1.0) == pytest.approx(4.06, abs=0.01)
    assert f.shuffled_epsilon(1000, 0.7) == pytest.approx(6.53, abs=0.01)
    with pytest.raises(TypeError, match="poisson_sampling"):
        f.wavedp.PrivacyEngine().make_private(poisson_sampling=False)  # type: ignore[call-arg]


def test_9_epsilon_is_not_below_what_is_proven() -> None:
    lower, upper = f.our_bounds()
    assert 1.81 < lower < upper < 1.829
    pytest.importorskip("opacus", reason="needs opacus, of the extra [bench]")
    assert f.their_epsilon("gdp") == pytest.approx(1.6177, abs=1e-4)
    assert f.their_epsilon("prv") > lower


def test_10_planted_bugs_are_caught() -> None:
    assert look_at_bug("no_noise").caught
    (row,) = (row for row in cells() if row[0] == "10")
    assert f"{len(BUGS)} of {len(BUGS)} planted bugs caught, 0 false alarms in 60 seeds" in row[3]
