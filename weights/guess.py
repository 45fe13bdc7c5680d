"""What network do these tensors belong to? A guess from their names, for error messages only."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESNETS = {
    (False, 2): "resnet18",
    (False, 6): "resnet34",
    (True, 6): "resnet50",
    (True, 23): "resnet101",
    (True, 36): "resnet152",
}
"""(has bottleneck blocks, blocks in layer3) → name."""

_FAMILIES = (
    (r"features\.denseblock\d", "a DenseNet"),
    (r"features\.\d+\.(weight|bias)$", "a VGG"),
    (r"stages\.\d+\.blocks\.\d+\.conv_dw\.", "a ConvNeXt"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position", "a Swin Transformer"),
    (r"blocks\.\d+\.attn\.qkv\.", "a vision transformer"),
    (r"encoder\.layers\.encoder_layer_\d+\.", "torchvision's vision transformer"),
    (r"blocks\.\d+\.\d+\.(conv_pw|conv_dw)\.", "a MobileNet or EfficientNet"),
    (r"s\d\.b\d+\.conv1\.", "a RegNet"),
)


def guess_network(names: Iterable[str]) -> str:
    """Return what network the tensor names look like (`resnet50`, `a ConvNeXt`), or "" without an idea.

    Args:
        names: tensor names as a state dict has them.
    """
    known = list(names)
    blocks = {found[1] for name in known if (found := re.match(r"layer3\.(\d+)\.conv1\.", name))}
    if blocks:
        bottleneck = any(re.match(r"layer\d\.0\.conv3\.", name) for name in known)
        return _RESNETS.get((bottleneck, len(blocks)), "a ResNet")
    return next((family for pattern, family in _FAMILIES if any(re.match(pattern, name) for name in known)), "")
