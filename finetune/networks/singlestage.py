"""singlestage: basic blocks at one resolution and one width, to compare with multistage.

    images    (N, 3, 32, 32)
    stem      (N, 32, 32, 32)    3 × 3 convolution, batch norm, ReLU
    layer1    (N, 32, 32, 32)    6 basic blocks with identity shortcuts
    pool      (N, 32)            32 × 32 average pool
    fc        (N, K)

Every convolution has a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from finetune.networks.classifier import Classifier, linear
from finetune.networks.foreign import rename_basic_blocks
from finetune.networks.registry import CLASSES, build, describe
from finetune.networks.settings import check_blocks


class BasicBlock(nn.Module):
    """y = ReLU(F(x) + x), where F is 3 × 3 conv, BN, ReLU, 3 × 3 conv, BN: (N, dim, H, W) → (N, dim, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class SingleStage(Classifier):
    """One stage of basic blocks: 116,004 parameters with six blocks and 100 classes."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3, blocks: int | Sequence[int] = 6) -> None:
        """Build it with PyTorch's initial weights.

        Args:
            num_classes: K; 0 leaves the head out.
            in_chans: channels of the images.
            blocks: how many, at least 1.

        Raises:
            UsageError: blocks that are not one number of at least 1.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        (count,) = check_blocks(blocks, 1)
        self.layer1 = nn.Sequential(*(BasicBlock(32) for _ in range(count)))
        self.pool = nn.AvgPool2d(32)
        self.num_classes, self.num_features = num_classes, 32
        self.fc = linear(32, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (N, 32, 32, 32) for images (N, 3, 32, 32)."""
        return self.layer1(torch.relu(self.bn1(self.conv1(x))))  # type: ignore[no-any-return]


checkpoint_filter_fn = rename_basic_blocks  # the assignment's names
default_cfgs = describe("finetune_singlestage")


def finetune_singlestage(pretrained: bool = False, **settings: Any) -> SingleStage:
    """Build singlestage for `timm.create_model`; settings are those of `SingleStage` and timm's own."""
    return build(SingleStage, "finetune_singlestage", pretrained, settings, checkpoint_filter_fn)


register_model(finetune_singlestage)
