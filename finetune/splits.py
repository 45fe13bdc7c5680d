"""Which image is in which split, decided by what an image is and never by where it was found.

Every image has a digest: the sha256 of its class name, shape and pixels. Splits are chosen by hashing the digests once
more with a salt, so that renaming, shuffling or repacking the files changes nothing. The identity of a data set is the
hash of its sorted digests.

Legend: N images, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.images import DataSplits, Images, ImageSet, RawData, first_few
from finetune.stream import Streamed, chosen, class_starts
from weights.errors import UsageError

TEST_FRACTION = 0.1
"""Share of a folder of classes that is held out for the test when the data bring no test split."""

TEST_SALT = "test"
"""Carries no seed: the test images are the same for every seed, or results of two seeds could not be compared."""

Digests = list[bytes]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pile:
    """Images that are still to be divided: places in a set, so that pixels are copied once, at the end.

    Attributes:
        images: the set.
        places: int64 (M,), which of its images.
        digests: M digests, in the order of `places`.
    """

    images: ImageSet
    places: NDArray[np.int64]
    digests: Digests

    def part(self, chosen: NDArray[np.int64]) -> Pile:
        """Return the images at `chosen` among these."""
        return Pile(self.images, self.places[chosen], [self.digests[place] for place in chosen])

    def take(self) -> ImageSet:
        """Return the images themselves."""
        return take(self.images, self.places)


def make_splits(
    raw: RawData, *, val_fraction: float = 0.1, limit: int | None = None, shots: int | None = None, seed: int = 0
) -> DataSplits:
    """Hold out the validation (and where needed the test) images, then limit the training images.

    The order is fixed: test, validation, limit, shots. So the validation images of a seed are the same for every limit.
    A validation split that the data bring is used as it is, whatever `val_fraction` says.

    Training images are put in the order of their digests: every on-disk layout of the same images then gives the same
    run, and shares its cached features. Validation and test images keep the order in which they were found.

    Args:
        raw: the data set as found.
        val_fraction: share of the training images to hold out, stratified; 0 holds out none.
        limit: how many training images to keep, stratified; None keeps all. The other splits are not limited.
        shots: how many training images of every class to keep, of those within the limit; None keeps all.
        seed: decides which images are held out and kept.

    Returns:
        The splits, with their identities and with notes on all that was held out.

    Raises:
        UsageError: `val_fraction` outside 0..1, or `limit` below 1.
    """
    check_settings(val_fraction=val_fraction, limit=limit)
    notes = list(raw.notes)
    train = Pile(raw.train, np.arange(len(raw.train)), image_digests(raw.train))
    found = {"train": train.digests}
    test, test_digests = raw.test, None if raw.test is None else image_digests(raw.test)
    if test_digests is not None:
        found["test"] = test_digests
    if raw.val is not None:
        found["val"] = image_digests(raw.val)
    sha256 = identity(found)

    if raw.hold_out_test:
        train, held = _hold_out(train, TEST_FRACTION, salt=TEST_SALT)
        test, test_digests = (held.take(), held.digests) if held else (None, None)
        notes.append(f"The data bring no test split: {_count(test)} were held out, the same for every seed.")
    elif test is None:
        notes.append("The data bring no test split: there is no test accuracy.")

    notes += _leaks(train.digests, test_digests)
    val = raw.val
    if val is not None and val_fraction == 0:
        notes.append(f"The data bring a validation split of {_count(val)}: it is used as it is.")
    elif val is None and val_fraction > 0:
        train, held = _hold_out(train, val_fraction, salt=f"val:{seed}")
        val = held.take() if held else None
        if val is None:
            notes.append("There is no validation split: no class can spare an image for it.")
    notes += _absent(val, "validation") + _absent(test, "test")

    learned = _learned(train, limit, seed, notes)
    test_sha256 = None if test_digests is None else identity({"test": test_digests})
    made = DataSplits(raw.name, learned, val, test, sha256, test_sha256, tuple(notes))
    return made if shots is None else with_shots(made, shots, seed)


def with_shots(data: DataSplits, shots: int, seed: int) -> DataSplits:
    """Return splits with this many training images of every class; a class that has fewer keeps them all.

    Fewer shots take images of which more shots take all: those of 1 are among those of 5.
    """
    train = take(data.train, places_of_shots(data.train, shots, seed))
    counts = torch.bincount(data.train.labels, minlength=len(data.classes))
    few = int((counts < shots).sum())
    note = f"--shots {shots} is more than {few} of {len(counts)} classes have: all of their images are used."
    return replace(data, train=train, notes=(*data.notes, *([note] if few else [])))


def places_of_shots(train: ImageSet, shots: int, seed: int) -> NDArray[np.int64]:
    """Return which images `with_shots` keeps: places in the set, in its order.

    Args:
        train: the training images.
        shots: how many of every class.
        seed: decides which.
    """
    by_class, rank, _ = _ranked(train.labels, image_digests(train), f"shots:{seed}")
    return np.sort(by_class[rank < shots])


def _leaks(learned: Digests, tested: Digests | None) -> list[str]:
    """Return a sentence on test images that are training images too; what is held out for validation counts as such."""
    seen = set(learned)
    count = sum(digest in seen for digest in tested or ())
    if not count:
        return []
    are = "test image is a training image" if count == 1 else "test images are training images"
    return [f"{count:,} {are} too, pixel for pixel, so the test accuracy is too good; see finetune check."]


def check_settings(*, val_fraction: float, limit: int | None) -> None:
    """Refuse a share or a count that cannot be right, before any file is read.

    Raises:
        UsageError: `val_fraction` outside 0..1 (1 itself leaves nothing to learn from), or `limit` below 1.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction:g}; expected 0 or more and less than 1, for example 0.1.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}; expected at least 1 training image.")


def image_digests(images: ImageSet) -> Digests:
    """Return the sha256 of class name, shape and pixels of each image: N digests of 32 bytes, in the set's order."""
    if isinstance(images.images, Streamed):
        return images.images.named_digests
    starts = class_starts(images.classes, images.images.shape[1:])
    digests = []
    for row, label in zip(_rows(images.images), images.labels.tolist(), strict=True):
        image = starts[label].copy()
        image.update(row)
        digests.append(image.digest())
    return digests


def pixel_digests(images: Images) -> Digests:
    """Return the sha256 of the pixels of each image uint8 (N, 3, H, W): N digests of 32 bytes."""
    if isinstance(images, Streamed):
        return images.pixel_digests
    return [hashlib.sha256(row).digest() for row in _rows(images)]


def _rows(images: Images) -> NDArray[np.uint8]:
    """Return images in memory as rows of bytes (N, 3*H*W)."""
    rows: NDArray[np.uint8] = images[:].reshape(len(images), -1).contiguous().numpy()
    return rows


def identity(splits: Mapping[str, Digests]) -> str:
    """Return the hex sha256 of a data set: of every image's split and digest, in sorted order.

    Args:
        splits: digests of each split's images, by split name (`train`, `val`, `test`).
    """
    whole = hashlib.sha256()
    for name in sorted(splits):
        whole.update(f"{name}\0{len(splits[name])}\0".encode())
        whole.update(b"".join(sorted(splits[name])))
    return whole.hexdigest()


def choose(
    labels: torch.Tensor, digests: Digests, count: int, *, salt: str, leave_one: bool = False, cover: bool = False
) -> Mask:
    """Choose `count` images, each class in proportion to its size, by a salted hash of their digests.

    Within a class, images are ranked by hash. The image at rank r of a class of n stands at (r + 0.5) / n, and those
    with the lowest standing are taken. So a larger count takes the same images and more.

    Args:
        labels: int64 (N,), of the images to choose from.
        digests: of the same images, in the same order.
        count: how many to take.
        salt: text hashed with every digest: another salt is another choice.
        leave_one: never take the last image of a class.
        cover: take one image of every class before a second of any.

    Returns:
        bool (N,), True for the images taken. Fewer than `count` when `leave_one` leaves no more.
    """
    by_class, rank, size = _ranked(labels, digests, salt)
    standing = (rank + 0.5) / size
    later = (rank > 0) & cover
    order = np.lexsort((labels.numpy()[by_class], standing, later))
    if leave_one:
        order = order[(rank < size - 1)[order]]
    mask = np.zeros(len(by_class), dtype=np.bool_)
    mask[by_class[order[:count]]] = True
    return mask


def _ranked(
    labels: torch.Tensor, digests: Digests, salt: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rank the images of each class by a salted hash of their digests.

    Returns:
        int64 (N,) each: the images' places, class after class in the order of their hashes; the rank of each of these
        in its class, from 0; the size of its class.
    """
    start = hashlib.sha256(salt.encode() + b"\0")
    hashes = []
    for digest in digests:
        image = start.copy()
        image.update(digest)
        hashes.append(image.digest()[:8])
    keys = np.frombuffer(b"".join(hashes), dtype=">u8").astype(np.uint64)

    classes = labels.numpy()
    by_class = np.lexsort((keys, classes))
    label = classes[by_class]
    sizes = np.bincount(classes)  # (K,)
    rank = np.arange(len(classes)) - (np.cumsum(sizes) - sizes)[label]
    return by_class, rank, sizes[label]


def take(images: ImageSet, places: Sequence[int] | NDArray[np.int64]) -> ImageSet:
    """Return the images at `places` (M numbers from 0 to N - 1), in that order."""
    index = np.asarray(places, dtype=np.int64)
    return ImageSet(chosen(images.images, index), images.labels[torch.from_numpy(index)], images.classes)


def _hold_out(pile: Pile, fraction: float, *, salt: str) -> tuple[Pile, Pile | None]:
    """Split off a share (at least one image, if any class can spare one): the rest, and the share."""
    count = max(1, round(fraction * len(pile.digests)))
    mask = choose(pile.images.labels[pile.places], pile.digests, count, salt=salt, leave_one=True)
    if not mask.any():
        return pile, None
    return pile.part(np.flatnonzero(~mask)), pile.part(np.flatnonzero(mask))


def _learned(train: Pile, limit: int | None, seed: int, notes: list[str]) -> ImageSet:
    """Return the training images, limited and in the order of their digests; what is notable goes into `notes`."""
    there = len(train.digests)
    if limit is not None and limit < there:
        labels = train.images.labels[train.places]
        train = train.part(np.flatnonzero(choose(labels, train.digests, limit, salt=f"limit:{seed}", cover=True)))
    order = sorted(range(len(train.digests)), key=train.digests.__getitem__)
    learned = train.part(np.array(order, np.int64)).take()
    missing = len(learned.classes) - len(torch.unique(learned.labels))
    if limit is not None and limit < there and missing:
        of = len(learned.classes)
        notes.append(f"--limit {limit} leaves {missing} of {of} classes without a training image.")
    elif limit is not None and limit > there:
        notes.append(f"--limit {limit} is more than there is: all {_count(learned)} are used for training.")
    return learned


def _absent(images: ImageSet | None, split: str) -> list[str]:
    """Name the classes of which a split has no image; labels are those of train, so none has moved."""
    if images is None:
        return []
    counts = torch.bincount(images.labels, minlength=len(images.classes)).tolist()
    absent = [name for name, count in zip(images.classes, counts, strict=True) if not count]
    if not absent:
        return []
    return [
        f"The {split} images are of {len(counts) - len(absent)} of {len(counts)} classes: there are none of "
        f"{first_few(absent)}, and {split} figures say nothing about {'it' if len(absent) == 1 else 'them'}."
    ]


def _count(images: ImageSet | None) -> str:
    count = 0 if images is None else len(images)
    return f"{count:,} image" if count == 1 else f"{count:,} images"
