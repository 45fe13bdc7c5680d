"""A recipe file to edit: every setting with its default, what it does, and what it can be.

All of it comes from the recipe's own definition, so a new setting is in it by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from finetune.recipe import Recipe, kind_of, to_table

HEAD = """\
# Settings of a run, each with its default. Change what you like, and delete what you do not need.
#
#     finetune plan --config recipe.toml     what a run with them would do, and what it would cost
#     finetune run --config recipe.toml      the run; flags win over this file
#
# "auto" is chosen when the run starts. Relative paths begin in the folder in which the command runs.
"""

COLUMN = 32  # where the comment behind a value begins; the longest default leaves room for it


def write_template(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the file's text.

    Args:
        groups: headings, and the settings under each; every setting is in one of them.
    """
    items = {item.name: item for item in dataclasses.fields(Recipe)}
    values = to_table(Recipe())
    parts = [HEAD]
    for heading, names in groups.items():
        parts.append(f"\n\n# {heading.upper()}\n")
        parts += [_entry(items[name], values[name]) for name in names]
    return "".join(parts)


def _entry(item: dataclasses.Field[Any], value: Any) -> str:
    """Return one setting: what it does, and its default with what else it can be."""
    assigned = f"{item.name} = {_toml(value)}"
    return f"\n# {item.metadata['help']}\n{assigned:<{COLUMN - 1}} # {_accepted(item)}\n"


def _accepted(item: dataclasses.Field[Any]) -> str:
    choices: tuple[str, ...] = item.metadata["choices"]
    if not choices:
        return kind_of(item)
    *others, last = (f'"{choice}"' for choice in choices)
    return f"{', '.join(others)} or {last}"


def _toml(value: Any) -> str:
    """Return a value as TOML writes it, a list on one line."""
    if isinstance(value, list):
        return f"[{', '.join(_toml(part) for part in value)}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
