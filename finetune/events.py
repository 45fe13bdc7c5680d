"""What a run tells the outside: one plain callable per event, all silent by default.

The command line turns them into progress bars and lines; Python's `progress=True` prints them as plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.plan import Plan


@dataclass(frozen=True)
class Events:
    """Callables for everything that a run has to say.

    Attributes:
        note: a sentence for the user.
        progress: (what, done, total) while something long goes on; `done == total` ends it.
        plan: what is going to happen, before it does.
        epoch: a finished epoch's row of metrics.jsonl, and the number of epochs in all.
    """

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    plan: Callable[[Plan], None] = lambda plan: None
    epoch: Callable[[dict[str, Any], int], None] = lambda row, epochs: None


PLAIN_SECONDS = 10.0  # plain text gets a line of progress this often: a log of an hour stays below 400 lines


class Pace:
    """Lines of progress for where nothing can be drawn over: one now and then."""

    def __init__(self) -> None:
        self._what = ""
        self._began = self._told = 0.0

    def line(self, what: str, done: int, total: int) -> str | None:
        """Return what to print of this progress, None when it is too early for another line or nothing is left."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._told = what, now, now
        if total and done >= total:
            self._what = ""
        elif total and now - self._told > PLAIN_SECONDS:
            self._told = now
            left = (now - self._began) * (total - done) / max(done, 1)
            return f"{what}: {done:,} of {total:,}, about {left:.0f} s left"
        return None


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return an epoch's figures for people.

    Args:
        row: of metrics.jsonl.
        epochs: in all.
    """
    val = "" if row["val_accuracy"] is None else f"  val {row['val_accuracy']:.2f} % loss {row['val_loss']:.3f}"
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  train {row['train_accuracy']:.2f} % loss "
        f"{row['train_loss']:.3f}{val}  {row['images_per_second']:.0f} img/s  {row['seconds']:.0f} s"
    )


def printed() -> Events:
    """Return events that are printed to standard output, a line each."""
    pace = Pace()

    def progress(what: str, done: int, total: int) -> None:
        if (line := pace.line(what, done, total)) is not None:
            print(line, flush=True)

    return Events(
        note=lambda text: print(text, flush=True),
        progress=progress,
        plan=lambda plan: print(*plan.sentences(), sep="\n", flush=True),
        epoch=lambda row, epochs: print(epoch_line(row, epochs), flush=True),
    )
