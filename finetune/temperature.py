"""Temperature scaling: one number by which logits are divided, so that confidence can be believed.

It is fitted on the validation images after training (Guo et al. 2017, "On Calibration of Modern Neural Networks",
section 4.2) and changes no prediction, because it keeps the order of the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BOUND = 20.0  # temperatures from 1 / BOUND to BOUND; images that lead beyond them say nothing about confidence
HALVINGS = 60  # of the bracket: far below what double precision can tell apart


@dataclass(frozen=True)
class Temperature:
    """A temperature, and where it comes from.

    Attributes:
        value: logits are divided by it; 1 leaves them as they are.
        reason: a clause for people: what it was fitted on, or why it is 1.
    """

    value: float
    reason: str

    def as_dict(self) -> dict[str, float | str]:
        """Return both as plain values, for JSON."""
        return {"temperature": self.value, "reason": self.reason}


NOT_FITTED = Temperature(1.0, "no validation images to fit it on")


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> Temperature:
    """Return the temperature with the least cross-entropy.

    Cross-entropy is convex in the inverse temperature, so its slope has one zero at most, which is found by halving.
    There is none when every image is right (colder is always better) or when predictions are no better than chance.

    Args:
        logits: float32 (N, C) of the validation images.
        labels: int64 (N,).
    """
    values = logits.double()
    true = float(values.gather(1, labels[:, None]).mean())

    def slope(inverse: float) -> float:
        """Derivative of the mean cross-entropy by the inverse temperature: expected minus true logit."""
        return float(((values * inverse).softmax(1) * values).sum(1).mean()) - true

    low, high = 1 / BOUND, BOUND
    images = f"{len(labels):,} validation image{'' if len(labels) == 1 else 's'}"
    if slope(high) <= 0:
        return Temperature(1.0, f"{images} leave none: so few are wrong that colder is always better")
    if slope(low) >= 0:
        return Temperature(1.0, f"{images} leave none: predictions are no better than chance")
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return Temperature(round(1 / low, 4), f"fitted on {images}")
