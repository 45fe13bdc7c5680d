"""identity: a pre-activation ResNet, after He et al. 2016, "Identity Mappings in Deep Residual Networks".

    images    (N, 3, 32, 32)
    conv1     (N, 64, 32, 32)    3 × 3 convolution
    layer1    (N, 64, 32, 32)    blocks with identity skips
    layer2    (N, 128, 16, 16)   the first block of this and the next two has stride 2 and doubles the channels
    layer3    (N, 256, 8, 8)
    layer4    (N, 512, 4, 4)
    pool      (N, 512)           4 × 4 average pool
    fc        (N, K)

No convolution has a bias. There is no norm behind the last stage, so the sum of all its blocks reaches the classifier
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from finetune.networks.classifier import Classifier, linear
from finetune.networks.registry import CLASSES, build, describe
from finetune.networks.settings import check_blocks
from weights.errors import UsageError


class ZeroPaddedSkip(nn.Module):
    """Option A: 2 × 2 max-pool, and as many channels of zeros behind: (N, C, H, W) → (N, 2C, H / 2, W / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller, wider tensor."""
        x = max_pool2d(x, 2)
        return torch.cat([x, torch.zeros_like(x)], dim=1)


class PreActivationBlock(nn.Module):
    """y = F(x) + skip(x), where F is BN, ReLU, 3 × 3 conv, BN, ReLU, 3 × 3 conv.

    (N, dim_in, H, W) → (N, dim, H / stride, W / stride). Nothing follows the sum: with stride 1 and convolutions of
    zeros the block is the identity. With stride 2 the skip is option A or B.
    """

    def __init__(self, dim_in: int, dim: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(dim_in)
        self.conv1 = nn.Conv2d(dim_in, dim, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.skip: nn.Module = nn.Identity()
        if stride == 2:
            projection = nn.Conv2d(dim_in, dim, 1, stride=2, bias=False)
            self.skip = ZeroPaddedSkip() if shortcut == "A" else projection

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.conv1(torch.relu(self.bn1(x)))
        y = self.conv2(torch.relu(self.bn2(y)))
        return y + self.skip(x)  # type: ignore[no-any-return]


class IdentityResNet(Classifier):
    """With 10 classes and two blocks per stage 11,171,146 parameters (option B) or 10,999,114 (option A)."""

    def __init__(
        self,
        num_classes: int = CLASSES,
        in_chans: int = 3,
        blocks: Sequence[int] = (2, 2, 2, 2),
        shortcut: str = "B",
    ) -> None:
        """Build it with PyTorch's initial weights.

        Args:
            num_classes: K; 0 leaves the head out.
            in_chans: channels of the images.
            blocks: how many in each stage, at least 1.
            shortcut: the skip where the shape changes: A pools and adds zeros, B is a 1 × 1 convolution of stride 2.

        Raises:
            UsageError: blocks that are not four numbers of at least 1, or a shortcut other than A or B.
        """
        super().__init__()
        one, two, three, four = check_blocks(blocks, 4)
        if shortcut not in ("A", "B"):
            raise UsageError(
                f"shortcut is {shortcut}; it can be A (max-pool and zeros) or B (1 × 1 convolution of stride 2)."
            )
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(64, 64, one, shortcut)
        self.layer2 = _stage(64, 128, two, shortcut)
        self.layer3 = _stage(128, 256, three, shortcut)
        self.layer4 = _stage(256, 512, four, shortcut)
        self.pool = nn.AvgPool2d(4)
        self.num_classes, self.num_features = num_classes, 512
        self.fc = linear(512, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (N, 512, 4, 4) for images (N, 3, 32, 32)."""
        return self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))  # type: ignore[no-any-return]


def _stage(dim_in: int, dim: int, blocks: int, shortcut: str) -> nn.Sequential:
    first = PreActivationBlock(dim_in, dim, 1 if dim_in == dim else 2, shortcut)
    return nn.Sequential(first, *(PreActivationBlock(dim, dim, 1, shortcut) for _ in range(blocks - 1)))


default_cfgs = describe("finetune_identity")


def finetune_identity(pretrained: bool = False, **settings: Any) -> IdentityResNet:
    """Build identity for `timm.create_model`; settings are those of `IdentityResNet` and timm's own."""
    return build(IdentityResNet, "finetune_identity", pretrained, settings)


register_model(finetune_identity)
