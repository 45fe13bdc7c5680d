"""Which images a report shows, and how they become small pictures in its page.

Legend: N images, C classes, M pictures.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional

from finetune.metrics import confusion_matrix

PAIRS = 10  # most confused pairs
PER_PAIR = 3  # pictures of each
MISTAKES = 20  # most confident mistakes
SIDE = 64  # pixels: as PNG up to 12 kB, so that at most 60 pictures leave room in a page of 2 MB


@dataclass(frozen=True)
class Pair:
    """Two classes of which one is taken for the other.

    Attributes:
        label: what the images are.
        taken: what they were taken for.
        count: how many images.
        of: images of the class `label`.
        rows: the most confident of these mistakes, the most confident first.
        right: an image of the class `taken` that was recognised, the most confident; None without one.
    """

    label: int
    taken: int
    count: int
    of: int
    rows: tuple[int, ...]
    right: int | None


@dataclass(frozen=True)
class Mistake:
    """One image that was taken for another class.

    Attributes:
        row: its place in the split.
        label: what it is.
        taken: what it was taken for.
        confidence: the softmax of that, in percent.
    """

    row: int
    label: int
    taken: int
    confidence: float


@dataclass(frozen=True)
class Examples:
    """What a report shows.

    Attributes:
        pairs: the most confused pairs of classes, the most frequent first.
        mistakes: the most confident mistakes, the most confident first.
    """

    pairs: tuple[Pair, ...]
    mistakes: tuple[Mistake, ...]

    @property
    def rows(self) -> list[int]:
        """The images that are shown, in ascending order."""
        shown = {one.row for one in self.mistakes}
        for pair in self.pairs:
            shown |= {*pair.rows, *(() if pair.right is None else (pair.right,))}
        return sorted(shown)


def choose_examples(logits: torch.Tensor, labels: torch.Tensor) -> Examples:
    """Choose the pairs and mistakes to show; equal logits give equal choices.

    Args:
        logits: float32 (N, C).
        labels: int64 (N,).
    """
    if not len(labels):
        return Examples((), ())
    predicted = logits.argmax(1)
    confidence = logits.double().softmax(1).gather(1, predicted[:, None])[:, 0]  # (N,)
    order = torch.argsort(confidence, descending=True, stable=True)
    wrong = order[(predicted != labels)[order]]
    found = zip(
        wrong.tolist(), labels[wrong].tolist(), predicted[wrong].tolist(), confidence[wrong].tolist(), strict=True
    )
    sure = [Mistake(row, label, taken, 100 * value) for row, label, taken, value in found]
    matrix = confusion_matrix(predicted, labels, logits.shape[1])
    counted = [(int(matrix[a, b]), a, b) for a, b in matrix.nonzero().tolist() if a != b]
    counted.sort(key=lambda item: (-item[0], item[1], item[2]))
    pairs = []
    for count, label, taken in counted[:PAIRS]:
        rows = [one.row for one in sure if (one.label, one.taken) == (label, taken)][:PER_PAIR]
        right = order[((predicted == taken) & (labels == taken))[order]].tolist()
        pairs.append(Pair(label, taken, count, int(matrix[label].sum()), tuple(rows), right[0] if right else None))
    return Examples(tuple(pairs), tuple(sure[:MISTAKES]))


def shrink(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images (M, 3, H, W) with sides of at most `SIDE`; small ones as they are."""
    longer = max(images.shape[-2:])
    if longer <= SIDE or not len(images):
        return images
    size = [max(1, round(side * SIDE / longer)) for side in images.shape[-2:]]
    return functional.interpolate(images, size=size, mode="bilinear", antialias=True)


def png(picture: torch.Tensor) -> str:
    """Return a uint8 (3, H, W) picture as the address of a PNG that needs no file: `data:image/png;base64,...`."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
