"""One pass over a split's images for several cuts: rows go to cache entries, or stay in memory.

Legend: N images of the split; rows come in their order, some hundred at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from finetune.augment import Views
from finetune.cache import Entry
from finetune.features import Prefix, compute_rows
from finetune.images import ImageSet

BLOCK = 8  # batches at a time: as many as a run without a cache computes between two chances to stop


class Target(Protocol):
    """Where one part's rows go."""

    def wants(self, start: int, stop: int) -> bool:
        """Return whether any of these rows is still to be computed."""

    def put(self, start: int, values: Sequence[torch.Tensor]) -> None:
        """Take stored crossing tensors, whose rows begin at `start`."""


class InMemory:
    """Rows that stay in memory.

    Args:
        part: gives the rows' shapes.
        count: N.
    """

    def __init__(self, part: Prefix, count: int) -> None:
        self.tensors = [torch.empty((count, *row.stored), dtype=row.dtype) for row in part.rows]

    def wants(self, start: int, stop: int) -> bool:
        """Return True: nothing is there yet."""
        return True

    def put(self, start: int, values: Sequence[torch.Tensor]) -> None:
        """Keep rows."""
        for target, value in zip(self.tensors, values, strict=True):
            target[start : start + len(value)] = value


class OnDisk:
    """Rows that are written to a cache entry, a chunk when it is full.

    Args:
        entry: open and locked.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.chunk: list[torch.Tensor] = []

    def _chunks(self, start: int, stop: int) -> list[int]:
        """Return the numbers of the chunks with some of these rows that the entry does not hold."""
        size = self.entry.chunk_rows
        return [number for number in range(start // size, (stop - 1) // size + 1) if not self.entry.holds(number)]

    def wants(self, start: int, stop: int) -> bool:
        """Return whether the entry lacks a chunk with any of these rows."""
        return bool(self._chunks(start, stop))

    def put(self, start: int, values: Sequence[torch.Tensor]) -> None:
        """Write the chunks that these rows complete.

        Raises:
            RunError: the cache cannot be written.
        """
        stop = start + len(values[0])
        for number in self._chunks(start, stop):
            rows = self.entry.rows_of(number)
            low, high = max(start, rows.start), min(stop, rows.stop)
            if low == rows.start:
                self.chunk = [value.new_empty((rows.stop - rows.start, *value.shape[1:])) for value in values]
            for target, value in zip(self.chunk, values, strict=True):
                target[low - rows.start : high - rows.start] = value[low - start : high - start]
            if high == rows.stop:
                self.entry.write_chunk(number, self.chunk)


def run_pass(
    joint: Prefix,
    targets: Sequence[Target],
    widths: Sequence[int],
    data: ImageSet,
    views: Views,
    view: int,
    report: Callable[[int], None],
) -> None:
    """Go over the images once and hand each target its rows.

    Args:
        joint: gives the crossing tensors of all targets, one target's after the other's.
        targets: where they go.
        widths: how many crossing tensors each target takes.
        data: the split.
        views: its views.
        view: which one.
        report: called with the number of images done since the last call; may raise to end the pass.
    """
    block = BLOCK * joint.batch
    for start in range(0, len(data), block):
        stop = min(start + block, len(data))
        if any(target.wants(start, stop) for target in targets):
            values = [value.cpu() for value in compute_rows(joint, data, views, view, start, stop)]
            for target, width in zip(targets, widths, strict=True):
                target.put(start, values[:width])
                values = values[width:]
        report(stop - start)
