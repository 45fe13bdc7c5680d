"""What a resumed run needs, packed for checkpoint.pt and checked when it is read."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from finetune.compute import Computing
from finetune.fit import Progress, Trainer
from finetune.images import DataSplits
from finetune.models import Prepared
from finetune.precision import choice_of
from finetune.recipe import AUTO, PLACES, Recipe, flag, to_table
from finetune.rundir import CHECKPOINT
from weights.errors import RunError
from weights.guard import shortened, told

FORMAT = 5  # counts up whenever a checkpoint of before would go on to another result


def pack(
    progress: Progress,
    trainer: Trainer,
    best: dict[str, torch.Tensor] | None,
    data: DataSplits,
    prepared: Prepared,
    computing: Computing,
) -> dict[str, Any]:
    """Return a checkpoint: tensors and plain values only, so that it can be read without running code."""
    return {
        "progress": asdict(progress),
        "trainer": trainer.state(),
        "best": best,
        "data": data.sha256,
        "weights": prepared.sha256,
        "choices": computing.choices(),
        "recipe": to_table(trainer.recipe),
        "format": FORMAT,
    }


_HELD = {"progress": dict, "trainer": dict, "choices": dict, "recipe": dict, "data": str}


def require_whole(path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks what `pack` puts into it.

    Args:
        path: the run directory, for messages.
        state: what was read.

    Raises:
        RunError: something is absent or of another kind.
    """
    for name, kind in _HELD.items():
        if not isinstance(state.get(name), kind):
            raise _damaged(path, f"it holds no {name}")
    try:
        json.dumps(state["recipe"])  # plain values, as `to_table` gives them
        for choice in state["choices"].values():
            if choice is not None:
                choice_of(choice)
    except (RecursionError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def restore(path: Path, state: dict[str, Any], trainer: Trainer) -> None:
    """Continue where a checkpoint was written.

    Args:
        path: the run directory, for messages.
        state: what `pack` returned.
        trainer: at its start.

    Raises:
        RunError: what is in it does not belong to this trainer.
    """
    try:
        trainer.load_state(state["trainer"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, (str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def progress_of(path: Path, state: dict[str, Any]) -> Progress:
    """Return how far a checkpoint's run had come.

    Args:
        path: the run directory, for messages.
        state: what `pack` returned.

    Raises:
        RunError: it holds something else.
    """
    try:
        progress = Progress(**state["progress"])
    except TypeError as error:
        raise _damaged(path, str(error)) from error
    plain = Progress()
    for item in fields(Progress):
        value, usual = getattr(progress, item.name), getattr(plain, item.name)
        if usual is None or (isinstance(usual, float) and isinstance(value, int)):
            continue
        if type(value) is not type(usual):
            raise _damaged(path, f"its {item.name} is {told(value)}")
    if not all(isinstance(row, dict) for row in progress.rows) or not 0 <= progress.epoch <= len(progress.rows):
        raise _damaged(path, "its epochs are not there")
    return progress


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(
        f"{path / CHECKPOINT} is damaged ({shortened(reason)}); delete it to start this run from its first epoch."
    )


def require_same(path: Path, state: dict[str, Any], recipe: Recipe, data: DataSplits, prepared: Prepared) -> None:
    """Refuse to resume with other settings, data or weights than the run began with.

    Where data, weights and caches lie may change: the first two are compared by what they hold.

    Args:
        path: the run directory, for messages.
        state: what `pack` returned.
        recipe: as recipe.toml has it now, with everything automatic filled in.
        data: as found now.
        prepared: as found now.

    Raises:
        RunError: they differ; the message lists how.
    """
    if state.get("format") != FORMAT or _once_had_epochs_for_a_budget(state):
        raise RunError(
            f"{path} was begun by another version of finetune, which ordered, scaled or trained its images in "
            f"another way; start a new run with --config {path / 'recipe.toml'}."
        )
    before, now = {**to_table(Recipe()), **state["recipe"]}, to_table(recipe)  # what is new since has its default
    changed = [
        f"{flag(name)} {now[name]} (was {before[name]})"
        for name in now
        if name not in (*PLACES, "data") and now[name] != before[name]
    ]
    if changed:
        raise RunError(
            f"{path / 'recipe.toml'} has other settings than its run began with: {', '.join(changed)}; put them back, "
            f"or start a new run with --config {path / 'recipe.toml'}."
        )
    if state["data"] != data.sha256:
        raise RunError(
            f"{path} was trained on other images (sha256 {state['data'][:12]}…, now {data.sha256[:12]}…); bring the "
            "original data back, or start a new run."
        )
    if state["weights"] != prepared.sha256:
        raise RunError(
            f"{path} began with other weights (sha256 {str(state['weights'])[:12]}…, now "
            f"{str(prepared.sha256)[:12]}…); bring the original weights back, or start a new run."
        )


def _once_had_epochs_for_a_budget(state: dict[str, Any]) -> bool:
    """Whether a budget was turned into a number of epochs when the run began; now the schedule follows the clock."""
    budgeted: bool = state["recipe"].get("budget", AUTO) != AUTO
    return budgeted and "share" not in (state["trainer"].get("schedule") or ())
