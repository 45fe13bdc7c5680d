"""Imported before finetune, it puts a function in the place of two small libraries that a bare GPU machine may lack.

Nothing that is measured uses them: tomli-w writes a run's recipe.toml, and platformdirs names the user's cache folder,
into which no benchmark looks.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def flat_toml(values: Mapping[str, Any]) -> str:
    """Return settings as TOML: texts, numbers, switches and lists of these, which TOML writes as JSON does."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def stand_in(name: str, **functions: Callable[..., str]) -> None:
    """Put a module with these functions in the place of one that is not installed."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        vars(module).update(functions)
        sys.modules[name] = module


stand_in("tomli_w", dumps=flat_toml)
stand_in("platformdirs", user_cache_dir=lambda name: str(Path.home() / ".cache" / name))
