"""What the runs of a sweep came to, and what follows from it: the frontier, the choice, a sentence or two.

The choice falls on validation accuracy alone. Runs are compared with what their validation images can tell: the
standard error of a share p of n images is sqrt(p (1 - p) / n), and a run within one standard error of the best is as
good as far as anybody knows (the rule of Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3, by
which the plainest of such models is taken).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.plan import duration

WORTH_NAMING = 0.9  # of the best run's time: a run that takes more than this is no quicker choice


@dataclass(frozen=True)
class Tried:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        path: the folder.
        train_layers: what trained.
        lr: peak learning rate.
        weight_decay: weight decay; None is what suits the layers.
        shots: training images of every class; None is all.
        images: training images; 0 where the run did not end.
        classes: how many; likewise.
        diverged: what its error said; "" for a finished run.
        val_accuracy: in percent; None where the run diverged.
        train_accuracy: likewise.
        test_accuracy: likewise; of the chosen run alone.
        seconds: time of the run with its features at hand; 0 where it diverged.
        epochs: how many it had.
    """

    name: str
    path: str
    train_layers: tuple[str, ...]
    lr: float
    weight_decay: float | None
    shots: int | None
    images: int = 0
    classes: int = 0
    diverged: str = ""
    val_accuracy: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    seconds: float = 0.0
    epochs: int = 0

    @property
    def accuracy(self) -> float:
        """Validation accuracy, to rank by: a run that diverged comes after all others."""
        return -math.inf if self.val_accuracy is None else self.val_accuracy


@dataclass(frozen=True)
class Advice:
    """What to take from a sweep.

    Attributes:
        chosen: the run with the highest validation accuracy, the quickest of several; None when all diverged.
        quicker: a run that is as good as the images can tell, in less time; None where there is none.
        sentences: the advice in words.
    """

    chosen: str | None
    quicker: str | None
    sentences: tuple[str, ...]


def frontier(runs: Sequence[Tried]) -> list[Tried]:
    """Return the runs that no other run beats in accuracy without taking longer, the quickest first."""
    found: list[Tried] = []
    for run in sorted(_finished(runs), key=lambda run: (run.seconds, -run.accuracy)):
        if not found or run.accuracy > found[-1].accuracy:
            found.append(run)
    return found


def best_of(runs: Sequence[Tried]) -> Tried | None:
    """Return the run with the highest validation accuracy, the quickest of several; None when none was finished."""
    return max(_finished(runs), key=lambda run: (run.accuracy, -run.seconds), default=None)


def with_most_images(runs: Sequence[Tried]) -> list[Tried]:
    """Return the runs on all of the images, or on the most of every class that were tried."""
    most = max((math.inf if run.shots is None else run.shots for run in runs), default=None)
    return [run for run in runs if (math.inf if run.shots is None else run.shots) == most]


def standard_error(percent: float, images: int) -> float:
    """Return the standard error, in percentage points, of a share of some images."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / images)


def recommend(runs: Sequence[Tried], val_images: int) -> Advice:
    """Choose among the runs with the most training images.

    Args:
        runs: all runs of a sweep.
        val_images: how many images the validation accuracy is of.
    """
    contenders = with_most_images(runs)
    best = best_of(contenders)
    if best is None:
        return Advice(None, None, ("Every run diverged; start again with a lower --lr.",))
    error = standard_error(best.accuracy, val_images)
    equal = [run for run in _finished(contenders) if run.accuracy >= best.accuracy - error]
    quickest = min(equal, key=lambda run: (run.seconds, -run.accuracy))
    quicker = quickest if quickest.seconds < WORTH_NAMING * best.seconds else None
    of = "the only run" if len(contenders) == 1 else f"the best of {len(contenders)} runs"
    sentences = [
        f"Take {best.name}: {best.accuracy:.2f} % of {val_images:,} validation images right, {of}, in "
        f"{duration(best.seconds)} with the features at hand."
    ]
    if quicker is not None:
        less = best.accuracy - quicker.accuracy
        sentences.append(
            f"In a hurry, take {quicker.name}: {less:.2f} points less, where one standard error is {error:.2f}, in "
            f"{duration(quicker.seconds)}."
        )
    sentences += _at_an_edge(best, contenders) + _by_shots(runs)
    lost = [run.name for run in runs if run.diverged]
    if lost:
        sentences.append(f"{len(lost)} of {len(runs)} runs diverged: {', '.join(lost)}.")
    return Advice(best.name, None if quicker is None else quicker.name, tuple(sentences))


def _finished(runs: Sequence[Tried]) -> list[Tried]:
    return [run for run in runs if run.val_accuracy is not None]


def _at_an_edge(best: Tried, runs: Sequence[Tried]) -> list[str]:
    """Say so where the best value of a setting is the first or the last that was tried: beyond it may be a better."""
    said = []
    for name, word in (("lr", "learning rate"), ("weight_decay", "weight decay")):
        other = "weight_decay" if name == "lr" else "lr"
        tried = {
            getattr(run, name)
            for run in runs
            if run.train_layers == best.train_layers and getattr(run, other) == getattr(best, other)
        }
        value = getattr(best, name)
        if None in tried:  # auto has no place between numbers
            continue
        if len(tried) > 1 and value in (min(tried), max(tried)) and value > 0:
            end, beyond = ("largest", "larger") if value == max(tried) else ("smallest", "smaller")
            said.append(
                f"Its {word} {value:g} is the {end} of those tried with its layers; a {beyond} one may be better."
            )
    return said


def _by_shots(runs: Sequence[Tried]) -> list[str]:
    """Say what the images of a class are worth: the best run for each number of them."""
    counts = dict.fromkeys(run.shots for run in runs)
    if len(counts) < 2:
        return []
    parts = []
    for shots in counts:
        best = best_of([run for run in runs if run.shots == shots])
        if best is not None:
            parts.append(f"{best.accuracy:.2f} % with {'all' if shots is None else f'{shots:,}'}")
    return [f"By images of every class, the best run each: {', '.join(parts)}."]
