"""Checks of the networks' settings: found, expected, next step."""

from __future__ import annotations

from collections.abc import Sequence

from weights.errors import UsageError

MOST_BLOCKS = 1000
"""Of a stage. He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2, go up to 200."""


def check_blocks(blocks: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """Return the number of blocks in each stage.

    Args:
        blocks: one number per stage, each 1 to `MOST_BLOCKS`; a network of one stage takes a plain number too.
        stages: how many stages there are.

    Raises:
        UsageError: the wrong number of numbers, or one below 1 or beyond `MOST_BLOCKS`.
    """
    given = (blocks,) if isinstance(blocks, int) else tuple(blocks)
    if len(given) != stages or any(not isinstance(number, int) or number < 1 for number in given):
        expected = f"{stages} whole numbers of at least 1, one per stage" if stages > 1 else "one number of at least 1"
        found = ",".join(map(str, given)) or "empty"
        example = ",".join(["2"] * stages)
        raise UsageError(f"blocks is {found}, and this network needs {expected}; give for example {example}.")
    if max(given) > MOST_BLOCKS:
        raise UsageError(f"blocks is {','.join(map(str, given))}; give at most {MOST_BLOCKS:,} for a stage.")
    return given


def check_dropout(dropout: float) -> float:
    """Return a dropout probability.

    Raises:
        UsageError: it is not in 0 to below 1.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is {dropout}; give a number from 0 (off) to below 1.")
    return dropout
