"""`--arch` and the settings that go with it: which network a run builds, and what its checkpoint says about that."""

from __future__ import annotations

import re
from typing import Any

import timm
import torch

from finetune.networks import NETWORKS, PREFIX, settings_of
from finetune.recipe import Recipe, flag
from weights.arch import Arch, resolve_arch
from weights.check import check_room
from weights.errors import UsageError, WeightsError, near_matches
from weights.locate import Found

SETTINGS = ("blocks", "shortcut", "hidden", "dropout")  # settings of a recipe that some networks have
SHAPELESS = ("dropout",)  # those that no tensor depends on: a checkpoint may go on with another value


def resolve_network(text: str) -> Arch:
    """Resolve `--arch`; where there is no such network, offer ours as well as timm's.

    Args:
        text: what the user wrote.

    Raises:
        UsageError: no such network or tag; names near matches.
    """
    try:
        return resolve_arch(text)
    except UsageError:
        name = text.strip().partition(".")[0]
        if timm.is_model(name):
            raise  # the tag is wrong
        ours = [short for short in NETWORKS if not timm.is_model(short)]
        known = [model for model in timm.list_models() if not model.startswith(PREFIX)]
        near = near_matches(name.removeprefix(PREFIX), [*ours, *known])
        if not near:
            raise
        for short in ours:  # the prefix may be left out in `finetune baseline` only
            near = re.sub(rf"\b{short}\b", PREFIX + short, near)
        raise UsageError(f'Unknown architecture "{name}"{near}') from None


def network_settings(recipe: Recipe, arch: Arch) -> dict[str, Any]:
    """Return the recipe's settings of the network itself, as arguments for `timm.create_model`.

    Raises:
        UsageError: a setting that the network does not have.
    """
    given = {
        "blocks": tuple(_whole_number(part) for part in recipe.blocks) or None,
        "shortcut": recipe.shortcut,
        "hidden": recipe.hidden,
        "dropout": recipe.dropout,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return {}
    name = _ours(arch)
    known = settings_of(name) if name else {"dropout": 0.0}
    for setting in given:
        if setting not in known:
            has = ", ".join(flag(one) for one in known if one in SETTINGS) or "none of these settings"
            raise UsageError(f"{flag(setting)} does not belong to {name or arch.name}, which has {has}; leave it out.")
    return given if name else {"drop_rate": given["dropout"]}


def settings_with_weights(recipe: Recipe, found: Found) -> dict[str, Any]:
    """Return the recipe's settings of the network, and for one of ours those that its checkpoint was trained with.

    A run directory states them in config.json, so that they need not be given again.

    Args:
        recipe: blocks, shortcut, hidden and dropout are read.
        found: the weights.

    Raises:
        UsageError: a setting that the network does not have.
        WeightsError: a setting that disagrees with the checkpoint's, or config.json states one that cannot be right.
    """
    given = network_settings(recipe, found.arch)
    name = _ours(found.arch)
    if not name or found.model_args is None:
        return given
    usual = settings_of(name)
    stated = {setting: value for setting, value in found.model_args.items() if setting in usual}
    _require_sound(name, stated, found)
    for setting, value in given.items():
        there = stated.get(setting, usual[setting])
        if setting not in SHAPELESS and _text(value) != _text(there):
            raise WeightsError(
                f"{flag(setting)} is {_text(value)} and the weights ({found.source}) were trained with {_text(there)}; "
                f"leave {flag(setting)} out, or give other weights."
            )
    return {**stated, **given}


def _require_sound(name: str, stated: dict[str, Any], found: Found) -> None:
    """Build the network without values, to see that it can have these settings."""
    try:
        with torch.device("meta"):
            outline = NETWORKS[name](**stated)
    except (UsageError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"The config.json of the weights ({found.source}) has model_args that {PREFIX}{name} cannot have "
            f"({str(error).rstrip('.')}); mend it, or give the weights alone in another folder."
        ) from error
    if found.path is not None:
        check_room(PREFIX + name, found.path, outline)


def _ours(arch: Arch) -> str:
    """Return our own short name of a network, "" for one of timm's."""
    name = arch.name.removeprefix(PREFIX)
    return name if name != arch.name and name in NETWORKS else ""


def _text(value: object) -> str:
    """Return a setting as the user writes it: a plain number and a list of it alone are the same."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--blocks holds '{text}'; give whole numbers of at least 1, such as 2,2,2,2.") from None
