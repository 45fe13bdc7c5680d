"""A run from recipe to run directory, step after step.

    data ──► model ──► cut ──► how to compute ──► plan ──► features ──► fit ──► test, proof, files

`run` and `resume` are the two ways in; the steps up to the plan are in `finetune/job.py`. Everything before the run
directory is made can fail without leaving a trace. Several processes go through the same steps; only the first of them
holds the run directory, writes, and tells `events` anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint, outcome
from finetune.augment import Views
from finetune.budget import Budget, keep_time
from finetune.class_weights import class_weights
from finetune.cut import sources_dropped
from finetune.data import DATA_NAMES
from finetune.device import settle
from finetune.events import Events
from finetune.fit import Listener, Progress, Trainer, fit
from finetune.images import ImageSet
from finetune.job import Job, Shared, Stop, prepare, settings_of, watched
from finetune.layers import require_unchanged
from finetune.memory import exhaustion_explained
from finetune.precision import compile_module
from finetune.predictions import illustrate, write_predictions
from finetune.ranks import Ranks
from finetune.recipe import Recipe, check, with_absolute_paths
from finetune.rendezvous import joined
from finetune.report import write_report
from finetune.results import read_summary
from finetune.rundir import PREDICTIONS, RunDirectory, create_run_directory, open_run_directory, require_empty
from finetune.sharing import Shard, Split, own_block, synchronise_batch_norms
from finetune.sources import FeatureBuilder, Live
from weights.errors import StoppedError

PLAIN = Views("none", 1)  # images as they are


@sources_dropped()
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
    check(recipe)
    with joined() as ranks:
        events = events if events is not None and ranks.first else Events()
        ranks.require_same(settings_of(recipe))
        if output is not None and ranks.first:
            require_empty(output)  # again when it is made: this only spares the wait
        words = "Stopped before the run began; nothing was written, so start it again."
        job = prepare(recipe, watched(events, stop, words), shared=shared, ranks=ranks)
        name = f"{job.prepared.arch.name}-{job.data.name}"
        with _held_by_first(ranks, lambda: create_run_directory(output, name)) as place:
            if place.held is not None:
                # What follows from other settings stays auto, for whoever changes those.
                kept = replace(job.recipe, views=recipe.views, lr=recipe.lr)
                place.held.write_recipe(with_absolute_paths(kept, DATA_NAMES))
            with exhaustion_explained(job.computing.smaller):
                return _carry_out(job, place, None, events, stop, started)


@sources_dropped()
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
    with joined() as ranks:
        events = events if events is not None and ranks.first else Events()
        ranks.require_same({"--resume": "given"})
        recipe = ranks.from_first(lambda: open_run_directory(path)[1])
        with _held_by_first(ranks, lambda: open_run_directory(path)[0]) as place:
            held = place.held
            summary = ranks.from_first(lambda: read_summary(path) if held and held.read_summary() is not None else None)
            if summary is not None:
                if held is not None:
                    held.drop_checkpoint()  # a kill between the last two writes leaves it
                events.note(f"{path} is a finished run; nothing is left to do.")
                return {**summary, "output": str(path)}
            state = ranks.from_first(lambda: held.read_checkpoint() if held else None)
            words = f"Stopped; go on with: finetune run --resume {path}"
            if state is not None:
                checkpoint.require_whole(path, state)
            choices = None if state is None else state["choices"]
            telling = events if state is None else _from(checkpoint.progress_of(path, state).epoch, events)
            job = prepare(recipe, watched(telling, stop, words), choices=choices, shared=shared, ranks=ranks)
            if state is not None:
                checkpoint.require_same(path, state, job.recipe, job.data, job.prepared)
            with exhaustion_explained(job.computing.smaller):
                return _carry_out(job, place, state, events, stop, started)


def _from(epoch: int, events: Events) -> Events:
    """Return events whose plan counts the epochs after this one, in which a resumed run goes on."""
    return replace(events, plan=lambda plan: events.plan(replace(plan, done=epoch)))


@dataclass(frozen=True)
class Place:
    """The run directory.

    Attributes:
        path: where it is.
        held: itself, in the process that writes; None in the others.
    """

    path: Path
    held: RunDirectory | None


@contextmanager
def _held_by_first(ranks: Ranks, find: Callable[[], RunDirectory]) -> Iterator[Place]:
    """Let the first process hold the run directory; all are told where it is."""
    directory = find() if ranks.first else None
    with directory or nullcontext():
        path = ranks.from_first(lambda: directory.path if directory else Path())
        ranks.advice = f"what was finished is kept: go on with finetune run --resume {path}"
        yield Place(path, directory)


def _carry_out(
    job: Job, place: Place, state: dict[str, Any] | None, events: Events, stop: Stop, started: float
) -> dict[str, Any]:
    """Features, training, test, files."""
    recipe, data, ranks, directory = job.recipe, job.data, job.ranks, place.held
    progress = checkpoint.progress_of(place.path, state) if state else Progress()
    progress.estimate = progress.estimate or job.plan.estimate()
    before = replace(progress)
    if directory is not None:
        directory.open_log(recipe.log, progress.rows)

    def stop_now() -> None:
        ranks.check()
        if stop():
            raise _stopped(place.path, progress, recipe)

    builder = _builder(job, events, stop_now)
    train = _split(job, builder, data.train, job.views, "train")
    val = None if data.val is None else _split(job, builder, data.val, PLAIN, "validation")
    ranks.wait(stop_now)
    trainer = _trainer(job, lambda: before.total_seconds + time.perf_counter() - started)
    best: dict[str, torch.Tensor] | None = None
    if state:
        checkpoint.restore(place.path, state, trainer)
        best = state["best"]
    elif trainer.budget is not None:
        trainer.budget.require_time(place.path)

    def save(now: Progress, is_best: bool) -> None:
        nonlocal best
        if is_best and recipe.patience:
            best = {name: value.clone() for name, value in trainer.evaluated.state_dict().items()}
        _clock(now, before, started, builder)
        keep_time(trainer.budget, job.plan, now.rows, now.saving_seconds)
        begun = time.perf_counter()
        if directory is not None:
            directory.write_checkpoint(checkpoint.pack(now, trainer, best, job.data, job.prepared, job.computing))
            directory.write_metrics(now.rows)
        now.saving_seconds = max(now.saving_seconds, time.perf_counter() - begun)

    listener = Listener(
        batch=lambda epoch, done, of: events.progress(f"epoch {epoch} of {trainer.epochs}", done, of),
        epoch=lambda row: events.epoch(row, trainer.epochs),
        save=save,
        stop=ranks.stops(stop),
    )
    if not fit(trainer, train, val, progress, listener):
        raise _stopped(place.path, progress, recipe)
    if progress.out_of_time:
        done = trainer.skipping.done(progress.epoch, progress.unseen)
        events.note(f"--budget {recipe.budget} ended training after {done:.1f} of {trainer.epochs} epochs.")
    if best is not None:
        trainer.suffix.load_state_dict(best)
    elif trainer.average is not None:
        trainer.suffix.load_state_dict(trainer.average.module.state_dict())
    clock = partial(_clock, progress, before, started, builder)
    return {**_finish(job, directory, trainer, train, val, builder, progress, clock), "output": str(place.path)}


def _trainer(job: Job, spent: Callable[[], float]) -> Trainer:
    """Return what trains, at its start; `spent` tells the seconds of the run so far."""
    plan, computing, ranks = job.plan, job.computing, job.ranks
    suffix = settle(job.cut.suffix, job.device)
    synchronise_batch_norms(ranks, suffix, job.device)
    return Trainer(
        suffix,
        job.prepared.fresh,
        job.recipe,
        len(job.data.train),
        computing.training.dtype,
        job.device,
        forward=compile_module(suffix) if computing.training.compiled else ranks.wrap(suffix, job.device),
        windows=computing.windows,
        budget=None
        if plan.budget is None
        else Budget(plan.budget - plan.reserved_seconds, spent, agree=ranks.number_of_first),
        class_weights=class_weights(job.recipe.class_weights, job.data.train.labels, len(job.data.classes)),
        ranks=ranks,
    )


def _clock(progress: Progress, before: Progress, started: float, builder: FeatureBuilder | None) -> None:
    """Bring times up to now: those of this process on top of those `before` it, of processes that were stopped."""
    progress.total_seconds = before.total_seconds + time.perf_counter() - started
    progress.prefix_seconds = before.prefix_seconds + (builder.seconds if builder else 0.0)


def _finish(
    job: Job,
    directory: RunDirectory | None,
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
    module, ranks = trainer.suffix, job.ranks
    if builder is None:  # nothing is computed ahead, so the images as they are cost no more than a view of them
        train = _split(job, None, job.data.train, PLAIN, "train")
    figures: dict[str, float | None] = {}
    figures |= outcome.train_figures(module, train, job.device, trainer.dtype, job.recipe, ranks)
    temperature = outcome.val_temperature(module, val, job.device, trainer.dtype, job.recipe, ranks)
    predictions = None
    progress.eval_seconds += time.perf_counter() - start
    before_test = builder.seconds if builder else 0.0
    if job.data.test is not None:
        test = _split(job, builder, job.data.test, PLAIN, "test")
        ranks.wait(builder.stop if builder else lambda: None)
        start = time.perf_counter()
        logits = outcome.test_logits(module, test, job.device, job.recipe, ranks)
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
        job.recipe, job.data, job.prepared, job.computing, asdict(progress), figures, temperature, seconds, ranks.size
    )
    if directory is not None:
        outcome.write_model(directory.path, job.recipe, job.data, job.prepared, temperature)
        if predictions is not None:
            write_predictions(directory.path / PREDICTIONS, predictions)
        directory.write_metrics(progress.rows)
        write_report(directory.path, summary, progress.rows, job.data.classes, predictions)
        directory.write_summary(summary)
        directory.drop_checkpoint()
    ranks.wait()  # the files are there for whoever looks after this
    return summary


def _builder(job: Job, events: Events, stop: Callable[[], None]) -> FeatureBuilder | None:
    """Return what makes features, or None where batches are computed as they are wanted."""
    computing = job.computing
    if computing.prefix is None or not computing.placement.ahead:
        return None
    told = {"arch": job.prepared.arch.full_name, "data": job.data.name}
    return replace(computing.builder(job.recipe, events), stop=stop, told=told)


def _split(job: Job, builder: FeatureBuilder | None, data: ImageSet, views: Views, name: str) -> Split:
    """Return a split as the loop sees it: features where the plan says so, else images on the fly.

    Of features each process has those of a block of the split.
    """
    computing = job.computing
    prefix, dtype = computing.prefix, computing.training.dtype
    if name == "test":  # all in fp32, as whoever loads the model will compute it (docs/decisions/0005)
        prefix, dtype = prefix and prefix.for_test, torch.float32
    if builder is None or prefix is None:
        live = Live(data, views, job.prepared.preprocessing, prefix, job.device, dtype, computing.images)
        return Split(live, data.labels, views.count)
    own = replace(builder, prepared=prefix)
    features = own.features(*own_block(job.ranks, data, views), name)
    builder.seconds = own.seconds
    if job.ranks.alone:
        return Split(features, data.labels, views.count)
    rows = job.ranks.part(len(data))
    return Split(Shard(features, rows), data.labels, views.count, rows)


def _stopped(path: Path, progress: Progress, recipe: Recipe) -> StoppedError:
    done = (
        f"after epoch {progress.epoch} of {recipe.epochs}" if progress.epoch else "before the first epoch was finished"
    )
    return StoppedError(f"Stopped {done}; what was finished is kept. Go on with: finetune run --resume {path}")
