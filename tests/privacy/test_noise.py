# SPDX-License-Identifier: Apache-2.0
"""The law of the noise, its tail, its freshness, and the grid. Statistical thresholds are at 1e-7 or below."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from wavedp.privacy import Entropy, gaussian_noise, grid_step, round_to_grid
from wavedp.privacy.entropy import unpredictable_draws

DRAWS = 1_000_000
SIGMAS = 5.4  # two-sided 6.7e-8


def test_law() -> None:
    x = gaussian_noise((DRAWS,), 3.0, dtype=torch.float64).numpy() / 3.0
    assert abs(x.mean()) < SIGMAS / math.sqrt(DRAWS)
    assert abs(x.var() - 1.0) < SIGMAS * math.sqrt(2.0 / DRAWS)
    assert stats.kstest(x, "norm").pvalue > 1e-7
    for threshold in (3.0, 4.0, 4.6):
        expected = DRAWS * 2 * stats.norm.sf(threshold)
        count = int((np.abs(x) > threshold).sum())
        assert stats.poisson.ppf(1e-8, expected) <= count <= stats.poisson.isf(1e-8, expected), threshold


def test_coordinates_are_uncorrelated() -> None:
    x = gaussian_noise((DRAWS,), 1.0).double().numpy()
    half = DRAWS // 2
    for shift in (1, 2, 16, 160, 1 << 18, half):  # 16 lies between the cosine and the sine of a pair
        correlation = np.mean(x[:-shift] * x[shift:])
        assert abs(correlation) < SIGMAS / math.sqrt(DRAWS - shift), shift


def test_never_the_same_twice() -> None:
    draws = torch.cat([gaussian_noise((100_001,), 1.0, dtype=torch.float64) for _ in range(4)])
    # 64 + 32 bits a pair: two equal values among 400,000 are a 1e-15 event, up to float64's own grid near 0.
    assert torch.unique(draws).numel() > draws.numel() - 3


def test_shapes_dtypes_and_zero() -> None:
    assert gaussian_noise((), 1.0).shape == ()
    assert gaussian_noise((3, 0, 2), 1.0).shape == (3, 0, 2)
    assert gaussian_noise((5, 7), 1.0).dtype == torch.float32
    assert gaussian_noise((2,), 1.0, dtype=torch.float64).dtype == torch.float64
    assert torch.equal(gaussian_noise((4,), 0.0), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_noise_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        gaussian_noise((2,), 1.0, dtype=dtype)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_bad_std_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        gaussian_noise((2,), std)


def test_seeded_entropy_is_marked_and_separated() -> None:
    first, again = Entropy(5, "noise"), Entropy(5, "noise")
    assert first.insecure
    assert not Entropy().insecure
    a = gaussian_noise((64,), 1.0, entropy=first)
    assert torch.equal(a, gaussian_noise((64,), 1.0, entropy=again))
    assert not torch.equal(a, gaussian_noise((64,), 1.0, entropy=first))
    assert not torch.equal(a, gaussian_noise((64,), 1.0, entropy=Entropy(5, "sampling")))
    # torch's CPU generator keeps 32 bits of a seed; these seeds differ in bit 32.
    assert not torch.equal(a, gaussian_noise((64,), 1.0, entropy=Entropy(5 + 2**32, "noise")))


@pytest.mark.parametrize(("std", "step"), [(1.0, 2.0**-12), (1.9, 2.0**-12), (2.0, 2.0**-11), (0.3, 2.0**-14)])
def test_grid_step(std: float, step: float) -> None:
    assert grid_step(std) == step


def test_rounding_hides_the_low_bits_of_the_sum() -> None:
    """Without the grid, 'a multiple of 2^-24' tells a sum of 0 from a sum of 1/3 under perfect noise."""
    step = grid_step(1.0)
    for total in (0.0, 1.0 / 3.0, 1e-9):
        noisy = total + gaussian_noise((100_000,), 1.0, dtype=torch.float64)
        rounded = round_to_grid(noisy, step)
        assert torch.equal(rounded / step, torch.round(rounded / step))
        assert (rounded - noisy).abs().max() <= step / 2


def test_grid_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        round_to_grid(torch.ones(2), 0.3)
    with pytest.raises(ValueError, match="step"):
        round_to_grid(torch.ones(2), 0.0)


def test_draws_inside_a_model_come_from_a_seed_that_nobody_knows() -> None:
    """A new one whenever it is asked for; a known seed from outside neither counts nor is lost."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        with unpredictable_draws(torch.device("cpu")) as draw_anew:
            for _ in range(3):
                draw_anew()
                drawn.append(tuple(torch.rand(4).tolist()))
        after = torch.rand(4)
    assert len(set(drawn)) == 6
    torch.manual_seed(0)
    assert torch.equal(torch.rand(4), after)
