# SPDX-License-Identifier: Apache-2.0
"""The public functions on the gradients of single records: ``wavedp.ghost_norm`` and its like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavedp

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gradients_of_records(layer: nn.Module, x: Tensor, grad_outputs: Tensor) -> list[Tensor]:
    """Autograd, one record at a time: [B, *parameter] of every parameter."""
    records = []
    for record, grads in zip(x, grad_outputs):
        records.append(torch.autograd.grad(layer(record[None]), list(layer.parameters()), grads[None]))
    return [torch.stack(parameter) for parameter in zip(*records)]


@pytest.mark.parametrize("shape", [(5, 12), (5, 7, 12), (5, 3, 4, 12), (5, 40, 12)], ids=str)
def test_ghost_norm_is_that_of_autograd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9, bias=False).double()
    x, g = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 9, dtype=torch.float64)
    (grads,) = gradients_of_records(layer, x, g)
    squared = wavedp.ghost_norm(x, g)
    assert torch.allclose(squared, grads.square().sum((1, 2)), rtol=1e-12)
    assert torch.allclose(squared.sqrt(), wavedp.per_sample_norm([grads]), rtol=1e-12)
    factors = wavedp.clip_factors(squared.sqrt(), 3.0)
    total = wavedp.scaled_weight_grad(g, x, factors)
    assert torch.allclose(total, torch.einsum("b,bpd->pd", factors.double(), grads), rtol=1e-12)


def test_embedding_grad_norm_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(6, 5, padding_idx=2).double()
    ids, g = torch.randint(0, 6, (4, 3, 7)), torch.randn(4, 3, 7, 5, dtype=torch.float64)
    (grads,) = gradients_of_records(layer, ids, g)
    expected = grads.square().sum((1, 2))
    assert torch.allclose(wavedp.embedding_grad_norm(ids, g, 2), expected, rtol=1e-12)
    assert torch.allclose(wavedp.embedding_grad_norm(ids.to(torch.uint8), g, 2), expected, rtol=1e-12)
    assert (wavedp.embedding_grad_norm(ids, g) > expected).all()
    single = wavedp.embedding_grad_norm(ids[:, 0, 0], g[:, 0, 0])
    assert torch.allclose(single, g[:, 0, 0].square().sum(1), rtol=1e-12)


def test_norms_carry_no_gradient() -> None:
    x, g = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    results = [
        wavedp.ghost_norm(x, g),
        wavedp.embedding_grad_norm(torch.zeros(2, 3, dtype=torch.int64), g),
        wavedp.per_sample_norm([x, g]),
        *wavedp.clip_and_sum([x, g], 1.0),
        wavedp.scaled_weight_grad(g, x, torch.ones(2)),
        wavedp.clip_factors(torch.ones(2, requires_grad=True), 1.0),
    ]
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_and_sum_by_hand(dtype: torch.dtype) -> None:
    weights = torch.tensor([[3.0, 0.0], [0.5, 0.0], [0.0, 0.0]], dtype=dtype)
    biases = torch.tensor([[4.0], [0.25], [0.0]], dtype=dtype)
    assert torch.allclose(wavedp.per_sample_norm([weights, biases])[[0, 2]], torch.tensor([5.0, 0.0]).double())
    weight, bias = wavedp.clip_and_sum([weights, biases], 1.0)  # norms 5, 0.56, 0
    assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(weight.double(), torch.tensor([0.6 + 0.5, 0.0]).double(), rtol=1e-6)
    assert torch.allclose(bias.double(), torch.tensor([0.8 + 0.25]).double(), rtol=1e-6)


def test_clip_and_sum_of_mixed_types_and_no_record() -> None:
    grads = [torch.randn(0, 3), torch.randn(0, 2, 2, dtype=torch.float64)]
    assert [total.tolist() for total in wavedp.clip_and_sum(grads, 1.0)] == [[0.0] * 3, [[0.0] * 2] * 2]
    grads = [torch.full((1, 4), 3.0, dtype=torch.bfloat16), torch.full((1, 7), 2.0, dtype=torch.float64)]
    low, high = wavedp.clip_and_sum(grads, 4.0)  # norm 8
    assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
    assert torch.allclose(low, torch.full((4,), 1.5), rtol=1e-6)
    assert torch.allclose(high, torch.full((7,), 1.0, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_record_that_is_not_finite_contributes_exactly_zero(poison: float) -> None:
    grads = [torch.randn(5, 3, 2), torch.randn(5, 4)]
    clean = wavedp.clip_and_sum([g[[0, 1, 3, 4]] for g in grads], 1.0)
    grads[1][2, 0] = poison
    assert torch.isfinite(wavedp.per_sample_norm(grads)).tolist() == [True, True, False, True, True]
    for found, expected in zip(wavedp.clip_and_sum(grads, 1.0), clean):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_grad_norm", [1e-6, 0.37, 1.0, 123.4])
def test_no_factor_lets_a_norm_exceed_the_bound(max_grad_norm: float) -> None:
    norms = 10.0 ** torch.empty(10_000, dtype=torch.float64).uniform_(-8, 8)
    factors = wavedp.clip_factors(norms, max_grad_norm)
    assert factors.dtype == torch.float32
    assert (factors.double() * norms).max() <= max_grad_norm
    assert torch.equal(factors == 1.0, norms < max_grad_norm * (1 - 1e-7))
    assert (factors.double() * norms)[norms > max_grad_norm].min() >= max_grad_norm * (1 - 1e-6)


def test_factors_at_the_edges() -> None:
    norms = torch.tensor([0.0, 0.5, math.inf, math.nan, 1e39, 1e150], dtype=torch.float64)
    assert wavedp.clip_factors(norms, 1.0).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_one_record_moves_the_sum_by_no_more_than_the_bound() -> None:
    torch.manual_seed(1)
    grads = [torch.randn(20, 30) * 10.0 ** torch.empty(20, 1).uniform_(-20, 20), torch.randn(20, 4, 5)]
    whole = wavedp.clip_and_sum(grads, 0.5)
    for record in range(20):
        kept = [k for k in range(20) if k != record]
        without = wavedp.clip_and_sum([g[kept] for g in grads], 0.5)
        moved = math.sqrt(sum((x - y).double().square().sum().item() for x, y in zip(whole, without)))
        assert moved <= 0.5 * (1 + 1e-5)


def test_under_compile() -> None:
    x, g = torch.randn(3, 5, 8), torch.randn(3, 5, 6)

    def step(x: Tensor, g: Tensor) -> Tensor:
        factors = wavedp.clip_factors(wavedp.ghost_norm(x, g).sqrt(), 1.0)
        return wavedp.scaled_weight_grad(g, x, factors)

    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, g), step(x, g), rtol=1e-6)


x3, x4 = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: wavedp.ghost_norm([1.0], x3), TypeError, "ghost_norm takes torch tensors"),
    (lambda: wavedp.ghost_norm(x3, x3.int()), TypeError, "grad_outputs of ghost_norm must be float32"),
    (lambda: wavedp.ghost_norm(x3, x3.to_sparse()), TypeError, "dense tensors"),
    (lambda: wavedp.ghost_norm(torch.ones(2), torch.ones(2)), ValueError, r"need the axes \[B, \.\.\., width\]"),
    (lambda: wavedp.ghost_norm(x3, x4), ValueError, "must agree in all axes but the last"),
    (lambda: wavedp.ghost_norm(x3, x3[:, 0]), ValueError, "must agree in all axes but the last"),
    (lambda: wavedp.embedding_grad_norm(x3[..., 0], x3), TypeError, "must be integers, not torch.float32"),
    (lambda: wavedp.embedding_grad_norm(x3.long(), x3), ValueError, r"expected \[B, \.\.\.\] and"),
    (lambda: wavedp.embedding_grad_norm(x3[..., 0].long(), x3, -1), ValueError, "add the number of embeddings"),
    (lambda: wavedp.embedding_grad_norm(x3[..., 0].long(), x3, 1.5), TypeError, "an integer padding_idx or None"),
    (lambda: wavedp.per_sample_norm([]), ValueError, "grad_samples of per_sample_norm is empty"),
    (lambda: wavedp.per_sample_norm(x3), TypeError, "takes a list of tensors"),
    (lambda: wavedp.per_sample_norm([x3, torch.tensor(1.0)]), ValueError, "record axis first"),
    (lambda: wavedp.per_sample_norm([x3, x3[:1]]), ValueError, r"disagree on the number of records: \[1, 2\]"),
    (lambda: wavedp.per_sample_norm([x3, x3.to("meta")]), ValueError, "lie on cpu and on meta"),
    (lambda: wavedp.clip_factors(x3, 1.0), ValueError, r"must have the shape \[B\], not \(2, 3, 4\)"),
    (lambda: wavedp.clip_factors(torch.ones(2), 0.0), ValueError, "positive and finite, not 0.0"),
    (lambda: wavedp.clip_factors(torch.ones(2), math.inf), ValueError, "positive and finite, not inf"),
    (lambda: wavedp.clip_factors(torch.ones(2), math.nan), ValueError, "positive and finite, not nan"),
    (lambda: wavedp.clip_factors(torch.ones(2), True), TypeError, "a real number max_grad_norm, not a bool"),
    (lambda: wavedp.clip_factors(torch.ones(2), "1"), TypeError, "a real number max_grad_norm, not a str"),
    (lambda: wavedp.clip_and_sum([x3.long()], 1.0), TypeError, "grad_samples of clip_and_sum must be float32"),
    (lambda: wavedp.clip_and_sum([x3], -1.0), ValueError, "positive and finite, not -1.0"),
    (lambda: wavedp.scaled_weight_grad(x3, x4, torch.ones(2)), ValueError, "must agree in all axes but the last"),
    (lambda: wavedp.scaled_weight_grad(x3, x3, torch.ones(3)), ValueError, r"must have the shape \[2\], not \(3,\)"),
    (lambda: wavedp.scaled_weight_grad(x3, x3, [1.0, 1.0]), TypeError, "takes torch tensors, not a list of 2"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
