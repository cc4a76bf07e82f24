# SPDX-License-Identifier: Apache-2.0
"""wavelet_tokens and wavelet_untokens on every backend: values, prefixes, energies, gradients, refused arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import wavedp
from wavedp.ops import use_backend

ops = torch.ops.wavedp
# dtype: relative to the largest coefficient. One affine more than the transform, which a GPU may fuse.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = list(TOLERANCES)
# B, C, H, W, levels, grid: patches of 1, 2 and more values, rows that are no vector, one token, unequal axes, the
# sizes of SIT-4 at 256 pixels cut to a quarter.
CASES = [
    (2, 1, 2, 2, 1, (1, 1)),
    (2, 3, 16, 24, 2, (2, 3)),
    (1, 2, 24, 20, 2, (3, 5)),
    (3, 3, 32, 32, 3, (4, 4)),
    (1, 3, 64, 64, 3, (4, 4)),
    (1, 1, 64, 32, 5, (1, 1)),
    (2, 4, 48, 16, 1, (1, 8)),
]
TRITON_CASES = CASES[1:4]


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def cases_for(target: Any) -> list[Any]:
    return TRITON_CASES if target.backend == "triton" else CASES


def constants(channels: int, levels: int) -> tuple[list[Any], list[Any]]:
    """Of each scale: a number, or a tensor of one or of every channel."""
    counts = [channels] + [3 * channels] * levels
    mean = [0.5 * torch.randn(count) if s % 2 else 0.25 for s, count in enumerate(counts)]
    std = [2.0 if s % 2 else torch.rand(count) + 0.5 for s, count in enumerate(counts)]
    mean[-1] = torch.tensor(0.125)
    return mean, std


def maps_of(x: Tensor, levels: int) -> list[np.ndarray[Any, Any]]:
    """Coefficient maps [B, C_s, h, w] in float64, coarse first, by PyWavelets."""
    coeffs = pywt.wavedec2(x.double().cpu().numpy(), "haar", "zero", levels)
    return [coeffs[0], *(np.concatenate(details, axis=1) for details in coeffs[1:])]


def tokens_of(x: Tensor, levels: int, grid: tuple[int, int], mean: list[Any], std: list[Any]) -> list[Tensor]:
    """The definition, one token after another."""
    tokens = []
    for coefficients, m, s in zip(maps_of(x, levels), mean, std):
        by_channel = [np.reshape(np.asarray(value, dtype=np.float64), (-1, 1, 1)) for value in (m, s)]
        normalised = (coefficients - by_channel[0]) / by_channel[1]
        p, q = normalised.shape[2] // grid[0], normalised.shape[3] // grid[1]
        rows = [
            normalised[:, :, i * p : (i + 1) * p, j * q : (j + 1) * q].reshape(len(x), -1)
            for i in range(grid[0])
            for j in range(grid[1])
        ]
        tokens.append(torch.from_numpy(np.stack(rows, axis=1)))
    return tokens


def assert_close(actual: Tensor, exact: Tensor, target: Any, what: Any, factor: float = 1) -> None:
    tolerance = factor * TOLERANCES[actual.dtype] * (1 if target.rounds_to_nearest(actual.dtype) else 2)
    worst = (actual.double().cpu() - exact).abs().max()
    assert worst <= tolerance * max(exact.abs().max(), 1) * 4, (what, worst)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_normalised_patches_of_pywavelets(target: Any, dtype: torch.dtype) -> None:
    for *shape, levels, grid in cases_for(target):
        x = noise(*shape, dtype=dtype, device=target.device)
        mean, std = constants(shape[1], levels)
        zeros, ones = [0.0] * (levels + 1), [1.0] * (levels + 1)
        for m, s in ((None, None), (mean, std), (mean, None), (None, std)):
            expected = tokens_of(x, levels, grid, m or zeros, s or ones)
            actual = wavedp.wavelet_tokens(x, levels, grid, m, s)
            for scale, (one, other) in enumerate(zip(actual, expected, strict=True)):
                assert (one.dtype, one.device, one.shape) == (dtype, x.device, other.shape)
                assert_close(one, other, target, (shape, levels, grid, scale))


@pytest.mark.parametrize("norm", ["ortho", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_agrees_with_the_reference(target: Any, dtype: torch.dtype, norm: str) -> None:
    """To the bit without a normalisation; with one, up to the ulp of a fused multiply-add."""
    if not target.rounds_to_nearest(dtype):
        pytest.skip("needs a CUDA device: Triton's interpreter cuts bfloat16 off")
    for *shape, levels, grid in cases_for(target):
        x = noise(*shape, dtype=dtype, device=target.device)
        mean, std = constants(shape[1], levels)
        results = []
        for backend in (target.backend, "reference"):
            with use_backend(backend):
                plain, energies = wavedp.wavelet_tokens(x, levels, grid, norm=norm, energies=True)
                image = wavedp.wavelet_untokens(plain, grid, output_size=shape[2:], norm=norm)
                normalised = wavedp.wavelet_tokens(x, levels, grid, mean, std, norm=norm)
                back = wavedp.wavelet_untokens(normalised, grid, mean, std, output_size=shape[2:], norm=norm)
                results.append(([*plain, image], [*normalised, back, energies]))
        for one, other in zip(results[0][0], results[1][0], strict=True):
            assert torch.equal(one, other)
        epsilon = torch.finfo(dtype).eps
        for one, other in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(one, other, rtol=8 * epsilon, atol=8 * epsilon)


@pytest.mark.parametrize("norm", ["ortho", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untokens_inverts_for_every_prefix(target: Any, dtype: torch.dtype, norm: str) -> None:
    for *shape, levels, grid in cases_for(target):
        x = noise(*shape, dtype=dtype, device=target.device)
        mean, std = constants(shape[1], levels)
        tokens = wavedp.wavelet_tokens(x, levels, grid, mean, std, norm=norm)
        for scales in range(1, levels + 2):
            halvings = levels + 1 - scales
            size = [n >> halvings for n in shape[2:]]
            image = wavedp.wavelet_untokens(
                tokens[:scales], grid, mean, std, levels=levels, output_size=size, norm=norm
            )
            exact = torch.nn.functional.avg_pool2d(x.double(), 2**halvings).cpu()
            assert image.shape == exact.shape
            assert_close(image, exact, target, (shape, scales), factor=8 * 2.0**levels)
            if scales <= levels:
                again = wavedp.wavelet_tokens(image, levels, grid, mean, std, scales=scales, norm=norm)
                for one, other in zip(again, tokens[:scales], strict=True):
                    assert_close(one, other.double().cpu(), target, (shape, scales), factor=8 * 2.0**levels)


def test_channels_are_enough_where_patches_are_square(target: Any) -> None:
    x = noise(2, 3, 16, 32, device=target.device)
    tokens = wavedp.wavelet_tokens(x, 2, (2, 4))
    image = wavedp.wavelet_untokens(tokens, (2, 4), channels=3)
    assert torch.equal(image, wavedp.wavelet_untokens(tokens, (2, 4), output_size=(16, 32)))
    torch.testing.assert_close(image, x)
    square = wavedp.wavelet_tokens(x[..., :16], 2, 2)
    assert torch.equal(square[1], wavedp.wavelet_tokens(x[..., :16], 2, (2, 2))[1])


def test_bytes_become_samples(target: Any) -> None:
    x = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8).to(target.device)
    mean, std = constants(3, 2)
    for dtype in (None, torch.float16):
        actual = wavedp.wavelet_tokens(x, 2, (2, 3), mean, std, affine=(2 / 255, -1), dtype=dtype)
        assert actual[0].dtype == (dtype or torch.float32)
        for one, other in zip(actual, tokens_of(x.double() * 2 / 255 - 1, 2, (2, 3), mean, std), strict=True):
            assert_close(one, other, target, dtype, factor=4)
    unit = wavedp.wavelet_tokens(x, 2, (2, 3))
    for one, other in zip(unit, tokens_of(x.double() / 255, 2, (2, 3), [0.0] * 3, [1.0] * 3), strict=True):
        assert_close(one, other, target, "1/255")


def test_tokens_in_another_dtype_are_rounded_once(target: Any) -> None:
    for dtype in DTYPES:
        x = noise(1, 3, 16, 24, dtype=dtype, device=target.device)
        for other in DTYPES:
            tokens, energies = wavedp.wavelet_tokens(x, 2, (2, 3), dtype=other, energies=True)
            assert energies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            for one, exact in zip(tokens, tokens_of(x, 2, (2, 3), [0.0] * 3, [1.0] * 3), strict=True):
                assert one.dtype == other
                worst = (one.double().cpu() - exact).abs().max() / exact.abs().max()
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                factor = 1 if target.rounds_to_nearest(other) else 2
                assert worst <= factor * max(TOLERANCES[other], TOLERANCES[wide])


def test_energies_are_sums_of_squares(target: Any) -> None:
    for *shape, levels, grid in cases_for(target):
        x = noise(*shape, device=target.device)
        _, energies = wavedp.wavelet_tokens(x, levels, grid, *constants(shape[1], levels), energies=True)
        expected = np.concatenate([np.square(m).sum(axis=(2, 3)) for m in maps_of(x, levels)], axis=1)
        torch.testing.assert_close(energies.double().cpu(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
        # Parseval: the transform is orthonormal.
        torch.testing.assert_close(energies.sum(1), x.square().sum((1, 2, 3)), rtol=1e-4, atol=1e-6)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "padded": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2],
    "swapped batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(target: Any, strides: str) -> None:
    x = STRIDES[strides](noise(2, 3, 16, 24, device=target.device))
    tokens = wavedp.wavelet_tokens(x, 2, (2, 3))
    expected = wavedp.wavelet_tokens(x.clone(memory_format=torch.contiguous_format), 2, (2, 3))
    assert all(map(torch.equal, tokens, expected))
    strided = [one.mT.contiguous().mT for one in tokens]
    assert torch.equal(
        wavedp.wavelet_untokens(strided, (2, 3), channels=3), wavedp.wavelet_untokens(tokens, (2, 3), channels=3)
    )


def test_no_level_an_empty_batch_and_more_levels_than_a_backend_takes(target: Any) -> None:
    x = noise(2, 3, 8, 12, device=target.device)
    (only,) = wavedp.wavelet_tokens(x, 0, (2, 3), [1.0], [2.0])
    torch.testing.assert_close(only, tokens_of(x, 0, (2, 3), [1.0], [2.0])[0].float().to(x.device))
    torch.testing.assert_close(wavedp.wavelet_untokens([only], (2, 3), [1.0], [2.0], channels=3), x)
    empty = wavedp.wavelet_tokens(x[:0], 2, (2, 3))
    assert [tuple(one.shape) for one in empty] == [(0, 6, 3), (0, 6, 9), (0, 6, 36)]
    assert wavedp.wavelet_untokens(empty, (2, 3), channels=3).shape == (0, 3, 8, 12)
    deep = noise(1, 1, 512, 512, device=target.device)
    tokens = wavedp.wavelet_tokens(deep, 9, 1)
    assert [one.shape[2] for one in tokens] == [1, *(3 * 4**k for k in range(9))]
    torch.testing.assert_close(wavedp.wavelet_untokens(tokens, 1, channels=1), deep, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_element_is_written(target: Any) -> None:
    for *shape, levels, grid in cases_for(target):
        tokens, energies = wavedp.wavelet_tokens(noise(*shape, device=target.device), levels, grid, energies=True)
        assert all(one.isfinite().all() for one in (*tokens, energies))
        assert wavedp.wavelet_untokens(tokens, grid, output_size=shape[2:]).isfinite().all()


def test_gradients_of_any_order(target: Any) -> None:
    x = noise(2, 2, 4, 8, dtype=torch.float64, device=target.device).requires_grad_()
    shift, scale = noise(14, dtype=torch.float64), torch.rand(14, dtype=torch.float64) + 0.5
    shift, scale = shift.to(x.device), scale.to(x.device)
    checks = (gradcheck,) if target.interpreted else (gradcheck, gradgradcheck)
    tokens = [one.detach().requires_grad_() for one in wavedp.wavelet_tokens(x, 2, (1, 2))]
    for check in checks:
        assert check(
            lambda x: tuple(ops.wavelet_tokens(x, 2, [1, 2], 0.25, shift, scale, 1.0, 0.0, None, False)),
            x,
            fast_mode=True,
        )
        assert check(
            lambda *t: ops.wavelet_untokens(list(t), [2, 4, 8], [1, 2], 1.0, shift, scale), tokens, fast_mode=True
        )
        assert check(lambda x: tuple(wavedp.wavelet_tokens(x, 2, (1, 2), std=[2.0, 3.0, 4.0])), x, fast_mode=True)
        assert check(
            lambda *t: wavedp.wavelet_untokens(t, (1, 2), std=[2.0, 3.0, 4.0], channels=2), tokens, fast_mode=True
        )


def test_the_gradient_of_some_scales_and_of_another_dtype(target: Any) -> None:
    x = noise(1, 3, 8, 8, device=target.device).requires_grad_()
    for dtype in (torch.float32, torch.float64):
        tokens = wavedp.wavelet_tokens(x, 2, 2, std=[2.0, 3.0, 4.0], dtype=dtype)
        weights = [torch.randn_like(one) for one in tokens]
        (some,) = torch.autograd.grad(tokens[1:2], x, weights[1:2], retain_graph=True)
        weights[0].zero_()
        weights[2].zero_()
        (every,) = torch.autograd.grad(tokens, x, weights)
        assert some.dtype == torch.float32
        assert torch.equal(some, every)
        low = wavedp.wavelet_untokens(weights, 2, std=[0.5, 1 / 3, 0.25], channels=3)
        torch.testing.assert_close(some, low.float(), rtol=1e-5, atol=1e-5)


def test_constants_of_inference_mode_serve_a_later_backward() -> None:
    x, constants = torch.rand(1, 3, 32, 32), ([0.25] * 3, [2.0] * 3)
    with torch.inference_mode():
        tokens = wavedp.wavelet_tokens(x, 2, 4, *constants)
        wavedp.wavelet_untokens(tokens, 4, *constants, channels=3)
    leaves = [one.clone().requires_grad_(scale == 1) for scale, one in enumerate(tokens)]
    wavedp.wavelet_untokens(leaves, 4, *constants, channels=3).sum().backward()
    wanted = torch.autograd.grad(wavedp.wavelet_untokens([2 * one for one in leaves], 4, channels=3).sum(), leaves[1])
    torch.testing.assert_close(leaves[1].grad, wanted[0])


def test_numbers_of_any_kind_are_the_same_numbers() -> None:
    """In float64 until they are rounded once, whoever made them."""
    x, generator = torch.rand(1, 2, 16, 16), np.random.default_rng(0)
    for _ in range(20):
        mean, std = generator.normal(size=3), generator.uniform(0.5, 2.0, size=3)
        expected = wavedp.wavelet_tokens(x, 2, 2, mean.tolist(), std.tolist())
        found = wavedp.wavelet_tokens(x, 2, 2, list(mean), tuple(std))
        assert all(torch.equal(*pair) for pair in zip(found, expected))
    halves = [[1, 2, 4], [True + 0.0, 2.0, 4.0], list(np.array([1, 2, 4]))]
    first, *others = (wavedp.wavelet_tokens(x, 2, 2, [0, 0, 0], std) for std in halves)
    assert all(torch.equal(*pair) for other in others for pair in zip(other, first))


def test_energies_carry_no_gradient() -> None:
    x = noise(1, 1, 4, 4).requires_grad_()
    tokens, energies = wavedp.wavelet_tokens(x, 1, 1, energies=True)
    assert not energies.requires_grad
    tokens[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.5))
    of_op = ops.wavelet_tokens(x, 1, [1, 1], 0.5, None, None, 1.0, 0.0, None, True)
    with pytest.raises(RuntimeError, match="energies of wavelet_tokens carry no gradient"):
        of_op[-1].sum().backward()


def test_torch_func_transforms() -> None:
    images = noise(4, 2, 1, 4, 8, dtype=torch.float64)
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]

    def loss(x: Tensor) -> Tensor:
        tokens = wavedp.wavelet_tokens(x, 2, (1, 2), mean, std)
        return wavedp.wavelet_untokens([one.sin() for one in tokens], (1, 2), mean, std, channels=1).square().sum()

    expected = torch.stack([torch.autograd.functional.jacobian(loss, image) for image in images])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(images), expected)
    tangent = torch.randn_like(images[0])
    _, derivative = torch.func.jvp(loss, (images[0],), (tangent,))
    torch.testing.assert_close(derivative, (expected[0] * tangent).sum())
    batched = torch.vmap(lambda x: wavedp.wavelet_tokens(x, 2, (1, 2), mean, std, energies=True), in_dims=1)
    tokens, energies = batched(images.movedim(0, 1))
    for k, image in enumerate(images):
        alone, by_channel = wavedp.wavelet_tokens(image, 2, (1, 2), mean, std, energies=True)
        assert all(torch.equal(one[k], other) for one, other in zip(tokens, alone))
        torch.testing.assert_close(energies[k], by_channel)
    with pytest.raises(ValueError, match="vmap cannot run over them"):
        torch.vmap(lambda m: wavedp.wavelet_tokens(images[0], 0, 1, [m])[0])(torch.randn(3))


def opcheck_cases(device: str) -> list[tuple[Any, tuple[Any, ...]]]:
    x = noise(2, 1, 4, 4, dtype=torch.float64, device=device).requires_grad_()
    scale = torch.rand(4, dtype=torch.float64, device=device) + 0.5
    tokens = [one.detach().requires_grad_() for one in wavedp.wavelet_tokens(x, 1, 2)]
    bytes_ = torch.arange(16, dtype=torch.uint8, device=device).view(1, 1, 4, 4)
    return [
        (ops.wavelet_tokens.default, (x, 1, [2, 2], 0.5, scale, scale, 1.0, 0.0, None, False)),
        (ops.wavelet_tokens.default, (bytes_, 1, [2, 1], 0.5, None, None, 0.5, 1.0, torch.float16, True)),
        (ops.wavelet_untokens.default, (tokens, [1, 4, 4], [2, 2], 0.5, None, scale)),
    ]


@pytest.mark.parametrize("case", range(3))
def test_opcheck(case: int, device: torch.device) -> None:
    torch.library.opcheck(*opcheck_cases(device.type)[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_and_trains(device: torch.device, dtype: torch.dtype) -> None:
    convolution = torch.nn.Conv2d(1, 2, 1).to(device)
    x = torch.randn(2, 1, 8, 8, device=device)
    with torch.autocast(device.type, dtype=dtype):
        tokens = wavedp.wavelet_tokens(convolution(x), 2, 2)
        back = wavedp.wavelet_untokens(tokens, 2, channels=2)
    assert tokens[0].dtype == back.dtype == dtype
    back.sum().backward()
    weight = convolution.weight.grad
    assert weight is not None
    torch.testing.assert_close(weight.flatten(), x.sum().expand(2), rtol=2**-5, atol=2**-3)


def test_vmap_of_the_ops_themselves() -> None:
    images, scale = noise(2, 3, 1, 4, 8), torch.rand(7) + 0.5
    arguments = (2, [1, 2], 0.5, None, scale, 1.0, 0.0, None, True)
    tokens = torch.vmap(lambda x: ops.wavelet_tokens(x, *arguments), in_dims=1)(images)
    for k in range(3):
        for one, other in zip(tokens, ops.wavelet_tokens(images[:, k], *arguments), strict=True):
            assert torch.equal(one[k], other)
    back = torch.vmap(lambda *t: ops.wavelet_untokens(list(t), [1, 4, 8], [1, 2], 0.5, None, 1 / scale))(*tokens[:3])
    torch.testing.assert_close(back, images.movedim(1, 0))
