# SPDX-License-Identifier: Apache-2.0
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wavedp import superres
from wavedp.superres import Chain, Resized, SuperResolver, to_size


def repeat(images: Tensor, times: int) -> Tensor:
    return images.repeat_interleave(times, 2).repeat_interleave(times, 3)


def scales(resolver: SuperResolver) -> list[tuple[str, int]]:
    stages = resolver.stages if isinstance(resolver, Chain) else (resolver,)
    return [(stage.name, stage.scale) for stage in stages]


def test_a_chain_applies_its_stages_in_order() -> None:
    bicubic, haar = superres.load("bicubic", scale=2), superres.load("haar", scale=4)
    images = torch.rand(2, 3, 5, 4)
    chain = Chain([bicubic, haar])
    assert chain.scale == 8
    assert torch.equal(chain(images), haar(bicubic(images)))
    assert (chain(images) - Chain([haar, bicubic])(images)).abs().max() > 0.01


def test_a_chain_passes_the_generator_and_the_batch_size_on(
    ldm_folder: Path, swin2sr_folder: Callable[[int], Path]
) -> None:
    ldm = superres.load("ldm-4x", path=ldm_folder, num_inference_steps=2)
    swin = superres.load("swin2sr", path=swin2sr_folder(2))
    chain, images = Chain([ldm, swin]), torch.rand(2, 1, 4, 4)
    first = chain(images, generator=torch.Generator().manual_seed(0), batch_size=1)
    assert first.shape == (2, 1, 32, 32)
    low = ldm(images, generator=torch.Generator().manual_seed(0), batch_size=1)
    assert torch.equal(first, swin(low, batch_size=1))


def test_a_chain_checks_its_input_and_takes_no_options() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Chain([])(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(TypeError, match="takes no option prompt"):
        Chain([superres.load("haar")])(torch.rand(1, 3, 2, 2), prompt="a cat")


def test_x4_then_x2_reaches_x8(swin2sr_folder: Callable[[int], Path]) -> None:
    four = superres.load("swin2sr", path=swin2sr_folder(4))
    two = superres.load("swin2sr", path=swin2sr_folder(2))
    resolver = to_size([four, two], 8, 64)
    assert scales(resolver) == [("swin2sr", 4), ("swin2sr", 2)]
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(resolver(images), two(four(images)))


@pytest.mark.parametrize(
    ("spec", "from_size", "size", "expected"),
    [
        ("bicubic", 8, 64, [("bicubic", 8)]),
        ("haar", 8, 64, [("haar", 8)]),
        ("bicubic", (7, 9), (21, 27), [("bicubic", 3)]),
        ("haar", 8, 8, []),
        (["bicubic"], 8, 24, [("bicubic", 3)]),
    ],
)
def test_names_take_the_largest_scale_that_fits(
    spec: str | list[str],
    from_size: int | tuple[int, int],
    size: int | tuple[int, int],
    expected: list[tuple[str, int]],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolver = to_size(spec, from_size, size)
    assert scales(resolver) == expected


def espcn(scale: int) -> superres.EspcnResolver:
    """An untrained network: bicubic interpolation."""
    return superres.EspcnResolver(superres.Espcn(superres.EspcnConfig(scale=scale, channels=1, width=4)))


def test_one_model_is_used_as_often_as_it_fits() -> None:
    four = espcn(4)
    resolver = to_size(four, 4, 64)
    assert isinstance(resolver, Chain)
    assert resolver.stages == (four, four)


def test_several_models_are_used_once_each_and_only_while_something_is_left() -> None:
    four, two = espcn(4), espcn(2)
    assert to_size([four, two], 8, 32) is four
    assert to_size([four, two], 8, 16) is two
    assert scales(to_size([two, four, two], 8, 128)) == [("espcn", 2), ("espcn", 4), ("espcn", 2)]


def test_swin2sr_by_name_is_x4_then_x2(monkeypatch: pytest.MonkeyPatch, swin2sr_folder: Callable[[int], Path]) -> None:
    monkeypatch.setattr("wavedp.superres.swin2sr.DEFAULT_PATHS", {s: str(swin2sr_folder(s)) for s in (4, 2)})
    resolver = to_size("swin2sr", 8, 64)
    assert scales(resolver) == [("swin2sr", 4), ("swin2sr", 2)]
    assert resolver(torch.rand(1, 3, 8, 8)).shape == (1, 3, 64, 64)


def test_what_is_left_is_a_bicubic_enlargement_with_a_warning() -> None:
    four, images = espcn(4), torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"make x4 where x8 is wanted .* bicubic enlargement, factor 2"):
        resolver = to_size(four, 8, 64)
    expected = F.interpolate(four(images), size=(64, 64), mode="bicubic", align_corners=False).clamp(0, 1)
    assert resolver.scale == 8
    assert torch.equal(resolver(images), expected)


def test_a_model_that_goes_beyond_is_shrunk_by_the_area_mean_with_a_warning() -> None:
    four, images = espcn(4), torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"make x4 where x2 is wanted .* area mean, factor 1/2"):
        resolver = to_size(four, 8, 16)
    torch.testing.assert_close(resolver(images), F.avg_pool2d(four(images), 2))


@pytest.mark.parametrize(("size", "scale"), [(64, 2), (29, 1)])
def test_bicubic_reaches_any_size_in_one_resize_without_a_warning(size: int, scale: int) -> None:
    images = torch.rand(2, 1, 28, 28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolver = to_size("bicubic", 28, size)
    expected = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    assert torch.equal(resolver(images), expected)
    assert resolver.scale == scale


def test_haar_then_the_rest() -> None:
    images = torch.rand(1, 1, 8, 8)
    with pytest.warns(UserWarning, match="factor 3/2"):
        resolver = to_size("haar", 8, 48)
    expected = F.interpolate(repeat(images, 4), size=(48, 48), mode="bicubic", align_corners=False).clamp(0, 1)
    assert torch.equal(resolver(images), expected)


def test_a_resized_resolver_takes_only_its_size_and_no_images_too() -> None:
    with pytest.warns(UserWarning, match="factor 3/2"):
        resolver = to_size("haar", 8, 24)
    assert resolver(torch.rand(0, 3, 8, 8)).shape == (0, 3, 24, 24)
    with pytest.raises(ValueError, match=r"made for images of \(8, 8\), not \(9, 8\)"):
        resolver(torch.rand(1, 3, 9, 8))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="fixed aspect ratio"):
        to_size("bicubic", 8, 4)
    with pytest.raises(ValueError, match="fixed aspect ratio"):
        to_size("bicubic", (8, 8), (16, 24))
    with pytest.raises(ValueError, match="width is a positive integer"):
        to_size("bicubic", (8, 0), 16)
    with pytest.raises(ValueError, match="cannot be shared by 2 models"):
        to_size("haar+bicubic", 8, 16, batch_size=3)
    with pytest.raises(ValueError, match="no super-resolver 'magic'"):
        to_size("haar+magic", 8, 64 * 3)
    with pytest.raises(ValueError, match="at least one"):
        to_size([], 8, 16)


def test_chains_and_resizes_are_saved_and_read_back(tmp_path: Path) -> None:
    network = espcn(2)
    torch.nn.init.normal_(network.model.layers[-2].weight, std=0.05)
    chain, images = Chain([network, superres.load("haar", scale=2)]), torch.rand(2, 1, 6, 6)
    chain.save_pretrained(tmp_path / "chain")
    again = superres.from_pretrained(tmp_path / "chain")
    assert scales(again) == [("espcn", 2), ("haar", 2)]
    assert torch.equal(again(images), chain(images))
    resized = Resized(chain, (6, 6), (30, 30))
    resized.save_pretrained(tmp_path / "resized")
    read = superres.from_pretrained(tmp_path / "resized")
    assert torch.equal(read(images), resized(images))
    with pytest.raises(ValueError, match="takes no options"):
        superres.from_pretrained(tmp_path / "chain", batch_size=2)
