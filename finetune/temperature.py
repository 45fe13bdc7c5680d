"""Temperature scaling: one number by which logits are divided, so that confidence can be believed.

It is fitted on the validation images after training (Guo et al. 2017, "On Calibration of Modern Neural Networks",
section 4.2) and changes no prediction, because it keeps the order of the logits. A few images ask for one by chance, so
it is kept only where they tell it from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BOUND = 20.0  # temperatures from 1 / BOUND to BOUND; images that lead beyond them say nothing about confidence
SIGNIFICANT = 3.841  # exceeded by chance in 5 % of cases: chi-squared, one degree of freedom (Wilks 1938)


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
    """Return the temperature with the least cross-entropy, or 1 where that is not significantly less.

    Cross-entropy is convex in the inverse temperature, so its slope has one zero at most. There is none when every
    image is right (colder is always better) or when predictions are no better than chance. Whether the images tell the
    temperature from 1 is a likelihood-ratio test: twice the difference in summed cross-entropy.

    Args:
        logits: float32 (N, C) of the validation images.
        labels: int64 (N,).
    """
    from scipy.optimize import brentq  # here, because only the end of a run needs it

    values = logits.double()
    true = values.gather(1, labels[:, None]).sum()

    def slope(inverse: float) -> float:
        """Derivative of the summed cross-entropy by the inverse temperature: expected minus true logits."""
        return float(((values * inverse).softmax(1) * values).sum() - true)

    def loss(inverse: float) -> float:
        """Summed cross-entropy in nats."""
        return float((values * inverse).logsumexp(1).sum() - true * inverse)

    images = f"{len(labels):,} validation image{'' if len(labels) == 1 else 's'}"
    if slope(BOUND) <= 0:
        return Temperature(1.0, f"{images} leave none: so few are wrong that colder is always better")
    if slope(1 / BOUND) >= 0:
        return Temperature(1.0, f"{images} leave none: predictions are no better than chance")
    inverse = float(brentq(slope, 1 / BOUND, BOUND))
    value = round(1 / inverse, 4)
    if 2 * (loss(1.0) - loss(inverse)) <= SIGNIFICANT:
        return Temperature(1.0, f"{images} do not tell {value:g} from 1")
    return Temperature(value, f"fitted on {images}")
