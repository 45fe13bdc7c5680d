"""The features of several cuts of one network, computed together.

One pass over the images fills the cache entries of all cuts that lack them. Keys and values are those of a run that is
alone: it finds what is written here, and here is found what it wrote. Where features stay in memory, they are handed on
under the same keys.

Legend: N images of a split, V views; a *part* is one cut's prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from finetune.augment import Views
from finetune.cache import Entry, key_of, make_room, room_on_disk
from finetune.compute import cache_folder, memory_budget, quicker_than_disk
from finetune.device import PREFIX_BATCH
from finetune.events import Events
from finetune.features import Prefix, Progressing
from finetune.images import ImageSet
from finetune.job import Job
from finetune.merge import join
from finetune.one_pass import InMemory, OnDisk, run_pass
from finetune.placement import Placement, place
from finetune.sources import FeatureBuilder
from finetune.units import parse_bytes
from weights.errors import UsageError

Held = dict[str, list[torch.Tensor]]
"""Stored features in memory, one view of one split under each cache key."""

PLAIN = Views("none", 1)


@dataclass(frozen=True)
class Subset:
    """Fewer training images, whose features are rows of those of all.

    Attributes:
        images: the images.
        rows: int64 (M,), their places among all training images.
    """

    images: ImageSet
    rows: torch.Tensor


def with_features(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose frozen part is computed ahead, one of each kind: the cuts of some layers are the same."""
    found: dict[str, Job] = {}
    for job in jobs:
        if job.computing.prefix is not None and job.computing.placement.ahead:
            found.setdefault(key_of(job.computing.prefix.identity), job)
    return list(found.values())


def place_together(jobs: Sequence[Job], subsets: Sequence[Subset]) -> Placement | None:
    """Decide where the features of several cuts go when all are there at the same time.

    Args:
        jobs: of `with_features`, at least one; their settings differ in the layers that train.
        subsets: further training sets.

    Returns:
        The place; None where they do not fit together, whatever each of them does alone.
    """
    recipe = jobs[0].recipe
    needed = held = 0
    for job in jobs:
        builder = job.computing.builder(recipe, Events())
        size = sum(row.bytes for row in builder.prepared.prefix.rows)
        splits = [(job.data.train, job.views), *((subset.images, job.views) for subset in subsets)]
        splits += [(job.data.val, PLAIN)] if job.data.val is not None else []
        rows = sum(len(split) * views.count for split, views in splits)
        needed += rows * size
        if recipe.cache in ("auto", "disk"):
            held += (rows - sum(builder.missing(split, views) for split, views in splits)) * size
    left = [job.computing.left for job in jobs if job.computing.left is not None]
    try:
        placement = place(
            needed,
            mode=recipe.cache,
            free=room_on_disk(cache_folder(recipe)),
            limit=parse_bytes(recipe.cache_limit, "--cache-limit"),
            memory=min([memory_budget(recipe), *left]),
            held=held,
            fresh_each_epoch=False,
            quick=jobs[0].device.type == "cuda" and all(quicker_than_disk(job.computing.prefix) for job in jobs),
        )
    except UsageError:
        return None
    return placement if placement.ahead else None


def compute_together(
    jobs: Sequence[Job], subsets: Sequence[Subset], placement: Placement, events: Events, stop: Callable[[], None]
) -> Held:
    """Compute the features of training and validation images for several cuts.

    Args:
        jobs: of `with_features`; same data, same views.
        subsets: further training sets.
        placement: where features go, of `place_together`.
        events: told of progress.
        stop: asked between chunks; may raise to end the work, what is finished is kept on disk.

    Returns:
        What is in memory now; nothing where the features are on disk.

    Raises:
        RunError: the cache cannot be written.
    """
    held: Held = {}
    data, views = jobs[0].data, jobs[0].views
    for group in _groups(jobs, placement, events, stop):
        held |= group.compute(data.train, views, "train")
        if data.val is not None:
            held |= group.compute(data.val, PLAIN, "validation")
        if views.draws is None:  # others are drawn for each set by itself
            for subset in subsets:
                held |= group.copy(data.train, subset, views, held)
    return held


def _groups(jobs: Sequence[Job], placement: Placement, events: Events, stop: Callable[[], None]) -> list[_Group]:
    """Put together what can be one module: the same number format, all compiled or none."""
    groups: dict[str, list[FeatureBuilder]] = {}
    for job in jobs:
        told = {"arch": job.prepared.arch.full_name, "data": job.data.name}
        builder = replace(job.computing.builder(job.recipe, events), stop=stop, told=told)
        own = placement if not placement.on_disk else job.computing.placement  # on disk: as a run alone reads them
        groups.setdefault(str(builder.prepared.choice), []).append(replace(builder, placement=own))
    sample = jobs[0].data.train.images[:PREFIX_BATCH]
    keep = [
        entry.folder.name
        for builders in groups.values()
        for builder in builders
        for split, views in ((jobs[0].data.train, jobs[0].views), (jobs[0].data.val, PLAIN))
        if split is not None
        for entry, _ in builder.entries(split, views)
    ]
    return [_Group(builders, sample, placement.on_disk, keep) for builders in groups.values()]


def _named(builder: FeatureBuilder, data: ImageSet, views: Views, name: str) -> list[tuple[Entry, dict[str, object]]]:
    """Return a split's entries with what `finetune cache list` shows of them, as those of a run have it."""
    return [(entry, {**about, **builder.told, "split": name}) for entry, about in builder.entries(data, views)]


@dataclass
class _Group:
    """Parts that are computed in one pass.

    Attributes:
        builders: of each part.
        sample: uint8 images, to try the merged prefix with.
        on_disk: whether the features go to the cache.
        keep: keys that do not make room for others.
    """

    builders: list[FeatureBuilder]
    sample: torch.Tensor
    on_disk: bool
    keep: list[str]
    _joints: dict[tuple[int, ...], Prefix | None] = field(default_factory=dict)

    def joint(self, places: tuple[int, ...]) -> Prefix | None:
        """Return one prefix for some of the parts; None where these are fewer than two, or have to run apart."""
        if places not in self._joints:
            parts = [self.builders[place].prepared for place in places]
            self._joints[places] = join(parts, self.sample) if len(parts) > 1 else None
            if len(parts) > 1 and self._joints[places] is None:
                self.builders[0].events.note(
                    "In one pass these cuts would give other values, so each has a pass of its own."
                )
        return self._joints[places]

    def compute(self, data: ImageSet, views: Views, name: str) -> Held:
        """Compute a split for all parts; what cannot be computed together each part's own builder computes.

        Nothing is left to the runs: the first of them would pay for it out of its --budget.
        """
        entries = [_named(builder, data, views, name) for builder in self.builders]
        cuts = f"features of {name}" + (f" for {len(entries)} cuts" if len(entries) > 1 else "")
        first = self.builders[0]
        report = Progressing(first.events.progress, len(data) * views.count, cuts, first.stop)
        if self.on_disk:
            for view in range(views.count if len(self.builders) > 1 else 0):
                self._fill([made[view] for made in entries], data, views, view, report)
            for builder in self.builders:
                if builder.missing(data, views):
                    written = Placement("disk", True, 0, "")  # the runs read them
                    replace(builder, placement=written, _keys=[*self.keep]).features(data, views, name)
            return {}
        joint = self.joint(tuple(range(len(self.builders))))
        if joint is None:
            return {
                entry.folder.name: list(tensors)
                for builder, made in zip(self.builders, entries, strict=True)
                for (entry, _), tensors in zip(made, builder.features(data, views, name).tensors, strict=True)
            }
        held: Held = {}
        for view in range(views.count):
            targets = [InMemory(builder.prepared.prefix, len(data)) for builder in self.builders]
            run_pass(joint, targets, [len(target.tensors) for target in targets], data, views, view, report)
            held |= {made[view][0].folder.name: it.tensors for made, it in zip(entries, targets, strict=True)}
        return held

    def _fill(
        self,
        entries: Sequence[tuple[Entry, dict[str, Any]]],
        data: ImageSet,
        views: Views,
        view: int,
        report: Callable[[int], None],
    ) -> None:
        """Write one view to the entries that lack rows; one such entry alone is left to its own builder."""
        with ExitStack() as stack:
            for entry, _ in sorted(entries, key=lambda pair: pair[0].folder.name):  # one order for all processes
                stack.enter_context(self.builders[0].locked(entry))
                entry.load_journal()
            absent = tuple(place for place, (entry, _) in enumerate(entries) if entry.missing_rows())
            joint = self.joint(absent)
            if joint is None:
                return
            chosen = [entries[place] for place in absent]
            self._make_room([entry for entry, _ in chosen])
            for entry, about in chosen:
                entry.open(about)
            targets = [OnDisk(entry) for entry, _ in chosen]
            run_pass(joint, targets, [len(entry.shapes) for entry, _ in chosen], data, views, view, report)
            for entry, _ in chosen:
                entry.finish()

    def _make_room(self, entries: Sequence[Entry]) -> None:
        needed = sum(entry.missing_rows() * sum(entry.row_bytes) for entry in entries)
        first = self.builders[0]
        make_room(first.cache_dir, needed, first.limit, self.keep)

    def copy(self, data: ImageSet, subset: Subset, views: Views, held: Held) -> Held:
        """Give a subset its features: rows of those of all training images."""
        copies: Held = {}
        for builder in self.builders:
            whole, part = builder.entries(data, views), _named(builder, subset.images, views, "train")
            if not self.on_disk:
                for (entry, _), (small, _) in zip(whole, part, strict=True):
                    copies[small.folder.name] = [tensor[subset.rows] for tensor in held[entry.folder.name]]
            elif builder.missing(subset.images, views):
                tensors = builder.features(data, views, "train").tensors
                for source, (small, about) in zip(tensors, part, strict=True):
                    self._write_rows(builder, small, about, source, subset.rows)
        return copies

    def _write_rows(
        self,
        builder: FeatureBuilder,
        entry: Entry,
        about: dict[str, Any],
        source: Sequence[torch.Tensor],
        rows: torch.Tensor,
    ) -> None:
        self.keep.append(entry.folder.name)
        with builder.locked(entry):
            entry.load_journal()
            self._make_room([entry])
            entry.open(about)
            for number in range(-(-entry.rows // entry.chunk_rows)):
                if not entry.holds(number):
                    entry.write_chunk(number, [tensor[rows[entry.rows_of(number)]] for tensor in source])
            entry.finish()
