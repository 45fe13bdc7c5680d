"""Names of networks: what the user writes after `--arch`, resolved against timm's registry.

A timm name has two parts, `resnet50.a1_in1k`: the architecture, and the tag of one set of pretrained weights. The tag
decides the preprocessing (mean, std, interpolation, input size), so it is settled before any file is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import timm.models
from timm.models import PretrainedCfg

from weights.errors import UsageError, near_matches

PREFERRED_TAGS = {"resnet18": "tv_in1k", "resnet50": "tv_in1k"}
"""Tags that a bare name means here, where that differs from timm: torchvision's weights make better fixed features."""


@dataclass(frozen=True)
class Arch:
    """A network and the pretrained weights it is asked for with.

    Attributes:
        name: architecture as timm registers it (`resnet18`).
        tag: pretrained tag (`tv_in1k`), "" when there is none.
        config: timm's pretrained configuration as a plain dict: input_size (C, H, W), mean, std, interpolation,
            num_classes, first_conv, classifier, license, url, hf_hub_id and so on.
        tag_given: whether the user wrote the tag; only then is a file of another tag a contradiction.
    """

    name: str
    tag: str
    config: dict[str, Any] = field(hash=False)
    tag_given: bool = False

    @property
    def full_name(self) -> str:
        """`resnet18.tv_in1k`, or the bare name when there is no tag."""
        return f"{self.name}.{self.tag}" if self.tag else self.name


def resolve_arch(text: str) -> Arch:
    """Resolve a timm name, with or without a pretrained tag.

    An untagged resnet18 or resnet50 means torchvision's weights (`tv_in1k`); other untagged names mean timm's default.
    Names registered with `timm.models.register_model` work like timm's own; when they bring no configuration they get
    timm's defaults.

    Args:
        text: what the user wrote, such as `resnet18` or `resnet50.a1_in1k`.

    Raises:
        UsageError: when timm has no such architecture, has renamed it, or has no such tag; names near matches.
    """
    name, _, tag = text.strip().partition(".")
    if not timm.models.is_model(name):
        near = (
            near_matches(name, timm.models.list_models()) or "; expected a timm name such as resnet18 or convnext_tiny."
        )
        raise UsageError(f'Unknown architecture "{name}"{near}')
    renamed = timm.models.get_deprecated_models()
    if name in renamed:
        now = f"renamed in timm; use {renamed[name]}." if renamed[name] else "removed from timm; choose another."
        raise UsageError(f'Architecture "{name}" was {now}')
    tags = known_tags(name)
    if tag and tag not in tags:
        near = near_matches(tag, tags) or f"; its tags are {', '.join(sorted(filter(None, tags))) or 'none'}."
        raise UsageError(f'{name} has no pretrained weights "{tag}"{near}')
    wanted = tag or PREFERRED_TAGS.get(name, "")
    found = timm.models.get_pretrained_cfg(f"{name}.{wanted}" if wanted else name)
    config = _plain(found or PretrainedCfg(architecture=name))
    return Arch(name, wanted or config.get("tag", ""), config, tag_given=bool(tag))


def known_tags(name: str) -> dict[str, dict[str, Any]]:
    """Return every pretrained tag of an architecture with its configuration, {} for an unknown one.

    Args:
        name: architecture without a tag.
    """
    found = timm.models.get_arch_pretrained_cfgs(name)
    return {full.partition(".")[2]: _plain(config) for full, config in found.items()}


def pretrained_archs() -> Iterator[Arch]:
    """Yield every architecture that timm knows with every tag of its pretrained weights."""
    for full_name in timm.models.list_pretrained():
        name, _, tag = full_name.partition(".")
        if found := timm.models.get_pretrained_cfg(full_name):
            yield Arch(name, tag, _plain(found), tag_given=bool(tag))


def weights_url(config: dict[str, Any]) -> tuple[str, str]:
    """Return the address of the weights outside the Hugging Face hub and its file name, ("", "") when there is none.

    Args:
        config: a timm pretrained configuration; its `url` is a string, or a pair of address and file name.
    """
    url = config.get("url") or ""
    if isinstance(url, (list, tuple)):
        return str(url[0]), str(url[1])
    return url, url.partition("?")[0].rpartition("/")[2]


def _plain(config: PretrainedCfg) -> dict[str, Any]:
    return {k: v for k, v in asdict(config).items() if v is not None or k in ("pool_size", "first_conv", "classifier")}
