"""Recipe settings as command-line options: names, types, defaults and help all come from `finetune.recipe.Recipe`."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.page import GENERATOR
from finetune.recipe import AUTO, Recipe, flag, from_table, read_toml, to_table
from weights.errors import UsageError

PANELS = {
    "What to train": (
        "arch", "train_layers", "weights", "weights_dir", "allow_missing", "keep_head", "image_size",
    ),
    "Network": ("blocks", "shortcut", "hidden", "dropout"),
    "Data": (
        "data", "data_dir", "labels", "augment", "cutout", "views", "windows", "skip_easy", "val_fraction", "limit",
        "shots", "hold_test",
    ),
    "Training": (
        "epochs", "batch_size", "lr", "head_lr_scale", "lr_scales", "optimizer", "momentum", "weight_decay", "schedule",
        "warmup", "label_smoothing", "class_weights", "ema", "freeze_norms", "budget", "patience", "seed",
    ),
    "Machine": (
        "device", "precision", "compile", "cache", "cache_dir", "cache_limit", "memory_budget", "image_memory", "log",
    ),
}  # fmt: skip

Config = Annotated[
    Path | None, typer.Option(help="Read settings from a recipe.toml; flags win over it.", show_default=False)
]


def recipe_options(
    command: Callable[..., Any], *, without: tuple[str, ...] = (), shown: dict[str, str] | None = None
) -> Callable[..., Any]:
    """Give a command an option for every recipe setting; it receives them as `settings`, only those that were given.

    Args:
        command: takes `settings: dict[str, Any]` first and its own typed options after it.
        without: settings that the command decides itself.
        shown: what help shows as the default of some settings, where the command's differ from `Recipe`'s.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "settings"]
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    wanted = [item for item in dataclasses.fields(Recipe) if item.name not in without]
    parameters = [_parameter(item, panel_of[item.name], (shown or {}).get(item.name)) for item in wanted]

    def run(**given: Any) -> Any:
        names = {item.name for item in wanted}
        settings = {name: value for name, value in given.items() if name in names and value is not None}
        rest = {name: value for name, value in given.items() if name not in names}
        return command(_lists(settings), **rest)

    run.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__annotations__ = {}
    return run


def _parameter(item: dataclasses.Field[Any], panel: str, default: str | None) -> inspect.Parameter:
    """Return one setting as a Typer parameter; None means "not given"."""
    kind = str(item.type)
    if kind == "bool":
        switch = typer.Option(flag(item.name), help=item.metadata["help"], rich_help_panel=panel, show_default="False")
        return inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[bool | None, switch]
        )
    python = next(
        (known for name, known in (("int", int), ("float", float), ("Path", Path)) if kind.startswith(name)), str
    )
    shown = to_table(Recipe())[item.name]
    shown = ",".join(shown) if isinstance(shown, list) else str(shown)
    choices = item.metadata["choices"]
    option = typer.Option(
        flag(item.name),
        help=item.metadata["help"],
        show_default=default or shown or "none",
        rich_help_panel=panel,
        metavar="|".join(choices) if choices else {int: "INTEGER", float: "FLOAT"}.get(python),
        parser=_number_or_auto(item.name, whole=python is int) if kind in ("int | None", "float | None") else None,
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[python | None, option]
    )


def _number_or_auto(name: str, *, whole: bool) -> Callable[[str], float | str]:
    """Return what reads a setting that help shows as `auto`, so that `auto` may be given too."""

    def read(text: str) -> float | str:
        try:
            return text if text == AUTO else int(text) if whole else float(text)
        except ValueError:
            wanted = "a whole number" if whole else "a number"
            raise UsageError(f"{flag(name)} is '{text}'; give {wanted}, or auto.") from None

    return read


def _lists(settings: dict[str, Any]) -> dict[str, Any]:
    """Split the comma-separated lists among the settings; `none`, which help shows for an empty one, empties it."""
    lists = {item.name for item in dataclasses.fields(Recipe) if str(item.type).startswith("tuple")}
    split = {
        name: tuple(part.strip() for part in value.split(",") if part.strip()) if name in lists else value
        for name, value in settings.items()
    }
    for name in (lists & split.keys()) - {"train_layers"}:  # of which `check` says what to name
        if split[name] == ("none",):
            split[name] = ()
        elif settings[name] and not split[name]:
            raise UsageError(f"{flag(name)} is '{settings[name]}' and names nothing; list what it is to hold, as a,b.")
    return split


def make_recipe(settings: dict[str, Any], config: Path | None) -> Recipe:
    """Return a recipe from defaults, then a recipe file, then flags.

    Raises:
        UsageError: the file cannot be read, or holds an unknown setting or a wrong type.
    """
    base = from_table(read_toml(config), str(config)) if config else Recipe()
    return dataclasses.replace(base, **without_auto(settings))


def without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings from the command line with None where `auto` was given and the recipe means None by it."""
    auto = {item.name for item in dataclasses.fields(Recipe) if "None" in str(item.type)}
    return {name: None if name in auto and str(value) == AUTO else value for name, value in settings.items()}


def require_folder(path: Path, option: str) -> None:
    """Refuse a file to be written in a folder that is not there, before any work is done for it.

    Raises:
        UsageError: there is no such folder.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path} lies in a folder that does not exist; make {path.parent}, or give another.")


def require_page(path: Path, option: str) -> None:
    """Refuse a page to be written where that cannot be, or where something else is; an earlier page may be replaced.

    Raises:
        UsageError: there is no such folder, or something that is no page of this program's.
    """

    def is_page() -> bool:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(2000)

    _require_file(path, option, is_page, "page of this version")


def require_predictions(path: Path, option: str) -> None:
    """Refuse predictions to be written where that cannot be, or where something else is; earlier ones may be replaced.

    Raises:
        UsageError: there is no such folder, or something that is no file of predictions.
    """

    def is_predictions() -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                return {"logits", "labels"} <= set(file.keys()) <= {"logits", "labels", "shown", "pictures"}
        except SafetensorError:
            return False

    _require_file(path, option, is_predictions, "file of predictions")


def _require_file(path: Path, option: str, may_go: Callable[[], bool], what: str) -> None:
    require_folder(path, option)
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give the name of a file.")
    try:
        if path.exists() and not (path.is_file() and may_go()):
            raise UsageError(
                f"{option} {path} is there already and is not known as a {what}, so it is kept; give another name."
            )
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read ({error.strerror}); give another name.") from error
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"{option} {path} lies in a folder that cannot be written; give another.")
