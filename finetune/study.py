"""What a sweep knows before its folder is made: data, a job for each cut, and which features can be there together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from finetune.data import DATA_NAMES, require_data
from finetune.events import Events
from finetune.grid import Candidate, Grid
from finetune.images import DataSplits
from finetune.job import Job, Shared, Stop, prepare, read_splits, watched
from finetune.models import find_weights, with_own_scales
from finetune.plan import duration
from finetune.recipe import Recipe
from finetune.splits import places_of_shots, with_shots
from finetune.together import Subset, place_together, with_features
from weights.errors import UsageError


@dataclass(frozen=True)
class Study:
    """A sweep before it begins.

    Attributes:
        recipe: what all runs share.
        grid: what they do not.
        arch: full timm name.
        whole: the splits with all training images.
        data: the splits by images of every class.
        candidates: the combinations, those of one cut after another.
        jobs: by layers that train, each on the most images.
        subsets: the smaller training sets among the largest.
        events: told of everything, each note once.
        stop: asked before each step.
    """

    recipe: Recipe
    grid: Grid
    arch: str
    whole: DataSplits
    data: dict[int | None, DataSplits]
    candidates: tuple[Candidate, ...]
    jobs: dict[tuple[str, ...], Job]
    subsets: tuple[Subset, ...]
    events: Events
    stop: Stop

    def stages(self) -> list[list[tuple[str, ...]]]:
        """Return which cuts have their features at the same time: all of them where they fit, else each by itself."""
        jobs = with_features(list(self.jobs.values()))
        if len(jobs) < 2 or place_together(jobs, self.subsets) is not None:
            return [list(self.jobs)]
        self.events.note(
            f"The features of {len(jobs)} cuts fit neither the disk budget nor memory together, so each cut's are "
            "computed when its turn comes."
        )
        return [[layers] for layers in self.jobs]

    def expected(self) -> str:
        """Return how many runs there are, and how long they will take, as one clause.

        It counts one pass over the frozen part, the longest, and all training images for every run.
        """
        seconds = 0.0
        for candidate in self.candidates:
            plan = self.jobs[candidate.recipe.train_layers].plan
            told = plan.estimate()["seconds"]
            seconds += told["train"] + told["eval"]
        features = max(job.plan.feature_seconds for job in self.jobs.values())
        most = "at most " if self.subsets else ""
        once = f", after {duration(features)} for the features" if features else ""
        runs = f"{len(self.candidates)} run{'s' * (len(self.candidates) != 1)}"
        return f"{runs}, expected to take {most}{duration(seconds)}{once}"


def look(recipe: Recipe, grid: Grid, events: Events, stop: Stop, words: str) -> Study:
    """Read the data, and prepare a job for each cut, which says what its runs will cost.

    Args:
        recipe: what all runs share.
        grid: what they do not.
        events: told of notes, progress and the plan of each cut.
        stop: asked whenever there is progress.
        words: what the StoppedError says.

    Raises:
        UsageError: no validation images, layers that are named in two ways, or what `prepare` refuses.
        WeightsError, DataError: as for `prepare`.
    """
    watching = watched(events, stop, words)
    candidates = grid.candidates(recipe)
    first = {candidate.recipe.train_layers: candidate.recipe for candidate in reversed(candidates)}
    bases = {layers: replace(first[layers], shots=grid.most) for layers in grid.train_layers}
    if recipe.data not in DATA_NAMES:
        require_data(recipe.data, labels=recipe.labels)  # before weights are looked for, as a run does
    bases = dict(zip(bases, with_own_scales(list(bases.values())), strict=True))
    found = [find_weights(base) for base in bases.values()]  # a wrong layer name in any of them is answered now
    whole = read_splits(replace(recipe, shots=None), found[0], watching)
    if whole.val is None:
        raise UsageError(
            f"A sweep chooses by validation images, and {whole.name} leaves none with --val-fraction "
            f"{recipe.val_fraction:g}; give --val-fraction 0.1, or data with a val/ folder."
        )
    data = {shots: whole if shots is None else with_shots(whole, shots, recipe.seed) for shots in grid.shots}
    jobs = {layers: prepare(base, watching, shared=Shared(data[grid.most])) for layers, base in bases.items()}
    _require_different(jobs)
    most = data[grid.most].train
    subsets = [
        Subset(data[shots].train, torch.from_numpy(places_of_shots(most, shots, recipe.seed)))
        for shots in grid.shots
        if shots is not None and shots != grid.most
    ]
    arch = next(iter(jobs.values())).prepared.arch
    own = tuple(
        replace(one, recipe=replace(one.recipe, lr_scales=bases[one.recipe.train_layers].lr_scales))
        for one in candidates
    )
    return Study(recipe, grid, arch.full_name, whole, data, own, jobs, tuple(subsets), events, stop)


def _require_different(jobs: dict[tuple[str, ...], Job]) -> None:
    """Refuse layers that are named in two ways.

    Raises:
        UsageError: with both names.
    """
    seen: dict[frozenset[str], str] = {}
    for layers, job in jobs.items():
        name = ",".join(layers)
        other = seen.setdefault(frozenset(job.prepared.selection.trained), name)
        if other != name:
            raise UsageError(
                f"--train-layers {other} and {name} are the same layers of {job.prepared.arch.name}; leave one "
                "of them out."
            )
