"""The confusion matrix as inline SVG: a square for every pair of classes that was met, all classes named.

The diagonal has the colour of what was right, everything else that of mistakes; the darker, the larger the share of the
row. Every square that is more than a trace says its figures when it is pointed at, and the page has a table in words.

Legend: C classes; rows are what the images are, columns what they were taken for.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch

LARGEST = 150  # classes: with more, names could not be read and the picture would be wider than any screen
NUMBERED = 20  # classes up to which every square holds its number
NAME = 24  # letters of a class name that are shown
LEVELS = (2, 5, 10, 25, 50)  # percent of a row, from which the next darker shade begins; below the first it is a trace
SHADES = (1, 2, 3, 4, 5)  # style classes m1 to m5, one for each of LEVELS; a trace is of shade 1


def confusion_chart(matrix: torch.Tensor, classes: Sequence[str]) -> str:
    """Return the chart as an HTML figure's content, or "" with more classes than it can show.

    Args:
        matrix: int64 (C, C).
        classes: C names.
    """
    count = len(classes)
    if count > LARGEST:
        return ""
    side = max(10, min(44, 640 // count))
    font = min(12, side - 1)
    names = [_short(name) for name in classes]
    margin = 14 + round(0.6 * font * max(len(name) for name in names))
    width = margin + count * side + 1
    squares = _squares(matrix, classes)
    frame = "".join(
        f'<path class="grid" d="M0 {line}H{count}M{line} 0V{count}" vector-effect="non-scaling-stroke" fill="none"/>\n'
        for line in range(0, count + 1, 1 if count <= NUMBERED else 10)
    )
    return (
        f'<svg viewBox="0 0 {width} {width}" style="min-width: {min(width, 1120)}px; max-width: {width}px" role="img" '
        'aria-labelledby="matrix-title matrix-desc">\n<title id="matrix-title">Confusion matrix</title>\n'
        '<desc id="matrix-desc">Rows are what the images are, columns what they were taken for. The table of all '
        "classes says it in words.</desc>\n"
        f"{_names(names, margin, side, font)}"
        f'<g transform="translate({margin} {margin}) scale({side})">\n{squares}{frame}</g>\n'
        f"{_numbers(matrix, margin, side) if count <= NUMBERED else ''}</svg>\n"
    )


def matrix_key() -> str:
    """Return the chart's key: what the shades mean."""
    parts = []
    bounds = [*LEVELS[1:], 100]
    for shade, low, high in zip(SHADES, LEVELS, bounds, strict=True):
        said = f"{low if shade > 1 else 0} to {high} %"
        parts.append(f'<span class="keep">{_swatch("wrong", shade)} {_swatch("right", shade)} {said}</span>')
    return (
        '<p class="soft">Shares of the row, mistakes and right ones: '
        + "; ".join(parts)
        + ". An empty square is none. Rows are what the images are, columns what they were taken for.</p>\n"
    )


def _swatch(kind: str, shade: int) -> str:
    return (
        f'<svg class="key swatch" viewBox="0 0 10 10" aria-hidden="true"><rect class="{kind} m{shade}" width="10" '
        'height="10"/></svg>'
    )


def shade_of(share: float) -> int:
    """Return the shade, 1 to 5, of a share of a row in percent."""
    return max(1, sum(share >= level for level in LEVELS))


def _squares(matrix: torch.Tensor, classes: Sequence[str]) -> str:
    """Return a square of side 1 for each pair that was met; traces are drawn as one path, which takes less room."""
    totals = matrix.sum(1).tolist()
    traces, squares = [], []
    for row, column in matrix.nonzero().tolist():
        found = int(matrix[row, column])
        share = 100 * found / totals[row]
        if row != column and share < LEVELS[0]:
            traces.append(f"M{column} {row}h1v1h-1z")
            continue
        said = f"{_short(classes[row])} taken for {_short(classes[column])}"
        said = said if row != column else f"{_short(classes[row])}, right"
        kind = "right" if row == column else "wrong"
        squares.append(
            f'<rect class="{kind} m{shade_of(share)}" x="{column}" y="{row}" width="1" height="1">'
            f"<title>{escape(said)}: {found:,} of {totals[row]:,}</title></rect>\n"
        )
    path = f'<path class="wrong m1" d="{"".join(traces)}"/>\n' if traces else ""
    return path + "".join(squares)


def _numbers(matrix: torch.Tensor, margin: int, side: int) -> str:
    """Return the number of each square, in a colour that stands out from its shade."""
    totals = matrix.sum(1).tolist()
    parts = []
    for row, column in matrix.nonzero().tolist():
        found = int(matrix[row, column])
        seen = {5: "on", 4: "mid"}.get(shade_of(100 * found / totals[row]), "off")
        x, y = margin + (column + 0.5) * side, margin + (row + 0.5) * side + 4
        parts.append(f'<text class="{seen}" x="{x:g}" y="{y:g}" text-anchor="middle">{found}</text>\n')
    return "".join(parts)


def _names(names: Sequence[str], margin: int, side: int, font: int) -> str:
    """Return the names of the rows, and those of the columns, which read upwards."""
    parts = []
    for place, name in enumerate(names):
        along = margin + (place + 0.5) * side + 0.35 * font  # the base line lies below the middle of the letters
        said = escape(name)
        parts.append(f'<text x="{margin - 5}" y="{along:g}" text-anchor="end">{said}</text>\n')
        parts.append(f'<text transform="translate({along:g} {margin - 5}) rotate(-90)">{said}</text>\n')
    return f'<g class="names" style="font-size: {font}px">\n{"".join(parts)}</g>\n'


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"
