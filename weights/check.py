"""Do these tensors fit this model? One function per way in which they may not, each with its sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from weights.errors import ShapeError, UsageError, WeightsError, near_matches
from weights.guess import guess_network
from weights.torch_file import SMALL

_LISTED = 10
"""How many layers or tensors an error lists before it says how many more there are."""


def under(name: str, layers: Iterable[str]) -> bool:
    """Say whether a tensor's name is one of `layers` or lies below one (`layer4` holds `layer4.0.bn1.bias`).

    Args:
        name: dotted tensor name.
        layers: dotted module or tensor names.
    """
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def some(items: Sequence[str]) -> str:
    """Return the items in one line, the first ten when there are more.

    Args:
        items: what to list.
    """
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def network_name(model: nn.Module) -> str:
    """Return timm's name of a model, or the name of its class.

    Args:
        model: any model.
    """
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def misfit(tensor: Tensor, place: Tensor) -> str:
    """Return why a tensor cannot go where `place` is, or "" when it can.

    Args:
        tensor: from the file, any dtype.
        place: the model's tensor.
    """
    if tensor.shape != place.shape:
        return f"{tuple(tensor.shape)}, expected {tuple(place.shape)}"
    if place.is_floating_point() and not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')}, expected floating point"
    return ""


def check_allowed(model: nn.Module, allow_missing: Iterable[str]) -> None:
    """Check that the model has every layer that may be missing.

    Args:
        model: the model.
        allow_missing: dotted module or tensor names.

    Raises:
        UsageError: for a name that the model does not have, with near matches.
    """
    known = {name for name, _ in model.named_modules() if name} | set(model.state_dict())
    for layer in allow_missing:
        if layer not in known:
            near = near_matches(layer, known) or f"; its layers are {', '.join(n for n, _ in model.named_children())}."
            raise UsageError(f'--allow-missing: {network_name(model)} has no layer "{layer}"{near}')


def check_same_network(
    name: str,
    where: str,
    given: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    unexpected: Sequence[str],
    needed: Mapping[str, Tensor],
) -> None:
    """Check that the tensors are plausibly those of this network at all.

    More than a quarter of the file without a place is another, usually deeper, network: ResNet-34 holds everything that
    ResNet-18 needs, and 80 % more. Extras in files of the right network (masks, indices) stay well below that. More
    than an eighth of wrong shapes is a network of the same family: ResNet-18 in ResNet-50.

    Args:
        name: of the network.
        where: where they came from, for the message.
        given: the file's tensors outside the head.
        fitting: those of them with a place and the right shape.
        unexpected: names of those without a place.
        needed: the tensors that the model needs from the file.

    Raises:
        WeightsError: when most do not fit.
    """
    wrong = len(given) - len(fitting) - len(unexpected)
    few = not fitting or 2 * len(fitting) < min(len(given), len(needed))
    if not few and 4 * len(unexpected) <= len(given) and 8 * wrong <= len(given):
        return
    raise WeightsError(
        f"The weights ({where}) are those of another network than {name}{_hint(given, needed)}: of {len(given)} "
        f"tensors outside the head {len(fitting)} fit, {wrong} differ in shape and {len(unexpected)} have no place; "
        "give the --arch they belong to, or other weights."
    )


def check_whole_layers(
    where: str, allow_missing: Iterable[str], needed: Mapping[str, Tensor], missing: Sequence[str]
) -> None:
    """Check that a layer which may be missing is absent as a whole, or there as a whole.

    Args:
        where: where they came from, for the message.
        allow_missing: dotted module or tensor names.
        needed: the model's tensors that the file should hold, by name.
        missing: names of those it does not hold.

    Raises:
        WeightsError: for half a layer; it names the parts that are absent as a whole.
    """
    for layer in allow_missing:
        names = [n for n in needed if under(n, (layer,))]
        absent = [n for n in names if n in missing]
        if absent and len(absent) < len(names):
            parts = _allowable(absent, needed)
            raise WeightsError(
                f"The weights ({where}) hold {len(names) - len(absent)} of the {len(names)} tensors of {layer}, and "
                f"half a layer is more likely a mistake; give --allow-missing {parts} to allow only what is absent."
            )


def check_complete(
    name: str,
    where: str,
    needed: Mapping[str, Tensor],
    missing: Sequence[str],
    given: Mapping[str, Tensor],
    keep_head: bool = False,
) -> None:
    """Check that nothing is missing and every shape is right.

    Args:
        name: of the network.
        where: where they came from, for the message.
        needed: the model's tensors outside the head, by name.
        missing: names of those that are absent without leave.
        given: the file's tensors.
        keep_head: whether training goes on from a checkpoint, which has to be whole.

    Raises:
        WeightsError: with the missing tensors grouped by layer, the wrong ones with both shapes, and the way on; a
            ShapeError where there are wrong ones.
    """
    wrong = [f"{n} {reason}" for n, t in needed.items() if n in given and (reason := misfit(given[n], t))]
    if not missing and not wrong:
        return
    problems, ways = [], ["give complete weights"]
    if missing:
        groups = _by_layer(missing, needed)
        listed = [f"{layer} ({_members(layer, names, whole)})" for layer, names, whole in groups]
        problems.append(f"missing {some(listed)}")
        if len(groups) <= _LISTED and not keep_head:
            ways.append(f"--allow-missing {_allowable(missing, needed)} to start from random values there")
    if wrong:
        problems.append(f"wrong shape: {some(wrong)}")
    if wrong and not missing:
        ways = ["give the weights of this --arch"]
    kind = ShapeError if wrong else WeightsError
    raise kind(
        f"The weights ({where}) do not fit {name}{_hint(given, needed)}: {'; '.join(problems)}. "
        f"Next: {', or '.join(ways)}."
    )


def check_classes(where: str, head: Iterable[str], wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Check that a head which is loaded has as many outputs as the model's.

    Args:
        where: where the tensors came from, for the message.
        head: module names of the classifier.
        wanted: the model's tensors, by name.
        given: the file's tensors.

    Raises:
        WeightsError: with both numbers of classes.
    """
    for name in (f"{module}.weight" for module in head):
        here, there = wanted.get(name), given.get(name)
        if here is None or there is None or here.ndim != there.ndim or here.shape[1:] != there.shape[1:]:
            continue  # another layer altogether, which check_complete says
        if len(here) != len(there):
            raise WeightsError(
                f"The weights ({where}) were trained for {len(there)} classes and the data have {len(here)}; give data "
                "with the same classes, or use finetune run without --keep-head, which gives them a new head."
            )


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that there is no NaN and no infinity.

    Args:
        where: where they came from, for the message.
        tensors: what is about to be loaded.

    Raises:
        WeightsError: with the names of the tensors that hold some.
    """
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise WeightsError(
            f"The weights ({where}) hold NaN or infinite values in {some(bad)}; they are spoilt, so give others."
        )


def check_room(name: str, path: Path, outline: nn.Module) -> None:
    """Check that a weight file is large enough to hold a network's values, before memory is taken for them.

    Args:
        name: of the network.
        path: the file.
        outline: the network without values, on the device meta.

    Raises:
        WeightsError: it has less than a byte for each value, or is gone.
    """
    needed = sum(value.numel() for value in outline.parameters())
    try:
        there = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); bring it back, and run again.") from error
    if needed > there + SMALL:
        raise WeightsError(
            f"{path} has {there:,} bytes, too few for the {needed:,} values of {name}; it holds another network, or "
            "less than all of one."
        )


def _hint(given: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> str:
    guess, own = guess_network(given), guess_network(needed)
    partial = guess == "a ResNet" and own.startswith("resnet")  # a ResNet file with some blocks absent
    return f" (they look like {guess})" if guess and guess != own and not partial else ""


def _members(layer: str, names: Sequence[str], whole: bool) -> str:
    if whole and len(names) > 1:
        return f"all {len(names)} tensors"
    return some([n.removeprefix(f"{layer}.") for n in names])


def _allowable(missing: Sequence[str], needed: Mapping[str, Tensor]) -> str:
    """What to write after --allow-missing for these names: whole layers where they are whole."""
    groups = _by_layer(missing, needed)
    return ",".join(part for layer, names, whole in groups for part in ([layer] if whole else names))


def _by_layer(missing: Sequence[str], needed: Mapping[str, Tensor]) -> list[tuple[str, list[str], bool]]:
    """Group names as (layer, names, whole): the largest layers that are absent altogether, then parts of layers."""
    absent = set(missing)
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in missing:
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts))]
        whole = next((a for a in above if all(n in absent for n in needed if under(n, (a,)))), "")
        layer = whole or (above[-1] if above else name)
        groups.setdefault((layer, bool(whole) or not above), []).append(name)
    return [(layer, names, whole) for (layer, whole), names in groups.items()]
