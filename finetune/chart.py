"""Charts of epochs, of one run or of several, as inline SVG, in colours that the page's style sheet gives.

Style classes: `grid` for grid lines, `a` for training, `b` for validation; dashes tell the two apart without colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 420, 250, 46, 34, 42, 10  # of a chart, in its own units


def line_chart(key: str, name: str, unit: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a chart of one measure as an HTML figure: training and, where there is one, validation.

    Args:
        key: `loss` or `accuracy`, the end of the rows' keys.
        name: what the chart is called.
        unit: follows every value that is read out, such as " %".
        rows: metrics.jsonl's rows, at least one.
    """
    series = [
        (mark, label, [float(row[f"{split}_{key}"]) for row in rows])
        for mark, split, label in (("a", "train", "training"), ("b", "val", "validation"))
        if all(row[f"{split}_{key}"] is not None for row in rows)
    ]
    values = [value for _, _, line in series for value in line]
    levels = ticks(min(values), max(values))
    low, high = levels[0], levels[-1]
    epochs = [int(row["epoch"]) for row in rows]

    def x(epoch: float) -> float:
        span = max(epochs[-1] - epochs[0], 1)
        return LEFT + 8 + (epoch - epochs[0]) / span * (WIDTH - LEFT - RIGHT - 16)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = grid_lines(levels, y)
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


LINES = 6  # line styles there are; more runs begin again with the first


def overlay(key: str, title: str, across: str, unit: str, lines: Sequence[tuple[str, list[float], list[float]]]) -> str:
    """Return a chart of one line per run as an HTML figure; the page's own key says which line is whose.

    Args:
        key: of this chart within the page, for its title's id.
        title: what the chart shows.
        across: what lies along the axis, with its unit.
        unit: follows every value that is read out, such as " %".
        lines: (name, places along the axis, values) of each run, names escaped already.
    """
    everything = [value for _, _, values in lines for value in values]
    levels = ticks(min(everything), max(everything))
    places = [place for _, along, _ in lines for place in along]
    whole = all(place == int(place) for place in places)  # epochs, and not seconds
    marks = [float(mark) for mark in whole_ticks(0, int(max(places)))] if whole else ticks(0.0, max(places))
    marks = marks if marks[-1] >= max(places) else [*marks, max(places)]
    low, high, first, last = levels[0], levels[-1], marks[0], marks[-1]

    def x(place: float) -> float:
        return LEFT + (place - first) / (last - first) * (WIDTH - LEFT - 2 * RIGHT)  # room for half of the last label

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = grid_lines(levels, y)
    digits = decimals(marks)
    for mark in marks:
        label = f"{mark:,.{digits}f}"
        parts.append(f'<text x="{x(mark):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{across}</text>')
    parts.append(f'<text x="0" y="14">{title.lower()}{unit and f" in{unit}"}</text>')
    for number, (_, along, values) in enumerate(lines):
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(along, values, strict=True))
        parts.append(f'<polyline class="s s{number % LINES}" points="{points}"/>')
        if len(values) == 1:  # a line of one point is not seen
            parts.append(f'<circle class="s s{number % LINES}" cx="{x(along[0]):.1f}" cy="{y(values[0]):.1f}" r="3"/>')
    told = "; ".join(f"{name} from {values[0]:.2f}{unit} to {values[-1]:.2f}{unit}" for name, _, values in lines)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-title {key}-desc">\n'
        f'<title id="{key}-title">{title}</title>\n<desc id="{key}-desc">{told}.</desc>\n'
        + "\n".join(parts)
        + "\n</svg></figure>\n"
    )


def grid_lines(levels: Sequence[float], y: Callable[[float], float], width: int = WIDTH) -> list[str]:
    """Return a grid line and its value for each level, in a chart of this width."""
    digits = decimals(levels)
    parts = []
    for level in levels:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(level) + 4:.1f}" text-anchor="end">{level:.{digits}f}</text>')
    return parts


def decimals(marks: Sequence[float]) -> int:
    """Return how many decimals tell the marks of an axis apart."""
    return max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))


def ticks(low: float, high: float) -> list[float]:
    """Return two to seven round numbers whose first and last enclose low and high (0 to 100 stays within)."""
    if high - low < 1e-9:
        low, high = (low - 1, high) if low >= 1 else (low, low + 1)
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def whole_ticks(first: int, last: int) -> list[int]:
    """Return at most nine whole numbers from first to last, multiples of 1, 2 or 5 times a power of ten."""
    steps = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    step = next(step for step in steps if (last - first) / step <= 8)
    return [number for number in range(first, last + 1) if number % step == 0]


TALL = 360  # height of a chart whose two axes have the same scale


def reliability_chart(lines: Sequence[tuple[str, str, Sequence[float], Sequence[float]]]) -> str:
    """Return accuracy against confidence as an HTML figure; on the diagonal, confidence can be believed.

    Args:
        lines: (style class, label, mean confidence of each bin, accuracy of each bin), in percent, empty bins left out.
    """
    left, right, top, bottom = LEFT, WIDTH - 2 * RIGHT, TOP, TALL - BOTTOM  # room for half of the last label

    def x(share: float) -> float:
        return left + share / 100 * (right - left)

    def y(share: float) -> float:
        return bottom - share / 100 * (bottom - top)

    parts = grid_lines([0, 20, 40, 60, 80, 100], y)
    for share in (0, 20, 40, 60, 80, 100):
        parts.append(f'<text x="{x(share):.1f}" y="{bottom + 17}" text-anchor="middle">{share}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{TALL - 6}" text-anchor="middle">confidence in %</text>')
    parts.append('<text x="0" y="14">accuracy in %</text>')
    parts.append(f'<line class="ideal" x1="{x(0)}" y1="{y(0)}" x2="{x(100)}" y2="{y(100)}"/>')
    for place, (mark, label, confidence, accuracy) in enumerate(lines):
        start = right - 140 * (len(lines) - place)
        parts.append(f'<line class="{mark}" x1="{start}" x2="{start + 24}" y1="10" y2="10"/>')
        parts.append(f'<text x="{start + 30}" y="14">{label}</text>')
        points = [(x(a), y(b)) for a, b in zip(confidence, accuracy, strict=True)]
        parts.append(f'<polyline class="{mark}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
        parts += [f'<circle class="{mark}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {TALL}" role="img" aria-labelledby="reliability-title reliability-desc">\n'
        '<title id="reliability-title">Accuracy by confidence</title>\n'
        '<desc id="reliability-desc">Points on the dotted diagonal would be confidence that can be believed; the table '
        "has their figures.</desc>\n" + "\n".join(parts) + "\n</svg></figure>\n"
    )
