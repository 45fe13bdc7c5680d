"""Checks of the networks' settings: found, expected, next step."""

from __future__ import annotations

from collections.abc import Sequence

from weights.errors import UsageError


def check_blocks(blocks: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """Return the number of blocks in each stage.

    Args:
        blocks: one number per stage, each at least 1; a network of one stage takes a plain number too.
        stages: how many stages there are.

    Raises:
        UsageError: the wrong number of numbers, or one below 1.
    """
    given = (blocks,) if isinstance(blocks, int) else tuple(blocks)
    if len(given) != stages or any(not isinstance(number, int) or number < 1 for number in given):
        expected = f"{stages} whole numbers of at least 1, one per stage" if stages > 1 else "one number of at least 1"
        found = ",".join(map(str, given)) or "empty"
        example = ",".join(["2"] * stages)
        raise UsageError(f"blocks is {found}, and this network needs {expected}; give for example {example}.")
    return given


def check_dropout(dropout: float) -> float:
    """Return a dropout probability.

    Raises:
        UsageError: it is not in 0 to below 1.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is {dropout}; give a number from 0 (off) to below 1.")
    return dropout
