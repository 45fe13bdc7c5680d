"""What a run knows before it starts: data, model, cut, how it is computed, and the plan.

    recipe ──► data ──► model ──► cut ──► how to compute ──► plan

`finetune run` and `finetune plan` both come through here, so they cannot disagree. Nothing is written but caches:
remembered timings, and decoded photos.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch

from finetune.augment import Views, make_views
from finetune.auto import choice_told, settle_auto, trains_fresh_stage
from finetune.cache import key_of
from finetune.compute import Computing, cache_folder, decide
from finetune.cut import Cut, cut_model
from finetune.data import DATA_NAMES, load_data, require_data
from finetune.decoded import DecodedCache
from finetune.device import pick_device
from finetune.events import Events
from finetune.images import DataSplits, ImageSet
from finetune.layers import fingerprint
from finetune.machine import free_memory
from finetune.memory import exhaustion_explained
from finetune.models import Prepared, find_weights, prepare_model
from finetune.plan import Plan
from finetune.ranks import Ranks
from finetune.recipe import AUTO, PLACES, Recipe, check, flag, resolve_auto, to_table
from finetune.rundir import require_empty
from finetune.scratch import few_steps
from finetune.sharing import require_rows
from finetune.sources import images_sha256
from finetune.stream import HEADROOM
from finetune.units import parse_bytes
from weights.errors import StoppedError, UsageError, WeightsError
from weights.locate import Found

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Shared:
    """What several runs of one process have in common, so that none of them reads, times or computes it again.

    Attributes:
        data: what `load_data` would give them.
        choices: number formats and compilation, as `Computing.choices` returns them; None chooses them.
        features: stored features that are in memory, by the keys of their cache entries.
    """

    data: DataSplits
    choices: dict[str, Any] | None = None
    features: Mapping[str, list[torch.Tensor]] = field(default_factory=dict)


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
        ranks: of this process among those that share the run.
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
    ranks: Ranks = field(default_factory=Ranks)


def plan_run(
    recipe: Recipe, output: Path | None = None, *, events: Events | None = None, stop: Stop = lambda: False
) -> Plan:
    """Plan a run without beginning it: what `run` would do with the same arguments, up to the plan.

    Steps are timed, and the timings remembered for the run; no feature is computed and no run directory made.

    Args:
        recipe: the settings.
        output: the run directory to come; refused where `run` would refuse it.
        events: told of notes and progress; silent when None.
        stop: asked while data are read and steps are timed.

    Raises:
        UsageError, WeightsError, DataError, RunError, StoppedError: as for `run`, before it begins.
    """
    check(recipe)
    if output is not None:
        require_empty(output)
    words = "Stopped before the plan was made; nothing was written."
    return prepare(recipe, watched(events or Events(), stop, words)).plan


def prepare(
    recipe: Recipe,
    events: Events,
    *,
    choices: dict[str, Any] | None = None,
    shared: Shared | None = None,
    ranks: Ranks | None = None,
) -> Job:
    """Look at data, weights and machine, and decide how everything will be computed; nothing is written but caches.

    Args:
        recipe: the settings.
        events: told of notes, progress and the plan.
        choices: a resumed run's choices of number format and compilation, kept instead of measured.
        shared: what other runs of this process have read and computed already.
        ranks: of this process among those that share the run; alone when None.
    """
    started, ranks = time.perf_counter(), ranks or Ranks()
    device = ranks.device(pick_device(recipe.device))
    if recipe.data not in DATA_NAMES:
        require_data(recipe.data, labels=recipe.labels)  # before weights are looked for, or even downloaded
    found = find_weights(recipe)
    data = shared.data if shared is not None else read_splits(recipe, found, events, ranks.local_size)
    if recipe.hold_test:
        data = replace(data, test=None)
    for note in data.notes:
        events.note(note)
    _require_validation(recipe, data)
    if recipe.keep_head:
        _require_classes(found, data)
    prepared = prepare_model(recipe, len(data.classes), found)
    recipe = _settle(recipe, len(data.train), prepared, events)
    if prepared.account is not None:
        events.note(prepared.account.sentence())
    elif prepared.selection.frozen:
        events.note("No weights were loaded (--weights none), so the layers that do not train keep random values.")
    frozen = fingerprint(prepared.model, prepared.selection.frozen)
    cut = cut_model(prepared.model, prepared.selection, _sample(data.train, prepared, 2))
    side = min(data.train.images.shape[-2:])
    views = make_views(
        recipe.augment,
        len(data.train),
        side,
        count=recipe.views,
        seed=recipe.seed,
        cutout=recipe.cutout,
        fill=tuple(round(255 * part) for part in prepared.preprocessing.mean),
    )
    known = choices if choices is not None or shared is None else shared.choices
    held = {} if shared is None else shared.features
    _require_same(ranks, data, prepared, device)
    with exhaustion_explained():
        computing, plan = decide(recipe, data, prepared, cut, views, device, events, known, held, ranks)
    _require_same_formats(ranks, computing)
    plan = ranks.from_first(lambda: replace(plan, start_seconds=time.perf_counter() - started))
    if recipe.budget is not None and choices is None:  # what a resumed run has left, its checkpoint knows
        plan.require_time(recipe.budget)
    events.plan(plan)
    return Job(recipe, data, prepared, cut, frozen, device, views, computing, plan, ranks)


def _settle(recipe: Recipe, images: int, prepared: Prepared, events: Events) -> Recipe:
    """Fill in what is auto in a recipe, and say what somebody might wonder at."""
    fresh_stage = trains_fresh_stage(prepared.model, prepared.selection, prepared.fresh)
    settled = resolve_auto(settle_auto(recipe, images, fresh_stage), images)
    for told in (choice_told(recipe, settled), few_steps(settled, images)):
        if told is not None:
            events.note(told)
    return settled


def settings_of(recipe: Recipe) -> dict[str, object]:
    """Return the settings that all processes of a run must have alike, by their flags."""
    return {flag(name): value for name, value in to_table(recipe).items() if name not in (*PLACES, "data")}


def _require_same(ranks: Ranks, data: DataSplits, prepared: Prepared, device: torch.device) -> None:
    """Refuse processes of one run that found different things, and splits that are too small for them.

    Raises:
        RunError: a process has other data, weights or versions than the first one.
        UsageError: a split has fewer images than there are processes.
    """
    if ranks.alone:
        return
    splits = {"training": data.train, "validation": data.val, "test": data.test}
    require_rows(ranks, {name: len(split or ()) for name, split in splits.items()})
    facts = {"data": data.sha256, "weights": prepared.sha256}
    facts |= {f"{name} images": images_sha256(split.images) for name, split in splits.items() if split is not None}
    ranks.require_same(
        {
            **{f"{name} of sha256": str(digest)[:12] for name, digest in facts.items()},
            "a device of type": device.type,
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
    )


def _require_same_formats(ranks: Ranks, computing: Computing) -> None:
    """Refuse processes of one run that would compute in different ways, though the first one chose for all.

    Raises:
        RunError: a process does not compute as the first one does.
    """
    prefix = computing.prefix
    ranks.require_same(
        {
            "for the frozen part": "none" if prefix is None else f"{prefix.choice} ({key_of(prefix.identity)[:12]})",
            "for training": str(computing.training),
        }
    )


def read_splits(recipe: Recipe, found: Found, events: Events, processes: int = 1) -> DataSplits:
    """Read the recipe's data and split them; `processes` do so at the same time on this machine."""
    memory = None if recipe.image_memory is None else parse_bytes(recipe.image_memory, "--image-memory")
    if processes > 1:  # each finds the same memory free
        memory = min(memory or free_memory(), int(HEADROOM * free_memory())) // processes
    return load_data(
        recipe.data,
        data_dir=recipe.data_dir,
        labels=recipe.labels,
        image_size=recipe.image_size or int(found.arch.config["input_size"][-1]),
        image_memory=memory,
        val_fraction=recipe.val_fraction,
        limit=recipe.limit,
        shots=recipe.shots,
        seed=recipe.seed,
        progress=events.progress,
        kept=_kept_images(recipe, events),
    )


def _kept_images(recipe: Recipe, events: Events) -> DecodedCache | None:
    """Return where decoded images stay for the next command, if anything does."""
    if recipe.cache not in (AUTO, "disk"):
        return None
    return DecodedCache(cache_folder(recipe), parse_bytes(recipe.cache_limit, "--cache-limit"), events.note)


def _require_validation(recipe: Recipe, data: DataSplits) -> None:
    """Refuse patience without anything to measure it on.

    Raises:
        UsageError: there are no validation images.
    """
    if recipe.patience and data.val is None:
        raise UsageError(
            f"--patience {recipe.patience} needs validation images, and there are none: give --val-fraction 0.1, or "
            "data with a val/ folder, or leave --patience out."
        )


def _require_classes(found: Found, data: DataSplits) -> None:
    """Refuse a kept classifier whose outputs would stand for other classes than the data's.

    Raises:
        WeightsError: the checkpoint states its classes, as many as the data have, and they are others or in another
            order. Another number of them is refused when the weights are loaded.
    """
    there, here = found.label_names, data.classes
    if len(there) != len(here) or tuple(there) == tuple(here):
        return
    number = next(index for index, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1])
    raise WeightsError(
        f"The weights ({found.source}) were trained with class {number} = {there[number]} and {data.name} has "
        f"{here[number]} there; give data of the same classes, or use finetune run without --keep-head, which gives "
        "them a new head."
    )


def watched(events: Events, stop: Stop, words: str) -> Events:
    """Return events that end the preparation of a run when `stop` asks for it; there is nothing to save yet.

    Args:
        events: the run's own.
        stop: asked whenever there is progress.
        words: what the StoppedError says.
    """

    def progress(what: str, done: int, total: int) -> None:
        if stop():
            raise StoppedError(words)
        events.progress(what, done, total)

    return replace(events, progress=progress)


def _sample(images: ImageSet, prepared: Prepared, count: int) -> torch.Tensor:
    """Return a few training images as the model sees them: float32 (count, 3, S, S)."""
    return prepared.preprocessing(images.images[torch.arange(count) % len(images)])
