"""The assignments' networks, written a second time from their descriptions and under the assignments' module names.

They share no code with finetune/networks, so equal outputs mean that both read the descriptions alike; and their state
dicts are what a student's own class saves. Import with `from make_networks import ...`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


class StudentShared(nn.Module):
    """figure1_shared: `conv1`, `bn`, `block1` to `block4`, `fc`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 1, 1)
        self.bn = nn.BatchNorm2d(32)
        self.block1 = StudentSharedBlock(32, 32, 2, 1)
        self.block2 = StudentSharedBlock(32, 64, 4, 2)
        self.block3 = StudentSharedBlock(64, 128, 4, 2)
        self.block4 = StudentSharedBlock(128, 256, 2, 2)
        self.fc = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn(self.conv1(x)))
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = block(x)
        return self.fc(x.amax((2, 3)))


class StudentSharedBlock(nn.Module):
    def __init__(self, before: int, width: int, repeats: int, stride: int) -> None:
        super().__init__()
        self.before, self.width, self.repeats = before, width, repeats
        self.conv_init = nn.Conv2d(before, width, 3, stride, 1)
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        self.bn = nn.BatchNorm2d(width)
        self.convShortcut_init = nn.Conv2d(before, width, 1, stride)
        self.convShortcut = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for repeat in range(self.repeats):
            first = self.conv_init if repeat == 0 else self.conv
            y = self.bn(self.conv(relu(self.bn(first(x)))))
            if repeat > 0:
                x = self.convShortcut(x)
            elif self.before != self.width:
                x = self.convShortcut_init(x)
            x = relu(x + y)
        return x


class StudentBlock(nn.Module):
    """`conv1`, `bn1`, `conv2`, `bn2`, `shortcut`: the block of singlestage, and multistage's of both kinds."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = width // before
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.shortcut(x) + self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))


class StudentStages(nn.Module):
    """singlestage with widths (32,) and multistage with (16, 32, 64): `conv1`, `bn1`, the blocks, `linear`.

    With `flat` the blocks are one list, `blocks`; else `stage1`, `stage2` and so on.
    """

    def __init__(self, classes: int, widths: tuple[int, ...], depth: int, *, flat: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.groups = []
        for number, width in enumerate(widths):
            before = widths[max(number - 1, 0)]
            self.groups.append([StudentBlock(before if i == 0 else width, width) for i in range(depth)])
        if flat:
            self.blocks = nn.ModuleList([block for group in self.groups for block in group])
        else:
            for number, group in enumerate(self.groups, 1):
                self.add_module(f"stage{number}", nn.Sequential(*group))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        for group in self.groups:
            for block in group:
                x = block(x)
        return self.linear(x.mean((2, 3)))


class StudentBottleneck(nn.Module):
    """`layer`, and where the shape changes `downsize` or `make_equal_channel`; `bias` is that of the convolutions."""

    def __init__(self, before: int, middle: int, width: int, *, halve: bool, bias: bool) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=bias)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        stride = 2 if halve else 1
        self.layer = nn.Sequential(unit(before, middle, 1, stride), unit(middle, middle, 3), unit(middle, width, 1))
        if halve:
            self.downsize = unit(before, width, 1, 2)
        elif before != width:
            self.make_equal_channel = unit(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if hasattr(self, "downsize"):
            return y + self.downsize(x)
        return y + (self.make_equal_channel(x) if hasattr(self, "make_equal_channel") else x)


class StudentResNet50(nn.Module):
    """resnet50_layer4: `layer1` is the stem, `layer2` to `layer4` are the groups, `fc` is the head."""

    def __init__(self, classes: int, *, bias: bool) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=bias), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        before = 64
        for number, (middle, width, blocks) in enumerate([(64, 256, 3), (128, 512, 4), (256, 1024, 6)], 2):
            group = []
            for block in range(blocks):
                halve = number < 4 and block == blocks - 1
                group.append(StudentBottleneck(before, middle, width, halve=halve, bias=bias))
                before = width
            self.add_module(f"layer{number}", nn.Sequential(*group))
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("layer2")(self.layer1(x))
        x = self.get_submodule("layer4")(self.get_submodule("layer3")(x))
        return self.fc(x.mean((2, 3)))


def used(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network batch norms as training leaves them, other than 0 and 1, and switch it to eval mode."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.bias):
                assert value is not None
                nn.init.normal_(value, std=0.1)
            for value in (module.running_var, module.weight):
                assert value is not None
                nn.init.uniform_(value, 0.5, 1.5)
    return model.eval()
