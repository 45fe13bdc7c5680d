"""figure1_shared: the plan of figure1, where the repeats of a stage use the same layers again.

    images    (N, 3, 32, 32)
    stem      (N, 32, 32, 32)    3 × 3 convolution, batch norm, ReLU, dropout
    layer1    (N, 32, 32, 32)    2 repeats
    layer2    (N, 64, 16, 16)    4 repeats, the first with stride 2
    layer3    (N, 128, 8, 8)     4 repeats, the first with stride 2
    layer4    (N, 256, 4, 4)     2 repeats, the first with stride 2
    pool      (N, 256)           4 × 4 max-pool
    fc        (N, K)

Every convolution has a bias. A stage's one batch norm sees the outputs of all its 3 × 3 convolutions, so its running
statistics are averages over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from finetune.networks.classifier import Classifier, linear
from finetune.networks.figure1 import PLAN
from finetune.networks.foreign import rename
from finetune.networks.registry import CLASSES, build, describe
from finetune.networks.settings import check_dropout

BRANCH_SCALE = 0.5
"""What a stage's norm multiplies with at first: how much each repeat adds to its shortcut (decision 0014)."""


class SharedStage(nn.Module):
    """A stage of residual blocks that share their layers: (N, dim_in, H, W) → (N, dim, H / stride, W / stride).

    Each repeat is ReLU(F(x) + shortcut(x)), F being 3 × 3 conv, BN, ReLU, 3 × 3 conv, BN with one and the same BN.

        repeat       first conv     second conv   shortcut
        the first    `conv_init`    `conv`        identity where channels agree, else `shortcut_init` (1 × 1)
        the others   `conv`         `conv`        `shortcut` (1 × 1)

    `shortcut_init` is there in every stage, although one where channels agree never uses it.

    Training begins with shortcuts that pass on what they get, as those of figure1 do within a stage: PyTorch's initial
    1 × 1 convolutions mix all channels and shrink them, and no norm behind them makes up for it.
    """

    def __init__(self, dim_in: int, dim: int, repeats: int, stride: int) -> None:
        super().__init__()
        self.repeats = repeats
        self.keeps_shape = dim_in == dim and stride == 1
        self.conv_init = nn.Conv2d(dim_in, dim, 3, stride, padding=1)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.bn = nn.BatchNorm2d(dim)
        self.shortcut_init = nn.Conv2d(dim_in, dim, 1, stride)
        self.shortcut = nn.Conv2d(dim, dim, 1)
        nn.init.constant_(self.bn.weight, BRANCH_SCALE)
        for parameter in (*self.shortcut_init.parameters(), *self.shortcut.parameters()):
            (nn.init.dirac_ if parameter.ndim == 4 else nn.init.zeros_)(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last repeat's output."""
        shortcut = x if self.keeps_shape else self.shortcut_init(x)
        x = self._repeat(self.conv_init(x), shortcut)
        for _ in range(self.repeats - 1):
            x = self._repeat(self.conv(x), self.shortcut(x))
        return x

    def _repeat(self, y: Tensor, shortcut: Tensor) -> Tensor:
        """Go on from the first convolution's output: both arguments and the result are (N, dim, h, w)."""
        y = self.conv(torch.relu(self.bn(y)))
        return torch.relu(self.bn(y) + shortcut)


class Figure1Shared(Classifier):
    """figure1 with shared layers: 1,340,260 parameters with 100 classes."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3, dropout: float = 0.25) -> None:
        """Build it with PyTorch's initial weights, but for shortcuts and the stages' norms: see `SharedStage`.

        Args:
            num_classes: K; 0 leaves the head out.
            in_chans: channels of the images.
            dropout: probability that a value behind the stem is set to 0 in training.

        Raises:
            UsageError: a dropout outside 0 to below 1.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.drop = nn.Dropout(check_dropout(dropout))
        inputs = (32, *(dim for dim, _, _ in PLAN))
        stages = [SharedStage(dim_in, *stage) for dim_in, stage in zip(inputs, PLAN, strict=False)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.MaxPool2d(4)
        self.num_classes, self.num_features = num_classes, 256
        self.fc = linear(256, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (N, 256, 4, 4) for images (N, 3, 32, 32)."""
        x = self.drop(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


PARTS = {
    "conv_init": "conv_init", "conv": "conv", "bn": "bn", "convShortcut_init": "shortcut_init",
    "convShortcut": "shortcut",
}  # fmt: skip
"""The assignment's names of a stage's layers, and ours."""


def checkpoint_filter_fn(tensors: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Bring the assignment's names (`block1.convShortcut_init`) to ours; other files come back as they are.

    Raises:
        WeightsError: a tensor has no place here.
    """
    if "block1.conv_init.weight" not in tensors:
        return tensors
    places = {"conv1": "conv1", "bn": "bn1", "fc": "fc"}
    for stage in range(1, 5):
        places |= {f"block{stage}.{theirs}": f"layer{stage}.{ours}" for theirs, ours in PARTS.items()}
    return rename(tensors, places, model)


default_cfgs = describe("finetune_figure1_shared")


def finetune_figure1_shared(pretrained: bool = False, **settings: Any) -> Figure1Shared:
    """Build figure1_shared for `timm.create_model`; settings are those of `Figure1Shared` and timm's own."""
    return build(Figure1Shared, "finetune_figure1_shared", pretrained, settings, checkpoint_filter_fn)


register_model(finetune_figure1_shared)
