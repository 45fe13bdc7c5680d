"""Our networks are in timm's registry as soon as timm is imported, and timm is not imported for that.

`import finetune` has to be quick (`finetune --help` does not wait for torch), and after it timm has to know our
networks, also when the user's script imports timm later. So a finder is put before Python's own: it lets them find
timm, and has `finetune.networks` imported when timm's own code has run. docs/decisions/0007 has the alternatives.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_networks() -> None:
    """Register our networks now when timm is there, else when it is imported."""
    if "timm" in sys.modules:
        importlib.import_module("finetune.networks")
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    """Find timm as the other finders do, with a loader that registers our networks behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _TimmLoader(spec.loader)
        return spec


class _TimmLoader(Loader):
    """timm's own loader, and then our networks."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader  # whoever asks for resources gets timm's own
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TimmFinder)]
        importlib.import_module("finetune.networks")
