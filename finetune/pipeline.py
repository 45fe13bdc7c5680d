"""A run from recipe to run directory, step after step.

    data ──► model ──► cut ──► how to compute ──► plan ──► features ──► fit ──► test, proof, files

`run` and `resume` are the two ways in. Everything before the run directory is made can fail without leaving a trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint, outcome
from finetune.augment import Views, make_views
from finetune.class_weights import class_weights
from finetune.compute import Computing, decide
from finetune.cut import Cut, cut_model
from finetune.data import load_data
from finetune.device import pick_device, settle
from finetune.events import Events
from finetune.fit import Listener, Progress, Source, Split, Trainer, fit
from finetune.images import DataSplits, ImageSet
from finetune.layers import fingerprint, require_unchanged
from finetune.models import Prepared, find_weights, prepare_model
from finetune.plan import Plan
from finetune.precision import compile_module
from finetune.predictions import illustrate, write_predictions
from finetune.recipe import Recipe, check, parse_seconds, resolve_auto
from finetune.report import write_report
from finetune.rundir import PREDICTIONS, RunDirectory, create_run_directory, open_run_directory, require_empty
from finetune.sources import FeatureBuilder, Live
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


def run(
    recipe: Recipe, output: Path | None = None, *, events: Events | None = None, stop: Stop = lambda: False
) -> dict[str, Any]:
    """Fine-tune a model and write its run directory.

    Args:
        recipe: the settings.
        output: the run directory; None makes the next free one under runs/.
        events: told of notes, progress, the plan and epochs; silent when None.
        stop: asked before each step and after each chunk of features; True ends the run so that it can be resumed.

    Returns:
        The summary, as in summary.json, with the run directory's path under "output".

    Raises:
        UsageError: a setting that cannot be right.
        WeightsError: weights that cannot be used.
        DataError: data that cannot be used.
        TrainingError: the loss is not finite, or a frozen tensor moved.
        RunError: the output folder or the cache cannot be used.
        StoppedError: `stop` asked for it.
    """
    started = time.perf_counter()
    events = events or Events()
    check(recipe)
    if output is not None:
        require_empty(output)  # again when it is made: this only spares the wait
    words = "Stopped before the run began; nothing was written, so start it again."
    job = prepare(recipe, _watched(events, stop, words))
    name = f"{job.prepared.arch.name}-{job.data.name}"
    with create_run_directory(output, name) as directory:
        # What follows from other settings stays auto, for whoever changes those.
        directory.write_recipe(replace(job.recipe, views=recipe.views, lr=recipe.lr))
        return _carry_out(job, directory, None, events, stop, started)


def resume(path: Path, *, events: Events | None = None, stop: Stop = lambda: False) -> dict[str, Any]:
    """Go on with a run that was stopped or killed, to the result it would have had.

    Args:
        path: its run directory.
        events: as for `run`.
        stop: as for `run`.

    Returns:
        The summary. A finished run's is returned as it stands.

    Raises:
        RunError: there is no such run, its checkpoint is damaged, or data or weights are not those it began with.
        UsageError, WeightsError, DataError, TrainingError, StoppedError: as for `run`.
    """
    started = time.perf_counter()
    events = events or Events()
    directory, recipe = open_run_directory(path)
    with directory:
        summary = directory.read_summary()
        if summary is not None:
            directory.drop_checkpoint()  # a kill between the last two writes leaves it
            events.note(f"{path} is a finished run; nothing is left to do.")
            return {**summary, "output": str(path)}
        state = directory.read_checkpoint()
        words = f"Stopped; go on with: finetune run --resume {path}"
        job = prepare(recipe, _watched(events, stop, words), choices=None if state is None else state["choices"])
        if state is not None:
            checkpoint.require_same(path, state, job.recipe, job.data, job.prepared)
        return _carry_out(job, directory, state, events, stop, started)


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


def _watched(events: Events, stop: Stop, words: str) -> Events:
    """Return events that end the preparation of a run when `stop` asks for it; there is nothing to save yet."""

    def progress(what: str, done: int, total: int) -> None:
        if stop():
            raise StoppedError(words)
        events.progress(what, done, total)

    return replace(events, progress=progress)


def _sample(images: ImageSet, prepared: Prepared, count: int) -> torch.Tensor:
    """Return a few training images as the model sees them: float32 (count, 3, S, S)."""
    return prepared.preprocessing(images.images[torch.arange(count) % len(images)])


def _carry_out(
    job: Job, directory: RunDirectory, state: dict[str, Any] | None, events: Events, stop: Stop, started: float
) -> dict[str, Any]:
    """Features, training, test, files."""
    recipe, data = job.recipe, job.data
    progress = Progress(**state["progress"]) if state else Progress()
    before = replace(progress)

    def stop_now() -> None:
        if stop():
            raise _stopped(directory, progress, recipe)

    builder = _builder(job, events, stop_now)
    train = Split(_source(job, builder, data.train, job.views, "train"), data.train.labels, job.views.count)
    val = None
    if data.val is not None:
        plain = Views("none", 1)
        val = Split(_source(job, builder, data.val, plain, "validation"), data.val.labels, 1)
    suffix = settle(job.cut.suffix, job.device)
    trainer = Trainer(
        suffix,
        job.prepared.fresh,
        recipe,
        len(data.train),
        job.computing.training.dtype,
        job.device,
        forward=compile_module(suffix) if job.computing.training.compiled else None,
        windows=job.computing.windows,
        class_weights=class_weights(recipe.class_weights, data.train.labels, len(data.classes)),
    )
    best: dict[str, torch.Tensor] | None = None
    if state:
        trainer.load_state(state["trainer"])
        best = state["best"]

    def save(now: Progress, is_best: bool) -> None:
        nonlocal best
        if is_best and recipe.patience:
            best = {name: value.clone() for name, value in trainer.evaluated.state_dict().items()}
        _clock(now, before, started, builder)
        directory.write_checkpoint(checkpoint.pack(now, trainer, best, job.data, job.prepared, job.computing))
        directory.write_metrics(now.rows)

    listener = Listener(
        batch=lambda epoch, done, of: events.progress(f"epoch {epoch} of {trainer.epochs}", done, of),
        epoch=lambda row: events.epoch(row, trainer.epochs),
        save=save,
        stop=stop,
    )
    if not fit(trainer, train, val, progress, listener):
        raise _stopped(directory, progress, recipe)
    if best is not None:
        suffix.load_state_dict(best)
    elif trainer.average is not None:
        suffix.load_state_dict(trainer.average.module.state_dict())
    return _finish(
        job, directory, trainer, train, val, builder, progress, lambda: _clock(progress, before, started, builder)
    )


def _clock(progress: Progress, before: Progress, started: float, builder: FeatureBuilder | None) -> None:
    """Bring times up to now: those of this process on top of those `before` it, of processes that were stopped."""
    progress.total_seconds = before.total_seconds + time.perf_counter() - started
    progress.prefix_seconds = before.prefix_seconds + (builder.seconds if builder else 0.0)


def _finish(
    job: Job,
    directory: RunDirectory,
    trainer: Trainer,
    train: Split,
    val: Split | None,
    builder: FeatureBuilder | None,
    progress: Progress,
    clock: Callable[[], None],
) -> dict[str, Any]:
    """Prove that nothing frozen moved, read the test split, write the files."""
    require_unchanged(job.prepared.model, job.frozen)
    start = time.perf_counter()
    module = trainer.suffix
    figures: dict[str, float | None] = {}
    figures |= outcome.train_figures(module, train, job.device, trainer.dtype, job.recipe)
    temperature = outcome.val_temperature(module, val, job.device, trainer.dtype, job.recipe)
    predictions = None
    progress.eval_seconds += time.perf_counter() - start
    if job.data.test is not None:
        source = _source(job, builder, job.data.test, Views("none", 1), "test")
        start = time.perf_counter()
        logits = outcome.test_logits(module, source, len(job.data.test), job.device, job.recipe)
        figures |= outcome.test_figures(logits, job.data.test.labels, temperature.value)
        predictions = illustrate(logits, job.data.test.labels, job.data.test.images)
        progress.eval_seconds += time.perf_counter() - start
    require_unchanged(job.prepared.model, job.frozen)
    clock()
    seconds = {
        "total": progress.total_seconds,
        "compile": job.computing.compile_seconds,
        "prefix": progress.prefix_seconds,
        "train": progress.seconds,
        "eval": progress.eval_seconds,
    }
    summary = outcome.summarise(
        job.recipe, job.data, job.prepared, job.computing, asdict(progress), figures, temperature, seconds
    )
    outcome.write_model(directory.path, job.recipe, job.data, job.prepared, temperature)
    if predictions is not None:
        write_predictions(directory.path / PREDICTIONS, predictions)
    directory.write_metrics(progress.rows)
    write_report(directory.path, summary, progress.rows, job.data.classes, predictions)
    directory.write_summary(summary)
    directory.drop_checkpoint()
    return {**summary, "output": str(directory.path)}


def _builder(job: Job, events: Events, stop: Callable[[], None]) -> FeatureBuilder | None:
    """Return what makes features, or None where batches are computed as they are wanted."""
    computing = job.computing
    if computing.prefix is None or computing.placement.where not in ("ram", "disk"):
        return None
    return replace(computing.builder(job.recipe, events), stop=stop)


def _source(job: Job, builder: FeatureBuilder | None, data: ImageSet, views: Views, name: str) -> Source:
    """Return a split's source: features where the plan says so, else images on the fly."""
    computing = job.computing
    prefix, dtype = computing.prefix, computing.training.dtype
    if name == "test":  # all in fp32, as whoever loads the model will compute it (docs/decisions/0005)
        prefix, dtype = prefix and prefix.for_test, torch.float32
    if builder is None or prefix is None:
        return Live(data, views, job.prepared.preprocessing, prefix, job.device, dtype)
    own = replace(builder, prepared=prefix)
    features = own.features(data, views, name)
    builder.seconds = own.seconds
    return features


def _stopped(directory: RunDirectory, progress: Progress, recipe: Recipe) -> StoppedError:
    done = (
        f"after epoch {progress.epoch} of {recipe.epochs}" if progress.epoch else "before the first epoch was finished"
    )
    return StoppedError(
        f"Stopped {done}; what was finished is kept. Go on with: finetune run --resume {directory.path}"
    )
