"""Other people's tensor names, brought to the names timm uses.

A file holds a state dict, or a training checkpoint with one inside, often with prefixes that wrappers left
(`module.` from data parallel, `_orig_mod.` from torch.compile, `model.` from Lightning). Where timm has a conversion of
its own for an architecture (original ConvNeXt, ViT and DeiT files, torchvision's VGG and DenseNet), that one is used.
It also resizes position embeddings to the model's image size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import timm.models
from torch import Tensor, nn

from weights.check import misfit, under
from weights.errors import WeightsError
from weights.guard import shortened

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


def plain_names(checkpoint: object, where: str = "The checkpoint") -> dict[str, Tensor]:
    """Take the state dict out of a checkpoint and strip wrappers' prefixes from its names.

    A prefix is stripped only when every name has it, as often as it is there. Other entries than tensors are left out.

    Args:
        checkpoint: a state dict, or a mapping that holds one under a usual key, nested or not.
        where: what to call it in messages, as the first word of a sentence.

    Returns:
        Tensors by plain name, detached, in the order of the file.

    Raises:
        WeightsError: when there are no tensors in it.
    """
    found = _unwrap(checkpoint, where)
    tensors = {str(k): v.detach() for k, v in found.items() if isinstance(v, Tensor) and isinstance(k, str | int)}
    tensors.pop("n_averaged", None)  # the counter of torch's AveragedModel, beside its `module.` names
    if not tensors:
        keys = ", ".join(sorted(shortened(str(k)) for k in found if isinstance(k, str | int))[:6]) or "nothing"
        raise WeightsError(
            f"{where} holds {keys} and no tensors; expected a state dict, so give a file that holds one."
        )
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def timm_names(tensors: Mapping[str, Tensor], model: nn.Module, head: Collection[str] = ()) -> dict[str, Tensor]:
    """Apply timm's own conversion of foreign names and of position embeddings for another image size, if it helps.

    The conversion is tried only when tensors that the model needs are absent or of another shape, and kept only when
    more of them fit afterwards, or as many fit and more are there: timm's functions are written for the files they
    know, and may fail on, or spoil, any other. A kernel that it resampled is put back: weights with other patches are
    those of another network.

    Args:
        tensors: tensors by name, as `plain_names` gives them.
        model: the timm model they are for.
        head: module names of the classifier, whose tensors need not fit.

    Returns:
        The converted tensors, or the given ones unchanged.

    Raises:
        WeightsError: one of our own networks' conversions knows the names and finds tensors that have no place.
    """
    wanted = {name: place for name, place in model.state_dict().items() if not under(name, head)}

    def score(found: Mapping[str, Tensor]) -> tuple[int, int]:
        """How many tensors fit, and how many are there at all, as those of a head for other classes are."""
        return _fitting(found, wanted), len(wanted.keys() & found.keys())

    convert = _timm_filter(model)
    if convert is None or _fitting(tensors, wanted) == len(wanted):
        return dict(tensors)
    arguments = (dict(tensors), model) if len(inspect.signature(convert).parameters) > 1 else (dict(tensors),)
    try:
        converted = convert(*arguments)
    except _FOREIGN_FAILURES:
        return dict(tensors)
    named = {k: v for k, v in converted.items() if isinstance(v, Tensor)} if isinstance(converted, dict) else {}
    for name in named.keys() & tensors.keys():
        if named[name].numel() != tensors[name].numel() and _is_kernel(model, name):
            named[name] = tensors[name]
    return named if score(named) > score(tensors) else dict(tensors)


def _unwrap(checkpoint: object, where: str) -> dict[Any, Any]:
    """Return the mapping that has the tensors; of several in one another, the outermost that has any."""
    seen: list[object] = []  # a pickle can put a mapping into itself
    while True:
        if not isinstance(checkpoint, Mapping):
            kind = type(checkpoint).__name__
            raise WeightsError(f"{where} holds a {kind}; expected a state dict, so give a file that holds one.")
        # dict's own method, where it is one: a pickle may have put another `items` on an OrderedDict
        held = dict(dict.items(checkpoint) if isinstance(checkpoint, dict) else checkpoint.items())
        if any(isinstance(value, Tensor) for value in held.values()):
            return held
        seen.append(checkpoint)
        inner = next((held[key] for key in _WRAPPERS if isinstance(held.get(key), Mapping)), None)
        if inner is None or any(inner is one for one in seen):
            return held
        checkpoint = inner


def _fitting(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    return sum(name in tensors and not misfit(tensors[name], place) for name, place in wanted.items())


def _is_kernel(model: nn.Module, name: str) -> bool:
    owner = dict(model.named_modules()).get(name.rpartition(".")[0])
    return isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _timm_filter(model: nn.Module) -> Callable[..., Any] | None:
    # timm passes the function to its builder and keeps no reference, so it is looked up in the file of the entry point
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    if not timm.models.is_model(architecture):
        return None
    module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    return next((found for name in _TIMM_FILTERS if callable(found := getattr(module, name, None))), None)
