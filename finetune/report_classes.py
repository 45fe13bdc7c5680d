"""The parts of a report that look at classes and single images: bars, confused pairs, mistakes, the confusion matrix.

Legend: N test images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch

from finetune.examples import Examples, Pair, png
from finetune.matrix_chart import confusion_chart, matrix_key
from finetune.metrics import precisions, recalls
from finetune.page import bar, cell, head, html_table, number, row_head, scrolling
from finetune.predictions import Predictions

SHOWN = 10  # worst and best classes that are seen at once
LISTED = 12  # classes that one was taken for; more of them are counted


class Album:
    """The pictures that a run has kept, as elements of a page; each picture is put into the page once per use.

    Args:
        predictions: with pictures, or without any.
    """

    def __init__(self, predictions: Predictions) -> None:
        self.predictions = predictions
        self.place = {row: place for place, row in enumerate(predictions.shown.tolist())}

    def picture(self, row: int, said: str) -> str:
        """Return an image of the split, "" when there is no picture of it.

        Args:
            row: its place in the split.
            said: alternative text, not escaped yet.
        """
        if row not in self.place:
            return ""
        picture = self.predictions.pictures[self.place[row]]
        return f'<img src="{png(picture)}" alt="{escape(said)}" width="64" height="64">'


def class_tables(matrix: torch.Tensor, classes: Sequence[str]) -> str:
    """Return the recall of each class with a bar, the worst first; with many classes the ends and, folded up, all.

    Args:
        matrix: int64 (C, C), rows are what the images are.
        classes: C names.
    """
    totals, share = matrix.sum(1).tolist(), recalls(matrix).tolist()
    present = [index for index in range(len(classes)) if totals[index]]
    ordered = sorted(present, key=lambda index: (share[index], index))
    heads = [head("class"), head("right", number=True), head("recall", number=True), head("")]

    def listed(caption: str, indices: Sequence[int]) -> str:
        rows = [
            [
                row_head(escape(classes[index]), name=True),
                number(f"{int(matrix[index, index]):,} of {totals[index]:,}"),
                number(f"{share[index]:.1f} %"),
                bar(share[index]),
            ]
            for index in indices
        ]
        return html_table(caption, heads, rows)

    if len(ordered) <= 2 * SHOWN:
        ends = listed("all classes, the worst first", ordered)
    else:
        worst = listed(f"the {SHOWN} worst", ordered[:SHOWN])
        ends = worst + listed(f"the {SHOWN} best", ordered[: -SHOWN - 1 : -1])
    every = _every_class(matrix, classes, ordered)
    return f'<div class="pair">\n{ends}</div>\n{every}'


def _every_class(matrix: torch.Tensor, classes: Sequence[str], ordered: Sequence[int]) -> str:
    """Return all classes with all that they were taken for: the confusion matrix in words."""
    totals, share, precision = matrix.sum(1).tolist(), recalls(matrix).tolist(), precisions(matrix).tolist()
    taken = matrix.sum(0).tolist()
    rows = []
    for index in ordered:
        others = [(int(n), place) for place, n in enumerate(matrix[index].tolist()) if n and place != index]
        others.sort(key=lambda pair: (-pair[0], pair[1]))
        rows.append(
            [
                row_head(escape(classes[index]), name=True),
                number(f"{totals[index]:,}"),
                number(f"{share[index]:.1f} %"),
                bar(share[index]),
                number(f"{precision[index]:.1f} %" if taken[index] else ""),
                cell(_listed([(classes[place], n) for n, place in others]), long=True),
            ]
        )
    heads = [head("class"), head("images", number=True), head("recall", number=True), head("")]
    heads += [head("precision", number=True), head("taken for")]
    table = scrolling("All classes", html_table("all classes, the worst first", heads, rows))
    return f"<details><summary>All {len(rows)} classes, and what each was taken for</summary>\n{table}</details>\n"


def _listed(taken: Sequence[tuple[str, int]]) -> str:
    """Return names with their numbers of images; of a long list the end is counted."""
    said = ", ".join(f"{escape(name)}&nbsp;{n:,}" for name, n in taken[:LISTED])
    rest = taken[LISTED:]
    return said + (f"; {len(rest)} more, {sum(n for _, n in rest):,} in all" if rest else "")


def matrix_part(matrix: torch.Tensor, classes: Sequence[str]) -> str:
    """Return the confusion matrix as a picture with its key, "" when there are too many classes for one."""
    chart = confusion_chart(matrix, classes)
    return matrix_key() + scrolling("Confusion matrix", f"<figure>{chart}</figure>") if chart else ""


def pairs_part(examples: Examples, classes: Sequence[str], album: Album) -> str:
    """Return the most confused pairs of classes, with pictures of the mistakes; "" when nothing was confused."""
    items = "".join(f"<li>{_pair(pair, classes, album)}</li>\n" for pair in examples.pairs)
    return f'<ol class="pairs">\n{items}</ol>\n' if items else ""


def _pair(pair: Pair, classes: Sequence[str], album: Album) -> str:
    label, taken = classes[pair.label], classes[pair.taken]
    words = f"<p><b>{escape(label)}</b> taken for <b>{escape(taken)}</b>: {pair.count:,} of {pair.of:,}</p>\n"
    wrong = "".join(album.picture(row, f"{label} taken for {taken}") for row in pair.rows)
    right = "" if pair.right is None else album.picture(pair.right, f"{taken}, recognised")
    if not wrong:
        return words
    beside = f'<span class="soft">beside one<br>that is {escape(taken)}:</span>{right}' if right else ""
    return f'{words}<div class="row">{wrong}{beside}</div>\n'


def mistakes_part(examples: Examples, classes: Sequence[str], album: Album) -> str:
    """Return the most confident mistakes, with their pictures; "" when there was none."""
    items = ""
    for one in examples.mistakes:
        label, taken = classes[one.label], classes[one.taken]
        picture = album.picture(one.row, f"test image {one.row}: {label}")
        items += f"<li>{picture}<b>{escape(label)}</b> taken for {escape(taken)}, {one.confidence:.1f}&nbsp;%</li>\n"
    return f'<ul class="pictures">\n{items}</ul>\n' if items else ""
