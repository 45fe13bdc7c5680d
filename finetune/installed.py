"""Which libraries are installed, beside what the package's own metadata asks for. No library is imported for that."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "finetune-timm"
DEVELOPMENT = ("dev", "supply")  # extras that no user of the commands needs


@dataclass(frozen=True)
class Package:
    """A library that this one needs.

    Attributes:
        name: of the distribution.
        version: installed; "" when it is not.
        required: the versions that are supported, such as ">=2.9"; "" is any.
    """

    name: str
    version: str
    required: str

    @property
    def supported(self) -> bool:
        """Whether it is installed in a version that is supported."""
        return bool(self.version) and in_range(self.version, self.required)


@dataclass(frozen=True)
class Installed:
    """What the metadata say.

    Attributes:
        requires_python: the versions that are supported; "" when this is not installed as a package.
        packages: what is needed, in the order of the metadata; () when this is not installed as a package.
        extras: name → libraries of that extra that are absent or out of range.
        namesake: whether another distribution called `finetune` is installed, whose package has our name.
    """

    requires_python: str = ""
    packages: tuple[Package, ...] = ()
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    namesake: bool = False


def installed() -> Installed:
    """Compare what is installed with the metadata of this package."""
    try:
        about = importlib.metadata.metadata(DISTRIBUTION)
        requirements = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return Installed(namesake=bool(version_of("finetune")))
    needed = [one for one in requirements if _applies(one, "")]
    extras = {}
    for extra in about.get_all("Provides-Extra") or []:
        wanted = [_package(one) for one in requirements if one not in needed and _applies(one, extra)]
        if extra not in DEVELOPMENT:
            extras[extra] = tuple(one.name for one in wanted if not one.supported)
    return Installed(
        requires_python=(about.get_all("Requires-Python") or [""])[0],
        packages=tuple(_package(one) for one in needed),
        extras=extras,
        namesake=bool(version_of("finetune")),
    )


def version_of(name: str) -> str:
    """Return the installed version of a distribution, "" when there is none."""
    try:
        return importlib.metadata.version(name) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def in_range(version: str, required: str) -> bool:
    """Say whether a version, which may be a pre-release, satisfies a requirement such as ">=2.9,<3"."""
    return SpecifierSet(required).contains(version, prereleases=True)


def _applies(one: Requirement, extra: str) -> bool:
    return one.marker is None or one.marker.evaluate({"extra": extra})


def _package(one: Requirement) -> Package:
    return Package(one.name, version_of(one.name), str(one.specifier))
