# SPDX-License-Identifier: Apache-2.0
"""The label histogram: charged before it is drawn, drawn once, noised as charged, and public afterwards."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wavedp import functional
from wavedp.privacy import (
    LedgerError,
    PrivacyLedger,
    PrivacySpec,
    histogram,
    label_probabilities,
    load_label_histogram,
    release_label_histogram,
)

MakeSpec = Callable[..., PrivacySpec]
LABELS = torch.arange(90) % 3


@pytest.fixture
def made(spec: MakeSpec) -> PrivacySpec:
    return spec(label_noise_multiplier=5.0)


@pytest.mark.parametrize("mode", ["standard", "strict"])
def test_counts_have_the_noise_that_is_charged(spec: MakeSpec, mode: str) -> None:
    """4,000 classes, of which three have records."""
    strict = {"noise_mode": mode, "trainable_parameters": 1000} if mode == "strict" else {}
    made = spec(label_noise_multiplier=5.0, **strict)
    counts = release_label_histogram(LABELS, 4000, made)
    assert counts.dtype == torch.float64
    noise = counts.clone()
    noise[:3] -= 30
    # Six standard errors: false alarms of 2e-9 each.
    assert abs(float(noise.mean())) <= 6 * 5.0 / math.sqrt(4000)
    assert float(noise.std()) == pytest.approx(5.0, rel=6 / math.sqrt(2 * 4000))
    grid = made.label_grid or functional.grid_step(5.0)
    assert grid <= 1.0
    assert torch.equal(counts, (counts / grid).round() * grid)
    assert not torch.equal(counts, release_label_histogram(LABELS, 4000, made))


def test_it_is_charged_before_it_is_drawn(made: PrivacySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "counts.json"
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:

        def failing(*arguments: object, **options: object) -> torch.Tensor:
            assert ledger.released == {"label_histogram": str(file)}
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(histogram, "noisy_mean", failing)
            with pytest.raises(MemoryError):
                release_label_histogram(LABELS, 3, made, ledger=ledger, path=file)
        assert not file.exists()
        with pytest.raises(RuntimeError, match="not drawn again"):
            release_label_histogram(LABELS, 3, made, ledger=ledger, path=file)


def test_it_is_saved_and_not_drawn_twice(made: PrivacySpec, tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:
        counts = release_label_histogram(LABELS, 3, made, ledger=ledger, path=file)
    assert torch.equal(load_label_histogram(file), counts)
    assert json.loads(file.read_text())["noise_multiplier"] == 5.0
    content = file.read_bytes()
    again = PrivacyLedger(tmp_path / "ledger", made)
    with again, pytest.raises(RuntimeError, match=f"read its result in {file}"):
        release_label_histogram(LABELS, 3, made, ledger=again, path=tmp_path / "other.json")
    assert file.read_bytes() == content
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("labels", "classes", "error", "message"),
    [
        (LABELS.int(), 3, TypeError, "int64"),
        (LABELS.tolist(), 3, TypeError, "list"),
        (LABELS[None], 3, ValueError, r"\[n\]"),
        (torch.zeros(101, dtype=torch.int64), 3, ValueError, "dataset_size_bound=100"),
        (LABELS, 2, ValueError, r"in \[0, 2\)"),
        (-LABELS, 3, ValueError, r"in \[0, 3\)"),
        (LABELS, 0, ValueError, "num_classes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_charged(
    made: PrivacySpec, tmp_path: Path, labels: torch.Tensor, classes: int, error: type[Exception], message: str
) -> None:
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:
        with pytest.raises(error, match=message):
            release_label_histogram(labels, classes, made, ledger=ledger)
        assert ledger.released == {}


def test_a_specification_or_ledger_that_does_not_charge_it_is_refused(
    spec: MakeSpec, made: PrivacySpec, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="charges no label histogram"):
        release_label_histogram(LABELS, 3, spec())
    with PrivacyLedger(tmp_path / "ledger", spec(label_noise_multiplier=9.0)) as ledger:
        with pytest.raises(LedgerError, match="another specification"):
            release_label_histogram(LABELS, 3, made, ledger=ledger)
        assert ledger.released == {}


def test_a_seed_is_not_taken_for_a_private_release(made: PrivacySpec, tmp_path: Path) -> None:
    with PrivacyLedger(tmp_path / "ledger", made) as ledger:
        with pytest.raises(ValueError, match="not private"):
            release_label_histogram(LABELS, 3, made, ledger=ledger, insecure_seed=1)
        assert ledger.released == {}


def test_no_records_are_a_histogram_too(made: PrivacySpec) -> None:
    counts = release_label_histogram(torch.zeros(0, dtype=torch.int64), 3, made, insecure_seed=1)
    assert counts.count_nonzero() == 3
    again = release_label_histogram(torch.zeros(0, dtype=torch.int64), 3, made, insecure_seed=1)
    assert torch.equal(counts, again)


def test_probabilities() -> None:
    assert label_probabilities(torch.tensor([3.0, -2.0, 1.0])).tolist() == [0.75, 0.0, 0.25]
    assert label_probabilities(torch.tensor([-3.0, -2.0])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("content", ["[]", '{"noised_counts": []}', '{"noised_counts": [1, "2"]}', "{", "[NaN]"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "counts.json").write_text(content)
    with pytest.raises(ValueError, match=r"counts\.json"):
        load_label_histogram(tmp_path / "counts.json")
