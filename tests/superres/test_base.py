# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import Self

from wavedp.superres.base import BatchedSuperResolver, State, generators_per_image, pad_to_multiple


class Recorder(BatchedSuperResolver):
    """Repeats pixels, remembers what it was handed, and can be told to answer wrongly."""

    name = "recorder"

    def __init__(self, channels: int | None = None, size_multiple: int = 1, **options: Any) -> None:
        super().__init__(2, **{"batch_size": 3, **options})
        self.channels, self.size_multiple = channels, size_multiple
        self.seen: list[Tensor] = []
        self.answer = lambda images: images.repeat_interleave(2, 2).repeat_interleave(2, 3)

    @classmethod
    def load(cls, **options: Any) -> Self:
        return cls(**options)

    def _upscale(self, images: Tensor, generators: list[torch.Generator], condition: dict[str, Any]) -> Tensor:
        self.seen.append(images)
        return self.answer(images)

    def state(self) -> State:
        return {}, {}


def test_splits_into_batches_and_keeps_the_order() -> None:
    images = torch.rand(7, 3, 4, 5)
    resolver = Recorder()
    result = resolver(images)
    assert [len(batch) for batch in resolver.seen] == [3, 3, 1]
    assert torch.equal(result, images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    resolver.seen.clear()
    resolver(images, batch_size=7)
    assert [len(batch) for batch in resolver.seen] == [7]


def test_a_grey_image_meets_a_colour_model_as_three_equal_channels() -> None:
    images = torch.rand(2, 1, 4, 4)
    resolver = Recorder(channels=3)
    resolver.answer = lambda x: torch.stack([x[:, 0] * 0, x[:, 1], x[:, 2] * 0.5], 1).repeat(1, 1, 2, 2)
    result = resolver(images)
    assert torch.equal(resolver.seen[0], images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(result, (images * 0.5).repeat(1, 1, 2, 2))


def test_a_colour_image_meets_a_grey_model_channel_by_channel() -> None:
    images = torch.rand(2, 3, 4, 4)
    resolver = Recorder(channels=1)
    result = resolver(images)
    assert torch.equal(resolver.seen[0], images.reshape(6, 1, 4, 4))
    assert torch.equal(result, images.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 15), (3, 20), (1, 1)])
def test_pads_to_the_multiple_and_crops_back(height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width)
    resolver = Recorder(size_multiple=8)
    result = resolver(images)
    seen = resolver.seen[0]
    assert seen.shape[2] % 8 == seen.shape[3] % 8 == 0
    assert seen.shape[2] - height < 8
    assert seen.shape[3] - width < 8
    assert torch.equal(seen[:, :, :height, :width], images)
    assert torch.equal(result, images.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_padding_reflects_where_the_image_is_large_enough_and_repeats_the_edge_elsewhere() -> None:
    row = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert pad_to_multiple(row, 4)[0, 0, 0].tolist() == [1, 2, 3, 2]
    assert pad_to_multiple(row, 8)[0, 0, 0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


def test_output_is_float32_clamped_and_on_the_model_s_dtype_inside() -> None:
    resolver = Recorder(dtype=torch.bfloat16)
    resolver.answer = lambda x: (x * 4 - 1).repeat(1, 1, 2, 2)
    result = resolver(torch.tensor([0.0, 0.25, 0.375, 1.0]).view(1, 1, 2, 2).double())
    assert resolver.seen[0].dtype == torch.bfloat16
    assert result.dtype == torch.float32
    assert result[0, 0, :2, :2].flatten().tolist() == [0, 0, 0.5, 1]


def test_no_images_make_no_images() -> None:
    assert Recorder()(torch.rand(0, 3, 4, 5)).shape == (0, 3, 8, 10)


def test_rounding_beyond_the_range_is_clamped() -> None:
    resolver = Recorder()
    resolver(torch.tensor([-5e-5, 1 + 5e-5]).view(1, 1, 1, 2))
    assert resolver.seen[0].flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "divide bytes by 255"),
        (torch.zeros(3, 4, 4), r"\[B, C, h, w\]"),
        (torch.zeros(1, 2, 4, 4), "C = 1 or 3"),
        (torch.zeros(1, 3, 0, 4), "h, w >= 1"),
        (torch.full((1, 3, 4, 4), 1.01), r"in \[0, 1\]"),
        (torch.full((1, 3, 4, 4), -1.0), r"span \[-1, -1\]"),
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), "infinite"),
    ],
)
def test_refuses_what_is_not_an_image(images: Tensor, message: str) -> None:
    resolver = Recorder()
    with pytest.raises(ValueError, match=message):
        resolver(images)
    assert not resolver.seen


def test_refuses_other_types_options_and_batch_sizes() -> None:
    with pytest.raises(TypeError, match="not list"):
        Recorder()([0.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes no option prompt"):
        Recorder()(torch.rand(1, 3, 4, 4), prompt="a cat")
    with pytest.raises(ValueError, match="batch_size is a positive integer"):
        Recorder()(torch.rand(1, 3, 4, 4), batch_size=0)
    with pytest.raises(ValueError, match="batch_size is a positive integer"):
        Recorder(batch_size=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda x: x, r"made \(1, 3, 4, 4\) of"), (lambda x: x.repeat(1, 1, 2, 2) / 0, "NaN or infinite")],
)
def test_a_model_that_answers_wrongly_is_an_error(answer: Any, message: str) -> None:
    resolver = Recorder()
    resolver.answer = answer
    with pytest.raises(RuntimeError, match=message):
        resolver(torch.rand(1, 3, 4, 4))


def test_one_generator_per_image_is_decided_by_the_call_s_generator_alone() -> None:
    def draws(count: int, seed: int) -> list[float]:
        generators = generators_per_image(count, torch.Generator().manual_seed(seed))
        return [torch.rand((), generator=g).item() for g in generators]

    assert draws(5, 0) == draws(5, 0)
    assert draws(5, 0)[:3] == draws(3, 0)
    assert len({*draws(5, 0), *draws(5, 1)}) == 10
    torch.manual_seed(7)
    first = [g.initial_seed() for g in generators_per_image(2, None)]
    torch.manual_seed(7)
    assert [g.initial_seed() for g in generators_per_image(2, None)] == first


def test_progress_names_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    Recorder()(torch.rand(4, 3, 2, 2), progress=True)
    assert "recorder" in capsys.readouterr().err
