# SPDX-License-Identifier: Apache-2.0
"""What silhouettes are made of: painted layers, and the upper-body garment that many are variations of.

Coordinates: x to the right, y down, a garment about 1 tall and centred on x = 0, a shoe about 1 long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Rng = np.random.Generator
Path = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Layer:
    """One painted piece.

    Attributes:
        points: ``[n, 2]``, the corners of a filled polygon, or of an open line if ``width`` is set.
        tone: brightness relative to the cloth.
        width: thickness of the line; None fills.
        is_cloth: whether it belongs to the garment, or only marks what is painted already (seams, buttons).
    """

    points: Points
    tone: float
    width: float | None = None
    is_cloth: bool = True


def fill(path: Path, tone: float, *, is_cloth: bool = True) -> Layer:
    """A filled polygon."""
    return Layer(np.asarray(path, dtype=np.float64), tone, None, is_cloth)


def strip(path: Path, tone: float, width: float) -> Layer:
    """A strap: a line that is itself cloth."""
    return Layer(np.asarray(path, dtype=np.float64), tone, width)


def mark(path: Path, tone: float, width: float = 0.012) -> Layer:
    """A line on the cloth."""
    return Layer(np.asarray(path, dtype=np.float64), tone, width, is_cloth=False)


def both_sides(layer: Layer) -> list[Layer]:
    """The layer and its mirror image about x = 0."""
    other = Layer(layer.points * np.array([-1.0, 1.0]), layer.tone, layer.width, layer.is_cloth)
    return [layer, other]


def smooth(path: Path, *, closed: bool = False, rounds: int = 2, cut: float = 0.25) -> Path:
    """Corner cutting (G. Chaikin, 1974): each round replaces a corner by two, ``cut`` along its edges."""
    points = np.asarray(path, dtype=np.float64)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0) if closed else points[1:]
        before = points if closed else points[:-1]
        pairs = np.stack([before + cut * (after - before), after + cut * (before - after)], axis=1)
        inner = pairs.reshape(-1, 2)
        points = inner if closed else np.concatenate([points[:1], inner[1:-1], points[-1:]])
    return [(float(x), float(y)) for x, y in points]


@dataclass
class Top:
    """A body with a neck opening, to which sleeves, a hood or a collar are added.

    Attributes:
        half_width: of the body under the arms.
        length: of the body.
        waist, hem: half widths at the waist and at the lower edge.
        waist_height: y of the waist.
        shoulder: half width at the shoulder seam.
        neck, neck_depth: half width and depth of the opening.
        is_v_neck: whether the opening is a V.
        details: layers painted after the body.
    """

    half_width: float
    length: float
    waist: float
    hem: float
    waist_height: float
    shoulder: float
    slope: float
    armpit: float
    neck: float
    neck_depth: float
    is_v_neck: bool
    details: list[Layer] = field(default_factory=list)
    _behind: list[Layer] = field(default_factory=list)

    @classmethod
    def random(
        cls,
        rng: Rng,
        *,
        half_width: float,
        length: float,
        waist: float | None = None,
        hem: float | None = None,
        v_neck: float = 0.25,
    ) -> Top:
        """A top with the given measures and random others; ``v_neck`` is the chance of a V."""
        neck = rng.uniform(0.3, 0.6) * half_width
        is_v_neck = bool(rng.random() < v_neck)
        return cls(
            half_width=half_width,
            length=length,
            waist=half_width * rng.uniform(0.85, 1.0) if waist is None else waist,
            hem=half_width * rng.uniform(0.92, 1.08) if hem is None else hem,
            waist_height=rng.uniform(0.38, 0.5) * length,
            shoulder=half_width * rng.uniform(0.88, 1.0),
            slope=rng.uniform(0.04, 0.1),
            armpit=rng.uniform(0.24, 0.3),
            neck=neck,
            neck_depth=rng.uniform(0.12, 0.24) if is_v_neck else rng.uniform(0.04, 0.14),
            is_v_neck=is_v_neck,
        )

    def add_sleeves(self, length: float, *, cuff: float, angle: float, bend: float = 0.0) -> None:
        """Sleeves that leave the shoulder at ``angle`` (radians from straight down), ``bend`` at the elbow."""
        outward, down = np.sin(angle), np.cos(angle)
        start = np.array([self.shoulder, self.slope])
        tip = start + length * np.array([outward, down])
        across = cuff * np.array([-down, outward])
        elbow = (start + tip) / 2 + bend * np.array([down, -outward])
        armpit = (self.half_width * 0.96, self.armpit)
        inner_elbow = (np.array(armpit) + tip + across) / 2 + bend * np.array([down, -outward]) * 0.7
        path = [(self.shoulder * 0.7, self.slope), tuple(start), tuple(elbow), tuple(tip), tuple(tip + across)]
        path += [tuple(inner_elbow), armpit, (self.half_width * 0.7, self.armpit + 0.05)]
        self._behind += both_sides(fill(path, 0.94))
        self.details += both_sides(mark([tuple(start), armpit], 0.72))
        band = -0.08 * np.array([outward, down])
        if length > 0.4:
            self.details += both_sides(mark([tuple(tip + band), tuple(tip + across + band)], 0.75))

    def add_long_sleeves(self, rng: Rng) -> None:
        """Sleeves that hang beside the body down to about its hem."""
        length = rng.uniform(0.68, 0.86)
        self.add_sleeves(
            length, cuff=rng.uniform(0.075, 0.11), angle=rng.uniform(0.1, 0.26), bend=rng.uniform(0.0, 0.04)
        )

    def add_hood(self, rng: Rng) -> None:
        """A hood that lies behind the neck."""
        high = rng.uniform(0.06, 0.14)
        hood = [(-self.neck * 1.4, 0.04), (-self.neck * 1.1, -high), (self.neck * 1.1, -high), (self.neck * 1.4, 0.04)]
        self._behind.append(fill(smooth([*hood, (0.0, 0.16)], closed=True), 0.85))

    def add_roll_neck(self, rng: Rng) -> None:
        """A collar that stands up around the neck."""
        high, wide = rng.uniform(0.03, 0.09), self.neck * 0.9
        self.neck_depth = min(self.neck_depth, 0.05)
        collar = [(-wide, self.neck_depth), (-wide * 0.95, -high), (wide * 0.95, -high), (wide, self.neck_depth)]
        self.details.append(fill(collar, rng.uniform(0.8, 1.1)))

    def add_buttons(self, count: int, first: float, size: float) -> None:
        """Buttons down the middle, from ``first`` to the hem."""
        for y in np.linspace(first + 0.04, self.length - 0.1, count):
            self.details.append(mark([(0.02, y), (0.02 + size, y)], 0.45, size))

    def layers(self) -> list[Layer]:
        """Everything in painting order: what is behind, the inside of the back, the body, the details."""
        right = [] if self.is_v_neck else [(self.neck * 0.7, self.neck_depth * 0.75)]
        right.append((self.neck, 0.0))
        left = [(-x, y) for x, y in reversed(right)]
        neckline = [*left, (0.0, self.neck_depth), *right]
        side = [(self.shoulder, self.slope), (self.half_width, self.armpit)]
        side += [(self.waist, self.waist_height), (self.hem, self.length)]
        body = fill([*neckline, *side, *((-x, y) for x, y in reversed(side))], 1.0)
        back = fill([(-self.neck, 0.0), (0.0, 0.03), (self.neck, 0.0), (0.0, self.neck_depth)], 0.55)
        return [*self._behind, back, body, mark(neckline, 0.8), *self.details]
