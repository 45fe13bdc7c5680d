"""A run from recipe to run directory, step after step.

    data ──► model ──► cut ──► how to compute ──► plan ──► features ──► fit ──► test, proof, files

`run` and `resume` are the two ways in; the steps up to the plan are in `finetune/job.py`. Everything before the run
directory is made can fail without leaving a trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint, outcome
from finetune.augment import Views
from finetune.budget import Budget, keep_time
from finetune.class_weights import class_weights
from finetune.data import DATA_NAMES
from finetune.device import settle
from finetune.events import Events
from finetune.fit import Listener, Progress, Split, Trainer, fit
from finetune.images import ImageSet
from finetune.inference import Source
from finetune.job import Job, Shared, Stop, prepare, watched
from finetune.layers import require_unchanged
from finetune.memory import exhaustion_explained
from finetune.precision import compile_module
from finetune.predictions import illustrate, write_predictions
from finetune.recipe import Recipe, check, with_absolute_paths
from finetune.report import write_report
from finetune.rundir import PREDICTIONS, RunDirectory, create_run_directory, open_run_directory, require_empty
from finetune.sources import FeatureBuilder, Live
from weights.errors import StoppedError


def run(
    recipe: Recipe,
    output: Path | None = None,
    *,
    events: Events | None = None,
    stop: Stop = lambda: False,
    shared: Shared | None = None,
) -> dict[str, Any]:
    """Fine-tune a model and write its run directory.

    Args:
        recipe: the settings.
        output: the run directory; None makes the next free one under runs/.
        events: told of notes, progress, the plan and epochs; silent when None.
        stop: asked before each step and after each chunk of features; True ends the run so that it can be resumed.
        shared: what other runs of this process have read and computed already.

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
    job = prepare(recipe, watched(events, stop, words), shared=shared)
    name = f"{job.prepared.arch.name}-{job.data.name}"
    with create_run_directory(output, name) as directory, exhaustion_explained(job.computing.smaller):
        # What follows from other settings stays auto, for whoever changes those.
        kept = replace(job.recipe, views=recipe.views, lr=recipe.lr)
        directory.write_recipe(with_absolute_paths(kept, DATA_NAMES))
        return _carry_out(job, directory, None, events, stop, started)


def resume(
    path: Path, *, events: Events | None = None, stop: Stop = lambda: False, shared: Shared | None = None
) -> dict[str, Any]:
    """Go on with a run that was stopped or killed, to the result it would have had.

    Args:
        path: its run directory.
        events: as for `run`.
        stop: as for `run`.
        shared: as for `run`.

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
        choices = None if state is None else state["choices"]
        job = prepare(recipe, watched(events, stop, words), choices=choices, shared=shared)
        if state is not None:
            checkpoint.require_same(path, state, job.recipe, job.data, job.prepared)
        with exhaustion_explained(job.computing.smaller):
            return _carry_out(job, directory, state, events, stop, started)


def _carry_out(
    job: Job, directory: RunDirectory, state: dict[str, Any] | None, events: Events, stop: Stop, started: float
) -> dict[str, Any]:
    """Features, training, test, files."""
    recipe, data = job.recipe, job.data
    progress = Progress(**state["progress"]) if state else Progress()
    progress.estimate = progress.estimate or job.plan.estimate()
    before = replace(progress)
    directory.open_log(recipe.log, progress.rows)

    def stop_now() -> None:
        if stop():
            raise _stopped(directory, progress, recipe)

    builder = _builder(job, events, stop_now)
    train = Split(_source(job, builder, data.train, job.views, "train"), data.train.labels, job.views.count)
    val = None
    if data.val is not None:
        plain = Views("none", 1)
        val = Split(_source(job, builder, data.val, plain, "validation"), data.val.labels, 1)
    trainer = _trainer(job, lambda: before.total_seconds + time.perf_counter() - started)
    best: dict[str, torch.Tensor] | None = None
    if state:
        trainer.load_state(state["trainer"])
        best = state["best"]
    elif trainer.budget is not None:
        trainer.budget.require_time(directory.path)

    def save(now: Progress, is_best: bool) -> None:
        nonlocal best
        if is_best and recipe.patience:
            best = {name: value.clone() for name, value in trainer.evaluated.state_dict().items()}
        _clock(now, before, started, builder)
        keep_time(trainer.budget, job.plan, now.rows, now.saving_seconds)
        begun = time.perf_counter()
        directory.write_checkpoint(checkpoint.pack(now, trainer, best, job.data, job.prepared, job.computing))
        directory.write_metrics(now.rows)
        now.saving_seconds = max(now.saving_seconds, time.perf_counter() - begun)

    listener = Listener(
        batch=lambda epoch, done, of: events.progress(f"epoch {epoch} of {trainer.epochs}", done, of),
        epoch=lambda row: events.epoch(row, trainer.epochs),
        save=save,
        stop=stop,
    )
    if not fit(trainer, train, val, progress, listener):
        raise _stopped(directory, progress, recipe)
    if progress.out_of_time:
        done = trainer.skipping.done(progress.epoch, progress.unseen)
        events.note(f"--budget {recipe.budget} ended training after {done:.1f} of {trainer.epochs} epochs.")
    if best is not None:
        trainer.suffix.load_state_dict(best)
    elif trainer.average is not None:
        trainer.suffix.load_state_dict(trainer.average.module.state_dict())
    return _finish(
        job, directory, trainer, train, val, builder, progress, lambda: _clock(progress, before, started, builder)
    )


def _trainer(job: Job, spent: Callable[[], float]) -> Trainer:
    """Return what trains, at its start; `spent` tells the seconds of the run so far."""
    plan, computing = job.plan, job.computing
    suffix = settle(job.cut.suffix, job.device)
    return Trainer(
        suffix,
        job.prepared.fresh,
        job.recipe,
        len(job.data.train),
        computing.training.dtype,
        job.device,
        forward=compile_module(suffix) if computing.training.compiled else None,
        windows=computing.windows,
        budget=None if plan.budget is None else Budget(plan.budget - plan.reserved_seconds, spent),
        class_weights=class_weights(job.recipe.class_weights, job.data.train.labels, len(job.data.classes)),
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
    if builder is None:  # nothing is computed ahead, so the images as they are cost no more than a view of them
        train = replace(train, source=_source(job, None, job.data.train, Views("none", 1), "train"))
    figures: dict[str, float | None] = {}
    figures |= outcome.train_figures(module, train, job.device, trainer.dtype, job.recipe)
    temperature = outcome.val_temperature(module, val, job.device, trainer.dtype, job.recipe)
    predictions = None
    progress.eval_seconds += time.perf_counter() - start
    before_test = builder.seconds if builder else 0.0
    if job.data.test is not None:
        source = _source(job, builder, job.data.test, Views("none", 1), "test")
        start = time.perf_counter()
        logits = outcome.test_logits(module, source, len(job.data.test), job.device, job.recipe)
        figures |= outcome.test_figures(logits, job.data.test.labels, temperature.value)
        predictions = illustrate(logits, job.data.test.labels, job.data.test.images)
        progress.eval_seconds += time.perf_counter() - start
    figures["test_feature_seconds"] = builder.seconds - before_test if builder else 0.0
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
    if computing.prefix is None or not computing.placement.ahead:
        return None
    told = {"arch": job.prepared.arch.full_name, "data": job.data.name}
    return replace(computing.builder(job.recipe, events), stop=stop, told=told)


def _source(job: Job, builder: FeatureBuilder | None, data: ImageSet, views: Views, name: str) -> Source:
    """Return a split's source: features where the plan says so, else images on the fly."""
    computing = job.computing
    prefix, dtype = computing.prefix, computing.training.dtype
    if name == "test":  # all in fp32, as whoever loads the model will compute it (docs/decisions/0005)
        prefix, dtype = prefix and prefix.for_test, torch.float32
    if builder is None or prefix is None:
        return Live(data, views, job.prepared.preprocessing, prefix, job.device, dtype, computing.images)
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
