"""What a run is going to do and cost, known before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.placement import MEMORIES, Placement, size
from weights.errors import UsageError

if TYPE_CHECKING:
    from finetune.precision import Choice

CLOSING_RESERVE = 2.0  # times the expected time after training that --budget keeps for it: no clock steers that part


@dataclass(frozen=True)
class Streaming:
    """Images that are decoded as they are wanted.

    Attributes:
        bytes: of all images of the data set, decoded.
        memory: bytes that they may take; what is held at a time stays below.
        rate: images decoded a second, when all were decoded to be told apart.
    """

    bytes: int
    memory: int
    rate: float


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
        streaming: of images that are decoded as they are wanted; None where they are in memory.
        done: epochs that a resumed run has behind it.
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
    streaming: Streaming | None = None
    done: int = 0

    @property
    def frozen_share(self) -> float:
        """The prefix's share of a forward pass's multiply-adds, 0 to 1."""
        return self.multiply_adds[0] / max(1, sum(self.multiply_adds))

    @property
    def total_seconds(self) -> float:
        """Expected time from the plan on, whatever the budget: features, training and evaluation."""
        left = (self.epochs - self.done) * (self.epoch_seconds + self.val_seconds)
        return self.feature_seconds + left + self.test_seconds

    def streamed(self) -> str:
        """Return what is to be said of streamed images, as a clause; nothing where they are in memory."""
        if self.streaming is None:
            return ""
        often = "once for each feature row" if self.placement.ahead else "in every epoch"
        return (
            f"decoded as they are wanted, {often}: in memory they would take {size(self.streaming.bytes)}, twice while "
            f"they are split, and --image-memory is {size(self.streaming.memory)}"
        )

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
            "images": {
                "streamed": self.streaming is not None,
                **(asdict(self.streaming) if self.streaming else {}),
                **({"where": self.images[0], "bytes": self.images[1]} if self.images[0] else {}),
            },
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
        if self.streaming is not None:
            lines.append(f"images: {self.streamed()}")
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
        if self.budget is not None and self.epochs_in_budget < self.epochs and not self.done:
            epochs = f"about {self.epochs_in_budget:.1f} of {epochs}"
            lines.append(f"expected: {rows}{epochs}, ended by --budget after {duration(self.budget)}")
        else:
            epochs = f"{self.epochs - self.done} left of {epochs}" if self.done else epochs
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
