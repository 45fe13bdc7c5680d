"""`finetune init`: a recipe file to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import print_lines
from cli.options import PANELS, require_folder
from finetune.template import write_template
from weights.atomic import write_atomically
from weights.errors import RunError


def init_command(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a recipe file with every setting, its default and what it does, to be edited.

    It goes to `finetune run --config`; flags win over it.

    Example: finetune init photos.toml
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder; give the path of a file, such as {path / 'recipe.toml'}.")
    if path.exists() and not force:
        raise RunError(f"{path} is there already, and is kept; give another path, or --force to replace it.")
    require_folder(path, "PATH")
    write_atomically(path, write_template(PANELS).encode())
    print_lines([f"{path} holds every setting with its default; edit it, then: finetune run --config {path}"])
