"""Our own networks, made for images of 32 × 32 pixels, registered with timm as `finetune_<name>`.

    figure1           a ResNet of basic blocks: 32, 64, 128, 256 channels
    figure1_shared    the same plan, where the repeats of a stage share their layers
    singlestage       basic blocks at one resolution
    multistage        basic blocks at three resolutions
    vgg16             VGG-16 with batch norm and a small classifier
    resnet50_layer4   ResNet-50 up to conv4_x, with strides and ReLUs in other places
    identity          a pre-activation ResNet

Importing this package imports torch and timm and registers all of them; finetune/registration.py sees to it that this
happens when timm is there.
"""

from __future__ import annotations

import inspect
from typing import Any

from finetune.networks.classifier import Classifier
from finetune.networks.figure1 import Figure1
from finetune.networks.figure1_shared import Figure1Shared
from finetune.networks.identity import IdentityResNet
from finetune.networks.multistage import DownSamplingBlock, MultiStage
from finetune.networks.resnet50_layer4 import ResNet50Layer4
from finetune.networks.singlestage import SingleStage
from finetune.networks.vgg16 import VGG16

PREFIX = "finetune_"
"""What timm's names of our networks begin with."""

NETWORKS: dict[str, type[Classifier]] = {
    "figure1": Figure1,
    "figure1_shared": Figure1Shared,
    "singlestage": SingleStage,
    "multistage": MultiStage,
    "vgg16": VGG16,
    "resnet50_layer4": ResNet50Layer4,
    "identity": IdentityResNet,
}
"""Our names, without the prefix, and the classes."""

__all__ = [
    "NETWORKS",
    "PREFIX",
    "VGG16",
    "Classifier",
    "DownSamplingBlock",
    "Figure1",
    "Figure1Shared",
    "IdentityResNet",
    "MultiStage",
    "ResNet50Layer4",
    "SingleStage",
    "settings_of",
]


def settings_of(name: str) -> dict[str, Any]:
    """Return the settings that a network has beyond the class count and the images' channels, with their defaults.

    Args:
        name: one of `NETWORKS`.
    """
    parameters = inspect.signature(NETWORKS[name]).parameters
    return {key: value.default for key, value in parameters.items() if key not in ("num_classes", "in_chans")}
