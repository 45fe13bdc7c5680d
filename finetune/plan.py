"""What a run is going to do and cost, known before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from weights.errors import UsageError

if TYPE_CHECKING:
    from finetune.precision import Choice

DISK_RESERVE = 2 * 10**9  # bytes left free on the cache's disk, so that nothing else on it fails
CLOSING_RESERVE = 2.0  # times the expected time after training that --budget keeps for it: no clock steers that part
MEMORIES = {
    "device": "in the GPU's memory",
    "pinned": "in memory, sent to the GPU batch by batch",
    "ram": "in memory",
}
"""Places that are memory, as a plan words them."""

MEMORY_SHARE = 0.6  # of what is free: training itself, and the system's file cache, want the rest


@dataclass(frozen=True)
class Placement:
    """Where features will be.

    Attributes:
        where: "device" (a GPU's own memory), "pinned" (the computer's memory, from which a GPU fetches batches through
            pinned buffers), "ram", "disk" (memory-mapped), "off" (computed in every epoch) or "uncut" (there is no
            prefix).
        on_disk: whether they are also kept on disk for the next run.
        bytes: of all features.
        reason: one clause for people.
    """

    where: str
    on_disk: bool
    bytes: int
    reason: str

    @property
    def in_memory(self) -> bool:
        """Whether all features are in some memory."""
        return self.where in MEMORIES

    @property
    def ahead(self) -> bool:
        """Whether features are computed once, before training."""
        return self.in_memory or self.where == "disk"


@dataclass(frozen=True)
class Disk:
    """What a run takes on disk.

    Attributes:
        cache_dir: folder of the feature cache.
        held: bytes of this run's features that are there already.
        write: bytes of features still to be written there.
        free: bytes free on that disk now.
        model: bytes of the finished run directory, to a few kilobytes.
        checkpoint: bytes of the checkpoint that lies beside it until the run is finished.
    """

    cache_dir: Path
    held: int
    write: int
    free: int
    model: int
    checkpoint: int


@dataclass(frozen=True)
class Plan:
    """A run before it starts: `sentences` is what `finetune run` prints, `as_dict` all that `finetune plan` knows.

    Attributes:
        arch: full timm name.
        image_size: input side in pixels.
        data: name of the data set.
        classes: how many.
        counts: images in train, validation and test.
        device: name of the device.
        parameters: in all, how many train, and how many of the frozen ones lie behind the cut.
        multiply_adds: of one image's forward pass: before the cut (computed once), and behind it (in every step).
        trained_layers: what trains, by name.
        prefix: choice for the prefix; None when uncut.
        training: choice for what trains.
        placement: where features will be.
        window_share: share of each feature map that a training step sees, 0 to 1; the whole is 1.
        seen_share: mean share of the training images that an epoch sees, 0 to 1; all of them is 1.
        feature_views: image views whose features are still to be computed.
        disk: what the run takes on disk.
        epochs: how many.
        budget: seconds that the run may take; None is any time.
        images: where images lie that are looked at in every epoch ("device", "pinned" or "ram"), and their bytes; ""
            where features are computed ahead.
        processes: that share the images, their features, and every batch.
        batch_size: images per step.
        feature_seconds: expected time for features.
        epoch_seconds: expected time of one epoch of training.
        eval_seconds: expected time of all evaluation.
        test_feature_seconds: of feature_seconds, what comes after training: the test images.
        test_seconds: of eval_seconds, what comes after training: test, accuracy on training images, temperature.
        start_seconds: time that was spent until the plan was known: reading the data, timing steps, compiling.
    """

    arch: str
    image_size: int
    data: str
    classes: int
    counts: tuple[int, int, int]
    device: str
    parameters: tuple[int, int, int]
    multiply_adds: tuple[int, int]
    trained_layers: tuple[str, ...]
    prefix: Choice | None
    training: Choice
    placement: Placement
    window_share: float
    seen_share: float
    feature_views: int
    disk: Disk
    epochs: int
    batch_size: int
    feature_seconds: float
    epoch_seconds: float
    eval_seconds: float
    start_seconds: float = 0.0
    test_feature_seconds: float = 0.0
    test_seconds: float = 0.0
    budget: float | None = None
    images: tuple[str, int] = ("", 0)
    processes: int = 1

    @property
    def frozen_share(self) -> float:
        """The prefix's share of a forward pass's multiply-adds, 0 to 1."""
        return self.multiply_adds[0] / max(1, sum(self.multiply_adds))

    @property
    def total_seconds(self) -> float:
        """Expected time from the plan on, whatever the budget: features, training and evaluation."""
        return self.feature_seconds + self.epochs * self.epoch_seconds + self.eval_seconds

    def estimate(self) -> dict[str, Any]:
        """Return what is expected of the run in the words of its summary, to be set against the outcome.

        As there, `total` is the whole run's time: what was spent before the plan is in it.
        """
        epochs = self.epochs_in_budget
        train = epochs * self.epoch_seconds
        evaluation = self.test_seconds + epochs * self.val_seconds
        seconds = {
            "prefix": self.feature_seconds,
            "train": train,
            "eval": evaluation,
            "total": self.start_seconds + self.feature_seconds + train + evaluation,
        }
        return {"epochs": round(epochs, 2), "seconds": {name: round(value, 3) for name, value in seconds.items()}}

    @property
    def val_seconds(self) -> float:
        """Expected time of the evaluation after an epoch."""
        return (self.eval_seconds - self.test_seconds) / self.epochs

    @property
    def reserved_seconds(self) -> float:
        """What a budget keeps for the time after training, in which the last epoch's evaluation falls as well."""
        return CLOSING_RESERVE * (self.test_feature_seconds + self.val_seconds + self.test_seconds)

    @property
    def epochs_in_budget(self) -> float:
        """How many of the planned epochs are expected to fit into the budget; 0 when it leaves no time to train."""
        if self.budget is None:
            return float(self.epochs)
        return min(float(self.epochs), max(0.0, self.budget - self._around()) / (self.epoch_seconds + self.val_seconds))

    def require_time(self, text: str) -> None:
        """Refuse a budget that leaves no time to train.

        Args:
            text: the budget as the user wrote it.

        Raises:
            UsageError: features, test and evaluation take all of it.
        """
        if not self.epochs_in_budget:
            raise UsageError(
                f"--budget {text} leaves no time to train: start, features, evaluation and test need "
                f"{duration(self._around())}; give more time, or fewer images with --limit."
            )

    def _around(self) -> float:
        """Return the seconds that a budget needs before training and keeps for the time after it."""
        return self.start_seconds + self.feature_seconds - self.test_feature_seconds + self.reserved_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        total, trained, _ = self.parameters
        train, val, test = self.counts
        return {
            "arch": self.arch,
            "image_size": self.image_size,
            "data": {"name": self.data, "classes": self.classes, "train": train, "val": val, "test": test},
            "trained_layers": [name or "all" for name in self.trained_layers],
            "parameters": {"total": total, "trained": trained, "frozen": total - trained},
            "multiply_adds": {"once": self.multiply_adds[0], "every_step": self.multiply_adds[1]},
            "device": self.device,
            "training": _told(self.training),
            "prefix": None if self.prefix is None else _told(self.prefix),
            "features": {
                "where": self.placement.where,
                "on_disk": self.placement.on_disk,
                "bytes": self.placement.bytes,
                "reason": self.placement.reason,
                "to_compute": self.feature_views,
                "cache_dir": str(self.disk.cache_dir),
                "held_bytes": self.disk.held,
            },
            "images": {"where": self.images[0], "bytes": self.images[1]} if self.images[0] else None,
            "disk": {
                "features": self.disk.write,
                "free": self.disk.free,
                "run": self.disk.model,
                "checkpoint": self.disk.checkpoint,
            },
            "batch_size": self.batch_size,
            "processes": self.processes,
            "budget": self.budget,
            "epochs": self.epochs,
            "start_seconds": round(self.start_seconds, 3),
            "estimate": self.estimate(),
        }

    def sentences(self) -> list[str]:
        """Return the plan as a few lines for people."""
        total, trained, _ = self.parameters
        train, val, test = self.counts
        lines = [
            f"{self.arch} on {self.data}: {train:,} train, {val:,} validation, {test:,} test images",
            f"trains {', '.join(name or 'all' for name in self.trained_layers)}: {trained:,} of {total:,} parameters",
            f"device {self.device}; training in {self.training} ({self.training.reason})",
        ]
        if self.prefix:
            lines.append(
                f"frozen part, {100 * self.frozen_share:.0f} % of a forward pass, in {self.prefix} "
                f"({self.prefix.reason})"
            )
        lines.append(f"features: {self.placement.reason}")
        if self.images[0] in ("device", "pinned"):
            lines.append(f"images: {size(self.images[1])} {MEMORIES[self.images[0]]}")
        if self.processes > 1:
            lines.append(
                f"{self.processes} processes, each with its part of the images, and of every batch of {self.batch_size}"
            )
        if self.window_share < 1:
            lines.append(f"trains on random windows of the feature maps, {100 * self.window_share:.0f} % of their area")
        if self.seen_share < 1:
            lines.append(f"leaves easy images out: an epoch trains on {100 * self.seen_share:.0f} % of them on average")
        rows = f"{duration(self.feature_seconds)} for {self.feature_views:,} feature rows, "
        if not self.feature_views:
            rows = "no features to compute, " if self.placement.ahead else ""
        epochs = f"{self.epochs} epoch{'' if self.epochs == 1 else 's'} of {duration(self.epoch_seconds)}"
        if self.budget is not None and self.epochs_in_budget < self.epochs:
            epochs = f"about {self.epochs_in_budget:.1f} of {epochs}"
            lines.append(f"expected: {rows}{epochs}, ended by --budget after {duration(self.budget)}")
        else:
            within = "" if self.budget is None else f", within --budget, {duration(self.budget)}"
            lines.append(f"expected: {rows}{epochs}, {duration(self.total_seconds)} in all{within}")
        return lines


def _told(choice: Choice) -> dict[str, Any]:
    return {
        "precision": choice.precision,
        "compiled": choice.compiled,
        "images_per_second": round(choice.rate, 1),
        "reason": choice.reason,
    }


def duration(seconds: float) -> str:
    """Return a length of time for people: "8 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 or seconds == 0 else "under 1 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Return a number of bytes for people: "11.0 GB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def place(
    needed: int,
    *,
    mode: str,
    cache_dir: Path,
    limit: int,
    memory: int,
    held: int,
    fresh_each_epoch: bool,
    device: int | None = None,
    quick: bool = False,
) -> Placement:
    """Decide where features go.

    Args:
        needed: bytes of all features.
        mode: auto, ram, disk or off.
        cache_dir: folder of the cache.
        limit: most bytes the cache may take.
        memory: most bytes of the computer's memory for features.
        held: bytes of these features that are on disk already.
        fresh_each_epoch: every epoch uses views of its own that are not on disk, so caching saves nothing in this run.
        device: most bytes of a GPU's own memory for features; None where there is none.
        quick: features are computed faster than a disk gives them back.

    Raises:
        UsageError: the asked-for place is too small.
    """
    if mode == "off":
        return Placement("off", False, 0, "computed anew in every epoch, as asked")
    if mode == "auto" and fresh_each_epoch:
        return Placement("off", False, 0, "every epoch has views of its own, so they are computed as it goes")
    where = memory_for(needed, memory, device)
    text = f"{size(needed)} {MEMORIES.get(where, '')}"
    if mode == "ram":
        if not where:
            raise UsageError(
                f"--cache ram needs {size(needed)} for features and the memory budget is {size(memory)}; raise "
                "--memory-budget, lower --limit or --views, or use --cache disk."
            )
        return Placement(where, False, needed, f"{text}, nothing on disk")
    if mode == "auto" and where and quick and held < needed:
        return Placement(where, False, needed, f"{text}, not kept: a disk is slower than computing them again")
    free = free_disk(cache_dir) - DISK_RESERVE
    if needed <= limit and needed - held <= free:
        if where and mode == "auto":
            return Placement(where, True, needed, f"{text}, kept on disk for the next run")
        return Placement("disk", True, needed, f"{size(needed)} on disk, read as needed (memory budget {size(memory)})")
    if mode == "disk":
        raise UsageError(
            f"--cache disk needs {size(needed)} for features; --cache-limit is {size(limit)} and "
            f"{size(max(free, 0))} can be used on that disk: raise the limit, point --cache-dir elsewhere, or use "
            "--cache off."
        )
    if where:
        return Placement(where, False, needed, f"{text}; the disk budget is too small to keep them")
    return Placement(
        "off", False, 0, f"{size(needed)} fit neither disk nor memory, so they are computed in every epoch"
    )


def memory_for(needed: int, memory: int, device: int | None) -> str:
    """Return the memory in which so many bytes fit, a GPU's own before the computer's; "" where they fit in none.

    Args:
        needed: bytes.
        memory: most bytes of the computer's memory.
        device: most bytes of a GPU's own memory; None where there is none.
    """
    if device is not None and needed <= device:
        return "device"
    if needed > memory:
        return ""
    return "ram" if device is None else "pinned"


def free_disk(path: Path) -> int:
    """Return the bytes free on the disk of a folder that need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return int(psutil.disk_usage(str(path)).free)
