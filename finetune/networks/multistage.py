"""multistage: the blocks of singlestage in three stages, each at half the resolution and twice the width.

    images    (N, 3, 32, 32)
    stem      (N, 16, 32, 32)    3 × 3 convolution, batch norm, ReLU
    layer1    (N, 16, 32, 32)    basic blocks
    layer2    (N, 32, 16, 16)    a down-sampling block, then basic blocks
    layer3    (N, 64, 8, 8)      a down-sampling block, then basic blocks
    pool      (N, 64)            8 × 8 average pool
    fc        (N, K)

Every convolution has a bias but those of the shortcuts.
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
from finetune.networks.singlestage import BasicBlock
from weights.errors import UsageError


class DownSamplingBlock(nn.Module):
    """A basic block that halves the resolution and doubles the channels: (N, dim_in, H, W) → (N, dim, H / 2, W / 2).

    Its first convolution has stride 2; its shortcut is a 1 × 1 convolution of stride 2 without bias, and a batch norm.
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        """Build one block.

        Raises:
            UsageError: `dim` is not twice `dim_in`.
        """
        super().__init__()
        if dim != 2 * dim_in:
            raise UsageError(
                f"a DownSamplingBlock doubles its channels, so dim has to be {2 * dim_in} for dim_in {dim_in}, "
                f"and it is {dim}; change one of the two."
            )
        self.conv1 = nn.Conv2d(dim_in, dim, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(dim)
        self.shortcut = nn.Sequential(nn.Conv2d(dim_in, dim, 1, stride=2, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class MultiStage(Classifier):
    """Three stages: 181,572 parameters with two blocks in each and 100 classes."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3, blocks: Sequence[int] = (2, 2, 2)) -> None:
        """Build it with PyTorch's initial weights.

        Args:
            num_classes: K; 0 leaves the head out.
            in_chans: channels of the images.
            blocks: how many in each stage, at least 1; the down-sampling block counts.

        Raises:
            UsageError: blocks that are not three numbers of at least 1.
        """
        super().__init__()
        one, two, three = check_blocks(blocks, 3)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16) for _ in range(one)))
        self.layer2 = nn.Sequential(DownSamplingBlock(16, 32), *(BasicBlock(32) for _ in range(two - 1)))
        self.layer3 = nn.Sequential(DownSamplingBlock(32, 64), *(BasicBlock(64) for _ in range(three - 1)))
        self.pool = nn.AvgPool2d(8)
        self.num_classes, self.num_features = num_classes, 64
        self.fc = linear(64, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (N, 64, 8, 8) for images (N, 3, 32, 32)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))  # type: ignore[no-any-return]


checkpoint_filter_fn = rename_basic_blocks  # the assignment's names
default_cfgs = describe("finetune_multistage")


def finetune_multistage(pretrained: bool = False, **settings: Any) -> MultiStage:
    """Build multistage for `timm.create_model`; settings are those of `MultiStage` and timm's own."""
    return build(MultiStage, "finetune_multistage", pretrained, settings, checkpoint_filter_fn)


register_model(finetune_multistage)
