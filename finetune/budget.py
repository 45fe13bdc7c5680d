"""A run that has to end in time: `--budget`.

The schedule is walked by the larger of two shares: that of the recipe's steps, and that of the time for training. On a
machine that is fast enough the steps lead, and the run is the one without a budget. On one that is not, the clock
leads: training ends in time, in the middle of an epoch if need be, and the learning rate has come down to its end by
then. No estimate of the machine's speed is needed for that, so none can be wrong (docs/decisions/0008). What comes
after training no clock steers: the time kept for it is the plan's, and more once epochs show that to be too little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.optim import make_schedule
from finetune.plan import CLOSING_RESERVE, Plan, duration
from finetune.recipe import Recipe
from weights.errors import TrainingError

POINTS = 10_000  # at most, of the sampled curve; it is a straight line between two of them
STEADY = 1.0  # seconds added to what was expected and to what it took: the ratio of two instants says nothing
PASSES = 4  # over a split from the last epoch on: validation, training images, validation again, test
SAVES = 2  # files of a checkpoint's size from the last epoch on: the checkpoint and the model


@dataclass
class Budget:
    """The time for training, and how much of it is over.

    Attributes:
        until: second of the run at which training has to end; it may come forward after an epoch.
        spent: returns the seconds of the run so far, those of processes that were stopped included.
        begun: second of the run at which its first step was done, which takes longer than others; None before.
        agree: returns what all processes of the run take a share for, the first one's.
    """

    until: float
    spent: Callable[[], float]
    begun: float | None = None
    agree: Callable[[float], float] = float

    def end_by(self, second: float) -> None:
        """Bring the end of training forward; it is never put off, because the schedule does not go back."""
        self.until = min(self.until, second)

    def share(self) -> float:
        """Return the share of the time for training that is over, 0 to 1; the first call begins it."""
        now = self.spent()
        if self.begun is None:
            self.begun = now
        return self.agree(1.0 if now >= self.until else (now - self.begun) / (self.until - self.begun))

    def require_time(self, folder: Path) -> None:
        """Stop a run that has no time left to train when its training begins.

        Args:
            folder: the run directory, for the message.

        Raises:
            TrainingError: the time is over.
        """
        now = self.spent()
        if now >= self.until:
            raise TrainingError(
                f"The time of --budget was over before training began, after {duration(now)}. Features on disk are "
                f"kept: go on with finetune run --resume {folder}, whose time begins anew, or start a run with more."
            )


def closing_seconds(plan: Plan, rows: Sequence[Mapping[str, Any]], saving: float) -> float:
    """Return what a budget keeps for the time after training, by the plan and by what the epochs so far have taken.

    Where training or evaluation took longer than planned, the rest is expected to take as many times longer. What is
    not explained by that is a fixed cost of every pass over a split.

    Args:
        plan: of the run.
        rows: of metrics.jsonl, so far.
        saving: most seconds that a checkpoint took to write.
    """
    took = sum(float(row["eval_seconds"]) for row in rows)
    trained = sum(float(row["seconds"]) for row in rows[1:])  # the first epoch may have compiled
    slower = max(
        1.0,
        (took + STEADY) / (len(rows) * plan.val_seconds + STEADY),
        (trained + STEADY) / (len(rows[1:]) * plan.epoch_seconds + STEADY),
    )
    fixed = max(0.0, took / len(rows) - slower * plan.val_seconds) if rows else 0.0
    return slower * plan.reserved_seconds + CLOSING_RESERVE * (PASSES * fixed + SAVES * saving)


def keep_time(budget: Budget | None, plan: Plan, rows: Sequence[Mapping[str, Any]], saving: float) -> None:
    """Let training end early enough for what comes after it, as `closing_seconds` has it; without a budget nothing."""
    if budget is not None and plan.budget is not None:
        budget.end_by(plan.budget - closing_seconds(plan, rows, saving))


class PacedSchedule:
    """A learning-rate schedule that follows steps or time, whichever is further along.

    The curve is PyTorch's own, as `make_schedule` has it. What has been decided so far, how far along it is, is in its
    state, so a resumed run goes on from there.

    Args:
        optimizer: its groups' learning rates are the peaks.
        recipe: schedule and warmup are read.
        steps: steps in the whole run if there is time for all of them.
        budget: the time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, budget: Budget) -> None:
        self.optimizer, self.steps, self.budget = optimizer, steps, budget
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.curve = sample_curve(recipe, min(steps, POINTS))
        self.done, self.share = 0, 0.0
        self._set_rates()

    @property
    def over(self) -> bool:
        """Whether the end has been reached: no step is to follow."""
        return self.share >= 1

    def step(self) -> None:
        """Move on after an optimiser step."""
        self.done += 1
        self.share = max(self.share, self.done / self.steps, self.budget.share())
        self._set_rates()

    def look(self) -> None:
        """Let the share follow the time that passed without a step: an evaluation, a checkpoint."""
        if self.budget.begun is not None:
            self.share = max(self.share, self.budget.share())
            self._set_rates()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, as plain values."""
        return {
            "done": self.done,
            "share": self.share,
            "begun": self.budget.begun,
            "until": self.budget.until,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.done, self.share = state["done"], state["share"]
        self.budget.begun, self.budget.until = state["begun"], state["until"]
        self._set_rates()

    def _set_rates(self) -> None:
        place = self.share * (len(self.curve) - 1)
        low = min(int(place), len(self.curve) - 2)
        factor = self.curve[low] + (place - low) * (self.curve[low + 1] - self.curve[low])
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor


def sample_curve(recipe: Recipe, points: int) -> list[float]:
    """Return the recipe's schedule as multiples of the peak rate after 0, 1, ... `points` of `points` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make_schedule(optimizer, recipe, points)
    curve = [float(optimizer.param_groups[0]["lr"])]
    for _ in range(points):
        optimizer.step()  # without gradients it changes nothing; the schedule wants to be called after it
        schedule.step()
        curve.append(float(optimizer.param_groups[0]["lr"]))
    return curve
