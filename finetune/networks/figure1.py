"""figure1: a ResNet for 32 × 32 images, after He et al. 2015, "Deep Residual Learning for Image Recognition".

    images    (N, 3, 32, 32)
    stem      (N, 32, 32, 32)    3 × 3 convolution, batch norm, ReLU, dropout
    layer1    (N, 32, 32, 32)    2 basic blocks
    layer2    (N, 64, 16, 16)    4 basic blocks, the first with stride 2
    layer3    (N, 128, 8, 8)     4 basic blocks, the first with stride 2
    layer4    (N, 256, 4, 4)     2 basic blocks, the first with stride 2
    pool      (N, 256)           4 × 4 max-pool
    fc        (N, K)

No convolution has a bias: the batch norm behind it would take it away again.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from finetune.networks.classifier import Classifier, linear
from finetune.networks.registry import CLASSES, build, describe
from finetune.networks.settings import check_dropout

PLAN = ((32, 2, 1), (64, 4, 2), (128, 4, 2), (256, 2, 2))
"""Channels, blocks and the first block's stride of each stage."""


class BasicBlock(nn.Module):
    """y = ReLU(F(x) + shortcut(x)), where F is 3 × 3 conv, BN, ReLU, 3 × 3 conv, BN.

    (N, dim_in, H, W) → (N, dim, H / stride, W / stride). The shortcut is the identity, or where the shape changes a
    1 × 1 convolution and a batch norm.
    """

    def __init__(self, dim_in: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim_in != dim:
            self.shortcut = nn.Sequential(nn.Conv2d(dim_in, dim, 1, stride, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class Figure1(Classifier):
    """The network of the first assignment: 3,559,556 parameters with 100 classes."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3, dropout: float = 0.25) -> None:
        """Build it with PyTorch's initial weights.

        Args:
            num_classes: K; 0 leaves the head out.
            in_chans: channels of the images.
            dropout: probability that a value behind the stem is set to 0 in training.

        Raises:
            UsageError: a dropout outside 0 to below 1.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.drop = nn.Dropout(check_dropout(dropout))
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages()
        self.pool = nn.MaxPool2d(4)
        self.num_classes, self.num_features = num_classes, 256
        self.fc = linear(256, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (N, 256, 4, 4) for images (N, 3, 32, 32)."""
        x = self.drop(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


def _stages() -> list[nn.Sequential]:
    stages, dim_in = [], 32
    for dim, blocks, stride in PLAN:
        rest = [BasicBlock(dim, dim, 1) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(BasicBlock(dim_in, dim, stride), *rest))
        dim_in = dim
    return stages


default_cfgs = describe("finetune_figure1")


def finetune_figure1(pretrained: bool = False, **settings: Any) -> Figure1:
    """Build figure1 for `timm.create_model`; settings are those of `Figure1` and timm's own."""
    return build(Figure1, "finetune_figure1", pretrained, settings)


register_model(finetune_figure1)
