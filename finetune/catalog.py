"""What `--arch` can name: our networks, and timm's with the tags of their pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import timm
import torch

from finetune.networks import NETWORKS, PREFIX
from weights.arch import known_tags


@dataclass(frozen=True)
class Listed:
    """One architecture.

    Attributes:
        name: what `--arch` takes; `finetune baseline` takes ours without the prefix as well.
        ours: whether it is one of our networks.
        parameters: with the classes that the network has by itself; None for timm's, which would all have to be built.
        tags: of its pretrained weights.
    """

    name: str
    ours: bool
    parameters: int | None
    tags: tuple[str, ...]


def catalog(search: str = "") -> list[Listed]:
    """Return architectures by name, ours first.

    Args:
        search: part of a name, with or without a tag, or a pattern with `*` and `?`, in any case; empty is everything.
    """
    pattern = (search if set("*?[") & set(search) else f"*{search}*").lower()

    tags = {name: tuple(sorted(filter(None, known_tags(name)))) for name in timm.list_models()}

    def matches(name: str) -> bool:
        return any(fnmatchcase(full.lower(), pattern) for full in (name, *(f"{name}.{tag}" for tag in tags[name])))

    names = [name for name in tags if matches(name)]
    ours = [name for name in names if name.startswith(PREFIX) and name.removeprefix(PREFIX) in NETWORKS]
    found = []
    for name in ours:
        with torch.device("meta"):
            model = timm.create_model(name)
        found.append(Listed(name, True, sum(value.numel() for value in model.parameters()), ()))
    for name in names:
        if name not in ours:
            found.append(Listed(name, False, None, tags[name]))
    return found
