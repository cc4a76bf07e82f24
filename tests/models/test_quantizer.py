# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantisation: the grid, its numbering, the gradient; and how the use of codes is told."""

import math

import pytest
import torch

from wavedp.models.quantizer import FiniteScalarQuantizer, VectorQuantizer

LEVELS = (4, 3, 5)  # even and odd


def make(levels: tuple[int, ...] = LEVELS) -> FiniteScalarQuantizer:
    torch.manual_seed(0)
    return FiniteScalarQuantizer(6, levels, width_out=8).eval()


def test_every_token_is_one_point_of_the_grid():
    quantizer = make()
    digits = torch.cartesian_prod(torch.arange(5), torch.arange(3), torch.arange(4)).flip(1)  # the first counts least
    points = 2 * digits / (torch.tensor(LEVELS) - 1) - 1
    tokens = torch.arange(math.prod(LEVELS))
    torch.testing.assert_close(quantizer.lookup(tokens), quantizer.expand(points))
    assert quantizer.num_codes == 60


def test_encoding_takes_the_nearest_point_and_its_token_looks_it_up():
    quantizer = make()
    hidden = 4 * torch.randn(50, 7, 6)
    result = quantizer(hidden)
    z = torch.tanh(quantizer.reduce(hidden))
    nearest = [(z[..., i, None] - torch.linspace(-1, 1, n)).abs().argmin(-1) for i, n in enumerate(LEVELS)]
    torch.testing.assert_close(result.tokens, nearest[0] + 4 * nearest[1] + 12 * nearest[2])
    torch.testing.assert_close(result.values, quantizer.lookup(result.tokens))
    assert len(result.tokens.unique()) > 40  # no end of the numbering is unreachable
    assert float(result.codebook_loss) == float(result.commitment_loss) == 0


def test_the_gradient_goes_straight_through_the_rounding():
    quantizer = make()
    hidden = torch.randn(5, 7, 6, requires_grad=True)
    (through,) = torch.autograd.grad(quantizer(hidden).values.sum(), hidden)
    (without,) = torch.autograd.grad(quantizer.expand(torch.tanh(quantizer.reduce(hidden))).sum(), hidden)
    torch.testing.assert_close(through, without)


def test_what_is_not_finite_stays_so_and_stops_no_count():
    quantizer = make().train()
    assert quantizer(torch.full((1, 2, 6), torch.nan)).values.isnan().all()


@pytest.mark.parametrize("make_one", [lambda: VectorQuantizer(6, 60, 4), make])
def test_the_use_of_codes_is_perplexity_and_share(make_one):
    quantizer = make_one()
    assert [float(x) for x in quantizer.use_of_codes()] == [1.0, 0.0]
    quantizer.usage[:12] = 1 / 12
    perplexity, used = quantizer.use_of_codes()
    assert float(perplexity) == pytest.approx(12, rel=1e-5)
    assert float(used) == pytest.approx(0.2)
    quantizer.usage[0] = 100.0
    assert float(quantizer.use_of_codes()[0]) < 1.2


@pytest.mark.parametrize("make_one", [lambda: VectorQuantizer(6, 60, 4), make])
def test_training_counts_the_tokens(make_one):
    quantizer = make_one().train()
    hidden = torch.randn(40, 50, 6)
    for _ in range(200):
        tokens = quantizer(hidden).tokens
    counted = torch.bincount(tokens.flatten(), minlength=60) / tokens.numel()
    torch.testing.assert_close(quantizer.usage, counted, atol=0.01, rtol=0.2)


@pytest.mark.parametrize("make_one", [lambda: VectorQuantizer(6, 60, 4), make])
def test_autocast_does_not_change_which_code_is_nearest(make_one):
    quantizer = make_one().eval()
    with torch.no_grad():
        quantizer.reduce.weight.copy_(torch.eye(6)[: len(quantizer.reduce.weight)])  # exact in bfloat16 too
        quantizer.reduce.bias.zero_()
    hidden = torch.randn(30, 40, 6).bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = quantizer(hidden)
    assert torch.equal(half.tokens, quantizer(hidden).tokens)
    assert half.values.dtype == torch.bfloat16
