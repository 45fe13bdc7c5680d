"""Other people's tensor names, brought to the names timm uses.

A file holds a state dict, or a training checkpoint with one inside, often with prefixes that wrappers left
(`module.` from data parallel, `_orig_mod.` from torch.compile, `model.` from Lightning). Where timm has a conversion of
its own for an architecture (original ConvNeXt, ViT and DeiT files, torchvision's VGG and DenseNet), that one is used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import timm.models
from torch import Tensor, nn

from weights.errors import WeightsError

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Keys that training scripts keep a state dict under; averaged weights first, as timm does."""

_PREFIXES = ("module.", "_orig_mod.", "model.")

_TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
"""Names that timm's model files give to their conversion of foreign checkpoints."""

_FOREIGN_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def plain_names(checkpoint: object) -> dict[str, Tensor]:
    """Take the state dict out of a checkpoint and strip wrappers' prefixes from its names.

    A prefix is stripped only when every name has it, as often as it is there. Other entries than tensors are left out.

    Args:
        checkpoint: a state dict, or a mapping that holds one under a usual key, nested or not.

    Returns:
        Tensors by plain name, detached, in the order of the file.

    Raises:
        WeightsError: when there are no tensors in it.
    """
    found = _unwrap(checkpoint)
    tensors = {str(k): v.detach() for k, v in found.items() if isinstance(v, Tensor)}
    tensors.pop("n_averaged", None)  # the counter of torch's AveragedModel, beside its `module.` names
    if not tensors:
        keys = ", ".join(sorted(map(str, found))[:6]) or "nothing"
        raise WeightsError(f"no tensors found: it holds {keys}, where a state dict was expected")
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def timm_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Apply timm's own conversion of foreign names, when there is one and it helps.

    The conversion is tried only when names that the model needs are absent, and kept only when more of them are there
    afterwards: timm's functions are written for the files they know, and may fail on, or spoil, any other.

    Args:
        tensors: tensors by name, as `plain_names` gives them.
        model: the timm model they are for.

    Returns:
        The converted tensors, or the given ones unchanged.

    Raises:
        WeightsError: one of our own networks' conversions knows the names and finds tensors that have no place.
    """
    wanted = model.state_dict().keys()
    convert = _timm_filter(model)
    if convert is None or _fitting(tensors, wanted) == len(wanted):
        return dict(tensors)
    arguments = (dict(tensors), model) if len(inspect.signature(convert).parameters) > 1 else (dict(tensors),)
    try:
        converted = convert(*arguments)
    except _FOREIGN_FAILURES:
        return dict(tensors)
    named = {k: v for k, v in converted.items() if isinstance(v, Tensor)} if isinstance(converted, dict) else {}
    return named if _fitting(named, wanted) > _fitting(tensors, wanted) else dict(tensors)


def _unwrap(checkpoint: object) -> Mapping[Any, Any]:
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"no tensors found: it holds a {type(checkpoint).__name__}, where a state dict was expected")
    if any(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint
    inner = next((checkpoint[key] for key in _WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
    return checkpoint if inner is None else _unwrap(inner)


def _fitting(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> int:
    return sum(name in tensors for name in wanted)


def _timm_filter(model: nn.Module) -> Callable[..., Any] | None:
    # timm passes the function to its builder and keeps no reference, so it is looked up in the file of the entry point
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    if not timm.models.is_model(architecture):
        return None
    module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    return next((found for name in _TIMM_FILTERS if callable(found := getattr(module, name, None))), None)
