"""vgg16: configuration D of Simonyan and Zisserman 2015, "Very Deep Convolutional Networks", for 32 × 32 images.

    images        (N, 3, 32, 32)
    features      64, 64, M, 128, 128, M, 256 × 3, M, 512 × 3, M, 512 × 3, M    →    (N, 512, 1, 1)
    classifier    512 → hidden → hidden → K, with ReLU and dropout behind the first two

A number is a 3 × 3 convolution with bias to so many channels, a batch norm and a ReLU; M is a 2 × 2 max-pool, which
halves the resolution. The layers have torchvision's names.
"""

from __future__ import annotations

import re
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from finetune.networks.classifier import Classifier, linear
from finetune.networks.foreign import linears, modules, rename
from finetune.networks.registry import CLASSES, build, describe
from finetune.networks.settings import check_dropout
from weights.errors import UsageError

CONFIGURATION_D = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

MOST_HIDDEN = 16384
"""Width of a linear layer: four times the paper's. Its square already fills a GB."""


class VGG16(Classifier):
    """VGG-16 with batch norm: 15,253,578 parameters with hidden 512 and 10 classes."""

    classifier_name = "classifier.6"

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3, hidden: int = 512, dropout: float = 0.5) -> None:
        """Build it with PyTorch's initial weights.

        Args:
            num_classes: K; 0 leaves the last linear layer out.
            in_chans: channels of the images.
            hidden: width of the first two linear layers; 4096 in the paper, for images of 224 × 224 pixels.
            dropout: probability that one of their outputs is set to 0 in training.

        Raises:
            UsageError: a hidden width outside 1 to `MOST_HIDDEN`, or a dropout outside 0 to below 1.
        """
        super().__init__()
        if not 1 <= hidden <= MOST_HIDDEN:
            raise UsageError(f"hidden is {hidden}; give the width of the linear layers, from 1 to {MOST_HIDDEN:,}.")
        self.features = _features(in_chans)
        self.pool = nn.Identity()  # the fifth max-pool leaves one value per channel
        self.num_classes, self.num_features = num_classes, hidden
        self.classifier = nn.Sequential(
            nn.Linear(512, hidden), nn.ReLU(), nn.Dropout(check_dropout(dropout)),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout),
            linear(hidden, num_classes),
        )  # fmt: skip

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (N, 512, 1, 1) for images (N, 3, 32, 32)."""
        return self.features(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, K), or with `pre_logits` the last layer's input (N, hidden), for (N, 512, 1, 1)."""
        x = self.pool(x).flatten(1)  # (N, 512, 1, 1) → (N, 512)
        *before, last = self.classifier
        for layer in before:
            x = layer(x)
        return x if pre_logits else last(x)


def _features(dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for entry in CONFIGURATION_D:
        if isinstance(entry, int):
            layers += [nn.Conv2d(dim, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU()]
            dim = entry
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def checkpoint_filter_fn(tensors: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Bring a `classifier` whose three linear layers have other numbers (a dropout comes first) to ours.

    Other files come back as they are.

    Raises:
        WeightsError: a tensor has no place here.
    """
    found = linears(tensors)
    numbered = all(re.fullmatch(r"(features|classifier)\.\d+", name) for name in modules(tensors))
    if not numbered or len(found) != 3:
        return tensors
    places = {name: name for name in modules(tensors, "features")}
    places |= dict(zip(found, ("classifier.0", "classifier.3", "classifier.6"), strict=True))
    return rename(tensors, places, model)


default_cfgs = describe("finetune_vgg16", first_conv="features.0", classifier="classifier.6")


def finetune_vgg16(pretrained: bool = False, **settings: Any) -> VGG16:
    """Build vgg16 for `timm.create_model`; settings are those of `VGG16` and timm's own."""
    return build(VGG16, "finetune_vgg16", pretrained, settings, checkpoint_filter_fn)


register_model(finetune_vgg16)
