"""The outlines of the drawn data sets, as small templates.

Every outline lies in the unit circle around the origin, x to the right and y down. It is a polygon, or what a formula
keeps of the plane, or several of these. Corners are rounded to 1/1024 so that templates do not depend on the last bit
of a machine's sine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

CELLS = 128
"""Cells across a template."""

RIM = 9
"""Cells from an outline's edge that count as its rim."""

Plane = NDArray[np.float64]
Mask = NDArray[np.bool_]
Points = Sequence[tuple[float, float]]
Outline = Callable[[Plane, Plane], Mask]


def templates(names: Sequence[str]) -> NDArray[np.uint8]:
    """Draw the templates of some outlines.

    Args:
        names: keys of `OUTLINES`.

    Returns:
        uint8 (len(names), CELLS, CELLS): 0 outside, 1 rim, 2 inside. The border cells are 0.
    """
    centre = (np.arange(CELLS) * 2 + 1 - CELLS) / (CELLS - 4)  # a cell of margin on every side
    x, y = np.meshgrid(centre, centre)
    drawn = np.zeros((len(names), CELLS, CELLS), dtype=np.uint8)
    for template, name in zip(drawn, names, strict=True):
        inside = OUTLINES[name](x, y) & (x * x + y * y <= 1)
        template[inside] = 1
        template[_shrunk(inside)] = 2
    return drawn


def _shrunk(inside: Mask) -> Mask:
    """Return the cells farther than `RIM` from everything outside."""
    kept = inside.copy()
    for dy in range(-RIM, RIM + 1):
        dx = math.isqrt(RIM * RIM - dy * dy)
        for shift in (-dx, dx):
            kept &= np.roll(inside, (dy, shift), axis=(0, 1))  # nothing comes round: the border is outside
    return kept


def polygon(points: Points) -> Outline:
    """Return the inside of a polygon (even-odd rule), its corners in order."""
    corners = [(round(x * 1024) / 1024, round(y * 1024) / 1024) for x, y in points]

    def inside(x: Plane, y: Plane) -> Mask:
        odd = np.zeros(x.shape, dtype=np.bool_)
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y1 != y2:
                odd ^= ((y1 > y) != (y2 > y)) & (
                    (x - x1) * abs(y2 - y1) < (x2 - x1) * (y - y1) * math.copysign(1, y2 - y1)
                )
        return odd

    return inside


def star(points: int, inner: float) -> Outline:
    """Return a star: `points` corners on the unit circle and as many at radius `inner` between them."""
    return polygon([_polar(1 if i % 2 == 0 else inner, i * 180 / points) for i in range(2 * points)])


def regular(corners: int) -> Outline:
    """Return a regular polygon on the unit circle."""
    return polygon([_polar(1, i * 360 / corners) for i in range(corners)])


def ellipse(x0: float, y0: float, width: float, height: float) -> Outline:
    """Return an ellipse with its middle at (x0, y0) and these half-axes."""
    return lambda x, y: ((x - x0) / width) ** 2 + ((y - y0) / height) ** 2 <= 1


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """Return a rectangle."""
    return lambda x, y: (left <= x) & (x <= right) & (top <= y) & (y <= bottom)


def joined(*outlines: Outline) -> Outline:
    """Return what lies in any of the outlines."""
    return lambda x, y: np.logical_or.reduce([outline(x, y) for outline in outlines])


def without(outline: Outline, hole: Outline) -> Outline:
    """Return what lies in an outline and not in the hole."""
    return lambda x, y: outline(x, y) & ~hole(x, y)


def common(outline: Outline, other: Outline) -> Outline:
    """Return what lies in both."""
    return lambda x, y: outline(x, y) & other(x, y)


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.sin(math.radians(degrees)), -radius * math.cos(math.radians(degrees))


def _bar(degrees: float) -> Outline:
    """Return a bar from the origin to the unit circle."""
    (x, y), (across_x, across_y) = _polar(0.96, degrees), _polar(0.26, degrees + 90)
    back_x, back_y = -x / 8, -y / 8
    return polygon(
        [
            (back_x - across_x, back_y - across_y),
            (back_x + across_x, back_y + across_y),
            (x + across_x, y + across_y),
            (x - across_x, y - across_y),
        ]
    )


OUTLINES: dict[str, Outline] = {
    # shapes10
    "arrow": joined(polygon([(0, -1), (0.8, -0.05), (-0.8, -0.05)]), box(-0.28, -0.1, 0.28, 0.95)),
    "corner": polygon([(-0.7, -0.7), (-0.1, -0.7), (-0.1, 0.1), (0.7, 0.1), (0.7, 0.7), (-0.7, 0.7)]),
    "crescent": without(ellipse(0, 0, 1, 1), ellipse(0.5, 0, 0.8, 0.8)),
    "cross": joined(box(-0.3, -0.95, 0.3, 0.95), box(-0.95, -0.3, 0.95, 0.3)),
    "disc": ellipse(0, 0, 0.95, 0.95),
    "heart": lambda x, y: (1.4 * x * x + (1.25 * (0.12 - y)) ** 2 - 0.85) ** 3 < 2.6 * x * x * (1.25 * (0.12 - y)) ** 3,
    "hourglass": polygon([(-0.7, -0.7), (0.7, -0.7), (0.18, 0), (0.7, 0.7), (-0.7, 0.7), (-0.18, 0)]),
    "square": box(-0.7, -0.7, 0.7, 0.7),
    "star": star(5, 0.42),
    "triangle": regular(3),
    # shapes100
    "bolt": polygon([(0.3, -0.95), (-0.75, 0.2), (-0.15, 0.2), (-0.3, 0.95), (0.75, -0.2), (0.15, -0.2)]),
    "chevron": polygon([(-0.7, -0.7), (0, -0.7), (0.75, 0), (0, 0.7), (-0.7, 0.7), (0.05, 0)]),
    "clover": joined(*(ellipse(*_polar(0.5, degrees), 0.48, 0.48) for degrees in (0, 120, 240))),
    "double_arrow": joined(
        polygon([(0, -1), (0.65, -0.35), (-0.65, -0.35)]),
        polygon([(0, 1), (0.65, 0.35), (-0.65, 0.35)]),
        box(-0.22, -0.4, 0.22, 0.4),
    ),
    "drop": joined(ellipse(0, 0.38, 0.6, 0.6), polygon([(0, -1), (0.56, 0.2), (-0.56, 0.2)])),
    "ellipse": ellipse(0, 0, 0.98, 0.55),
    "fish": joined(ellipse(-0.2, 0, 0.78, 0.5), polygon([(0.3, 0), (0.85, -0.5), (0.85, 0.5)])),
    "flower": joined(
        ellipse(0, 0, 0.4, 0.4), *(ellipse(*_polar(0.66, degrees), 0.33, 0.33) for degrees in range(0, 360, 72))
    ),
    "h": joined(box(-0.7, -0.7, -0.25, 0.7), box(0.25, -0.7, 0.7, 0.7), box(-0.3, -0.22, 0.3, 0.22)),
    "half_disc": common(ellipse(0, 0.45, 1, 1), box(-1, -1, 1, 0.35)),
    "hexagon": regular(6),
    "house": polygon(
        [(0, -0.95), (0.85, -0.15), (0.6, -0.15), (0.6, 0.75), (-0.6, 0.75), (-0.6, -0.15), (-0.85, -0.15)]
    ),
    "lens": common(ellipse(0, -0.55, 1.14, 1.14), ellipse(0, 0.55, 1.14, 1.14)),
    "lollipop": joined(ellipse(0, -0.42, 0.56, 0.56), box(-0.16, 0, 0.16, 0.98)),
    "mushroom": joined(common(ellipse(0, 0, 0.95, 0.9), box(-1, -1, 1, 0.05)), box(-0.3, 0, 0.3, 0.85)),
    "pacman": without(ellipse(0, 0, 0.97, 0.97), polygon([(-0.1, 0), (1, -0.75), (1, 0.75)])),
    "parallelogram": polygon([(-0.35, -0.5), (0.85, -0.5), (0.35, 0.5), (-0.85, 0.5)]),
    "rectangle": box(-0.88, -0.44, 0.88, 0.44),
    "star4": star(4, 0.36),
    "star6": star(6, 0.5),
    "t": joined(box(-0.75, -0.65, 0.75, -0.15), box(-0.25, -0.2, 0.25, 0.9)),
    "trapezium": polygon([(-0.35, -0.6), (0.35, -0.6), (0.8, 0.5), (-0.8, 0.5)]),
    "u": joined(box(-0.7, -0.7, -0.25, 0.7), box(0.25, -0.7, 0.7, 0.7), box(-0.7, 0.28, 0.7, 0.7)),
    "y": joined(*(_bar(degrees) for degrees in (0, 120, 240))),
    "z": polygon(
        [
            (-0.75, -0.62),
            (0.25, -0.62),
            (0.25, 0.16),
            (0.75, 0.16),
            (0.75, 0.62),
            (-0.25, 0.62),
            (-0.25, -0.16),
            (-0.75, -0.16),
        ]
    ),
}

SHAPES10_OUTLINES = tuple(OUTLINES)[:10]
SHAPES100_OUTLINES = tuple(OUTLINES)[10:]
