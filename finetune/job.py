"""What a run knows before it starts: data, model, cut, how it is computed, and the plan.

    recipe ──► data ──► model ──► cut ──► how to compute ──► plan

Nothing is written but remembered timings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.augment import Views, make_views
from finetune.compute import Computing, decide
from finetune.cut import Cut, cut_model
from finetune.data import load_data
from finetune.device import pick_device
from finetune.events import Events
from finetune.images import DataSplits, ImageSet
from finetune.layers import fingerprint
from finetune.models import Prepared, find_weights, prepare_model
from finetune.plan import Plan
from finetune.recipe import Recipe, parse_seconds, resolve_auto
from weights.errors import StoppedError, UsageError

Stop = Callable[[], bool]


@dataclass
class Job:
    """Everything that a run knows once it has looked at data, weights and machine.

    Attributes:
        recipe: with epochs, batch size and views filled in.
        data: the splits.
        prepared: the model.
        cut: the model, cut.
        frozen: fingerprint of every frozen tensor as loaded.
        device: where it runs.
        views: the training images' views.
        computing: number formats, compilation, places.
        plan: what was told to the user.
    """

    recipe: Recipe
    data: DataSplits
    prepared: Prepared
    cut: Cut
    frozen: dict[str, str]
    device: torch.device
    views: Views
    computing: Computing
    plan: Plan


def prepare(recipe: Recipe, events: Events, *, choices: dict[str, Any] | None = None) -> Job:
    """Look at data, weights and machine, and decide how everything will be computed; nothing is written but caches.

    Args:
        recipe: the settings.
        events: told of notes, progress and the plan.
        choices: a resumed run's choices of number format and compilation, kept instead of measured.
    """
    device = pick_device(recipe.device)
    found = find_weights(recipe)
    data = load_data(
        recipe.data,
        data_dir=recipe.data_dir,
        labels=recipe.labels,
        image_size=recipe.image_size or int(found.arch.config["input_size"][-1]),
        val_fraction=recipe.val_fraction,
        limit=recipe.limit,
        seed=recipe.seed,
        progress=events.progress,
    )
    for note in data.notes:
        events.note(note)
    if recipe.patience and data.val is None:
        raise UsageError(
            f"--patience {recipe.patience} needs validation images, and there are none: give --val-fraction 0.1, or "
            "data with a val/ folder, or leave --patience out."
        )
    recipe = resolve_auto(recipe, len(data.train))
    prepared = prepare_model(recipe, len(data.classes), found)
    if prepared.account is not None:
        events.note(prepared.account.sentence())
    elif prepared.selection.frozen:
        events.note("No weights were loaded (--weights none), so the layers that do not train keep random values.")
    frozen = fingerprint(prepared.model, prepared.selection.frozen)
    cut = cut_model(prepared.model, prepared.selection, _sample(data.train, prepared, 2))
    side = min(data.train.images.shape[-2:])
    views = make_views(recipe.augment, len(data.train), side, count=recipe.views, seed=recipe.seed)
    computing, plan = decide(recipe, data, prepared, cut, views, device, events, choices)
    if recipe.budget is not None and choices is None:  # a resumed run has settled on its epochs
        epochs = plan.epochs_within(parse_seconds(recipe.budget, "--budget"))
        if epochs < plan.epochs:
            events.note(f"{epochs} of {plan.epochs} epochs fit into --budget {recipe.budget}.")
            fresh = recipe.augment == "crop" and recipe.views == recipe.epochs
            recipe = replace(recipe, epochs=epochs, views=epochs if fresh else recipe.views)
            views = make_views(recipe.augment, len(data.train), side, count=recipe.views, seed=recipe.seed)
            computing, plan = decide(recipe, data, prepared, cut, views, device, events, computing.choices())
    events.plan(plan)
    return Job(recipe, data, prepared, cut, frozen, device, views, computing, plan)


def watched(events: Events, stop: Stop, words: str) -> Events:
    """Return events that end the preparation of a run when `stop` asks for it; there is nothing to save yet."""

    def progress(what: str, done: int, total: int) -> None:
        if stop():
            raise StoppedError(words)
        events.progress(what, done, total)

    return replace(events, progress=progress)


def _sample(images: ImageSet, prepared: Prepared, count: int) -> torch.Tensor:
    """Return a few training images as the model sees them: float32 (count, 3, S, S)."""
    return prepared.preprocessing(images.images[torch.arange(count) % len(images)])
