"""resnet50_layer4: ResNet-50 (He et al. 2015) up to conv4_x, with ReLUs and strides in other places than the paper's.

    images    (N, 3, 32, 32)     or any other size
    stem      (N, 64, 8, 8)      7 × 7 convolution of stride 2, batch norm, ReLU, 3 × 3 max-pool of stride 2
    layer2    (N, 256, 4, 4)     3 bottleneck blocks, the last with stride 2
    layer3    (N, 512, 2, 2)     4 bottleneck blocks, the last with stride 2
    layer4    (N, 1024, 2, 2)    6 bottleneck blocks
    pool      (N, 1024)          global average pool
    fc        (N, K)

The stages are counted as in the paper's table 1, where the stem is conv1. In the paper a stage's *first* block has the
stride, and the ReLU follows the sum; here a group's *last* block has it, and the ReLU comes before the sum.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from finetune.networks.classifier import Classifier, linear
from finetune.networks.foreign import convolutions, modules, natural, norms, rename, require_blocks
from finetune.networks.registry import CLASSES, build, describe


class Bottleneck(nn.Module):
    """y = F(x) + shortcut(x), where F is 1 × 1, 3 × 3 and 1 × 1 convolution, each with batch norm and ReLU behind it.

    (N, dim_in, H, W) → (N, dim, H / stride, W / stride). The first convolution has the stride. The shortcut is the
    identity, or where the shape changes a 1 × 1 convolution, batch norm and ReLU.
    """

    def __init__(self, dim_in: int, middle: int, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, middle, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim_in != dim:
            convolution = nn.Conv2d(dim_in, dim, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = torch.relu(self.bn3(self.conv3(y)))
        return y + self.shortcut(x)  # type: ignore[no-any-return]


class ResNet50Layer4(Classifier):
    """The first four of ResNet-50's five parts: 8,882,762 parameters with 10 classes."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3) -> None:
        """Build it with Xavier-uniform weights of the convolutions and the linear layer.

        Args:
            num_classes: K; 0 leaves the head out.
            in_chans: channels of the images.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer2 = _group(64, 64, 256, blocks=3, last_stride=2)
        self.layer3 = _group(256, 128, 512, blocks=4, last_stride=2)
        self.layer4 = _group(512, 256, 1024, blocks=6, last_stride=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_classes, self.num_features = num_classes, 1024
        self.fc = linear(1024, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (N, 1024, H / 16, W / 16) for images (N, 3, H, W); 2 × 2 for 32 × 32."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(x)))  # type: ignore[no-any-return]


def _group(dim_in: int, middle: int, dim: int, blocks: int, last_stride: int) -> nn.Sequential:
    first = Bottleneck(dim_in, middle, dim)
    between = [Bottleneck(dim, middle, dim) for _ in range(blocks - 2)]
    return nn.Sequential(first, *between, Bottleneck(dim, middle, dim, last_stride))


def checkpoint_filter_fn(tensors: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Bring the assignment's names (`layer2.0.layer.1.0.weight`) to ours; other files come back as they are.

    There `layer1` is the stem, and a block holds `layer` (three times convolution and batch norm) and, where the shape
    changes, `downsize` or `make_equal_channel` (once). Convolution biases, where the file has them, go into the means
    of the batch norms behind them.

    Raises:
        WeightsError: the file has another number of blocks, or a tensor that has no place here.
    """
    found = (re.match(r"(.+?)\.layer\.", name) for name in tensors)
    theirs = sorted({match[1] for match in found if match}, key=natural)
    if not theirs:
        return tensors
    ours = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    require_blocks(theirs, ours)
    inside = tuple(f"{block}." for block in theirs)
    stem = {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
    places = {"fc": "fc"}
    places |= dict(zip(convolutions(stem), ("conv1",), strict=False))
    places |= dict(zip(norms(stem), ("bn1",), strict=False))
    for block, place in zip(theirs, ours, strict=True):
        main = f"{block}.layer"
        places |= dict(zip(convolutions(tensors, main), (f"{place}.conv{n}" for n in (1, 2, 3)), strict=False))
        places |= dict(zip(norms(tensors, main), (f"{place}.bn{n}" for n in (1, 2, 3)), strict=False))
        for shortcut in (f"{block}.downsize", f"{block}.make_equal_channel"):
            if modules(tensors, shortcut):
                places |= dict(zip(convolutions(tensors, shortcut), (f"{place}.shortcut.0",), strict=False))
                places |= dict(zip(norms(tensors, shortcut), (f"{place}.shortcut.1",), strict=False))
    return rename(tensors, places, model)


default_cfgs = describe("finetune_resnet50_layer4", fixed=False)


def finetune_resnet50_layer4(pretrained: bool = False, **settings: Any) -> ResNet50Layer4:
    """Build resnet50_layer4 for `timm.create_model`; settings are those of `ResNet50Layer4` and timm's own."""
    return build(ResNet50Layer4, "finetune_resnet50_layer4", pretrained, settings, checkpoint_filter_fn)


register_model(finetune_resnet50_layer4)
