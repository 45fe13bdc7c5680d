"""Images that are decoded when they are wanted, because all of them at once would not fit in memory.

A data set is decoded once to know what its images are: every image gets the digests that splits and cache keys are made
of (`finetune/splits.py`), and is forgotten again. From then on a `Streamed` stands where a tensor of images would: rows
that are asked for are decoded in parallel, and those that will be asked for next have been begun. Every image that is
decoded again is compared with its digest, so a file that changes while a run reads it ends the run.

Legend: N images, B of them asked for at a time, side S.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.decode import CHUNK, ImageFile, Receiver, decode_files, decode_image, reason_of
from finetune.decoded import DecodedCache
from finetune.device import PREFIX_BATCH
from finetune.images import Images, ImageSet, Progress
from finetune.machine import free_memory
from weights.errors import DataError

HEADROOM = 0.9
"""Share of the free memory that decoded images may take."""

COPIES = 2
"""Times that decoded images lie in memory while they are divided into splits."""

BATCHES = 3
"""Batches that are held at a time, whatever the memory. One is handed out, one lies beside it until it is copied, and
one is decoded ahead."""

LEAST = BATCHES * PREFIX_BATCH
"""Images that are held at a time, whatever the memory, until larger batches are asked for, as a GPU does."""

AHEAD = 512
"""Images that are decoded ahead where they are read in order, if the limit allows it: half a second of work for two
cores, so that no core waits while another is late."""

BLOCK = 8
"""Batches of the frozen part that are asked for at a time."""


@dataclass(eq=False)
class _Piece:
    """Images that one thread decodes: a future of uint8 (B, 3, S, S), and B."""

    images: Future[NDArray[np.uint8]]
    size: int


def class_starts(classes: Sequence[str], shape: Sequence[int]) -> list[hashlib._Hash]:
    """Return for each class the hash of its name and the images' shape, to which an image's pixels are added.

    A name cannot hold a NUL, so no two pairs of name and shape run together to the same bytes.
    """
    sides = ",".join(str(size) for size in shape)
    return [hashlib.sha256(f"{name}\0{sides}\0".encode()) for name in classes]


class Decoder:
    """Decodes the images of a data set again and again, some of them ahead, and never holds all.

    Args:
        files: N files.
        labels: the class of each.
        classes: names of the classes.
        side: S.
        resize: as for `decode_image`.
        memory: bytes that decoded images may take; `LEAST` images are held in any case, and three batches.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        labels: Sequence[int],
        classes: Sequence[str],
        side: int,
        *,
        resize: bool,
        memory: int,
    ) -> None:
        self.files, self.labels, self.side, self.resize, self.memory = files, labels, side, resize, memory
        self.bytes = len(files) * 3 * side * side
        self.limit = max(LEAST, memory // (3 * side * side))
        self.most = 0  # images that were held at a time, so far
        self.rate = 0.0  # images decoded a second, when all of them were
        self.digests = np.zeros((2, len(files), 32), np.uint8)  # of the pixels; of class name, shape and pixels
        self._starts = class_starts(classes, (3, side, side))
        self._coming: dict[int, tuple[_Piece, int]] = {}  # by place: where it is decoded, and as which of its images
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "decode")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # for good: threads read on between calls, and said it once

    def make_room(self, batch: int, advice: str) -> None:
        """Let three batches of so many images be held, whatever the memory may be that decoded images may take.

        Raises:
            DataError: they do not fit in what is free; it ends with the advice.
        """
        if BATCHES * batch > self.limit:
            _require_room(min(len(self.files), BATCHES * batch), self.side, free_memory(), advice)
            self.limit = BATCHES * batch

    def learn(self, place: int, image: NDArray[np.uint8]) -> None:
        """Take the digests of an image that was decoded, uint8 (3, S, S); called by any thread."""
        pixels = np.ascontiguousarray(image).data
        named = self._starts[self.labels[place]].copy()
        named.update(pixels)
        for row, digest in zip(self.digests, (hashlib.sha256(pixels), named), strict=True):
            row[place] = np.frombuffer(digest.digest(), np.uint8)

    def expect(self, *groups: Sequence[int]) -> None:
        """Begin to decode what will be asked for, group after group, first things first and within the limit.

        What was begun before and is not among it is given up.
        """
        wanted = dict.fromkeys(islice((place for group in groups for place in group), self.limit))
        kept = {place: piece for place, piece in self._coming.items() if place in wanted}
        needed = {piece for piece, _ in kept.values()}
        for piece, _ in self._coming.values():
            if piece not in needed:
                piece.images.cancel()
        self._coming = kept
        for group in groups:
            self._begin([place for place in group if place in wanted])

    def take(self, places: Sequence[int]) -> torch.Tensor:
        """Return images uint8 (B, 3, S, S).

        Raises:
            DataError: a file that cannot be read any more, or has changed.
        """
        self._begin(places)
        held = {piece for piece, _ in self._coming.values()}
        self.most = max(self.most, len(places) + sum(piece.size for piece in held))
        images = torch.empty(len(places), 3, self.side, self.side, dtype=torch.uint8)
        target = images.numpy()
        try:
            for row, place in enumerate(places):
                piece, at = self._coming[place]
                target[row] = piece.images.result()[at]
        finally:
            for place in places:
                self._coming.pop(place, None)
        return images

    def _begin(self, places: Sequence[int]) -> None:
        """Hand what has not been begun to the threads, in pieces."""
        new = [place for place in dict.fromkeys(places) if place not in self._coming]
        size = min(CHUNK, max(1, -(-len(new) // (os.cpu_count() or 1))))
        for start in range(0, len(new), size):
            part = new[start : start + size]
            piece = _Piece(self._pool.submit(self._decode, part), len(part))
            self._coming |= {place: (piece, at) for at, place in enumerate(part)}

    def _decode(self, places: Sequence[int]) -> NDArray[np.uint8]:
        """Decode images, in a thread: uint8 (B, 3, S, S)."""
        squares = np.empty((len(places), 3, self.side, self.side), np.uint8)
        for square, place in zip(squares, places, strict=True):
            file = self.files[place]
            try:
                image = decode_image(file, self.side, resize=self.resize)
            except Exception as error:  # as when it was decoded first
                raise DataError(
                    f"{file} cannot be read any more ({reason_of(file, error)}); bring the data back, and start again."
                ) from error
            if image is not None:
                square[:] = image
            if image is None or hashlib.sha256(square.data).digest() != self.digests[0, place].tobytes():
                raise DataError(
                    f"{file} has changed since this command began; leave the data as they are, and start it again."
                )
        return squares


class Streamed:
    """Images of a split uint8 (N, 3, S, S) that are decoded when rows are asked for, as a tensor gives rows.

    Which rows will be asked for is told before, with `expect` or by reading `in_order`; others are decoded in parallel
    while the caller waits.

    Args:
        decoder: of the whole data set.
        places: int64 (N,), which of its images.
    """

    def __init__(self, decoder: Decoder, places: NDArray[np.int64]) -> None:
        self.decoder, self.places = decoder, places

    @property
    def shape(self) -> torch.Size:
        """(N, 3, S, S)."""
        return torch.Size((len(self.places), 3, self.decoder.side, self.decoder.side))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return images uint8 (B, 3, S, S) of a slice, or of int64 (B,) rows."""
        return self.decoder.take(self.places[rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows].tolist())

    def in_order(self, start: int, stop: int) -> torch.Tensor:
        """Return the images from `start` to before `stop`, and begin to decode what follows them."""
        ahead = max(0, min(AHEAD, self.decoder.limit - 2 * (stop - start)))
        asked = self.places[start:stop].tolist()
        self.decoder.expect(asked, self.places[stop : stop + ahead].tolist())
        return self.decoder.take(asked)

    def expect(self, *groups: torch.Tensor) -> None:
        """Begin to decode the int64 (B,) rows that will be asked for, batch after batch.

        Raises:
            DataError: as of `make_room`.
        """
        self.decoder.make_room(max(map(len, groups), default=0), "a smaller --image-size or --batch-size")
        self.decoder.expect(*(self.places[rows.cpu().numpy()].tolist() for rows in groups))

    def part(self, rows: NDArray[np.int64]) -> Streamed:
        """Return some of the images; nothing is decoded."""
        return Streamed(self.decoder, self.places[rows])

    def block(self, batch: int) -> int:
        """Return how many images to ask for at a time: whole batches, three times of which keep to the limit.

        Raises:
            DataError: as of `make_room`.
        """
        self.decoder.make_room(batch, "a smaller --image-size, or --device cpu")
        return batch * min(BLOCK, self.decoder.limit // (BATCHES * batch))

    @property
    def pixel_digests(self) -> list[bytes]:
        """The sha256 of the pixels of each image: N digests."""
        return [digest.tobytes() for digest in self.decoder.digests[0, self.places]]

    @property
    def named_digests(self) -> list[bytes]:
        """The sha256 of class name, shape and pixels of each image: N digests."""
        return [digest.tobytes() for digest in self.decoder.digests[1, self.places]]


def load_splits(
    splits: Mapping[str, tuple[Sequence[ImageFile], Sequence[int]]],
    classes: tuple[str, ...],
    *,
    image_size: int,
    memory: int | None = None,
    progress: Progress | None = None,
    kept: DecodedCache | None = None,
    name: str = "",
) -> dict[str, ImageSet]:
    """Return the splits of a data set whose images are files: in memory where they fit, else streamed.

    Args:
        splits: files of each split, and their labels.
        classes: names of the classes.
        image_size: side of the decoded squares, at most.
        memory: bytes that decoded images may take; None is `HEADROOM` of what is free, and so is anything above it.
        progress: called as progress("decode", done, total).
        kept: where decoded images that fit in memory come from, if they are there, and stay; None is nowhere.
        name: of the data, for people.

    Raises:
        DataError: images that cannot be read, or are so large that not even `LEAST` of them fit in memory.
    """
    files = [file for part, _ in splits.values() for file in part]
    labels = [label for _, part in splits.values() for label in part]
    free = free_memory()
    room = int(HEADROOM * free) if memory is None else min(memory, int(HEADROOM * free))
    about = kept.identity(files, image_size) if kept else None
    images: Images | None = kept.recall(about, len(files), room // COPIES, progress) if kept and about else None
    if images is None:
        begun = time.perf_counter()
        images = _decode(files, labels, classes, image_size, room, free, progress)
        seconds = time.perf_counter() - begun
        if isinstance(images, Streamed):
            images.decoder.rate = len(files) / max(1e-9, seconds)
        elif kept and about:
            kept.keep(about, files, images[:], seconds=seconds, name=name, progress=progress)
    sets, start = {}, 0
    for split, (part, numbers) in splits.items():
        stop = start + len(part)
        own = images.part(np.arange(start, stop)) if isinstance(images, Streamed) else images[start:stop]
        sets[split] = ImageSet(own, torch.tensor(numbers, dtype=torch.int64), classes)
        start = stop
    return sets


def _decode(
    files: Sequence[ImageFile],
    labels: Sequence[int],
    classes: Sequence[str],
    image_size: int,
    room: int,
    free: int,
    progress: Progress | None,
) -> Images:
    """Decode all images, into memory where they fit in `room` of the `free` bytes, else to know their digests."""
    made: list[Images] = []

    def receiver(side: int, resize: bool) -> Receiver:
        made.clear()  # what images of another size have ended
        _require_room(min(len(files), LEAST), side, free, "a smaller --image-size")
        if COPIES * len(files) * 3 * side * side <= room:
            pixels = np.empty((len(files), 3, side, side), np.uint8)
            made.append(torch.from_numpy(pixels))
            return pixels.__setitem__
        decoder = Decoder(files, labels, classes, side, resize=resize, memory=room)
        made.append(Streamed(decoder, np.arange(len(files))))
        return decoder.learn

    decode_files(files, image_size, receiver, progress)
    return made[-1]


def _require_room(count: int, side: int, free: int, advice: str) -> None:
    """Refuse images so large that the fewest which are held at a time do not fit in memory.

    Args:
        count: how many these are.
        side: of each.
        free: bytes of memory.
        advice: what to give to need less.

    Raises:
        DataError: with what they need.
    """
    needed = count * 3 * side * side
    if needed > HEADROOM * free:
        raise DataError(
            f"{count:,} images of {side} x {side} pixels, the fewest that are held at a time, need "
            f"{needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; give {advice}."
        )


def chosen(images: Images, rows: NDArray[np.int64]) -> Images:
    """Return some of a set's images, in the order of int64 (M,) rows; streamed ones are not decoded for it."""
    return images.part(rows) if isinstance(images, Streamed) else images[torch.from_numpy(rows)]


def blocks(images: Images, start: int, stop: int, batch: int) -> Iterator[torch.Tensor]:
    """Yield the images from `start` to before `stop` in order, whole batches at a time and the rest at the end."""
    size = images.block(batch) if isinstance(images, Streamed) else BLOCK * batch
    for low in range(start, stop, size):
        high = min(low + size, stop)
        yield images.in_order(low, high) if isinstance(images, Streamed) else images[low:high]
