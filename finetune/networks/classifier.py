"""What timm asks of every classifier, said once: a head that can be taken, replaced or left out.

Shapes here and in the networks' files: N images, C channels of the last stage, K classes.

    images (N, 3, 32, 32) ──forward_features──► (N, C, h, w) ──pool, flatten──► (N, C) ──classifier──► (N, K)
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class Classifier(nn.Module):
    """Base of our networks. A network sets `pool`, `fc` and the two numbers, and defines `forward_features`.

    Attributes:
        classifier_name: dotted name of the last linear layer, the head that transfer learning replaces.
        num_classes: K; 0 when there is no head and the features are the output.
        num_features: inputs of the head.
        pool: what brings (N, C, h, w) down to one value per channel.
    """

    classifier_name: ClassVar[str] = "fc"
    num_classes: int
    num_features: int
    pool: nn.Module

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's output (N, C, h, w) for images (N, 3, 32, 32)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, K), or with `pre_logits` the head's input (N, C), for features (N, C, h, w)."""
        x = self.pool(x).flatten(1)  # (N, C, 1, 1) → (N, C)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) for images (N, 3, 32, 32)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new head with random weights in the old one's place.

        Args:
            num_classes: its outputs; 0 takes the head away, so that the features (N, C) are the output.
        """
        self.num_classes = num_classes
        self.set_submodule(self.classifier_name, linear(self.num_features, num_classes))


def linear(features: int, classes: int) -> nn.Module:
    """Return a linear layer features → classes, or for 0 classes one that changes nothing."""
    return nn.Linear(features, classes) if classes > 0 else nn.Identity()
