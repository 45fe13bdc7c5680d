"""What a run tells the outside: one plain callable per event, all silent by default.

The command line turns them into progress bars and lines; a notebook may pass its own.
"""

from __future__ import annotations

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
