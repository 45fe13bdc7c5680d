"""Checkpoints made elsewhere: a student's own class has other module names than ours, and the same layers.

Each network whose assignment fixes names has a `checkpoint_filter_fn` in its file. It says which of the file's modules
is which of ours (`places`), and `rename` here moves the tensors. What the names leave open (stages or one list of
blocks, one sequence or one in another) is told from what the tensors are: a convolution's weight has four dimensions,
a linear layer's two, and a batch norm has a running mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.networks.classifier import Classifier
from weights.check import some
from weights.errors import WeightsError

_NORM_BEHIND = ((r"conv(\d)$", r"bn\1"), (r"shortcut\.0$", "shortcut.1"))
"""Our convolutions, and which of our batch norms sees their output."""


def natural(name: str) -> tuple[str | int, ...]:
    """Return a sorting key by which layer10 comes after layer9."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def modules(tensors: Mapping[str, Tensor], under: str = "") -> list[str]:
    """Return the names of the modules that hold tensors, in natural order.

    Args:
        tensors: by name, as in a state dict.
        under: only this module and what lies below it; "" is all.
    """
    names = {name.rpartition(".")[0] for name in tensors}
    return sorted((name for name in names if not under or f"{name}.".startswith(f"{under}.")), key=natural)


def convolutions(tensors: Mapping[str, Tensor], under: str = "") -> list[str]:
    """Return the modules with a weight of four dimensions; arguments as for `modules`."""
    return _with_weight(tensors, under, 4)


def linears(tensors: Mapping[str, Tensor], under: str = "") -> list[str]:
    """Return the modules with a weight of two dimensions; arguments as for `modules`."""
    return _with_weight(tensors, under, 2)


def norms(tensors: Mapping[str, Tensor], under: str = "") -> list[str]:
    """Return the modules with running statistics; arguments as for `modules`."""
    return [name for name in modules(tensors, under) if f"{name}.running_mean" in tensors]


def require_blocks(theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Check that a file has as many blocks as the network.

    Raises:
        WeightsError: another number.
    """
    if len(theirs) != len(ours):
        raise WeightsError(
            f"it holds {len(theirs)} blocks, {theirs[0]} to {theirs[-1]}, and the network has {len(ours)}; give the "
            "network as many, or another file."
        )


def rename(tensors: Mapping[str, Tensor], places: Mapping[str, str], model: Classifier) -> dict[str, Tensor]:
    """Move tensors to our names.

    A convolution's bias that our network does not have is subtracted from the running mean of the batch norm behind
    it: that norm takes off its input's mean, so the outputs stay the same. A file without any convolution bias gets
    zeros for those that our network has.

    Args:
        tensors: of the file.
        places: their module names → ours.
        model: the network they are for.

    Raises:
        WeightsError: tensors that have no place, by name.
    """
    wanted = model.state_dict()
    renamed: dict[str, Tensor] = {}
    surplus: dict[str, Tensor] = {}
    homeless = []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        place = f"{places[module]}.{leaf}" if module in places else ""
        if place in wanted or place.startswith(f"{model.classifier_name}."):  # a model may have been built headless
            renamed[place] = tensor
        elif leaf == "bias" and place and _mean_behind(place.removesuffix(".bias")) in wanted:
            surplus[_mean_behind(place.removesuffix(".bias"))] = tensor
        else:
            homeless.append(name)
    if homeless:
        raise WeightsError(
            f"there is no place for {some(homeless)}, although other names are those of its assignment; leave these "
            "out of the file, or give the --arch that it belongs to."
        )
    for mean, bias in surplus.items():
        renamed[mean] = renamed[mean] - bias
    if not any(f"{name}.bias" in tensors for name in convolutions(tensors)):
        for name in convolutions(renamed):
            if f"{name}.bias" in wanted:
                renamed[f"{name}.bias"] = torch.zeros(len(renamed[f"{name}.weight"]))
    return renamed


def rename_basic_blocks(tensors: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Bring the assignment's names of singlestage and multistage to ours; other files come back as they are.

    There `conv1` and `bn1` are the stem and `linear` is the head. In between lie blocks of `conv1`, `bn1`, `conv2`,
    `bn2` and `shortcut`, in one list or in stages; their order is that of their names.

    Args:
        tensors: of the file.
        model: a singlestage or multistage network.

    Raises:
        WeightsError: the file has another number of blocks, or a tensor that has no place here.
    """
    theirs, ours = _basic_blocks(tensors), _basic_blocks(model.state_dict())
    if not theirs or "linear.weight" not in tensors:
        return tensors
    require_blocks(theirs, ours)
    places = {"conv1": "conv1", "bn1": "bn1", "linear": "fc"}
    for block, place in zip(theirs, ours, strict=True):
        places |= {f"{block}.{part}": f"{place}.{part}" for part in ("conv1", "bn1", "conv2", "bn2")}
        places |= dict.fromkeys(convolutions(tensors, f"{block}.shortcut")[:1], f"{place}.shortcut.0")
        places |= dict.fromkeys(norms(tensors, f"{block}.shortcut")[:1], f"{place}.shortcut.1")
    return rename(tensors, places, model)


def _basic_blocks(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(
        (name.removesuffix(".conv2.weight") for name in tensors if name.endswith(".conv2.weight")), key=natural
    )


def _with_weight(tensors: Mapping[str, Tensor], under: str, dimensions: int) -> list[str]:
    weights = ((name, tensors.get(f"{name}.weight")) for name in modules(tensors, under))
    return [name for name, weight in weights if weight is not None and weight.ndim == dimensions]


def _mean_behind(convolution: str) -> str:
    for pattern, norm in _NORM_BEHIND:
        if re.search(pattern, convolution):
            return re.sub(pattern, norm, convolution) + ".running_mean"
    return ""
