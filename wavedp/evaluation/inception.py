# SPDX-License-Identifier: Apache-2.0
"""Inception-v3 up to its last pooling, with the names of the weights that FID uses, read from a file that you give.

The layers are those of [Szegedy et al. 2016, arXiv 1512.00567] as in torchvision; FID's own network (the TensorFlow
graph of 2015-12-05) differs in its pooling: averages leave the border out, and the last block takes a maximum. No
weights come with this package.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedp.errors import BadFileError, MissingFileError
from wavedp.weights_file import read_tensors

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, outputs, kernel
Step = tuple[Layer, ...]  # one convolution, or two side by side

SIDE = 299


class InceptionPool3(nn.Module):
    """``[N, 3, H, W]`` in [0, 1] to the 2,048 features of the last pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padding=0)
        self.Mixed_5b = _a(192, 32)
        self.Mixed_5c = _a(256, 64)
        self.Mixed_5d = _a(288, 64)
        self.Mixed_6a = _Block(
            288,
            [
                [_step("branch3x3", 384, 3)],
                [_step("branch3x3dbl_1", 64, 1), _step("branch3x3dbl_2", 96, 3), _step("branch3x3dbl_3", 96, 3)],
            ],
            halves=True,
        )
        self.Mixed_6b = _c(128)
        self.Mixed_6c = _c(160)
        self.Mixed_6d = _c(160)
        self.Mixed_6e = _c(192)
        seven = [
            _step("branch7x7x3_1", 192, 1),
            _step("branch7x7x3_2", 192, (1, 7)),
            _step("branch7x7x3_3", 192, (7, 1)),
        ]
        self.Mixed_7a = _Block(
            768,
            [[_step("branch3x3_1", 192, 1), _step("branch3x3_2", 320, 3)], [*seven, _step("branch7x7x3_4", 192, 3)]],
            halves=True,
        )
        self.Mixed_7b = _e(1280)
        self.Mixed_7c = _e(2048, maximum=True)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features: Tensor = x.mean(dim=(2, 3))
        return features


def load_inception(path: Path | str, device: torch.device | str = "cpu") -> InceptionPool3:
    """The network with weights from a safetensors file, in evaluation mode.

    Args:
        path: names as in torchvision's ``inception_v3`` and pytorch-fid's weights (``Mixed_5b.branch1x1.conv.weight``,
            ...). The classifier ``fc`` and ``AuxLogits`` may be there and are left out.
        device: torch device.

    Raises:
        FileNotFoundError: if there is no such file.
        BadFileError: for a pickle (what ``torch.save`` writes; docs/evaluation.md has the two lines that convert it),
            or weights of another network.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(
            f"no Inception weights at {file}; docs/evaluation.md says which file, and how to convert it to safetensors"
        )
    found = read_tensors(file.read_bytes(), file)
    model = InceptionPool3()
    wanted = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    kept = {name: value.float() for name, value in found.items() if name in wanted}
    foreign = [
        name for name in sorted(set(found) - wanted)
        if not name.startswith(("fc.", "AuxLogits.")) and not name.endswith("num_batches_tracked")
    ]  # fmt: skip
    missing = sorted(wanted - set(kept))
    if foreign or missing:
        first = f"{missing[0]} is missing" if missing else f"{foreign[0]} is of no layer"
        raise BadFileError(
            f"{file} does not hold Inception-v3: {first} ({len(missing)} missing, {len(foreign)} others); give weights "
            "with torchvision's names, such as pytorch-fid's"
        )
    try:
        model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise BadFileError(f"{file} does not hold Inception-v3: {error}") from error
    return model.to(device).eval()


class _Convolution(nn.Module):
    """Convolution, batch norm with epsilon 0.001, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Kernel, *, stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (high // 2, wide // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(inputs, outputs, (high, wide), stride=stride, padding=around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Paths side by side and a pooled one, joined along the channels.

    Args:
        inputs: channels that come in.
        paths: the convolutions of each path.
        pooled: outputs of the convolution after the pooling; None where there is none.
        halves: the last convolution of every path, and the pooling, have stride 2 and no border.
        maximum: pool by the maximum instead of the mean.
    """

    def __init__(
        self,
        inputs: int,
        paths: list[list[Step]],
        pooled: int | None = None,
        *,
        halves: bool = False,
        maximum: bool = False,
    ) -> None:
        super().__init__()
        self.names: list[list[tuple[str, ...]]] = []
        for path in paths:
            channels = inputs
            names: list[tuple[str, ...]] = []
            for step in path:
                last = halves and step is path[-1]
                for name, outputs, kernel in step:
                    layer = _Convolution(
                        channels, outputs, kernel, stride=2 if last else 1, padding=0 if last else None
                    )
                    self.add_module(name, layer)
                names.append(tuple(name for name, _, _ in step))
                channels = step[0][1]
            self.names.append(names)
        self.branch_pool = None if pooled is None else _Convolution(inputs, pooled, 1)
        self.halves, self.maximum = halves, maximum

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for names in self.names:
            out = x
            for pair in names:
                out = torch.cat([self.get_submodule(name)(out) for name in pair], dim=1)
            joined.append(out)
        if self.halves:
            pooled = F.max_pool2d(x, 3, stride=2)
        elif self.maximum:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        joined.append(pooled if self.branch_pool is None else self.branch_pool(pooled))
        return torch.cat(joined, dim=1)


def _step(name: str, outputs: int, kernel: Kernel) -> Step:
    return ((name, outputs, kernel),)


def _a(inputs: int, pooled: int) -> _Block:
    return _Block(
        inputs,
        [
            [_step("branch1x1", 64, 1)],
            [_step("branch5x5_1", 48, 1), _step("branch5x5_2", 64, 5)],
            [_step("branch3x3dbl_1", 64, 1), _step("branch3x3dbl_2", 96, 3), _step("branch3x3dbl_3", 96, 3)],
        ],
        pooled,
    )


def _c(inner: int) -> _Block:
    return _Block(
        768,
        [
            [_step("branch1x1", 192, 1)],
            [_step("branch7x7_1", inner, 1), _step("branch7x7_2", inner, (1, 7)), _step("branch7x7_3", 192, (7, 1))],
            [
                _step("branch7x7dbl_1", inner, 1),
                _step("branch7x7dbl_2", inner, (7, 1)),
                _step("branch7x7dbl_3", inner, (1, 7)),
                _step("branch7x7dbl_4", inner, (7, 1)),
                _step("branch7x7dbl_5", 192, (1, 7)),
            ],
        ],
        192,
    )


def _e(inputs: int, *, maximum: bool = False) -> _Block:
    wide: Step = (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))
    deep: Step = (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1)))
    return _Block(
        inputs,
        [
            [_step("branch1x1", 320, 1)],
            [_step("branch3x3_1", 384, 1), wide],
            [_step("branch3x3dbl_1", 448, 1), _step("branch3x3dbl_2", 384, 3), deep],
        ],
        192,
        maximum=maximum,
    )
