"""`finetune eval`: what a trained model gets right on a data set.

On its run's own data it gives the run's own test figures, bit for bit on the same machine and number of threads: the
same cut, the same folded prefix in fp32, the same batches, and so the same code.

Legend: N images, C classes of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.augment import Views
from finetune.cut import cut_model, sources_dropped
from finetune.device import pick_device, prefix_batch, settle
from finetune.eval_data import SPLITS, choose_images, repeated_images
from finetune.events import Events
from finetune.images import ImageSet
from finetune.inference import evaluation_batch, lies_on_device, predict, score
from finetune.layers import freeze, select_layers
from finetune.metrics import (
    calibrate,
    confusion_matrix,
    is_uneven,
    mean_recall,
    precisions,
    recalls,
    top_5_accuracy,
)
from finetune.models import head_names
from finetune.precision import DTYPES, Choice, frozen_part_named
from finetune.prefix import prepare_prefix
from finetune.recipe import Recipe
from finetune.sources import Live
from finetune.trained import Trained
from weights.errors import UsageError

BATCH_ADVICE = "give a smaller --batch-size, or --device cpu"
FROZEN_ADVICE = "end other programs that use it, or give --device cpu"


@dataclass(frozen=True)
class Evaluation:
    """A model's predictions on a split, and what follows from them.

    Attributes:
        checkpoint: the model's folder.
        arch: its network.
        data: name of the data set.
        split: train, val or test.
        images: what was looked at, with the model's classes.
        logits: float32 (N, C).
        temperature: the model's own.
        reason: where the temperature comes from.
        repeated: bool (N,), True where the training images hold the same pixels; None when that is not known.
        uneven_training: whether the run that made the model called its classes uneven.
    """

    checkpoint: str
    arch: str
    data: str
    split: str
    images: ImageSet
    logits: torch.Tensor
    temperature: float
    reason: str
    repeated: torch.Tensor | None
    uneven_training: bool = False

    @property
    def matrix(self) -> torch.Tensor:
        """The confusion matrix, int64 (C, C)."""
        return confusion_matrix(self.logits.argmax(1), self.images.labels, self.logits.shape[1])

    def as_dict(self) -> dict[str, Any]:
        """Return every figure as plain values, for JSON: shares in percent, loss in nats."""
        labels, matrix = self.images.labels, self.matrix
        loss, accuracy = score(self.logits, labels)
        counts, recall, precision = matrix.sum(1).tolist(), recalls(matrix).tolist(), precisions(matrix).tolist()
        return {
            "checkpoint": self.checkpoint,
            "arch": self.arch,
            "data": self.data,
            "split": self.split,
            "images": len(labels),
            "accuracy": accuracy,
            "top5_accuracy": top_5_accuracy(self.logits, labels),
            "loss": loss,
            "mean_recall": mean_recall(matrix),
            "uneven": self.uneven_training or is_uneven(counts),
            "calibration": {
                "temperature": self.temperature,
                "reason": self.reason,
                "error": calibrate(self.logits, labels).error,
                "error_scaled": calibrate(self.logits, labels, self.temperature).error,
            },
            "repeated": self._repeated(),
            "classes": [
                {
                    "name": name,
                    "images": counts[index],
                    "accuracy": recall[index] if counts[index] else None,
                    "precision": precision[index] if int(matrix[:, index].sum()) else None,
                }
                for index, name in enumerate(self.images.classes)
            ],
            "confusion": matrix.tolist(),
        }

    def _repeated(self) -> dict[str, Any] | None:
        """Return how many images are in train as well, and the accuracy on the others; None when that is not known."""
        if self.repeated is None:
            return None
        new = ~self.repeated
        without = score(self.logits[new], self.images.labels[new])[1] if bool(new.any()) else None
        return {"images": int(self.repeated.sum()), "accuracy_without": without}


def evaluate(
    trained: Trained,
    data: str | None = None,
    *,
    data_dir: Path | None = None,
    labels: str | None = None,
    split: str = "test",
    precision: str = "fp32",
    device: str = "auto",
    batch_size: int | None = None,
    events: Events | None = None,
) -> Evaluation:
    """Evaluate a trained model.

    Args:
        trained: the model.
        data: what `--data` takes; None is the data of the run that made the model.
        data_dir: where named data sets are looked up first.
        labels: fine or coarse, of CIFAR-100; None is what the model was trained with.
        split: train, val or test, as the run would have split the data.
        precision: fp32, which the figures of a run are in, or bf16.
        device: as for a run.
        batch_size: images at a time; None is what the run took.
        events: told of notes and progress; silent when None.

    Raises:
        UsageError: an option that cannot be right.
        DataError: data that are missing, damaged, without the split, or of other classes.
    """
    events = events or Events()
    if split not in SPLITS:
        raise UsageError(f"--split is '{split}'; it can be train, val or test.")
    if precision not in DTYPES:
        raise UsageError(f"--precision is '{precision}'; finetune eval takes fp32 or bf16.")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}; give a whole number of at least 1.")
    place = pick_device(device)
    chosen = choose_images(trained, data, data_dir=data_dir, labels=labels, split=split, events=events)
    for note in chosen.notes:
        events.note(note)
    if trained.crop_pct != 1:
        events.note(
            f"This model's config.json crops images to their middle {100 * trained.crop_pct:.0f} %; here it sees all."
        )
    batch = batch_size or evaluation_batch(trained.recipe or Recipe())
    logits = logits_of(trained, chosen.images, place, DTYPES[precision], batch, events)
    return Evaluation(
        checkpoint=str(trained.folder),
        arch=trained.arch.name,
        data=chosen.name,
        split=split,
        images=chosen.images,
        logits=logits,
        temperature=trained.temperature.value,
        reason=trained.temperature.reason,
        repeated=None if chosen.learned is None else repeated_images(chosen.images, chosen.learned),
        uneven_training=bool(trained.said_of_data().get("uneven")),
    )


@sources_dropped()
def logits_of(
    trained: Trained,
    images: ImageSet,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    events: Events,
    advice: str | None = None,
) -> torch.Tensor:
    """Return logits float32 (N, C) the way a run computes those of its test split.

    Args:
        trained: the model.
        images: the split.
        device: where it runs.
        dtype: of the frozen part, and torch.bfloat16 for the rest under autocast.
        batch: images at a time; a frozen part takes as many as it always does.
        events: told of progress.
        advice: what to do where memory is too small; None names options of `finetune eval`.

    Raises:
        UsageError: the device's memory is too small.
    """
    model, prefix, module = trained.model, None, trained.model
    if trained.trained_layers is not None:
        sample = images.images[: prefix_batch(device)]
        wanted = tuple(name or "all" for name in trained.trained_layers)
        selection = select_layers(model, wanted, head_names(trained.arch))
        freeze(model, selection)
        cut = cut_model(model, selection, trained.preprocessing(sample[torch.arange(2) % len(sample)]))
        module = cut.suffix
        if cut.prefix is not None:
            with frozen_part_named(prefix_batch(device), device, advice or FROZEN_ADVICE):
                prefix = prepare_prefix(cut, trained.preprocessing, sample, device, _asked(dtype))
    live = Live(images, Views("none", 1), trained.preprocessing, prefix, device, dtype)
    source = _Counted(live, len(images), events.progress, advice or FROZEN_ADVICE)
    try:
        return predict(settle(module, device), source, torch.arange(len(images)), device, dtype, batch=batch)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"Batches of {batch} images need more memory than {device} has; {advice or BATCH_ADVICE}."
        ) from error


def _asked(dtype: torch.dtype) -> Callable[[Any], Choice]:
    """Return what chooses the prefix's number format: the one that was asked for, eager."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    return lambda build: Choice(name, False, 0.0, 0.0, "asked for")


class _Counted:
    """A source that tells how far it has come, and when its frozen part does not fit, whatever the batch."""

    def __init__(self, source: Live, total: int, progress: Callable[[str, int, int], None], advice: str) -> None:
        self.source, self.total, self.progress, self.done, self.advice = source, total, progress, 0, advice
        self.on_device = lies_on_device(source)

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fixed = None if self.source.prefix is None else self.source.prefix.prefix.batch
        smaller_helps = fixed is not None and len(rows) > fixed
        with frozen_part_named(None if smaller_helps else fixed, self.source.device, self.advice):
            batch = self.source.take(rows, views)
        self.done += len(rows)
        self.progress("evaluating", self.done, self.total)
        return batch

    def expect(self, *batches: torch.Tensor) -> None:
        self.source.expect(*batches)
