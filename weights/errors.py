"""Every error that a user of this project can meet, in one tree.

    FinetuneError                exit 1   the base; `cli.main` prints its text, and nothing else does
    ├── UsageError               exit 2   an option or name that cannot be right, whatever is on disk
    ├── WeightsError             exit 1   weights that are missing, damaged, unsafe or of another network
    ├── DataError                exit 1   data that are missing, damaged or not what they seem
    ├── TrainingError            exit 1   a run that cannot go on: a frozen tensor that moved, memory that ran out
    │   └── DivergedError        exit 1   its loss or its predictions are no finite numbers any more
    ├── RunError                 exit 1   a run directory that cannot be used, resumed or written
    └── StoppedError             exit 130 a run that was asked to stop (Ctrl-C, SIGTERM); it can be resumed

A message is one clear sentence (two at most) that says what was found, what was expected and what to do next. It
names files and values. The tree lives in `weights` because imports point down: `cli` → `finetune` → `weights`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FinetuneError(Exception):
    """Base of all errors meant for the user; `str(error)` is the whole message.

    Attributes:
        exit_code: what the command line ends with.
        told: whether another process of the same run says it on the same screen.
    """

    exit_code = 1
    told = False


class UsageError(FinetuneError):
    """An option, name or combination that cannot be right."""

    exit_code = 2


class WeightsError(FinetuneError):
    """Weights that are missing, damaged, unsafe to read, or belong to another network."""


class ShapeError(WeightsError):
    """Weights of which some tensors have another shape than the network's."""


class DataError(FinetuneError):
    """Data that are missing, damaged or not what they seem."""


class TrainingError(FinetuneError):
    """A run that must not go on: a loss that is NaN, or a frozen tensor that moved."""


class DivergedError(TrainingError):
    """A run whose loss or predictions are no finite numbers any more: these settings do not train this model."""


class RunError(FinetuneError):
    """A run directory that cannot be created, resumed or written."""


class StoppedError(FinetuneError):
    """A run that was asked to stop and did; the text says how to go on."""

    exit_code = 130  # 128 + SIGINT, what shells report for Ctrl-C


def near_matches(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return "; did you mean a, b or c?" for names like `name`, or "" when nothing is near.

    Args:
        name: what the user wrote.
        known: every name that would have been right.
        limit: how many to offer at most.
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=limit, cutoff=0.6)
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else ", ".join(near[:-1]) + " or " + near[-1]
    return f"; did you mean {listed}?"
