"""Frozen features: what the prefix gives for every image and view, computed once.

Legend: N images of a split, V views, one *crossing* tensor or more per image. Four-dimensional features (N, C, H, W)
lie in memory and on disk as (N, H, W, C), which is the channels-last layout that convolutions want.

`Features` answers `take(rows, views)` the same way from a GPU's memory, from RAM and from memory-mapped files
(`residency.py`). `cache.py` says what is on disk; this file only fills it and reads it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from finetune.augment import Preprocessing, Views
from finetune.cache import CHUNK_BYTES, Entry
from finetune.images import ImageSet, Progress
from finetune.residency import Store
from finetune.stream import BLOCK, blocks

READ_AHEAD = 2  # chunks: checking one keeps a core busy, and there are two at least
Run = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""The prefix, ready to run: float images (B, 3, S, S) → crossing tensors, B rows each."""


@dataclass(frozen=True)
class RowShape:
    """One crossing tensor without its batch dimension.

    Attributes:
        shape: as the model sees it, such as (C, H, W).
        dtype: torch.float32 or torch.bfloat16.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in memory: (H, W, C) for (C, H, W), else the same."""
        return (*self.shape[1:], self.shape[0]) if len(self.shape) == 3 else self.shape

    @property
    def bytes(self) -> int:
        """Bytes of one image's row."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def to_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return features (B, C, H, W) as contiguous (B, H, W, C); others contiguous as they are."""
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous()


def from_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Undo `to_stored` without a copy: (B, H, W, C) memory seen as (B, C, H, W)."""
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


@dataclass(frozen=True)
class Prefix:
    """The frozen part, ready to give features.

    Attributes:
        run: the folded, perhaps compiled, module.
        preprocessing: pixels to model input.
        dtype: what it computes in.
        batch: images per call; every call has exactly this many, so that a compiled prefix is compiled once.
        device: where it runs.
        rows: the crossing tensors' shapes.
    """

    run: Run
    preprocessing: Preprocessing
    dtype: torch.dtype
    batch: int
    device: torch.device
    rows: tuple[RowShape, ...]

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return crossing tensors, B rows each, on the device, for uint8 images (B, 3, H, W) of any number B."""
        parts = []
        with torch.no_grad():  # not inference_mode: its tensors cannot be saved for a backward pass
            for chunk in images.split(self.batch):
                short = self.batch - len(chunk)
                full = torch.cat([chunk, chunk[-1:].expand(short, -1, -1, -1)]) if short else chunk
                values = self.run(self.preprocessing(full.to(self.device, non_blocking=True), self.dtype))
                parts.append([value[: len(chunk)] for value in values])
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class Features:
    """Features of one split.

    Args:
        tensors: for each view, the stored crossing tensors, N rows each.
        device: where batches are wanted.
        stores: the same as one tensor (V, N, ...) for each crossing value, where they are that.

    Attributes:
        on_device: whether they lie on the device, so that rows may be given there.
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[torch.Tensor]],
        device: torch.device,
        stores: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.tensors = tensors
        columns = list(zip(*tensors, strict=True))
        wholes: Sequence[torch.Tensor | None] = stores or [None] * len(columns)
        self._stores = [Store(column, device, whole) for column, whole in zip(columns, wholes, strict=True)]
        self.on_device = all(store.on_device for store in self._stores)

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the crossing tensors of some images.

        Args:
            rows: int64 (B,), places in the split; on the host, or on the device where the features lie there.
            views: int64 (B,), the wanted view of each, beside `rows`.

        Returns:
            One tensor per crossing value, B rows in the order of `rows`, on the device.
        """
        return tuple(from_stored(store.take(rows, views)) for store in self._stores)


def new_stores(rows: Sequence[RowShape], views: int, count: int, device: torch.device) -> list[torch.Tensor]:
    """Return memory on a device for stored features: for each crossing value a tensor (V, N, ...)."""
    return [torch.empty((views, count, *row.stored), dtype=row.dtype, device=device) for row in rows]


def compute_view(
    prefix: Prefix,
    data: ImageSet,
    views: Views,
    view: int,
    *,
    entry: Entry | None,
    into: Sequence[torch.Tensor],
    report: Callable[[int], None],
) -> list[torch.Tensor]:
    """Compute one view of a split, writing it to the cache and keeping it in memory as asked.

    Chunks are read ahead. They are not written behind: on two cores that gained 2 % (docs/log.md), and a kill would
    cost the chunk being written and the one being computed.

    Args:
        prefix: what computes.
        data: the split's images.
        views: the run's views.
        view: which one.
        entry: the cache entry to write through, already locked; chunks that it holds are read, not computed. None
            keeps the disk out of it.
        into: memory for the stored crossing tensors, N rows each, on whatever device. Without any, they are returned
            memory-mapped from `entry`.
        report: called with the number of images done since the last call.

    Returns:
        The stored crossing tensors, N rows each.

    Raises:
        RunError: the cache cannot be written (disk full).
    """
    count = len(data)
    chunk_rows = entry.chunk_rows if entry else prefix.batch * BLOCK
    starts = range(0, count, chunk_rows)
    reading: deque[Future[list[torch.Tensor] | None]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as disk:
        for number, start in enumerate(starts):
            stop = min(start + chunk_rows, count)
            while entry and len(reading) < READ_AHEAD and number + len(reading) < len(starts):
                reading.append(disk.submit(entry.read_chunk, number + len(reading)))
            values = reading.popleft().result() if entry else None
            if values is None:
                values = compute_rows(prefix, data, views, view, start, stop)
                if entry:
                    entry.write_chunk(number, [value.cpu() for value in values])
            _keep(into, values, start, stop)
            report(stop - start)
    if entry:
        entry.finish()
    return entry.mapped() if entry and not into else list(into)


def _keep(into: Sequence[torch.Tensor], values: Sequence[torch.Tensor], start: int, stop: int) -> None:
    """Copy a chunk's rows into memory, if any is given; no name for one of them outlives it on the device."""
    for target, value in zip(into, values, strict=bool(into)):
        target[start:stop] = value


def compute_rows(prefix: Prefix, data: ImageSet, views: Views, view: int, start: int, stop: int) -> list[torch.Tensor]:
    """Return the stored crossing tensors of one view of the images from `start` to before `stop`, on the device.

    It holds one batch of images at a time, and the features gather.
    """
    parts, low = [], start
    for block in blocks(data.images, start, stop, prefix.batch):
        for images in block.split(prefix.batch):
            rows = torch.arange(low, low + len(images))
            low += len(images)
            seen = views.apply(images.to(prefix.device, non_blocking=True), rows, torch.full_like(rows, view))
            parts.append([to_stored(value) for value in prefix(seen)])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def gathered_bytes(prefix: Prefix, images: int) -> int:
    """Return the most bytes of features that gather on the device before they are kept: a chunk, on disk or not.

    Args:
        prefix: what computes.
        images: of the largest split.
    """
    row_bytes = sum(row.bytes for row in prefix.rows)
    return min(images * row_bytes, max(CHUNK_BYTES, BLOCK * prefix.batch * row_bytes))


class Progressing:
    """Add up finished images over a split's views for one progress line.

    Args:
        progress: where to report.
        total: image views in all.
        what: what to call the work.
        stop: called after every chunk; raises to end the run.
    """

    def __init__(self, progress: Progress, total: int, what: str, stop: Callable[[], None]) -> None:
        self.progress, self.total, self.what, self.stop, self.done = progress, total, what, stop, 0

    def __call__(self, images: int) -> None:
        """Report that `images` more image views are done."""
        self.done += images
        self.progress(self.what, self.done, self.total)
        self.stop()
