"""Which process of a run this is, as torchrun says it in the environment.

Nothing here imports torch: the command line asks before it does.
"""

from __future__ import annotations

import os

from weights.errors import UsageError


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks: rank 0, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def is_first_here() -> bool:
    """Whether this process is the first of its machine."""
    return not launched() or os.environ["LOCAL_RANK"] == "0"


def require_alone(command: str) -> None:
    """Refuse several processes of a command that does its work in one.

    Args:
        command: as the user calls it.

    Raises:
        UsageError: torchrun started several.
    """
    if launched():
        raise UsageError(
            f"finetune {command} works in one process and torchrun started {os.environ['WORLD_SIZE']}; start it "
            "without torchrun. finetune run and finetune baseline are what several processes can share."
        )
