# SPDX-License-Identifier: Apache-2.0
"""Ten kinds of clothing as a tailor or shoemaker would sketch them, with random proportions.

The kinds, their order and names are Fashion-MNIST's; the outlines are general knowledge of clothes, and
none is measured on a data set. Coordinates as in :mod:`wavedp.data.silhouette_pieces`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wavedp.data.silhouette_pieces import Layer, Rng, Top, both_sides, fill, mark, smooth, strip


def draw_t_shirt(rng: Rng) -> list[Layer]:
    """T-shirt or top: short sleeves, or none; round, wide or V neck."""
    top = Top.random(rng, half_width=rng.uniform(0.24, 0.34), length=rng.uniform(0.85, 1.05))
    if rng.random() < 0.8:
        top.add_sleeves(rng.uniform(0.14, 0.26), cuff=rng.uniform(0.13, 0.18), angle=rng.uniform(0.5, 0.95))
    return top.layers()


def draw_trouser(rng: Rng) -> list[Layer]:
    """Trousers from the front: a waistband and two legs."""
    waist, hip = rng.uniform(0.13, 0.18), rng.uniform(0.17, 0.22)
    crotch, cuff = rng.uniform(0.3, 0.4), rng.uniform(0.06, 0.13)
    stance = rng.uniform(0.0, 0.05)
    outer = hip if rng.random() < 0.5 else max(hip - 0.02, stance + cuff)
    leg = [
        (0.0, 0.0),
        (waist, 0.0),
        (hip, crotch * 0.75),
        ((outer + hip) / 2, 0.65),
        (max(outer, stance + cuff), 1.0),
        (max(outer, stance + cuff) - cuff, 1.0),
        (rng.uniform(0.008, 0.02) + stance * 0.4, 0.6),
        (0.0, crotch),
    ]
    layers = both_sides(fill(leg, 1.0))
    band = rng.uniform(0.03, 0.06)
    tone = rng.uniform(0.7, 1.05)
    belt = [(-waist, 0.0), (waist, 0.0), (waist + 0.01, band), (-waist - 0.01, band)]
    layers.append(fill(belt, tone))
    layers.append(mark([(0, band), (0, crotch)], 0.7))
    if rng.random() < 0.5:
        pocket = [(waist * 0.55, band), (hip * 0.95, crotch * 0.5)]
        layers += both_sides(mark(pocket, 0.7))
    return layers


def draw_pullover(rng: Rng) -> list[Layer]:
    """Pullover: long sleeves beside the body, ribbed hem and cuffs, closed front."""
    top = Top.random(rng, half_width=rng.uniform(0.24, 0.33), length=rng.uniform(0.88, 1.0))
    top.add_long_sleeves(rng)
    hem = top.length - rng.uniform(0.05, 0.09)
    if rng.random() < 0.7:
        top.details.append(mark([(-top.hem, hem), (top.hem, hem)], rng.uniform(0.7, 0.85)))
    if rng.random() < 0.25:
        top.add_hood(rng)
    elif rng.random() < 0.3:
        top.add_roll_neck(rng)
    return top.layers()


def draw_dress(rng: Rng) -> list[Layer]:
    """Dress: a narrow bodice, a waist, a straight or wide skirt; straps, short or long sleeves."""
    bust = rng.uniform(0.13, 0.18)
    top = Top.random(rng, half_width=bust, length=1.0, waist=bust * rng.uniform(0.72, 1.0), hem=rng.uniform(0.13, 0.32))
    kind = rng.random()
    if kind < 0.35:
        top.add_sleeves(rng.uniform(0.08, 0.2), cuff=rng.uniform(0.07, 0.1), angle=rng.uniform(0.25, 0.7))
    elif kind < 0.55:
        top.add_sleeves(rng.uniform(0.4, 0.55), cuff=rng.uniform(0.05, 0.07), angle=rng.uniform(0.1, 0.3))
    if rng.random() < 0.4:
        y = top.waist_height
        top.details.append(mark([(-top.waist, y), (top.waist, y)], rng.uniform(0.5, 1.3), rng.uniform(0.01, 0.04)))
    return top.layers()


def draw_coat(rng: Rng) -> list[Layer]:
    """Coat or jacket: long sleeves, lapels or a stand-up collar, an open or buttoned front, pockets."""
    top = Top.random(rng, half_width=rng.uniform(0.24, 0.31), length=1.0, hem=rng.uniform(0.25, 0.34))
    top.add_long_sleeves(rng)
    depth = rng.uniform(0.15, 0.4)
    neck = top.neck
    top.details.append(mark([(0, depth * 0.6), (0, top.length)], rng.uniform(0.2, 0.5), rng.uniform(0.012, 0.03)))
    if rng.random() < 0.7:
        lapel = [(neck * 0.4, -0.02), (neck * 1.3, 0.02), (neck * 1.4, depth * 0.55), (0.01, depth)]
        tone = rng.uniform(0.65, 1.25)
        top.details += both_sides(fill(lapel, tone))
    else:
        top.add_roll_neck(rng)
    if rng.random() < 0.3:
        top.add_hood(rng)
    if rng.random() < 0.6:
        y, inner, outer = rng.uniform(0.58, 0.7), 0.07, top.half_width * 0.8
        pocket = [(inner, y), (outer, y - rng.uniform(0, 0.05))]
        top.details += both_sides(mark(pocket, 0.6))
    top.add_buttons(int(rng.integers(0, 5)), depth, size=0.035)
    return top.layers()


def draw_sandal(rng: Rng) -> list[Layer]:
    """Sandal from the side, toe to the left: a sole, flat, wedged or heeled, under a few straps."""
    lift, thick = rng.choice([0.0, rng.uniform(0.1, 0.4)]), rng.uniform(0.04, 0.1)
    top = [(0.0, 0.8), (0.3, 0.82), (0.6, 0.8 - 0.55 * lift), (0.8, 0.8 - 0.95 * lift), (1.0, 0.8 - lift)]
    ground = 0.82 + thick
    if lift > 0 and rng.random() < 0.5:
        tip = 0.9 - rng.uniform(0, 0.05)
        under = [(0.99, ground), (tip, ground), (0.84, 0.86 - 0.8 * lift), (0.6, ground - 0.5 * lift)]
    else:
        under = [(1.0, ground), (0.5, ground)]
    sole = [*top, *under, (0.3, ground), (0.03, ground)]
    layers = [fill(sole, rng.uniform(0.6, 1.1))]
    strap = rng.uniform(0.03, 0.08)
    for x in np.sort(rng.uniform(0.08, 0.6, rng.integers(1, 5))):
        base = float(np.interp(x, [p[0] for p in top], [p[1] for p in top]))
        rise, reach = rng.uniform(0.12, 0.25) + 0.2 * x, rng.uniform(0.05, 0.25)
        arc = [(x, base), (x + 0.3 * reach, base - 0.7 * rise), (x + reach, base - rise)]
        layers.append(strip(smooth(arc), rng.uniform(0.75, 1.2), strap))
    if rng.random() < 0.75:
        height = 0.8 - lift - rng.uniform(0.22, 0.38)
        loop = [(0.97, 0.82 - lift), (1.0, height + 0.05), (0.85, height), (0.66, height + rng.uniform(0.0, 0.1))]
        layers.append(strip(smooth(loop), rng.uniform(0.8, 1.1), strap))
        layers.append(strip([(0.66, height + 0.05), (0.62, 0.8 - 0.6 * lift)], 0.9, strap))
    return layers


def draw_shirt(rng: Rng) -> list[Layer]:
    """Shirt or blouse: a turned-down collar, a buttoned front; long or short sleeves."""
    top = Top.random(rng, half_width=rng.uniform(0.23, 0.3), length=rng.uniform(0.92, 1.05), v_neck=1.0)
    if rng.random() < 0.6:
        top.add_long_sleeves(rng)
    else:
        top.add_sleeves(rng.uniform(0.16, 0.3), cuff=rng.uniform(0.12, 0.16), angle=rng.uniform(0.35, 0.75))
    neck, drop = top.neck, rng.uniform(0.08, 0.15)
    collar = [(0.0, top.neck_depth), (neck * 0.9, -0.03), (neck * 1.25, 0.03), (neck * 0.75, drop + 0.03)]
    tone = rng.uniform(0.8, 1.2)
    top.details += both_sides(fill(collar, tone))
    top.details += both_sides(mark([*collar[2:], collar[0]], 0.7))
    bottom = top.length if rng.random() < 0.8 else rng.uniform(0.35, 0.5)
    top.details.append(mark([(0.0, top.neck_depth), (0.0, bottom)], rng.uniform(0.55, 0.85)))
    top.add_buttons(int(rng.integers(3, 8)), top.neck_depth + 0.06, size=0.015)
    if rng.random() < 0.4:
        x, y = top.half_width * 0.35, rng.uniform(0.28, 0.36)
        top.details.append(mark([(x, y), (x + 0.1, y), (x + 0.1, y + 0.1), (x, y + 0.1), (x, y)], 0.8))
    return top.layers()


def draw_sneaker(rng: Rng) -> list[Layer]:
    """Sneaker from the side, toe to the left: low collar, bright sole, laces, a mark on the side."""
    collar, toe, tongue = rng.uniform(0.3, 0.42), rng.uniform(0.64, 0.72), rng.uniform(0.22, 0.36)
    ground, sole = 0.85, rng.uniform(0.05, 0.11)
    upper = [
        (0.02, ground - 0.3 * sole),
        (0.02, toe + 0.06),
        (0.1, toe),
        (0.28, toe - 0.04),
        (0.5, collar + 0.1),
        (0.58, tongue),
        (0.66, tongue + 0.02),
        (0.78, collar + rng.uniform(0.04, 0.1)),
        (0.93, collar - rng.uniform(0.0, 0.06)),
        (0.99, collar + 0.03),
        (0.97, ground - 0.3 * sole),
    ]
    layers = [fill(smooth(upper, closed=True), 1.0)]
    bottom = [(0.0, ground - sole), (0.5, ground - sole * 0.8), (1.0, ground - sole * 1.1)]
    bottom += [(0.99, ground), (0.04, ground)]
    layers.append(fill(bottom, rng.choice([rng.uniform(0.35, 0.7), rng.uniform(1.1, 1.5)])))
    for k in range(rng.integers(2, 6)):
        x, y = 0.34 + 0.055 * k, toe - 0.03 - (toe - collar) * 0.17 * k
        layers.append(mark([(x, y), (x + 0.07, y + 0.1)], rng.choice([0.55, 1.35]), 0.02))
    emblem, light = rng.random(), rng.choice([0.5, 1.45])
    if emblem < 0.4:
        for k in range(rng.integers(2, 4)):
            layers.append(mark([(0.52 + 0.07 * k, 0.5), (0.46 + 0.07 * k, ground - sole)], light, 0.025))
    elif emblem < 0.7:
        layers.append(mark(smooth([(0.35, 0.66), (0.5, 0.76), (0.85, 0.52)]), light, 0.035))
    if rng.random() < 0.4:
        layers.append(mark(smooth([(0.05, toe + 0.12), (0.2, toe + 0.06), (0.28, ground - sole)]), 0.7))
    return layers


def draw_bag(rng: Rng) -> list[Layer]:
    """Bag: a box, soft or trapezoid, under a handle or strap; flap, seam, clasp, pocket."""
    width, height = rng.uniform(0.38, 0.5), rng.uniform(0.45, 0.85)
    flare, top = rng.uniform(0.8, 1.05), rng.uniform(0.25, 0.45)
    body = [(-width * flare, top), (width * flare, top), (width, top + height), (-width, top + height)]
    layers = []
    if rng.random() < 0.85:
        grip, reach = rng.uniform(0.35, 0.95) * width, top - rng.uniform(0.12, 0.4)
        arc = [(-grip, top + 0.05), (-grip * 0.9, reach), (grip * 0.9, reach), (grip, top + 0.05)]
        layers.append(strip(smooth(arc), rng.uniform(0.6, 1.1), rng.uniform(0.025, 0.07)))
    layers.append(fill(smooth(body, closed=True, cut=rng.uniform(0.05, 0.2)), 1.0))
    if rng.random() < 0.6:
        drop, tone = top + height * rng.uniform(0.25, 0.65), rng.uniform(0.7, 1.2)
        flap = [(-width * flare, top), (width * flare, top), (width * 0.95, drop), (-width * 0.95, drop)]
        layers.append(fill(smooth(flap, closed=True, cut=0.12), tone, is_cloth=False))
        layers.append(mark([flap[3], flap[2]], 0.55, 0.014))
        layers.append(mark([(-0.03, drop), (0.03, drop)], rng.choice([0.3, 1.6]), 0.05))
    else:
        seam = top + height * rng.uniform(0.05, 0.25)
        layers.append(mark([(-width, seam), (width, seam)], 0.6))
    if rng.random() < 0.35:
        x, y = width * rng.uniform(0.4, 0.7), top + height * rng.uniform(0.4, 0.6)
        foot = top + height * 0.9
        layers.append(mark([(-x, y), (x, y), (x, foot), (-x, foot), (-x, y)], 0.65, 0.014))
    return layers


def draw_ankle_boot(rng: Rng) -> list[Layer]:
    """Ankle boot from the side, toe to the left: a shaft above the ankle, a flat, block or high heel."""
    lift = rng.choice([rng.uniform(0.0, 0.05), rng.uniform(0.08, 0.22)])
    shaft, back = rng.uniform(0.0, 0.2), rng.uniform(0.94, 1.0)
    front, toe, ground = rng.uniform(0.52, 0.62), rng.uniform(0.72, 0.78), 0.95
    upper = [
        (0.0, ground - 0.03),
        (0.02, toe + 0.04),
        (0.14, toe - 0.02),
        (0.36, toe - 0.1 - lift * 0.3),
        (front - 0.03, 0.5 - lift * 0.4),
        (front - rng.uniform(0.0, 0.06), shaft),
        (back, shaft + rng.uniform(-0.03, 0.03)),
        (0.94, 0.45),
        (0.99, ground - 0.1 - lift),
        (0.97, ground - 0.02 - lift),
        (0.62, ground - 0.02 - lift),
        (0.4, ground - 0.02),
    ]
    layers = [fill(smooth(upper, closed=True, cut=0.2), 1.0)]
    dark = rng.uniform(0.35, 0.9)
    sole = [(0.0, ground - 0.05), (0.4, ground - 0.04), (0.64, ground - 0.04 - lift), (0.98, ground - 0.05 - lift)]
    under = [(0.98, ground - lift), (0.66, ground - lift), (0.42, ground), (0.02, ground)]
    layers.append(fill([*sole, *under], dark))
    heel = rng.uniform(0.72, 0.88)
    step = ground - 0.05 - lift
    layers.append(fill([(heel, step), (0.98, step), (0.97, ground), (heel + 0.02, ground)], dark))
    kind = rng.random()
    if kind < 0.35:
        for k in range(rng.integers(3, 6)):
            y = shaft + 0.06 + 0.09 * k
            layers.append(mark([(front - 0.03, y), (front + 0.1, y + 0.03)], rng.choice([0.5, 1.4]), 0.02))
    elif kind < 0.65:
        x = rng.uniform(0.7, 0.82)
        panel = [(x - 0.07, shaft + 0.02), (x + 0.07, shaft + 0.02), (x + 0.04, 0.6), (x - 0.04, 0.6)]
        layers.append(fill(panel, rng.uniform(0.55, 0.8), is_cloth=False))
    else:
        y = rng.uniform(0.4, 0.6)
        layers.append(mark([(front - 0.05, y), (0.96, y - 0.03)], rng.choice([0.6, 1.3]), rng.uniform(0.02, 0.05)))
    return layers


DRAWINGS: dict[str, Callable[[Rng], list[Layer]]] = {
    "T-shirt/top": draw_t_shirt,
    "Trouser": draw_trouser,
    "Pullover": draw_pullover,
    "Dress": draw_dress,
    "Coat": draw_coat,
    "Sandal": draw_sandal,
    "Shirt": draw_shirt,
    "Sneaker": draw_sneaker,
    "Bag": draw_bag,
    "Ankle boot": draw_ankle_boot,
}
