"""Which images are the same picture, and which look alike.

Look-alikes are found in two steps. Hashes name candidates: pairs whose hashes differ in few bits, which tells
of the same coarse pattern of light and dark. Thumbnails decide: what is left of both without their coarse pattern has
to be correlated. That passes over brightness, contrast and colour, and tells one photo twice from two of a kind
(docs/data.md has the measurement).

Legend: N images, P distinct pictures, M pairs, T bits of threshold, S the side of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.functional import gaussian_blur

from finetune.images import Progress
from finetune.originals import THUMBNAIL, Look, Originals

BITS = 64  # of a perceptual hash
ROWS = 256  # hashes compared with all others at a time
MOST_PRODUCTS = 16_000_000  # in float32 64 MB, whatever the number of hashes
MOST_CANDIDATES = 1_000_000  # pairs whose details are compared: 24 MB, and a minute or two
MOST_PAIRS = 100_000  # near pairs that are kept; a set with more consists of look-alikes
COARSE = 2.0  # pixels of a thumbnail: the width (sigma) of the blur that is taken away
BLUR = 13  # pixels across, three widths to each side
SHIFT = 1  # pixels of a thumbnail by which look-alikes may lie apart
DETAIL = 0.7  # least correlation of what is left: chosen on CIFAR-100 (docs/data.md)
PAIRS = 4096  # compared in detail at a time, some 100 MB


@dataclass(frozen=True)
class NearPair:
    """Two images that look alike and are not the same picture.

    Attributes:
        first: one of them; of the training images where the pair crosses from train to test.
        second: the other; of the test images in that case.
        distance: bits in which their hashes differ.
        likeness: correlation of their fine detail, up to 1.
    """

    first: int
    second: int
    distance: int
    likeness: float


@dataclass(frozen=True)
class Duplicates:
    """The duplicates of a data set.

    Attributes:
        groups: images with the same pixels, each group in ascending order and of two or more.
        leaks: (test image, a training image with the same pixels), one for each such test image.
        near: look-alikes, those from train to test first, the most alike first.
        near_leaks: the test images that look like a training image, each with the likest one; those in `leaks` are
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
    found, complete = look_alikes([originals.looks[members[0]] for members in hashed], threshold, progress)
    near: list[NearPair] = []
    nearest: dict[int, NearPair] = {}
    for pair in found:
        one, other = hashed[pair.first], hashed[pair.second]
        crossing = _crossing(originals, one, other)
        first, second = crossing[0] if crossing else (one[0], other[0])
        near.append(replace(pair, first=first, second=second))
        for learned, test in crossing:
            if test not in nearest or pair.likeness > nearest[test].likeness:
                nearest[test] = replace(pair, first=learned, second=test)
    near.sort(key=lambda pair: (not leads_to_test(originals, pair), -pair.likeness, pair.first, pair.second))
    known = {test for test, _ in leaks}
    near_leaks = [pair for test, pair in sorted(nearest.items()) if test not in known]
    return Duplicates(groups, sorted(leaks), near, near_leaks, complete)


def group_by(digests: Sequence[bytes]) -> list[list[int]]:
    """Return the places of each distinct digest, in the order in which they first come."""
    places: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        places.setdefault(digest, []).append(place)
    return list(places.values())


def look_alikes(looks: Sequence[Look], threshold: int, progress: Progress | None = None) -> tuple[list[NearPair], bool]:
    """Return pairs of pictures that look alike, and whether these are all.

    Args:
        looks: P pictures with hashes, no two with the same pixels.
        threshold: T.
        progress: called as progress("compare images", done, total).
    """
    hashes = np.array([look.hash for look in looks], dtype=np.uint64)
    candidates, complete = near_pairs(hashes, threshold, progress)
    if not len(candidates):
        return [], complete
    thumbnails = torch.from_numpy(np.stack([look.thumbnail for look in looks if look.thumbnail is not None]))
    parts = [detail_likeness(thumbnails[part[:, 0]], thumbnails[part[:, 1]]) for part in candidates.split(PAIRS)]
    likeness = torch.cat(parts)
    alike = likeness >= DETAIL
    rows = zip(candidates[alike].tolist(), likeness[alike].tolist(), strict=True)
    near = [NearPair(first, second, bits, value) for (first, second, bits), value in rows]
    return near[:MOST_PAIRS], complete and len(near) <= MOST_PAIRS


def detail_likeness(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the correlation of the fine detail of M pairs of thumbnails, at the shift at which it is largest.

    Args:
        one: uint8 (M, S, S).
        other: their partners, the same.

    Returns:
        float32 (M,), -1 to 1; 0 where there is no detail.
    """
    sharp = [_without_coarse(side) for side in (one, other)]
    best = torch.full((len(one),), -1.0)
    for down in range(-SHIFT, SHIFT + 1):
        for right in range(-SHIFT, SHIFT + 1):
            here, there = (
                side[:, _part(sign * down), _part(sign * right)] for sign, side in zip((1, -1), sharp, strict=True)
            )
            best = torch.maximum(best, _correlation(here.flatten(1), there.flatten(1)))
    return best


def _part(shift: int) -> slice:
    """Return the pixels of a row of S that lie over one of its twin that is shifted by so many."""
    return slice(max(0, shift), THUMBNAIL + min(0, shift))


def _without_coarse(thumbnails: torch.Tensor) -> torch.Tensor:
    """Return thumbnails uint8 (M, S, S) less their blurred selves: float32 (M, S, S)."""
    values = thumbnails.float()
    coarse: torch.Tensor = gaussian_blur(values[:, None], [BLUR, BLUR], [COARSE, COARSE])[:, 0]
    return values - coarse


def _correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the correlation of each row with its partner: float32 (M,) of float32 (M, pixels)."""
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    lengths: torch.Tensor = one.norm(dim=1) * other.norm(dim=1)
    return (one * other).sum(1) / lengths.clamp_min(1e-6)


def near_pairs(
    hashes: NDArray[np.uint64], threshold: int, progress: Progress | None = None
) -> tuple[torch.Tensor, bool]:
    """Return all pairs of hashes that differ in at most T bits.

    As vectors of +1 and -1, two hashes that differ in d bits have the product 64 - 2 d, so a matrix product compares
    hundreds of hashes with all others at once; its sums are whole numbers that float32 holds exactly.

    Args:
        hashes: uint64 (P,).
        threshold: T.
        progress: called as progress(what, done, total).

    Returns:
        int64 (M, 3): first, second, bits, with first < second; and whether these are all: after `MOST_CANDIDATES` the
        search ends.
    """
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)  # (P, 64)
    signs = torch.from_numpy(bits).float() * 2 - 1
    found, count = [torch.zeros(0, 3, dtype=torch.int64)], 0
    rows_each = max(1, min(ROWS, MOST_PRODUCTS // max(1, len(signs))))
    for start in range(0, len(signs), rows_each):
        if progress is not None:
            progress("compare images", start, len(signs))
        products = signs[start : start + rows_each] @ signs[start:].T  # (up to ROWS, P - start)
        rows, columns = (products >= BITS - 2 * threshold).triu(1).nonzero(as_tuple=True)
        distances = (BITS - products[rows, columns].long()) // 2
        found.append(torch.stack([rows + start, columns + start, distances], dim=1))
        count += len(rows)
        if count > MOST_CANDIDATES:
            return torch.cat(found)[:MOST_CANDIDATES], False
    return torch.cat(found), True


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
