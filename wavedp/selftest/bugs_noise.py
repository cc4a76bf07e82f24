# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: noise that is missing, of another size or law, seen in the last bits, or seen twice."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavedp import functional, private_step
from wavedp.functional import NoiseKey
from wavedp.ops import noise as noise_ops
from wavedp.privacy import histogram, optimizer, release, strict
from wavedp.privacy.entropy import Entropy
from wavedp.privacy.optimizer import PrivateOptimizer
from wavedp.privacy.spec import PrivacySpec
from wavedp.selftest.planting import Planted, Registry

registry = Registry("noise")
bug = registry.bug

Change = Callable[[PrivateOptimizer, PrivacySpec, float], tuple[PrivacySpec, float]]


def release_with(planted: Planted, change: Change) -> None:
    """Let ``change`` make another specification and deviation of those that a batch is released with."""
    running: list[PrivateOptimizer] = []

    def released(original: Any, self: PrivateOptimizer) -> None:
        running.append(self)
        try:
            original(self)
        finally:
            running.pop()

    def made(original: Any, first: Any, second: Any, third: Any, *rest: Any) -> None:
        planted.mark()
        if len(rest) == 2:  # write_noisy_means(parameters, sums, spec, std, key)
            spec, std = change(running[-1], third, rest[0])
            original(first, second, spec, std, rest[1])
        else:  # step_with_noise(optimizer, parameters, sums, spec, std, key)
            spec, std = change(running[-1], rest[0], rest[1])
            original(first, second, third, spec, std, rest[2])

    planted.replace(PrivateOptimizer, "_release", released)
    planted.replace(optimizer, "write_noisy_means", made)
    planted.replace(optimizer, "step_with_noise", made)


def other_noise(planted: Planted, made: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let ``made(total, unit normals)`` be the noise of deviation 1 that a sum gets; it is rounded as ever."""

    def noisy(original: Any, total: Tensor, std: float, **options: Any) -> Tensor:
        if std == 0.0:
            return torch.as_tensor(original(total, std, **options))
        planted.mark()
        normals = functional.gaussian_noise(
            total.shape, 1.0, key=options["key"], offset=options["offset"], dtype=torch.float64
        )
        grid = options["grid"] or functional.grid_step(std)
        noised = torch.round((total + std * made(total, normals)) / grid) * grid
        return torch.as_tensor(noised / options["divisor"], dtype=options["out_dtype"])

    planted.replace(release, "noisy_mean", noisy)


@bug("known class")
def no_noise(planted: Planted) -> None:
    """Sums are released as they are."""

    def change(private: PrivateOptimizer, spec: PrivacySpec, std: float) -> tuple[PrivacySpec, float]:
        return spec, 0.0

    release_with(planted, change)


@bug("known class")
def noise_one_percent_low(planted: Planted) -> None:
    """The noise's deviation is 1 % too small."""
    release_with(planted, lambda private, spec, std: (spec, 0.99 * std))


@bug("jax_privacy #383; TF-Privacy #153")
def noise_scaled_for_mean(planted: Planted) -> None:
    """Noise for the mean is added to the sum: it is too small by the batch size."""
    release_with(planted, lambda private, spec, std: (spec, std / spec.expected_batch_size))


@bug("known class")
def noise_over_drawn_batch(planted: Planted) -> None:
    """The noise shrinks with the number of records that were drawn."""
    release_with(planted, lambda private, spec, std: (spec, std / max(1, len(private._batch._booked))))


@bug("own")
def noise_decays(planted: Planted) -> None:
    """The noise shrinks from step to step, and is accounted as constant."""
    release_with(planted, lambda private, spec, std: (spec, std * 0.95 ** (private._started - 1)))


@bug("Opacus #571, #819")
def denominator_from_batch(planted: Planted) -> None:
    """The noisy sum is divided by the number of records that were drawn."""
    release_with(
        planted,
        lambda private, spec, std: (replace(spec, expected_batch_size=max(1, len(private._batch._booked))), std),
    )


@bug("Opacus #571, #819; PR #838")
def denominator_from_data_set(planted: Planted) -> None:
    """The noisy sum is divided by the sample rate times the private number of records."""

    def change(private: PrivateOptimizer, spec: PrivacySpec, std: float) -> tuple[PrivacySpec, float]:
        if private.sampler is None:
            return spec, std
        return replace(spec, expected_batch_size=max(spec.sample_rate * private.sampler.num_records, 1e-3)), std

    release_with(planted, change)


@bug("Opacus 95fdb35a")
def divided_twice(planted: Planted) -> None:
    """The noisy sum is divided by the number of processes twice; noise, too, is not what is stated."""
    release_with(
        planted, lambda private, spec, std: (replace(spec, expected_batch_size=2.0 * spec.expected_batch_size), std)
    )


@bug("own")
def fused_noise_low(planted: Planted) -> None:
    """Optimizers that make the noise while they step make a tenth less of it."""

    def step(original: Any, *arguments: Any) -> None:
        planted.mark()
        *first, std, key = arguments
        original(*first, 0.9 * std, key)

    planted.replace(optimizer, "step_with_noise", step)


@bug("own")
def unreached_not_noised(planted: Planted) -> None:
    """Parameters that no record reached get no noise."""

    def write(original: Any, parameters: Any, sums: Any, *rest: Any) -> None:
        missing = parameters.keys() - sums.keys()
        original(parameters, sums, *rest)
        for name in missing:
            planted.mark()
            parameters[name].grad.zero_()

    planted.replace(optimizer, "write_noisy_means", write)


@bug("known class")
def empty_batch_skipped(planted: Planted) -> None:
    """An empty batch takes no step."""

    def step(original: Any, self: PrivateOptimizer, closure: object = None) -> None:
        if closure is not None or self._sums or self._batch._failed:
            original(self, closure)
            return
        planted.mark()
        self._begin_step()
        self._batch.stepped()

    planted.replace(PrivateOptimizer, "step", step)


@bug("own")
def empty_batch_not_noised(planted: Planted) -> None:
    """An empty batch steps without noise."""
    release_with(planted, lambda private, spec, std: (spec, std if private._sums else 0.0))


@bug("Opacus #313")
def closure_drops_noise(planted: Planted) -> None:
    """A step with a closure computes gradients anew, and applies them without noise."""

    def step(original: Any, self: PrivateOptimizer, closure: Any = None) -> None:
        if closure is None:
            original(self)
            return
        planted.mark()
        closure()
        self._begin_step()
        for name, total in self._sums.items():
            parameter = self._book.parameters[name]
            parameter.grad = (total / self._spec.expected_batch_size).to(parameter.dtype)
        self._releasing = True
        self._optimizer.step()
        self._releasing = False
        self._batch.stepped()

    planted.replace(PrivateOptimizer, "step", step)


@bug("jax_privacy 2.0.0")
def bfloat16_noise(planted: Planted) -> None:
    """Noise is drawn in bfloat16."""
    other_noise(planted, lambda total, normals: normals.bfloat16().double())


@bug("known class")
def uniform_noise(planted: Planted) -> None:
    """Noise is uniform, of the right variance."""
    other_noise(planted, lambda total, normals: torch.erf(normals / math.sqrt(2.0)) * math.sqrt(3.0))


@bug("known class")
def tail_cut_at_4(planted: Planted) -> None:
    """Noise beyond four deviations is cut off."""
    other_noise(planted, lambda total, normals: normals.clamp(-4.0, 4.0))


@bug("own")
def noise_follows_sum(planted: Planted) -> None:
    """Noise is a tenth smaller where the sum is not zero."""
    other_noise(planted, lambda total, normals: torch.where(total == 0.0, normals, 0.9 * normals))


def _torch_noise(planted: Planted, seed_of: Callable[[bytes, int], int | None]) -> None:
    def noisy(original: Any, total: Any, std: float, grid: float, divisor: float, key: Tensor, *rest: Any) -> None:
        step, offset, _, out = rest
        if std == 0.0:
            original(total, std, grid, divisor, key, *rest)
            return
        planted.mark()
        generator = torch.Generator()
        seed = seed_of(bytes(key.tolist()), step << 64 | offset)
        if seed is not None:
            generator.manual_seed(seed)
        noised = torch.randn(out.shape, generator=generator).double() * std + (0.0 if total is None else total)
        out.copy_((torch.round(noised / grid) * grid if grid else noised) / divisor)

    planted.replace(noise_ops, "noisy_mean", noisy)


@bug("torch.randn; tl.randn alike")
def noise_of_24_bits(planted: Planted) -> None:
    """Normals are made from uniforms of 24 bits, whose tail ends at 5.8 deviations."""

    def seed_of(key: bytes, place: int) -> int:
        return int.from_bytes(hashlib.sha256(key + place.to_bytes(16, "little")).digest()[:7], "little")

    _torch_noise(planted, seed_of)


@bug("torch.Generator's default")
def public_seed(planted: Planted) -> None:
    """A new generator is used without a seed, and every one starts with the same public number."""
    _torch_noise(planted, lambda key, place: None)


@bug("Opacus #616")
def no_grid(planted: Planted) -> None:
    """Noise is added in floating point, and the sum's last bits are released."""

    def grid_of(original: Any, self: PrivacySpec, std: float) -> float:
        planted.mark()
        return 0.0

    planted.replace(PrivacySpec, "grid_of", grid_of)


@bug("own")
def grid_from_sum(planted: Planted) -> None:
    """What is released is rounded to a grid that the sum chose."""

    def noisy(original: Any, total: Tensor, std: float, **options: Any) -> Tensor:
        largest = float(total.abs().amax()) if total.numel() else 0.0
        if std > 0.0 and largest > 0.0 and math.isfinite(largest):
            planted.mark()
            options["grid"] = 2.0 ** (math.frexp(largest)[1] - 20)
        return torch.as_tensor(original(total, std, **options))

    planted.replace(release, "noisy_mean", noisy)


@bug("own")
def rounded_before_noise(planted: Planted) -> None:
    """The sum is rounded to the grid and the noise is not."""

    def noisy(original: Any, total: Tensor, std: float, **options: Any) -> Tensor:
        if std > 0.0:
            planted.mark()
            grid = options["grid"] or functional.grid_step(std)
            total, options["grid"] = torch.round(total / grid) * grid, 0.0
        return torch.as_tensor(original(total, std, **options))

    planted.replace(release, "noisy_mean", noisy)


@bug("Opacus 1.6.0, resumed under its seed")
def same_noise_after_resume(planted: Planted) -> None:
    """Keys are numbered from the start of each process: a resumed run makes the same noise again."""
    numbers: dict[int, int] = {}

    def key(original: Any, self: Entropy) -> NoiseKey:
        planted.mark()
        numbers[id(self)] = numbers.get(id(self), 0) + 1
        made = NoiseKey.insecure(numbers[id(self)])
        made._insecure = False
        return made

    def start(original: Any, self: Entropy, *arguments: Any, **options: Any) -> None:
        numbers.pop(id(self), None)
        original(self, *arguments, **options)

    planted.replace(Entropy, "key", key)
    planted.replace(Entropy, "__init__", start)


@bug("own")
def one_key_for_all_steps(planted: Planted) -> None:
    """The key of the first step is kept, and makes the noise of all."""

    def key(original: Any, self: Entropy) -> NoiseKey:
        kept: Any = self.__dict__.setdefault("kept", original(self))
        planted.mark()
        return kept  # type: ignore[no-any-return]

    planted.replace(Entropy, "key", key)
    planted.replace(NoiseKey, "__exit__", lambda original, self, *exception: None)


@bug("own")
def key_not_wiped(planted: Planted) -> None:
    """Keys stay in memory after their release."""

    def wipe(original: Any, self: NoiseKey) -> None:
        planted.mark()
        self._memory = None

    planted.replace(NoiseKey, "wipe", wipe)


@bug("known class")
def same_noise_for_every_tensor(planted: Planted) -> None:
    """Every tensor takes the noise's numbers from the first on."""

    def write(original: Any, parameters: Any, sums: Any, *rest: Any) -> None:
        for name, parameter in parameters.items():
            planted.mark()
            original({name: parameter}, sums, *rest)

    planted.replace(optimizer, "write_noisy_means", write)


@bug("known class")
def same_noise_for_every_tensor_fused(planted: Planted) -> None:
    """An optimizer that makes the noise while it steps starts it anew for every tensor."""

    def step(original: Any, rule: int, tensors: Any, *rest: Any) -> None:
        for one in tensors:
            planted.mark()
            original(rule, [one], *rest)

    planted.replace(private_step, "noise_step", step)


@bug("known class")
def same_noise_for_every_shard(planted: Planted) -> None:
    """The two halves of a large tensor get the same noise."""

    def noisy(original: Any, total: Any, *rest: Any) -> None:
        out = rest[-1]
        if out.numel() < 4096 or out.numel() % 2 or not out.is_contiguous():
            original(total, *rest)
            return
        planted.mark()
        sums = (None, None) if total is None else total.reshape(-1).chunk(2)
        for part, half in zip(out.view(-1).chunk(2), sums):
            original(half, *rest[:-1], part)

    planted.replace(noise_ops, "noisy_mean", noisy)


@bug("jax_privacy 2.0.0")
def key_of_31_bits(planted: Planted) -> None:
    """Keys are made of 31 bits from NumPy's generator."""

    def from_os(original: Any, cls: Any) -> NoiseKey:
        planted.mark()
        made = NoiseKey.insecure(int(np.random.randint(0, 2**31)))  # noqa: NPY002
        made._insecure = False
        return made

    planted.replace(NoiseKey, "from_os", from_os)


@bug("torch.manual_seed")
def key_of_32_bits(planted: Planted) -> None:
    """32 bits of a key are random and the others zero."""

    def from_os(original: Any, cls: Any) -> NoiseKey:
        planted.mark()
        made: NoiseKey = original(cls)
        made._bytes()[4:] = 0
        return made

    planted.replace(NoiseKey, "from_os", from_os)


@bug("generators in user space")
def forked_keys_repeat(planted: Planted) -> None:
    """Keys come from a pool that forked processes share."""
    pool = Entropy().read(32)
    counter = [0]

    def from_os(original: Any, cls: Any) -> NoiseKey:
        planted.mark()
        counter[0] += 1
        made = NoiseKey.insecure(int.from_bytes(pool + counter[0].to_bytes(8, "little"), "little"))
        made._insecure = False
        return made

    planted.replace(NoiseKey, "from_os", from_os)


@bug("own")
def strict_rounding_free(planted: Planted) -> None:
    """Strict noise is not made larger for the rounding of the sum."""

    def rounded(original: Any, sensitivity: float, *arguments: Any) -> float:
        planted.mark()
        return sensitivity

    planted.replace(strict, "rounded_sensitivity", rounded)


@bug("own")
def label_counts_not_noised(planted: Planted) -> None:
    """The label histogram is released without noise."""

    def noisy(original: Any, counts: Tensor, std: float, **options: Any) -> Tensor:
        planted.mark()
        return counts

    planted.replace(histogram, "noisy_mean", noisy)
