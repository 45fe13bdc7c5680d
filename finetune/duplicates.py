"""Which images are the same picture, and which look alike.

Legend: N images, P distinct pictures, T bits of threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.images import Progress
from finetune.originals import Originals

BITS = 64  # of a perceptual hash
ROWS = 256  # hashes compared with all others at a time
MOST_PRODUCTS = 16_000_000  # in float32 64 MB, whatever the number of hashes
MOST_PAIRS = 100_000  # near pairs that are kept; a set with more consists of look-alikes


@dataclass(frozen=True)
class NearPair:
    """Two images that look alike and are not the same picture.

    Attributes:
        first: one of them; of the training images where the pair crosses from train to test.
        second: the other; of the test images in that case.
        distance: bits in which their hashes differ.
    """

    first: int
    second: int
    distance: int


@dataclass(frozen=True)
class Duplicates:
    """The duplicates of a data set.

    Attributes:
        groups: images with the same pixels, each group in ascending order and of two or more.
        leaks: (test image, a training image with the same pixels), one for each such test image.
        near: look-alikes, those from train to test first, the nearest first.
        near_leaks: the test images that look like a training image, each with the nearest one; those in `leaks` are
            left out.
        complete: whether `near` holds all pairs there are.
    """

    groups: list[list[int]]
    leaks: list[tuple[int, int]]
    near: list[NearPair]
    near_leaks: list[NearPair]
    complete: bool


def find_duplicates(originals: Originals, threshold: int, progress: Progress | None = None) -> Duplicates:
    """Find what is there twice.

    Args:
        originals: the data set.
        threshold: T, most bits in which the hashes of look-alikes differ.
        progress: called as progress(what, done, total).
    """
    pictures = group_by([look.digest for look in originals.looks])
    groups = [members for members in pictures if len(members) > 1]
    leaks: list[tuple[int, int]] = []
    for members in groups:
        trained = [image for image in members if originals.split_of(image) == "train"]
        if trained:
            leaks += [(image, trained[0]) for image in members if originals.split_of(image) == "test"]
    hashed = [members for members in pictures if originals.looks[members[0]].hash is not None]
    hashes = np.array([originals.looks[members[0]].hash for members in hashed], dtype=np.uint64)
    found, complete = near_pairs(hashes, threshold, progress)
    near: list[NearPair] = []
    nearest: dict[int, NearPair] = {}
    for one, other, distance in found:
        crossing = _crossing(originals, hashed[one], hashed[other])
        near.append(NearPair(*(crossing[0] if crossing else (hashed[one][0], hashed[other][0])), distance))
        for learned, test in crossing:
            if test not in nearest or distance < nearest[test].distance:
                nearest[test] = NearPair(learned, test, distance)
    near.sort(key=lambda pair: (not leads_to_test(originals, pair), pair.distance, pair.first, pair.second))
    known = {test for test, _ in leaks}
    near_leaks = [pair for test, pair in sorted(nearest.items()) if test not in known]
    return Duplicates(groups, sorted(leaks), near, near_leaks, complete)


def group_by(digests: Sequence[bytes]) -> list[list[int]]:
    """Return the places of each distinct digest, in the order in which they first come."""
    places: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        places.setdefault(digest, []).append(place)
    return list(places.values())


def near_pairs(
    hashes: NDArray[np.uint64], threshold: int, progress: Progress | None = None
) -> tuple[list[list[int]], bool]:
    """Return all pairs of hashes that differ in at most T bits.

    As vectors of +1 and -1, two hashes that differ in d bits have the product 64 - 2 d, so a matrix product compares
    hundreds of hashes with all others at once; its sums are whole numbers that float32 holds exactly.

    Args:
        hashes: uint64 (P,).
        threshold: T.
        progress: called as progress(what, done, total).

    Returns:
        [first, second, bits] with first < second, and whether these are all: after `MOST_PAIRS` the search ends.
    """
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)  # (P, 64)
    signs = torch.from_numpy(bits).float() * 2 - 1
    found: list[list[int]] = []
    rows_each = max(1, min(ROWS, MOST_PRODUCTS // max(1, len(signs))))
    for start in range(0, len(signs), rows_each):
        if progress is not None:
            progress("compare images", start, len(signs))
        products = signs[start : start + rows_each] @ signs[start:].T  # (up to ROWS, P - start)
        rows, columns = (products >= BITS - 2 * threshold).triu(1).nonzero(as_tuple=True)
        rows, columns = rows[: MOST_PAIRS + 1], columns[: MOST_PAIRS + 1]
        distances = (BITS - products[rows, columns].long()) // 2
        found += torch.stack([rows + start, columns + start, distances], dim=1).tolist()
        if len(found) > MOST_PAIRS:
            return found[:MOST_PAIRS], False
    return found, True


def _crossing(originals: Originals, one: list[int], other: list[int]) -> list[tuple[int, int]]:
    """Return (training image, test image) for each test image of a pair of pictures whose other half is trained on."""
    pairs = []
    for learned, tests in ((one, other), (other, one)):
        first = next((image for image in learned if originals.split_of(image) == "train"), None)
        if first is not None:
            pairs += [(first, image) for image in tests if originals.split_of(image) == "test"]
    return pairs


def leads_to_test(originals: Originals, pair: NearPair) -> bool:
    """Tell whether a pair is of a training image and a test image."""
    return (originals.split_of(pair.first), originals.split_of(pair.second)) == ("train", "test")
