"""`--class-weights`: how much the images of each class count in the training loss."""

from __future__ import annotations

import torch


def class_weights(kind: str, labels: torch.Tensor, classes: int) -> torch.Tensor | None:
    """Return the weight of each class, float32 (C,); None where all images count the same.

    `balanced` is N / (C * n) for a class of n images (King & Zeng 2001, "Logistic Regression in Rare Events
    Data"; the same as scikit-learn's "balanced"): every class has the same share of the loss, and the mean weight
    over the images is 1, so learning rates keep their meaning. Classes without an image are not counted.

    Args:
        kind: none or balanced.
        labels: int64 (N,) of the training images.
        classes: C.
    """
    if kind == "none":
        return None
    counts = torch.bincount(labels, minlength=classes)
    weights = len(labels) / (int((counts > 0).sum()) * counts.clamp_min(1).double())
    return torch.where(counts > 0, weights, 0.0).float()
