"""Figures of a classifier, from its logits and the true labels.

Legend: N images, C classes; logits float32 (N, C), labels int64 (N,) from 0 to C - 1. Shares are in percent.

Every figure of a run, of `finetune eval` and of a report comes from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BINS = 15  # of confidence, equally wide: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 5
UNEVEN = 2  # times as many images in the largest class as in the smallest: beyond that, the mean over images misleads


def top_k_accuracy(logits: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Return the share of images whose true class is among the k likeliest.

    Of classes with equal logits the one with the lower index goes first, as in argmax.
    """
    own = logits.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(logits.shape[1]) < labels[:, None]  # (N, C)
    ahead = (logits > own) | ((logits == own) & earlier)
    return 100 * int((ahead.sum(1) < k).sum()) / len(labels)


def top_5_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return top-5 accuracy; None with five classes or fewer, where it is always 100."""
    return top_k_accuracy(logits, labels, 5) if logits.shape[1] > 5 else None


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return int64 (C, C): how many images of the row's class were taken for the column's.

    Args:
        predicted: int64 (N,).
        labels: int64 (N,).
        classes: C.
    """
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def recalls(matrix: torch.Tensor) -> torch.Tensor:
    """Return float64 (C,): the share of each class's images that were recognised; NaN where there are none.

    It is also called per-class accuracy.
    """
    return 100 * matrix.diagonal().double() / matrix.sum(1).double()


def precisions(matrix: torch.Tensor) -> torch.Tensor:
    """Return float64 (C,): the share of right ones among the images taken for each class; NaN where there are none."""
    return 100 * matrix.diagonal().double() / matrix.sum(0).double()


def mean_recall(matrix: torch.Tensor) -> float:
    """Return the mean of the recalls of the classes that have images: each class counts the same."""
    return float(recalls(matrix).nanmean())


def is_uneven(counts: Sequence[int]) -> bool:
    """Tell whether the largest class has more than twice as many images as the smallest; empty classes are left out."""
    there = [count for count in counts if count]
    return bool(there) and max(there) > UNEVEN * min(there)


def uneven_recall(summary: Mapping[str, Any]) -> float | None:
    """Return a run's mean recall where its classes are uneven, so that it says more than the accuracy; else None.

    Args:
        summary: as in summary.json; one of an older version has no such figure.
    """
    value = summary.get("test_mean_recall") if summary["data"].get("uneven") else None
    return None if value is None else float(value)


def no_test(summary: Mapping[str, Any]) -> str:
    """Return why a run's summary has no test accuracy."""
    held = summary["data"].get("test_sha256") is not None
    return "the test images were left unread (--hold-test)" if held else "the data bring no test split"


@dataclass(frozen=True)
class Calibration:
    """How far confidence can be believed, by bins of confidence.

    Attributes:
        counts: images in each of the `BINS` bins; bin m holds confidences in (m / BINS, (m + 1) / BINS].
        confidence: mean confidence of each bin in percent; 0 where it is empty.
        accuracy: share of right predictions of each bin in percent; 0 where it is empty.
        error: expected calibration error in percentage points (Guo et al. 2017, equation 3).
    """

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    error: float


def calibrate(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> Calibration:
    """Set confidence against accuracy.

    Args:
        logits: float32 (N, C).
        labels: int64 (N,).
        temperature: the logits are divided by it first.
    """
    confidence = (logits.double() / temperature).softmax(1).amax(1)  # (N,)
    right = (logits.argmax(1) == labels).double()
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    counts = torch.bincount(place, minlength=BINS)
    filled = counts.clamp_min(1).double()
    mean_confidence = torch.bincount(place, confidence, minlength=BINS) / filled
    accuracy = torch.bincount(place, right, minlength=BINS) / filled
    error = float((counts.double() * (accuracy - mean_confidence).abs()).sum() / len(labels))
    return Calibration(
        tuple(counts.tolist()),
        tuple((100 * mean_confidence).tolist()),
        tuple((100 * accuracy).tolist()),
        100 * error,
    )
