# SPDX-License-Identifier: Apache-2.0
"""Clipping factors, the reference sum, and the three forms of per-record gradients against it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wavedp.privacy import FlatClipping, clip_and_sum
from wavedp.privacy.per_sample import Materialised, OuterProducts, RowScatter


def test_factors_are_rounded_down_and_exact_at_the_edges() -> None:
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, 1e30, math.inf, math.nan], dtype=torch.float64)
    factors = FlatClipping(1.0).factors(norms.square(), torch.float32)
    assert factors.dtype == torch.float32
    assert factors[:2].tolist() == [1.0, 1.0]
    assert (factors.double() * norms)[2:5].max() < 1.0
    assert factors[3] == pytest.approx(0.5, rel=1e-6)
    assert factors[5:].tolist() == [0.0, 0.0]


def test_factors_too_small_for_float32_leave_the_record_out() -> None:
    """A denormal factor can round up by half, and the contribution with it."""
    norms = torch.tensor([1e37, 1e39, 1e150], dtype=torch.float64)
    factors = FlatClipping(1.0).factors(norms.square(), torch.float32)
    assert factors[0] > 0.0
    assert factors[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("max_grad_norm", [1e-6, 0.37, 1.0, 123.4])
def test_no_factor_lets_a_norm_exceed_the_bound(max_grad_norm: float) -> None:
    norms = 10.0 ** torch.empty(10_000, dtype=torch.float64).uniform_(-8, 8)
    for dtype in (torch.float32, torch.float64):
        factors = FlatClipping(max_grad_norm).factors(norms.square(), dtype).double()
        assert (factors * norms).max() <= max_grad_norm
        assert torch.equal(factors == 1.0, norms < max_grad_norm * (1 - 1e-7)) or dtype == torch.float64


def test_clip_and_sum_by_hand() -> None:
    weights = torch.tensor([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]])
    biases = torch.tensor([[4.0], [0.4], [0.0]])
    weight, bias = clip_and_sum([weights, biases], 1.0)  # norms 5, 0.5, 0
    assert torch.allclose(weight, torch.tensor([0.6 + 0.3, 0.0]), rtol=1e-6)
    assert torch.allclose(bias, torch.tensor([0.8 + 0.4]), rtol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_record_contributes_exactly_zero(poison: float) -> None:
    grads = [torch.randn(5, 3, 2), torch.randn(5, 4)]
    clean = clip_and_sum([g[[0, 1, 3, 4]] for g in grads], 1.0)
    grads[1][2, 0] = poison
    for poisoned, expected in zip(clip_and_sum(grads, 1.0), clean):
        assert torch.allclose(poisoned, expected, rtol=1e-6, atol=1e-7)


def test_half_precision_is_summed_in_float32() -> None:
    grads = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    (total,) = clip_and_sum([grads], 1.0)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(4096.0, rel=1e-6)  # a bfloat16 sum stalls at 256


def test_empty_batch_sums_to_zero() -> None:
    assert torch.equal(clip_and_sum([torch.empty(0, 3)], 1.0)[0], torch.zeros(3))


@pytest.mark.parametrize(
    ("grads", "error"),
    [
        ([], ValueError),
        ([torch.zeros(())], ValueError),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], ValueError),
        ([torch.zeros(2, 3, dtype=torch.int64)], TypeError),
    ],
)
def test_clip_and_sum_refuses(grads: list[Tensor], error: type[Exception]) -> None:
    with pytest.raises(error):
        clip_and_sum(grads, 1.0)


@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, math.nan, math.inf])
def test_bound_must_be_positive(max_grad_norm: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        FlatClipping(max_grad_norm)


def test_the_reference_sum_does_not_lose_small_records_behind_a_large_one() -> None:
    """2^15 records of 2^-25 beside one of 1: each vanishes in a float32 sum that begins with the large one."""
    grads = torch.full((1 + 2**15, 1), 2.0**-25)
    grads[0] = 1.0
    (whole,), (without,) = clip_and_sum([grads], 2.0), clip_and_sum([grads[1:]], 2.0)
    assert (whole - without).item() == pytest.approx(1.0, abs=2.0**-23)
    assert without.item() == pytest.approx(2.0**-10, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_sums_lose_no_more_than_a_block_of_small_records(tokens: int) -> None:
    """As above, for every form: a large record first, then small ones that one float32 sum would drop.

    The 63 beside the large one, in its float32 block of 64, are lost: 63 * 2^-25 of it. All others are not.
    """
    records = 1 + 2**13
    a, g = torch.full((records, tokens, 2), 1.0), torch.full((records, tokens, 2), 2.0**-25)
    g[0] = 1.0
    ids = torch.zeros(records, tokens, dtype=torch.int64)
    ones = torch.ones(records)
    exact = tokens * (1.0 + 2.0**13 * 2.0**-25)
    for form, lost in (
        (OuterProducts(a, g), 64 * 2.0**-25),
        (RowScatter(ids, g, 1, None), 2.0**-23),
        (Materialised(g.sum(1)), 2.0**-23),
    ):
        total = form.weighted_sum(ones)
        assert total.flatten().tolist() == pytest.approx([exact] * total.numel(), rel=lost)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(("bound", "size"), [(1e-9, 1e36), (1e-6, 3e37), (1e-9, 1e-36)])
def test_factor_times_gradient_may_be_subnormal(tokens: int, bound: float, size: float) -> None:
    """A factor and a row may be normal numbers whose float32 product is rounded to a few bits, or to none."""
    for step in range(40):
        a = torch.full((1, tokens, 1), size)
        g = torch.full((1, tokens, 1), (1 + step / 40) / size)
        form = OuterProducts(a, g)
        factors = FlatClipping(bound).factors(form.squared_norms(), torch.float32)
        assert 0.999 * bound < form.weighted_sum(factors).item() <= bound * (1 + 1e-6)


# Token counts on both sides of the Gram / building choice: T (d + p) <= d p.
@pytest.mark.parametrize("tokens", [0, 1, 3, 40, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_outer_products(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(4, tokens, 8, dtype=dtype), torch.randn(4, tokens, 6, dtype=dtype)
    grads = torch.einsum("btp,btd->bpd", g, a)
    form = OuterProducts(a, g)
    squared = grads.double().square().sum((1, 2))
    assert torch.allclose(form.squared_norms(), squared, rtol=tolerance, atol=1e-30)
    factors = torch.tensor([1.0, 0.5, 0.0, 0.25], dtype=dtype)
    expected = torch.einsum("b,bpd->pd", factors, grads).double()
    assert torch.allclose(form.weighted_sum(factors).double(), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("tokens", [4, 64])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_extreme_sizes_neither_overflow_nor_vanish(tokens: int, size: float) -> None:
    torch.manual_seed(1)
    a = torch.randn(3, tokens, 16) * size
    g = torch.randn(3, tokens, 16) / size
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double()).square().sum((1, 2))
    assert torch.allclose(OuterProducts(a, g).squared_norms(), exact, rtol=2e-4)


def test_a_large_masked_token_does_not_hide_the_others() -> None:
    a = torch.ones(1, 2, 4)
    a[0, 0] = 1e30  # its output gradient is 0: it contributes nothing
    g = torch.ones(1, 2, 4)
    g[0, 0] = 0.0
    assert OuterProducts(a, g).squared_norms().item() == pytest.approx(16.0, rel=1e-5)


@pytest.mark.parametrize("tokens", [2, 16, 256])
def test_cancelling_tokens_never_look_smaller_than_they_are(tokens: int) -> None:
    """Tokens in pairs that almost cancel: the float32 error is relative to the terms, not to the norm."""
    torch.manual_seed(2)
    a = torch.randn(200, 1, 300).expand(-1, tokens, -1) * (1 + 1e-6 * torch.randn(200, tokens, 1))
    g = torch.randn(200, 1, 300) * torch.tensor([1.0, -1.0]).repeat(tokens // 2)[None, :, None]
    for part in (slice(0, 300), slice(0, 4)):  # d = 300: Gram for few tokens; d = 4: built
        a_part, g_part = a[..., part], g[..., part]
        exact = torch.einsum("btp,btd->bpd", g_part.double(), a_part.double()).square().sum((1, 2))
        assert (OuterProducts(a_part, g_part).squared_norms() >= exact * (1 - 1e-6)).all()


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_row_scatter(padding_idx: int | None) -> None:
    torch.manual_seed(3)
    ids = torch.randint(0, 5, (4, 9))
    g = torch.randn(4, 9, 3)
    grads = torch.zeros(4, 5, 3, dtype=torch.float64)
    for b in range(4):
        for t in range(9):
            if ids[b, t] != padding_idx:
                grads[b, ids[b, t]] += g[b, t]
    form = RowScatter(ids, g, 5, padding_idx)
    assert torch.allclose(form.squared_norms(), grads.square().sum((1, 2)), rtol=1e-12)
    factors = torch.tensor([0.0, 1.0, 0.5, 0.25])
    expected = torch.einsum("b,bvp->vp", factors.double(), grads)
    assert torch.allclose(form.weighted_sum(factors).double(), expected, rtol=1e-5, atol=1e-6)


def poisoned_forms() -> list[tuple[Callable[[Tensor], object], tuple[int, ...]]]:
    ids = torch.zeros(3, 2, dtype=torch.int64)
    finite = torch.ones(3, 2, 4)
    return [
        (lambda x: Materialised(x), (3, 4)),
        (lambda x: OuterProducts(x, finite), (3, 2, 4)),
        (lambda x: OuterProducts(x, torch.zeros(3, 2, 4)), (3, 2, 4)),
        (lambda x: OuterProducts(finite, x), (3, 2, 4)),
        (lambda x: RowScatter(ids, x, 2, None), (3, 2, 4)),
    ]


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_shows_in_the_norm_and_not_in_the_sum(case: int, poison: float) -> None:
    make, shape = poisoned_forms()[case]
    x = torch.ones(shape)
    x[1].view(-1)[0] = poison
    form = make(x)
    assert torch.isfinite(form.squared_norms()).tolist() == [True, False, True]
    assert torch.isfinite(form.weighted_sum(torch.tensor([1.0, 0.0, 1.0]))).all()
