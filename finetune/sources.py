"""Where training batches come from: the feature cache, or images on the fly. Both give the same values."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import Timeout

from finetune.augment import Preprocessing, Views
from finetune.cache import Entry, cannot_write, key_of, make_room
from finetune.device import synchronize
from finetune.events import Events
from finetune.features import Features, Progressing, compute_view, new_stores
from finetune.images import Images, ImageSet
from finetune.placement import Placement
from finetune.prefix import PreparedPrefix
from finetune.residency import ImagePlace, send
from finetune.splits import pixel_digests
from finetune.stream import Streamed


class Live:
    """Batches computed when they are asked for: views, preprocessing, and the prefix where there is one.

    All of it runs on the device, to which the images are sent batch by batch unless they lie there.

    Args:
        data: the split.
        views: its views.
        preprocessing: pixels to model input.
        prefix: the frozen part, or None for a model that trains uncut.
        device: where batches are wanted.
        dtype: of the model input of an uncut model.
        place: where images in memory lie; where `data` has them when None.

    Attributes:
        on_device: whether they lie on the device, so that rows may be given there.
    """

    def __init__(
        self,
        data: ImageSet,
        views: Views,
        preprocessing: Preprocessing,
        prefix: PreparedPrefix | None,
        device: torch.device,
        dtype: torch.dtype,
        place: ImagePlace | None = None,
    ) -> None:
        self.images, self.store = data.images, None
        if isinstance(data.images, torch.Tensor):
            self.store = (place or ImagePlace("ram", device)).store(data.images)
        self.views, self.preprocessing = views.on(device), preprocessing
        self.prefix, self.device, self.dtype = prefix, device, dtype
        self.on_device = self.store is not None and self.store.on_device

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the inputs of what trains for int64 (B,) rows and views, on the device."""
        images = send(self.images[rows], self.device) if self.store is None else self.store.take(rows, views)
        images = self.views.apply(images, send(rows, self.device), send(views, self.device))
        if self.prefix is None:
            return (self.preprocessing(images, self.dtype),)
        return self.prefix.prefix(images)

    def expect(self, *batches: torch.Tensor) -> None:
        """Begin to decode the int64 (B,) rows of the coming batches, where images are streamed."""
        if isinstance(self.images, Streamed):
            self.images.expect(*batches)


@dataclass
class FeatureBuilder:
    """Gives each split's features, from the cache as far as they are there.

    Attributes:
        prepared: the prefix.
        placement: where features go.
        cache_dir: folder of the cache.
        limit: most bytes the cache may take on disk.
        events: told of progress and damage.
        stop: asked between chunks; may raise to end the run.
        seconds: time spent so far.
        held: by key, stored features of a view that this process has in memory already.
        told: for people who look into the cache: the network and the data, by name; no ingredient of the key.
    """

    prepared: PreparedPrefix
    placement: Placement
    cache_dir: Path
    limit: int
    events: Events
    stop: Callable[[], None] = lambda: None
    seconds: float = 0.0
    held: Mapping[str, list[torch.Tensor]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    _keys: list[str] = field(default_factory=list)

    def entries(self, data: ImageSet, views: Views) -> list[tuple[Entry, dict[str, object]]]:
        """Return each view's cache entry with the ingredients of its key; nothing is opened."""
        images = images_sha256(data.images)
        made = []
        for view in range(views.count):
            about = {**self.prepared.identity, "images": images, "view": views.describe(view)}
            rows = self.prepared.prefix.rows
            folder = self.cache_dir / "features" / key_of(about)
            entry = Entry(folder, len(data), tuple(row.stored for row in rows), tuple(row.dtype for row in rows))
            made.append((entry, about))
        return made

    def holds(self, data: ImageSet, views: Views) -> bool:
        """Return whether all of a split's features are in memory already."""
        return bool(self.held) and all(entry.folder.name in self.held for entry, _ in self.entries(data, views))

    def missing(self, data: ImageSet, views: Views) -> int:
        """Return how many rows of a split the cache does not hold."""
        total = 0
        for entry, _ in self.entries(data, views):
            entry.load_journal()
            total += entry.missing_rows()
        return total

    def features(self, data: ImageSet, views: Views, name: str) -> Features:
        """Return a split's features, computing what is absent.

        Args:
            data: the split.
            views: its views.
            name: what to call the split in progress lines.

        Raises:
            RunError: the cache cannot be written.
        """
        start = time.perf_counter()
        device = self.prepared.prefix.device
        progress = Progressing(self.events.progress, len(data) * views.count, f"features of {name}", self.stop)
        held = self.holds(data, views)
        there = torch.device("cpu") if self.placement.where != "device" else device
        stores = []
        if self.placement.in_memory and (there.type != "cpu" or not held):
            stores = new_stores(self.prepared.prefix.rows, views.count, len(data), there)
        entries = self.entries(data, views) if held or self.placement.on_disk else []
        if not held:
            self._keys += [entry.folder.name for entry, _ in entries]  # no view makes room by deleting another
        tensors = []
        for view in range(views.count):
            into = [store[view] for store in stores]
            if held:
                kept = self.held[entries[view][0].folder.name]
                tensors.append(
                    [target.copy_(value) for target, value in zip(into, kept, strict=True)] if into else kept
                )
            elif not self.placement.on_disk:
                made = compute_view(self.prepared.prefix, data, views, view, entry=None, into=into, report=progress)
                tensors.append(made)
            else:
                entry, about = entries[view]
                about = {**about, **self.told, "split": name}
                tensors.append(self._from_disk(data, views, view, entry, about, into, progress))
        synchronize(device)
        self.seconds += time.perf_counter() - start
        return Features(tensors, device, stores or None)

    def _from_disk(
        self,
        data: ImageSet,
        views: Views,
        view: int,
        entry: Entry,
        about: dict[str, object],
        into: Sequence[torch.Tensor],
        progress: Progressing,
    ) -> list[torch.Tensor]:
        """Read one view through its cache entry, holding the entry's lock while it may be written."""
        with self.locked(entry):
            entry.load_journal()
            make_room(self.cache_dir, entry.missing_rows() * sum(entry.row_bytes), self.limit, self._keys)
            entry.open(about)
            tensors = compute_view(self.prepared.prefix, data, views, view, entry=entry, into=into, report=progress)
        if entry.damaged:
            self.events.note(
                f"Cached features {entry.folder.name} were damaged in {len(entry.damaged)} chunks; "
                "these were computed again."
            )
        return tensors

    def locked(self, entry: Entry) -> AbstractContextManager[object]:
        """Take an entry's lock, after waiting for a run that is writing it."""
        try:
            entry.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                return entry.lock.acquire(timeout=0)
            except Timeout:
                self.events.note("Another run is computing these features; waiting for it to finish.")
            while True:
                try:
                    return entry.lock.acquire(timeout=1)
                except Timeout:
                    self.stop()
        except OSError as error:
            raise cannot_write(entry.folder.parent, error) from error


def images_sha256(images: Images) -> str:
    """Return the sha256 of uint8 images (N, 3, H, W) in their order, shape included: of the sha256 of each.

    Streamed images know these, so nothing is decoded to find their features.
    """
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(b"".join(pixel_digests(images)))
    return digest.hexdigest()
