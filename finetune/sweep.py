"""A sweep: every combination of some settings, trained on features that are computed once for all of them.

    grid ──► data, one job for each cut ──► folder ──► features of all cuts in one pass ──► runs ──► choice, test, page

Each run is what `finetune run` would do with the same recipe, in a folder of its own. The test split is held back from
all of them, and read for the one that the validation images choose. What cannot be right in any of the combinations is
refused before the folder is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune import pipeline
from finetune.data import DATA_NAMES
from finetune.events import Events
from finetune.grid import SWEEP, Candidate, Grid, read_sweep, require_free, to_toml
from finetune.held_test import read_test
from finetune.job import Shared, Stop, watched
from finetune.recipe import Recipe, peak_rate, with_absolute_paths
from finetune.recommend import Advice, Tried, frontier, recommend, with_most_images
from finetune.results import read_summary
from finetune.rundir import RECIPE, SUMMARY, RunDirectory, create_run_directory, require_empty
from finetune.study import Study, look
from finetune.sweep_page import PAGE, write_page
from finetune.together import Held, compute_together, place_together, with_features
from weights.atomic import write_atomically
from weights.config import is_number
from weights.errors import DivergedError, RunError, StoppedError
from weights.guard import read_json

RESULT = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to, whole or so far.

    Attributes:
        arch: full timm name.
        data: name of the data set.
        val_images: how many images the choice is made by.
        runs: those that are finished or diverged, in the order of the grid.
        planned: how many there are in all.
        advice: the choice; None while runs are missing.
        feature_seconds: time for the features of all runs.
        seconds: time in all.
        output: the sweep's folder.
    """

    arch: str
    data: str
    val_images: int
    runs: tuple[Tried, ...]
    planned: int
    advice: Advice | None
    feature_seconds: float
    seconds: float
    output: str

    @property
    def chosen(self) -> Tried | None:
        """The run that the validation images choose; None where all diverged."""
        return next((run for run in self.runs if self.advice is not None and run.name == self.advice.chosen), None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        best = {run.name for run in frontier(with_most_images(self.runs))}
        runs = [{**asdict(run), "on_frontier": run.name in best} for run in self.runs]
        plain = {item: getattr(self, item) for item in ("arch", "data", "val_images", "planned", "output")}
        return {
            **plain,
            "runs": runs,
            "chosen": None if self.chosen is None else self.chosen.name,
            "quicker": None if self.advice is None else self.advice.quicker,
            "test_accuracy": None if self.chosen is None else self.chosen.test_accuracy,
            "recommendation": [] if self.advice is None else list(self.advice.sentences),
            "seconds": {"features": round(self.feature_seconds, 3), "total": round(self.seconds, 3)},
            "page": str(Path(self.output) / PAGE),
        }


def sweep(
    recipe: Recipe,
    grid: Grid,
    output: Path | None = None,
    *,
    events: Events | None = None,
    stop: Stop = lambda: False,
) -> Sweep:
    """Train every combination, choose one on the validation images, test it, and write the sweep's page.

    Args:
        recipe: the settings that all combinations share; with `hold_test` no run is tested, the chosen one neither.
        grid: values of the others.
        output: the sweep's folder; None makes the next free one under runs/.
        events: told of notes, progress, plans and epochs; silent when None.
        stop: asked before each step and after each chunk of features; True ends the sweep so that it can be resumed.

    Raises:
        UsageError: a setting that cannot be right, combinations that come twice, or no validation images to choose by.
        WeightsError, DataError: weights or data that cannot be used.
        TrainingError: a frozen tensor moved, or memory ran out; a run that diverges is no error.
        RunError: the output folder or the cache cannot be used.
        StoppedError: `stop` asked for it.
    """
    started = time.perf_counter()
    grid.check(recipe)
    absolute = with_absolute_paths(recipe, DATA_NAMES)
    if output is not None:
        require_free(output, grid, absolute)
        require_empty(output)  # again when it is made: this only spares the wait
    words = "Stopped before the sweep began; nothing was written, so start it again."
    study = look(recipe, grid, _once(events or Events()), stop, words)
    short = next(iter(study.jobs.values())).prepared.arch.name
    with create_run_directory(output, f"sweep-{short}-{study.whole.name}") as directory:
        write_atomically(directory.path / SWEEP, to_toml(grid, absolute).encode())
        return _carry_out(study, directory, _State(), started)


def resume_sweep(path: Path, *, events: Events | None = None, stop: Stop = lambda: False) -> Sweep:
    """Go on with a sweep that was stopped or killed: with the run it was in, then with those that had not begun.

    Args:
        path: its folder.
        events: as for `sweep`.
        stop: as for `sweep`.

    Returns:
        What it came to. A finished sweep is looked through, and nothing is trained.

    Raises:
        RunError: there is no such sweep, or data or weights are not those it began with.
        UsageError, WeightsError, DataError, TrainingError, StoppedError: as for `sweep`.
    """
    started = time.perf_counter()
    grid, recipe = read_sweep(path)
    grid.check(recipe)
    words = f"Stopped; go on with: finetune sweep --resume {path}"
    with RunDirectory(path) as directory:
        study = look(recipe, grid, _once(events or Events()), stop, words)
        return _carry_out(study, directory, _State.read(path), started)


@dataclass
class _State:
    """What cannot be read from the run folders.

    Attributes:
        diverged: why, by name of the run.
        feature_seconds: time for features, in all processes.
        seconds: time of the processes that were stopped.
    """

    diverged: dict[str, str] = field(default_factory=dict)
    feature_seconds: float = 0.0
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> _State:
        """Return the state of a sweep that is resumed; without a result that can be read, its beginning."""
        try:
            found = read_json(folder / RESULT)
            diverged = {str(run["name"]): str(run["diverged"]) for run in found["runs"] if run["diverged"]}
            features, total = found["seconds"]["features"], found["seconds"]["total"]
            return cls(diverged, features, total) if is_number(features) and is_number(total) else cls()
        except (OSError, ValueError, LookupError, TypeError):
            return cls()


def _carry_out(study: Study, directory: RunDirectory, state: _State, started: float) -> Sweep:
    """Features, runs, choice, test, page."""
    path = directory.path
    candidates = study.candidates
    before = state.seconds

    def result(advice: Advice | None = None) -> Sweep:
        runs = [_read(path / candidate.name, candidate, study, state) for candidate in candidates]
        done = tuple(run for run in runs if run is not None)
        state.seconds = before + time.perf_counter() - started
        return Sweep(
            study.arch, study.whole.name, len(study.whole.val or ()), done, len(candidates), advice,
            state.feature_seconds, state.seconds, str(path),
        )  # fmt: skip

    def keep(found: Sweep) -> None:
        write_atomically(path / RESULT, (json.dumps(found.as_dict(), indent=2) + "\n").encode())

    study.events.note(study.expected())
    held: Held
    try:
        for stage in study.stages():
            own = [candidate for candidate in candidates if candidate.recipe.train_layers in stage]
            there = {run.name for run in result().runs}
            todo = [candidate for candidate in own if candidate.name not in there]
            held = {}  # what the last stage had in memory goes before more comes
            held = _features(study, todo, state) if todo else {}
            for candidate in todo:
                study.events.note(f"run {candidates.index(candidate) + 1} of {len(candidates)}: {candidate.name}")
                _run(path / candidate.name, candidate, study, held, state)
                keep(result())
        advice = recommend(result().runs, len(study.whole.val or ()))
        _test(path, advice, study)
    except StoppedError as error:
        keep(result())
        raise StoppedError(
            f"Stopped after {len(result().runs)} of {len(candidates)} runs; what was finished is kept. Go on with: "
            f"finetune sweep --resume {path}"
        ) from error
    found = result(advice)
    write_page(path, found.as_dict())
    keep(found)
    return found


def _features(study: Study, todo: Sequence[Candidate], state: _State) -> Held:
    """Compute what the next runs have in common; return what stays in memory."""
    wanted = dict.fromkeys(candidate.recipe.train_layers for candidate in todo)
    jobs = with_features([study.jobs[layers] for layers in wanted])
    placement = place_together(jobs, study.subsets) if jobs else None
    if placement is None:
        return {}

    def require_going() -> None:
        if study.stop():
            raise StoppedError("Stopped while features were computed.")

    start = time.perf_counter()
    try:
        return compute_together(jobs, study.subsets, placement, study.events, require_going)
    finally:
        state.feature_seconds += time.perf_counter() - start


def _run(folder: Path, candidate: Candidate, study: Study, held: Held, state: _State) -> None:
    """Train one combination, from where it was stopped if it was; note that it diverged."""
    choices = study.jobs[candidate.recipe.train_layers].computing.choices()
    shared = Shared(study.data[candidate.recipe.shots], choices, held)
    events = replace(study.events, plan=lambda plan: None)  # its cut's has been shown
    try:
        if (folder / RECIPE).is_file():
            pipeline.resume(folder, events=events, stop=study.stop, shared=shared)
        else:
            for half_written in folder.glob(".*.tmp"):  # what a kill left of its recipe; else it is no empty folder
                half_written.unlink(missing_ok=True)
            pipeline.run(candidate.recipe, folder, events=events, stop=study.stop, shared=shared)
    except DivergedError as error:
        state.diverged[candidate.name] = str(error)
        study.events.note(f"{candidate.name} diverged: {error}")


def _read(folder: Path, candidate: Candidate, study: Study, state: _State) -> Tried | None:
    """Return a run's row; None while it is not finished.

    Raises:
        RunError: it was made with other data or weights than there are now.
    """
    recipe = candidate.recipe
    row = Tried(
        candidate.name, str(folder), recipe.train_layers, peak_rate(recipe), recipe.weight_decay, recipe.shots,
        diverged=state.diverged.get(candidate.name, ""),
    )  # fmt: skip
    if row.diverged:
        return row
    if not (folder / SUMMARY).is_file():
        return None
    summary = read_summary(folder)
    weights = study.jobs[recipe.train_layers].prepared.sha256
    for what, then, now in (
        ("images", summary["data"]["sha256"], study.whole.sha256),
        ("weights", summary["weights"]["sha256"], weights),
    ):
        if then != now:
            raise RunError(
                f"{folder} was trained with other {what} (sha256 {str(then)[:12]}…, now {str(now)[:12]}…); bring the "
                "original ones back, or start a new sweep."
            )
    return replace(
        row,
        images=summary["data"]["train"],
        classes=summary["data"]["classes"],
        val_accuracy=summary["val_accuracy"],
        train_accuracy=summary["train_accuracy"],
        test_accuracy=summary["test_accuracy"],
        seconds=round(summary["seconds"]["total"] - summary["seconds"]["prefix"], 3),
        epochs=summary["epochs"],
    )


def _test(path: Path, advice: Advice, study: Study) -> None:
    """Read the test split for the chosen run, unless it is to be held or was read before."""
    images = study.whole.test
    if advice.chosen is None or images is None or study.recipe.hold_test:
        return
    folder = path / advice.chosen
    if (RunDirectory(folder).read_summary() or {}).get("test_accuracy") is None:
        study.events.note(f"reading the test images for {advice.chosen}")
        read_test(folder, images, watched(study.events, study.stop, "Stopped while the chosen run was tested."))


def _once(events: Events) -> Events:
    """Return events that say each note once: the runs of a sweep have the same data and weights."""
    said: set[str] = set()

    def note(text: str) -> None:
        if text not in said:
            said.add(text)
            events.note(text)

    return replace(events, note=note)
