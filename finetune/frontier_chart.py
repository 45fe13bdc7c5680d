"""Accuracy against time as inline SVG: a circle for every run of a sweep, a line through those that no other beats.

The time axis is logarithmic: between training a classifier and training a whole network lie orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.chart import BOTTOM, HEIGHT, LEFT, LINES, RIGHT, TOP, grid_lines, ticks

ROUND_SECONDS = (
    *(factor * 10.0**power for power in (-2, -1) for factor in (1, 2, 5)), 1.0, 2.0, 5.0, 10.0, 20.0, 30.0,
    *(60.0 * minutes for minutes in (1, 2, 5, 10, 20, 30)), *(3600.0 * hours for hours in (1, 2, 5, 10, 20, 50, 100)),
)  # fmt: skip
MOST_MARKS = 7  # along the time axis: more would run into one another
NUMBER_WIDTH = 22.0  # room for a number of two digits, in the chart's own units
WIDE = 760  # of the chart, in its own units


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        number: its number in the page's table.
        told: what is said when it is pointed at, escaped.
        style: number of the line style of its layers.
        seconds: its time, above 0.
        accuracy: in percent.
        front: whether it is on the frontier.
    """

    number: int
    told: str
    style: int
    seconds: float
    accuracy: float
    front: bool


def frontier_chart(points: Sequence[Point]) -> str:
    """Return the chart as an HTML figure; "" without points."""
    if not points:
        return ""
    levels = ticks(min(point.accuracy for point in points), max(point.accuracy for point in points))
    marks = time_marks(min(point.seconds for point in points), max(point.seconds for point in points))
    low, high = levels[0], levels[-1]
    first = math.log(min(marks[0], *(point.seconds for point in points)))
    last = math.log(max(marks[-1], *(point.seconds for point in points)))

    def x(seconds: float) -> float:
        span = max(last - first, 1e-9)
        return LEFT + RIGHT + (math.log(seconds) - first) / span * (WIDE - LEFT - 4 * RIGHT)

    def y(accuracy: float) -> float:
        return TOP + (high - accuracy) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = grid_lines(levels, y, WIDE)
    for mark in marks:
        parts.append(
            f'<text x="{x(mark):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{time_label(mark)}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDE) / 2}" y="{HEIGHT - 6}" text-anchor="middle">time of the run</text>')
    parts.append('<text x="0" y="14">validation accuracy in %</text>')
    front = sorted((point for point in points if point.front), key=lambda point: point.seconds)
    line = " ".join(f"{x(point.seconds):.1f},{y(point.accuracy):.1f}" for point in front)
    parts.append(f'<polyline class="ideal" fill="none" points="{line}"/>')
    for point in points:
        across, down = x(point.seconds), y(point.accuracy)
        kind = f"s s{point.style % LINES}" + (" front" if point.front else "")
        parts.append(
            f'<circle class="{kind}" cx="{across:.1f}" cy="{down:.1f}" r="4"><title>{point.told}</title></circle>'
        )
    parts += _numbers([(x(point.seconds), y(point.accuracy), point.number) for point in front])
    told = "; ".join(point.told for point in front)
    return (
        f'<figure><svg viewBox="0 0 {WIDE} {HEIGHT}" style="min-width: 34rem" role="img" '
        'aria-labelledby="frontier-title frontier-desc">\n'
        '<title id="frontier-title">Validation accuracy against time</title>\n'
        f'<desc id="frontier-desc">On the frontier: {told}.</desc>\n' + "\n".join(parts) + "\n</svg></figure>\n"
    )


def _numbers(places: Sequence[tuple[float, float, int]]) -> list[str]:
    """Return the numbers of points from left to right, above each or below it; where neither is free, none."""
    parts, free = [], {-9: -math.inf, 17: -math.inf}  # how far below a point, and from where on there is room
    for across, down, number in places:
        shift = next((shift for shift, start in free.items() if across >= start), None)
        if shift is not None:
            parts.append(f'<text x="{across:.1f}" y="{down + shift:.1f}" text-anchor="middle">{number}</text>')
            free[shift] = across + NUMBER_WIDTH
    return parts


def time_marks(low: float, high: float) -> list[float]:
    """Return a few round times from one at or below `low` to one at or above `high`, in seconds."""
    below = [mark for mark in ROUND_SECONDS if mark <= low]
    above = [mark for mark in ROUND_SECONDS if mark >= high]
    first = below[-1] if below else ROUND_SECONDS[0]
    last = above[0] if above else ROUND_SECONDS[-1]
    marks = [mark for mark in ROUND_SECONDS if first <= mark <= last] or [last]
    step = math.ceil(len(marks) / MOST_MARKS)
    return marks[::-1][::step][::-1]


def time_label(seconds: float) -> str:
    """Return a round time in its largest unit: "30 s", "5 min", "2 h"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"
