"""Charts of a run's epochs as inline SVG, in colours that the page's style sheet gives.

Classes: `grid` for grid lines, `a` for training, `b` for validation (dashed, so that the two differ without colour too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 420, 250, 46, 34, 42, 10  # of a chart, in its own units


def line_chart(key: str, name: str, unit: str, rows: Sequence[dict[str, Any]]) -> str:
    """One chart as a figure: training and, where there is one, validation."""
    series = [
        (mark, label, [float(row[f"{split}_{key}"]) for row in rows])
        for mark, split, label in (("a", "train", "training"), ("b", "val", "validation"))
        if all(row[f"{split}_{key}"] is not None for row in rows)
    ]
    values = [value for _, _, line in series for value in line]
    marks = ticks(min(values), max(values))
    low, high = marks[0], marks[-1]
    epochs = [int(row["epoch"]) for row in rows]

    def x(epoch: float) -> float:
        span = max(epochs[-1] - epochs[0], 1)
        return LEFT + 8 + (epoch - epochs[0]) / span * (WIDTH - LEFT - RIGHT - 16)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:.{digits}f}</text>')
    for epoch in whole_ticks(epochs[0], epochs[-1]):
        parts.append(f'<text x="{x(epoch):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">epoch</text>')
    parts.append(f'<text x="0" y="14">{name.lower()}{unit and f" in{unit}"}</text>')
    legend = WIDTH - RIGHT - 110 * len(series)
    for place, (mark, label, line) in enumerate(series):
        start = legend + 110 * place
        parts.append(f'<line class="{mark}" x1="{start}" x2="{start + 24}" y1="10" y2="10"/>')
        parts.append(f'<text x="{start + 30}" y="14">{label}</text>')
        points = [(x(epoch), y(value)) for epoch, value in zip(epochs, line, strict=True)]
        parts.append(f'<polyline class="{mark}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
        if len(points) <= 40:  # more dots than this hide the line
            parts += [f'<circle class="{mark}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in points]
    told = "; ".join(
        f"{label} from {line[0]:.2f}{unit} in epoch {epochs[0]} to {line[-1]:.2f}{unit} in epoch {epochs[-1]}"
        for _, label, line in series
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-title {key}-desc">\n'
        f'<title id="{key}-title">{name} per epoch</title>\n<desc id="{key}-desc">{told}.</desc>\n'
        + "\n".join(parts)
        + "\n</svg></figure>\n"
    )


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers whose first and last enclose low and high."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def whole_ticks(first: int, last: int) -> list[int]:
    """Return at most nine whole numbers from first to last, evenly spaced from first on."""
    step = next(s for power in range(10) for s in (10**power, 2 * 10**power, 5 * 10**power) if (last - first) / s <= 8)
    return list(range(first, last + 1, step))
