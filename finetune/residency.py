"""Where rows lie while batches are made of them, and how a batch comes to the device that computes.

    on the device      a batch is one gather there; the host sends nothing but indices, once an epoch
    in memory          the host gathers a batch into a pinned buffer, from which a GPU fetches it while it computes
    in mapped files    the same; the system reads the pages that a gather touches

Only the buffers are pinned. A gather by index reads ordinary memory just as well, and PyTorch would lock the next power
of two of what it is asked for (CachingHostAllocator): 16 GiB for 9 GiB of features.

On a GPU nothing here makes the host wait for work that is queued, but for a buffer that is still being fetched.

Legend: N rows in each of V views, B rows in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from finetune.images import DataSplits
from finetune.placement import Placement, memory_for

BUFFERS = 2  # one is filled while the other is fetched


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; a copy from the host to a GPU is queued, and the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # PyTorch keeps it until the copy is done
    return tensor.to(device, non_blocking=True)


class Staging:
    """Pinned buffers through which batches go from the computer's memory to a GPU, in turn.

    The copies have a stream of their own, so the GPU fetches a batch while it computes the one before. A buffer is
    filled again when the copy out of it is done.

    Args:
        shape: of a row.
        dtype: of a row.
        device: where batches are wanted. Buffers for another device than a GPU are ordinary memory.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = [self._new(0) for _ in range(BUFFERS)]
        self.copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self.turn = 0

    def _new(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, *self.shape), dtype=self.dtype, pin_memory=self.stream is not None)

    def send(self, rows: int, fill: Callable[[torch.Tensor], object]) -> torch.Tensor:
        """Return rows on the device.

        Args:
            rows: B.
            fill: writes them into a buffer (B, ...), which is only its own while it runs.
        """
        self.turn = (self.turn + 1) % BUFFERS
        copied = self.copied[self.turn]
        if copied is not None:
            copied.synchronize()
        if len(self.buffers[self.turn]) < rows:
            self.buffers[self.turn] = self._new(rows)
        buffer = self.buffers[self.turn][:rows]
        fill(buffer)
        if self.stream is None:
            return buffer.to(self.device, copy=True)
        with torch.cuda.stream(self.stream):
            there = buffer.to(self.device, non_blocking=True)
            self.copied[self.turn] = self.stream.record_event()
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        there.record_stream(computing)  # its memory is not used again before what computes on it is done
        return there


class Store:
    """Rows of one kind in all their views, wherever they lie.

    Args:
        views: tensors (N, ...), one for each view.
        device: where batches are wanted.
        whole: the same rows as one tensor (V, N, ...), where they are one.
    """

    def __init__(self, views: Sequence[torch.Tensor], device: torch.device, whole: torch.Tensor | None = None) -> None:
        self.views, self.device = views, device
        if len(views) == 1:
            whole = views[0][None]
        self.flat = None if whole is None else whole.flatten(0, 1)  # (V * N, ...), not a copy
        self.on_device = views[0].device.type == device.type
        self.staging: Staging | None = None
        if device.type == "cuda" and not self.on_device:
            self.staging = Staging(views[0].shape[1:], views[0].dtype, device)

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Return rows on the device, in their order.

        Args:
            rows: int64 (B,); on the host, or on the device too where `on_device` is true.
            views: int64 (B,), the wanted view of each, there as well; not looked at where there is one.
        """
        if self.staging is not None:
            return self.staging.send(len(rows), partial(self._fill, rows, views))
        if self.flat is not None:
            # Of 128 rows of 100 kB on a CPU core this took a quarter of the time that self.flat[places] took.
            return self.flat.index_select(0, self._places(rows, views)).to(self.device)
        batch = self.views[0].new_empty((len(rows), *self.views[0].shape[1:]))
        self._fill(rows, views, batch)
        return batch.to(self.device)

    def _places(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        places = rows if len(self.views) == 1 else views * len(self.views[0]) + rows
        return places.to(self.views[0].device, non_blocking=True)

    def _fill(self, rows: torch.Tensor, views: torch.Tensor, batch: torch.Tensor) -> None:
        """Write rows into `batch` (B, ...), which lies where they do."""
        if self.flat is not None:
            torch.index_select(self.flat, 0, self._places(rows, views), out=batch)
            return
        for view, tensor in enumerate(self.views):  # on the host: a GPU would be waited for
            where = torch.nonzero(views == view).flatten()
            batch[where] = tensor[rows[where]]


class ImagePlace:
    """The images of a run where batches are made of them; each split goes to the GPU once.

    Args:
        where: "device" takes them to the device, anything else leaves them where they are.
        device: where batches are wanted.
    """

    def __init__(self, where: str, device: torch.device) -> None:
        self.where, self.device = where, device
        self._stores: dict[int, tuple[torch.Tensor, Store]] = {}

    def store(self, images: torch.Tensor) -> Store:
        """Return the place of uint8 images (N, 3, H, W), which may be asked for again."""
        if id(images) not in self._stores:
            there = images.to(self.device) if self.where == "device" else images
            self._stores[id(images)] = (images, Store([there], self.device))  # held, so that its id stays its own
        return self._stores[id(images)][1]


def place_images(data: DataSplits, placement: Placement, room: int | None) -> tuple[str, int]:
    """Return where images lie that every epoch looks at, and their bytes; ("", 0) where it looks at none."""
    splits = [split.images for split in (data.train, data.val, data.test) if split is not None]
    in_memory = [images for images in splits if isinstance(images, torch.Tensor)]  # others are decoded as wanted
    if placement.ahead or not in_memory:
        return "", 0
    count = sum(images.nbytes for images in in_memory)
    return memory_for(count, count, room), count
