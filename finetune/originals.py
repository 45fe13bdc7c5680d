"""Every image of a data set as it lies on disk: size, mode, what its pixels are, what it looks like.

A run decodes photos to one size; here each is decoded whole. The *digest* is the SHA-256 of the upright picture's size
and RGB pixels, so the same picture in two file formats has one digest. The *hash* is ImageHash's `phash`: 64 bits that
say which of the lowest frequencies are above their median; look-alikes differ in few of them. The *thumbnail* tells
pictures that are alike in detail from those that only have the same outline.

Legend: N images, S = 32 pixels, the side of a thumbnail.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from finetune.cifar import CifarFiles
from finetune.data import find_data, read_set
from finetune.decode import CHUNK, ImageFile, open_image, reason_of, set_warnings, upright
from finetune.images import Progress, RawData
from finetune.samples import list_samples
from finetune.shards import ShardSet, name_of
from finetune.survey import Survey, survey_folder
from weights.guard import shortened

THUMBNAIL = 32  # S: the side at which phash looks at a picture
PLAIN = 16
"""Grey levels between the darkest and the lightest point below which a picture has no pattern: its hash is noise."""


@dataclass(frozen=True)
class Look:
    """What was seen of one image.

    Attributes:
        size: (width, height) in pixels, as stored.
        mode: Pillow's mode, as stored.
        digest: of the upright RGB pixels.
        hash: perceptual hash; None of a plain picture.
        thumbnail: uint8 (S, S), grey; None of a plain picture.
    """

    size: tuple[int, int]
    mode: str
    digest: bytes
    hash: int | None
    thumbnail: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Originals:
    """A data set as found.

    Attributes:
        name: short name.
        classes: class names in label order.
        splits: the splits that are there, train first.
        split: int64 (N,), index into `splits` of each image.
        labels: int64 (N,).
        places: where each image is: a path below the data's folder, "train-000000.tar: 0017.jpg" or "train image 17".
        looks: what was seen of each.
        unreadable: (place, reason) of files that cannot be decoded; they are not among the N.
        survey: what else lies in an image folder; None for other data.
        picture: gives an image again, upright in RGB.
    """

    name: str
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    split: NDArray[np.int64]
    labels: NDArray[np.int64]
    places: list[str]
    looks: list[Look]
    unreadable: list[tuple[str, str]]
    survey: Survey | None
    picture: Callable[[int], Image.Image]

    def split_of(self, image: int) -> str:
        """Return the split of an image."""
        return self.splits[int(self.split[image])]

    def class_of(self, image: int) -> str:
        """Return the class of an image."""
        return self.classes[int(self.labels[image])]

    def counts(self) -> dict[str, list[int]]:
        """Return the images of each class, in label order, by split."""
        return {
            name: np.bincount(self.labels[self.split == number], minlength=len(self.classes)).tolist()
            for number, name in enumerate(self.splits)
        }


def read_originals(
    data: str, *, data_dir: Path | None = None, labels: str = "fine", progress: Progress | None = None
) -> Originals:
    """Read a data set as it lies on disk.

    Args:
        data: as for `--data`.
        data_dir: searched first for CIFAR by name.
        labels: `fine` or `coarse`.
        progress: called as progress("look at images", done, total).

    Raises:
        UsageError, DataError: data that are not there, or have no layout that can be read.
        OSError: a folder that cannot be listed.
    """
    found = find_data(data, data_dir=data_dir, labels=labels)
    if isinstance(found, ShardSet):
        return _from_shards(found, progress)
    if isinstance(found, Path):
        return _from_folder(survey_folder(found), progress)
    return _from_arrays(found, labels, progress)


def look_at(image: Image.Image, size: tuple[int, int], mode: str) -> Look:
    """Describe one picture.

    Args:
        image: upright, RGB.
        size: of the file, before it was turned.
        mode: of the file.
    """
    digest = hashlib.sha256(f"{image.size}\0".encode())
    digest.update(image.tobytes())
    grey = image.convert("L")
    darkest, lightest = grey.getextrema()
    if float(lightest) - float(darkest) < PLAIN:  # type: ignore[arg-type]  # numbers, in mode L
        return Look(size, mode, digest.digest(), None, None)
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)  # phash does just that
    pattern = imagehash.phash(small).hash  # bool (8, 8)
    bits = int.from_bytes(np.packbits(pattern).tobytes(), "big")
    return Look(size, mode, digest.digest(), bits, np.asarray(small))


def _from_folder(survey: Survey, progress: Progress | None) -> Originals:
    """Look at every file of a folder."""
    places = [survey.place(file) for file in survey.files]
    name = survey.root.resolve().name or "folder"
    split, labels = np.array(survey.split, np.int64), np.array(survey.labels, np.int64)
    return _from_files(name, survey.classes, survey.splits, split, labels, survey.files, places, survey, progress)


def _from_shards(found: ShardSet, progress: Progress | None) -> Originals:
    """Look at every image of shards."""
    listed = list_samples(found, progress)
    parts = list(listed.splits.values())
    files = [file for images, _ in parts for file in images]
    root = found.root.parent if found.root.is_file() else found.root
    places = [f"{file.tar.relative_to(root)}: {shortened(file.name)}" for file in files]
    split = np.repeat(np.arange(len(parts)), [len(images) for images, _ in parts]).astype(np.int64)
    labels = np.array([label for _, numbers in parts for label in numbers], np.int64)
    splits = tuple(listed.splits)
    return _from_files(name_of(found), listed.classes, splits, split, labels, files, places, None, progress)


def _from_files(
    name: str,
    classes: tuple[str, ...],
    splits: tuple[str, ...],
    split: NDArray[np.int64],
    labels: NDArray[np.int64],
    files: Sequence[ImageFile],
    places: list[str],
    survey: Survey | None,
    progress: Progress | None,
) -> Originals:
    """Look at image files; those that cannot be read are noted. The arguments are as in `Originals`, of all files."""
    seen = _look_at_files(files, progress)
    there = [index for index, look in enumerate(seen) if isinstance(look, Look)]

    def picture(image: int) -> Image.Image:
        with open_image(files[there[image]]) as opened:
            return upright(opened).copy()

    return Originals(
        name,
        classes,
        splits,
        split[there],
        labels[there],
        [places[index] for index in there],
        [look for look in seen if isinstance(look, Look)],
        [(place, look) for place, look in zip(places, seen, strict=True) if isinstance(look, str)],
        survey,
        picture,
    )


def _look_at_files(files: Sequence[ImageFile], progress: Progress | None) -> list[Look | str]:
    """Decode every file, in parallel; where one cannot be read, the reason stands in its place."""
    seen: list[Look | str] = [""] * len(files)

    def look_at_chunk(start: int) -> int:
        stop = min(start + CHUNK, len(files))
        for index in range(start, stop):
            try:
                with open_image(files[index]) as opened:
                    size, mode = opened.size, opened.mode
                    seen[index] = look_at(upright(opened), size, mode)
            except Exception as error:  # damaged bytes can make Pillow's readers raise nearly anything
                seen[index] = reason_of(files[index], error)
        return stop - start

    done = 0
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        set_warnings()
        try:
            for count in pool.map(look_at_chunk, range(0, len(files), CHUNK)):
                done += count
                if progress is not None:
                    progress("look at images", done, len(files))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return seen


def _from_arrays(found: CifarFiles | str, labels: str, progress: Progress | None) -> Originals:
    """Look at the images of CIFAR files or of a drawn set."""
    raw: RawData = read_set(found, labels=labels, progress=progress)
    sets = {name: part for name, part in (("train", raw.train), ("val", raw.val), ("test", raw.test)) if part}
    images = torch.cat([part.images[:] for part in sets.values()])
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, 3)
    size = (pixels.shape[2], pixels.shape[1])
    looks = []
    for index, image in enumerate(pixels):
        looks.append(look_at(Image.fromarray(image), size, "RGB"))
        if progress is not None and ((index + 1) % 1000 == 0 or index + 1 == len(pixels)):
            progress("look at images", index + 1, len(pixels))
    return Originals(
        raw.name,
        raw.train.classes,
        tuple(sets),
        np.repeat(np.arange(len(sets)), [len(part) for part in sets.values()]).astype(np.int64),
        torch.cat([part.labels for part in sets.values()]).numpy(),
        [f"{name} image {index}" for name, part in sets.items() for index in range(len(part))],
        looks,
        [],
        None,
        lambda image: Image.fromarray(pixels[image]),
    )
