"""The training loop: epochs over features (or images), one optimiser step per batch, a checkpoint per epoch.

Legend: B images in a batch. Nothing here knows where batches come from: a source answers `take(rows, views)`, from the
feature cache or by computing on the fly, and the loss is the same.

Everything random in an epoch (order, views, dropout) is seeded by the run's seed and the epoch's number. So a resumed
run needs no generator state to go on to the same bits.

Several processes go through the same epochs and batches in step, each with its part of every batch (`sharing.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from finetune.budget import Budget, PacedSchedule
from finetune.inference import announced, autocast, cast, evaluation_batch, lies_on_device, score
from finetune.optim import make_optimizer, make_schedule, update_average, warmed_average
from finetune.order import Batch, epoch_batches, epoch_seed, on_both
from finetune.ranks import Ranks
from finetune.recipe import Recipe
from finetune.residency import send
from finetune.sharing import Part, Split, parts_of, shared_logits, shared_losses
from finetune.skipping import Skipping
from finetune.windows import Windows
from weights.errors import DivergedError


@dataclass
class Progress:
    """What has been done so far; all of it is in a checkpoint.

    Attributes:
        epoch: finished epochs.
        rows: metrics.jsonl's rows.
        best_epoch: the epoch with the lowest validation loss; 0 before the first.
        best_loss: its validation loss.
        seconds: training time, without evaluation.
        eval_seconds: evaluation time.
        prefix_seconds: time for features in processes that were stopped.
        total_seconds: time of the processes that were stopped, up to their last checkpoint.
        saving_seconds: most time that writing a checkpoint took.
        unseen: images that the last epoch did not come to, because the time of a budget was over.
        images_seen: images trained on in all epochs.
        out_of_time: whether the time of a budget ended training before its last step.
        estimate: what the plan expected when the run began, as in the summary.
    """

    epoch: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0
    eval_seconds: float = 0.0
    prefix_seconds: float = 0.0
    total_seconds: float = 0.0
    saving_seconds: float = 0.0
    unseen: int = 0
    images_seen: int = 0
    out_of_time: bool = False
    estimate: dict[str, Any] | None = None


class Trainer:
    """A suffix in training: module, optimiser, schedule, moving average.

    Args:
        suffix: what trains, on the device; `forward` is its compiled twin or itself.
        fresh: names of parameters that start fresh.
        recipe: with epochs and batch size resolved.
        images: training images.
        dtype: torch.bfloat16 trains under autocast with fp32 weights.
        device: where it trains.
        forward: what to call; the suffix when None.
        windows: what to train on of each feature map; all of it when None.
        budget: the time that training may take; None takes as long as its epochs take.
        class_weights: float32 (classes,), how much an image of each class counts in the loss; all the same when None.
        ranks: of this process among those that train together, `forward` being of all of them; alone when None.
    """

    def __init__(
        self,
        suffix: nn.Module,
        fresh: frozenset[str],
        recipe: Recipe,
        images: int,
        dtype: torch.dtype,
        device: torch.device,
        forward: Callable[..., torch.Tensor] | None = None,
        windows: Windows | None = None,
        budget: Budget | None = None,
        class_weights: torch.Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if recipe.epochs is None or recipe.batch_size is None:
            raise ValueError("resolve the recipe first: epochs and batch_size are None")
        self.suffix, self.recipe, self.dtype, self.device = suffix, recipe, dtype, device
        self.forward = suffix if forward is None else forward  # not `or`: a compiled module has no truth value
        self.epochs, self.images, self.windows, self.budget = recipe.epochs, images, windows, budget
        self.class_weights = None if class_weights is None else class_weights.to(device)
        self.ranks = ranks or Ranks()
        self.skipping = Skipping(images, self.epochs, recipe.skip_easy or 0.0)
        self.batches = [-(-self.skipping.kept(epoch) // recipe.batch_size) for epoch in range(self.epochs)]
        self.losses = torch.zeros(images if recipe.skip_easy else 0, device=device)
        self.norms = [module for module in suffix.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.optimizer = make_optimizer(suffix, fresh, recipe)
        self.schedule: LRScheduler | PacedSchedule = (
            PacedSchedule(self.optimizer, recipe, sum(self.batches), budget)
            if budget
            else make_schedule(self.optimizer, recipe, sum(self.batches))
        )
        self.average: AveragedModel | None = None
        if recipe.ema:
            self.average = AveragedModel(suffix, multi_avg_fn=warmed_average(recipe.ema), use_buffers=True)

    def step(
        self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one optimiser step.

        Args:
            inputs: the suffix's inputs, B rows each.
            labels: int64 (B,) on the device.
            weights: float32 (B,) on the device, what each image's loss is multiplied with; 1 when None.

        Returns:
            Each image's loss before `weights`, float32 (B,), and whether it was right, bool (B,); on the device.
        """
        self._freeze_norms()
        with autocast(self.device, self.dtype):
            logits = self.forward(*cast(inputs, self.dtype))
            losses = self._losses(logits.float(), labels)
        loss = (losses if weights is None else losses * weights).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            update_average(self.average, self.suffix)
        return losses.detach(), logits.argmax(1) == labels

    def _freeze_norms(self) -> None:
        """From the share of training that the recipe names on, let batch norms normalise as they will in evaluation."""
        if not self.recipe.freeze_norms or self.share < 1 - self.recipe.freeze_norms:
            return
        if moving := [norm for norm in self.norms if norm.training]:  # each epoch sets all modules to training again
            self.ranks.share_buffers(self.suffix)  # each process has moved them by its own images
            for norm in moving:
                norm.eval()

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each image (B,), with its class's weight.

        Their mean divides by the number of images, not by the weights' sum as PyTorch's own weighting does: an image
        then counts the same in whatever batch it comes.
        """
        losses = functional.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing, reduction="none")
        return losses if self.class_weights is None else losses * self.class_weights[labels]

    @property
    def evaluated(self) -> nn.Module:
        """The module whose predictions count: the moving average where there is one."""
        return self.suffix if self.average is None else self.average.module

    @property
    def share(self) -> float:
        """The share of training that is done, 0 to 1: of its steps, or of a budget's time where that leads."""
        if isinstance(self.schedule, PacedSchedule):
            return self.schedule.share
        return self.schedule.last_epoch / sum(self.batches)  # PyTorch's name for the number of steps

    @property
    def over(self) -> bool:
        """Whether the time of a budget is over, or all of its steps are taken."""
        return isinstance(self.schedule, PacedSchedule) and self.schedule.over

    def look_at_clock(self) -> bool:
        """Return `over` after a look at the clock, which evaluation and saving moved on as well."""
        if isinstance(self.schedule, PacedSchedule):
            self.schedule.look()
        return self.over

    def train_epoch(
        self, split: Split, epoch: int, report: Callable[[int, int], None], stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Train one epoch, or as much of it as a budget has time for.

        Args:
            split: the training split.
            epoch: its number, from 0.
            report: called with (batches done, batches in all).
            stop: asked before each step; True abandons the epoch.

        Returns:
            train_loss, train_accuracy (running means; images count as in training), lr (the last step's), images (how
            many were seen); None when stopped.

        Raises:
            DivergedError: the loss is no longer finite.
        """
        self.suffix.train()
        torch.manual_seed(epoch_seed(self.recipe.seed, epoch, self.ranks.rank))
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # Apple GPUs have no float64
        # The last one counts images as often as their losses count.
        losses, correct, counted = (torch.zeros((), device=self.device, dtype=exact) for _ in range(3))
        kept, weights = self._skipped(epoch)
        batches, before = self.batches[epoch], sum(self.batches[:epoch])
        labels, corners = send(split.labels, self.device), self._corners(epoch)  # once: no step waits for a GPU
        lr, seen = 0.0, 0
        parts = parts_of(self.ranks, self._planned(split, epoch, kept), split.own)
        own = [(part.rows, part.views) for part in parts]
        placed = zip(parts, announced(split.source, own), on_both(own, self.device), strict=True)
        for done, (part, here, (_, (rows, views))) in enumerate(placed):
            if stop():
                return None
            lr = self.optimizer.param_groups[0]["lr"]
            inputs = split.source.take(*((rows, views) if lies_on_device(split.source) else here))
            if self.windows is not None and corners is not None:
                inputs = self.windows.cut(inputs, epoch, corners[rows])
            counts = part.counts(weights, rows)
            loss, right = self.step(inputs, labels[rows], part.scaled(counts))
            if self.recipe.skip_easy:
                self.losses[rows[: part.count]] = loss[: part.count]
            if counts is not None:
                loss, right = loss * counts, right * counts
            losses += loss.to(exact).sum()
            correct += right.to(exact).sum()
            counted += len(rows) if counts is None else counts.to(exact).sum()
            seen += part.whole
            last = done + 1 == batches or self.over
            if self.device.type == "cpu" or done % 50 == 0 or last:
                require_finite(losses, before + done, lr)  # reading the loss waits for a GPU: not each step
            report(done + 1, batches)
            if last:
                break
        losses, correct, counted = self._agree(torch.stack([losses, correct, counted]), parts[: done + 1])
        return {
            "train_loss": float(losses / counted),
            "train_accuracy": 100 * float(correct / counted),
            "lr": lr,
            "images": seen,
        }

    def _planned(self, split: Split, epoch: int, kept: torch.Tensor | None) -> Iterable[Batch]:
        """Return the epoch's batches, of the images in bool (N,) `kept`, or of all."""
        return epoch_batches(self.images, self.batches[epoch], split.views, epoch, self.recipe, kept)

    def _skipped(self, epoch: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return `Skipping.choose`'s choice: which images to visit, on the CPU, and their weights, on the device."""
        kept, weights = self.skipping.choose(self.losses, epoch, self.recipe.seed) or (None, None)
        return kept, None if weights is None else send(weights, self.device)

    def _corners(self, epoch: int) -> torch.Tensor | None:
        """Return the corners of all images' windows, on the device; None for whole maps."""
        corners = self.windows.corners(self.images, epoch, self.recipe.seed) if self.windows else None
        return None if corners is None else send(corners, self.device)

    def _agree(self, sums: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
        """Let all processes end an epoch with the same running statistics and the same last losses.

        Args:
            sums: over the images of this process.
            parts: of the batches that were trained on.

        Returns:
            The sums over all images.
        """
        self.ranks.share_buffers(self.suffix)
        if self.average is not None:
            self.ranks.share_buffers(self.average.module)
        if self.recipe.skip_easy:
            self.losses = shared_losses(self.ranks, self.losses, torch.cat([part.trained for part in parts]))
        return self.ranks.sum(sums)

    def state(self) -> dict[str, Any]:
        """Return everything that `load_state` needs to go on from here, as tensors and plain values."""
        return {
            "suffix": dict(self.suffix.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if not callable(v)},
            "average": None if self.average is None else dict(self.average.state_dict()),
            "losses": self.losses,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.suffix.load_state_dict(state["suffix"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.losses.copy_(state["losses"])


def require_finite(loss: torch.Tensor, step: int, lr: float) -> None:
    """Stop a run whose loss is NaN or infinite.

    Raises:
        DivergedError: with the step (counted from 1), the learning rate and what to do.
    """
    if not math.isfinite(float(loss)):
        raise DivergedError(
            f"The training loss became {float(loss)} at step {step + 1} (learning rate {lr:.3g}); a finite loss was "
            "expected. Lower --lr or --head-lr-scale, or use --precision fp32, and run again."
        )


@dataclass(frozen=True)
class Listener:
    """What the loop tells while it runs.

    Attributes:
        batch: (epoch from 1, batches done, batches in all).
        epoch: a finished epoch's metrics row.
        save: progress after an epoch, to be written before anything else happens; True marks the best epoch yet.
        stop: asked before each step; True ends training at once, the epoch in progress is lost.
    """

    batch: Callable[[int, int, int], None]
    epoch: Callable[[dict[str, Any]], None]
    save: Callable[[Progress, bool], None]
    stop: Callable[[], bool]


def fit(trainer: Trainer, train: Split, val: Split | None, progress: Progress, listener: Listener) -> bool:
    """Train to the end of the recipe, or until patience or the time of a budget is over.

    Args:
        trainer: at the state that belongs to `progress`.
        train: the training split.
        val: the validation split, or None.
        progress: updated in place after every epoch.
        listener: told of everything.

    Returns:
        Whether training ended on its own; False when `listener.stop` ended it.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    patience = trainer.recipe.patience
    while progress.epoch < trainer.epochs and not trainer.look_at_clock():
        if patience and progress.epoch - progress.best_epoch >= patience and progress.best_epoch:
            break
        epoch = progress.epoch
        start = time.perf_counter()
        metrics = trainer.train_epoch(train, epoch, partial(listener.batch, epoch + 1), listener.stop)
        if metrics is None:
            return False
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        val_loss = val_accuracy = None
        if val is not None:
            everything = torch.arange(len(val.labels))
            batch = evaluation_batch(trainer.recipe)
            logits = shared_logits(
                trainer.ranks, trainer.evaluated, val, everything, trainer.device, trainer.dtype, batch=batch
            )
            val_loss, val_accuracy = score(logits, val.labels)
        eval_seconds = time.perf_counter() - start
        progress.epoch += 1
        progress.unseen = trainer.skipping.kept(epoch) - int(metrics["images"])
        progress.images_seen += int(metrics["images"])
        progress.seconds += seconds
        progress.eval_seconds += eval_seconds
        row = {
            "epoch": progress.epoch,
            "train_loss": metrics["train_loss"],
            "train_accuracy": metrics["train_accuracy"],
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "lr": metrics["lr"],
            "seconds": seconds,
            "eval_seconds": eval_seconds,
            "images_per_second": metrics["images"] / seconds,
        }
        progress.rows.append(row)
        is_best = val_loss is not None and val_loss < progress.best_loss
        if is_best and val_loss is not None:
            progress.best_loss, progress.best_epoch = val_loss, progress.epoch
        listener.save(progress, is_best)
        listener.epoch(row)
    progress.out_of_time = trainer.over and (progress.unseen > 0 or progress.epoch < trainer.epochs)
    return True
