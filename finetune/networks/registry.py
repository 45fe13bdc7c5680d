"""How timm learns of our networks: a configuration for each, and one way to build them.

A network's file calls `register_model` with a function `finetune_<name>`; the prefix is there because timm has names
like `vgg16` already. Its `default_cfgs` and, where there is one, `checkpoint_filter_fn` stand in the same file, where
timm and `weights.convert` look for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg
from torch import Tensor

from finetune.networks.classifier import Classifier
from weights.errors import UsageError

SIDE = 32  # pixels: the images of CIFAR, which the networks were made for
CLASSES = 100  # unless told otherwise

# Of CIFAR-100's 50,000 training images in 0..1, per channel: measured, and rounded to four digits.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)

Network = TypeVar("Network", bound=Classifier)
Filter = Callable[[dict[str, Tensor], Classifier], dict[str, Tensor]]


def describe(name: str, *, first_conv: str = "conv1", classifier: str = "fc", fixed: bool = True) -> Any:
    """Return timm's `default_cfgs` for one network.

    Args:
        name: as registered, `finetune_figure1`.
        first_conv: dotted name of the convolution that sees the images.
        classifier: dotted name of the head.
        fixed: whether it takes images of 32 × 32 pixels only.
    """
    config = {
        "input_size": (3, SIDE, SIDE),
        "fixed_input_size": fixed,
        "num_classes": CLASSES,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
    }
    return generate_default_cfgs({name: config})


def build(
    network: type[Network], name: str, pretrained: bool, settings: dict[str, Any], names: Filter | None = None
) -> Network:
    """Build a network the way timm builds its own, so that `local-dir:` folders and overlays work alike.

    Args:
        network: its class.
        name: as registered.
        pretrained: load the weights that the configuration names (of a `local-dir:` folder).
        settings: what `timm.create_model` was given: `num_classes`, the network's own settings, timm's arguments.
        names: brings other people's tensor names to ours.

    Raises:
        UsageError: a setting that cannot be right, or an `img_size` that the network cannot take.
    """
    size = settings.pop("img_size", SIDE)
    known = get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size and size not in (SIDE, (SIDE, SIDE), [SIDE, SIDE]):
        height, width = (size, size) if isinstance(size, int) else size
        raise UsageError(
            f"{name} takes images of {SIDE} × {SIDE} pixels and cannot be built for {height} × {width}, because its "
            "last pooling would leave more or less than one value per channel; leave --image-size out."
        )
    model: Network = build_model_with_cfg(
        network,
        name,
        pretrained,
        pretrained_filter_fn=names,
        kwargs_filter=("img_size", "global_pool"),  # type: ignore[arg-type]  # what timm adds for every network
        **settings,
    )
    return model
