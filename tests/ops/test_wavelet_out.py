# SPDX-License-Identifier: Apache-2.0
"""``out=`` of every wavelet function: where results go, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import wavedp

GRID = (2, 3)


def leaves(structure: Any) -> list[Tensor]:
    if isinstance(structure, Tensor):
        return [structure]
    return [leaf for part in structure for leaf in leaves(part)]


def like(structure: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of other tensors."""
    if isinstance(structure, Tensor):
        return make(structure)
    return type(structure)(like(part, make) for part in structure)


def inputs(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64).to(device, dtype)
    if name == "idwt2":
        return wavedp.dwt2(x)
    if name.startswith("waverec2"):
        return wavedp.wavedec2(x, 10 if "10" in name else 2)
    if name == "wavelet_untokens":
        return wavedp.wavelet_tokens(x, 2, GRID)
    return x


CALLS: dict[str, Callable[..., Any]] = {
    "dwt2": lambda x, **options: wavedp.dwt2(x, "zero", **options),
    "idwt2": lambda coeffs, **options: wavedp.idwt2(coeffs, **options),
    "wavedec2": lambda x, **options: wavedp.wavedec2(x, 2, **options),
    "wavedec2 of no level": lambda x, **options: wavedp.wavedec2(x, 0, **options),
    "wavedec2 of 10 levels": lambda x, **options: wavedp.wavedec2(x, 10, **options),
    "waverec2": lambda coeffs, **options: wavedp.waverec2(coeffs, **options),
    "waverec2 of 10 levels": lambda coeffs, **options: wavedp.waverec2(coeffs, output_size=(8, 12), **options),
    "coarse": lambda x, **options: wavedp.coarse(x, 2, **options),
    "coarse of no level": lambda x, **options: wavedp.coarse(x, 0, **options),
    "wavelet_tokens": lambda x, **options: wavedp.wavelet_tokens(x, 2, GRID, std=[2.0, 3.0, 4.0], **options),
    "wavelet_untokens": lambda t, **options: wavedp.wavelet_untokens(t, GRID, output_size=(8, 12), **options),
}
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda result: torch.full_like(result, torch.nan, memory_format=torch.contiguous_format),
    "every other": lambda result: result.new_full((*result.shape[:-1], 2 * result.shape[-1]), torch.nan)[..., ::2],
    "transposed": lambda result: torch.full_like(result.mT.contiguous(), torch.nan).mT,
    "negated lazily": lambda result: torch._neg_view(torch.full_like(result, torch.nan)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CALLS)
def test_results_are_written_and_returned(target: Any, name: str, place: str) -> None:
    if target.interpreted and "10" in name:
        pytest.skip("needs a CUDA device: ten levels take the interpreter seven seconds")
    for dtype in (torch.float32, torch.float16):
        x = inputs(name, dtype, target.device)
        expected = CALLS[name](x)
        out = like(expected, PLACES[place])
        result = CALLS[name](x, out=out)
        for given, returned, wanted in zip(leaves(out), leaves(result), leaves(expected), strict=True):
            assert returned is given
            assert torch.equal(given, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_allocated(name: str) -> None:
    pytest.importorskip("wavedp._csrc", reason="the reference allocates at will")
    if "10" in name:
        pytest.skip("chained levels need an approximation between them")
    x = inputs(name)
    out = like(CALLS[name](x), torch.clone)

    def call() -> Any:
        if name == "wavelet_tokens":  # without the constants of a normalisation
            return wavedp.wavelet_tokens(x, 2, GRID, out=out)
        return CALLS[name](x, out=out)

    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    assert sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0) == 0


def test_energies_come_beside_out() -> None:
    x = inputs("wavelet_tokens")
    tokens, energies = wavedp.wavelet_tokens(x, 2, GRID, energies=True)
    out = [torch.empty_like(one) for one in tokens]
    written, again = wavedp.wavelet_tokens(x, 2, GRID, energies=True, out=out)
    assert all(one is given and torch.equal(one, wanted) for one, given, wanted in zip(written, out, tokens))
    assert torch.equal(again, energies)


@pytest.mark.parametrize("name", CALLS)
def test_an_out_that_does_not_fit_is_refused(name: str) -> None:
    x = inputs(name)
    expected = CALLS[name](x)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (like(expected, lambda r: r.double()), TypeError, "of torch.float32, not torch.float64"),
        (like(expected, lambda r: r[..., :-1]), ValueError, "must have the shape"),
        (like(expected, lambda r: r.to("meta")), ValueError, "must be on cpu as the input is, not on meta"),
        (like(expected, lambda r: r.numpy()), (TypeError, ValueError), "not a ndarray"),  # type: ignore[list-item]
        (like(expected, lambda r: r.to_sparse()), TypeError, "dense tensor"),
    ]
    if not isinstance(expected, Tensor):
        wrong += [(expected[0], ValueError, "not a Tensor"), (expected[:-1], ValueError, "must be")]
    for out, error, message in wrong:
        with pytest.raises(error, match=f"out of {name.split()[0]}.*{message}"):
            CALLS[name](x, out=out)


@pytest.mark.parametrize("name", CALLS)
def test_out_and_a_gradient_do_not_go_together(name: str) -> None:
    x = inputs(name)
    out = CALLS[name](x)
    for given, where in ((like(x, lambda leaf: leaf.clone().requires_grad_()), out), (x, None)):
        if where is None:
            where = like(out, lambda leaf: leaf.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
            CALLS[name](given, out=where)
        with torch.no_grad():
            result = CALLS[name](given, out=where)
        assert all(map(torch.equal, leaves(result), leaves(CALLS[name](x))))


def test_memory_shared_with_the_input_is_refused() -> None:
    memory = torch.randn(2, 6, 8, 8)
    x = memory[:, :3]
    band = memory[:, :3, :4, :4]
    fresh: list[Any] = [torch.empty(2, 3, 4, 4) for _ in range(3)]
    for overlapping in (band, memory.view(-1)[50:146].view(2, 3, 4, 4), x[..., ::2, ::2], x[..., 1::2, 1::2]):
        with pytest.raises(ValueError, match="overlaps the memory of its input"):
            wavedp.dwt2(x, out=(overlapping, tuple(fresh)))
        with pytest.raises(ValueError, match="overlaps the memory of its input"):
            wavedp.coarse(x, 1, out=overlapping)
    coeffs = wavedp.dwt2(x)
    whole = torch.empty(2, 3, 8, 8)
    whole[..., :4, :4] = coeffs[0]
    with pytest.raises(ValueError, match="overlaps the memory of its input"):
        wavedp.idwt2((whole[..., :4, :4], coeffs[1]), out=whole)
    tokens = wavedp.wavelet_tokens(x, 1, 4)
    with pytest.raises(ValueError, match="overlaps the memory of its input"):
        wavedp.wavelet_tokens(x, 1, 4, out=[tokens[0], memory.view(-1)[: tokens[1].numel()].view(tokens[1].shape)])
    with pytest.raises(ValueError, match="overlaps the memory of its input"):
        wavedp.wavelet_untokens(tokens, 4, channels=3, out=tokens[1].as_strided((2, 3, 8, 8), (192, 64, 8, 1), 0))


def test_results_that_share_memory_are_refused() -> None:
    x = torch.randn(2, 8, 8)
    band = torch.empty(2, 4, 4)
    with pytest.raises(ValueError, match="two tensors in out of dwt2 overlap"):
        wavedp.dwt2(x, out=(band, (torch.empty(2, 4, 4), band, torch.empty(2, 4, 4))))
    with pytest.raises(RuntimeError, match="single memory location"):
        wavedp.coarse(x, 1, out=torch.empty(1, 4, 4).expand(2, 4, 4))


def test_interleaved_memory_is_no_overlap() -> None:
    """Input and results are the channels of one buffer: their extents overlap, their elements do not."""
    memory = torch.randn(2, 7, 8, 8)
    x = memory[:, :3].clone()
    expected = wavedp.coarse(x, 1)
    memory[:, :3] = x
    result = wavedp.coarse(memory[:, :3], 1, out=memory[:, 4:, :4, ::2])
    assert torch.equal(result, expected)
    assert torch.equal(memory[:, :3], x)


def test_a_write_is_seen_by_autograd() -> None:
    """A backward that saved the tensor before must not use what is there now."""
    weight = torch.ones(1, 2, 2, requires_grad=True)
    for write in (
        lambda out: wavedp.coarse(torch.ones(1, 4, 4), 1, out=out),
        lambda out: wavedp.waverec2([torch.ones(1, 2, 2)[..., :1, :1], (None, None, None)], out=out),
        lambda out: wavedp.wavedec2(torch.ones(1, 4, 4), 1, out=[out, tuple(torch.empty(3, 1, 2, 2).unbind(0))]),
        lambda out: wavedp.wavelet_untokens([torch.ones(1, 4, 1)], 2, channels=1, out=out[None]),
    ):
        out = torch.zeros(1, 2, 2)
        product = (out * weight).sum()
        version = out._version
        write(out)
        assert out._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_an_inference_tensor_is_written_to_in_inference_mode_alone() -> None:
    with torch.inference_mode():
        out = torch.zeros(1, 2, 2)
        assert torch.equal(wavedp.coarse(torch.ones(1, 4, 4), 1, out=out), torch.full((1, 2, 2), 2.0))
    with pytest.raises(RuntimeError, match="out of coarse is an inference tensor"):
        wavedp.coarse(torch.ones(1, 4, 4), 1, out=out)
