"""What a resumed run needs, packed for checkpoint.pt and checked when it is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune.compute import Computing
from finetune.fit import Progress, Trainer
from finetune.images import DataSplits
from finetune.models import Prepared
from finetune.recipe import AUTO, PLACES, Recipe, flag, to_table
from weights.errors import RunError

FORMAT = 3  # counts up whenever a checkpoint of before would go on to another result


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
            f"{path} was begun by another version of finetune, which ordered and trained its images in another way; "
            f"start a new run with --config {path / 'recipe.toml'}."
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
    return budgeted and "share" not in state["trainer"]["schedule"]
