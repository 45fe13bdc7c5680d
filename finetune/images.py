"""Sets of images: what every part of the project passes around as data.

Legend: N images, C = 3 channels (RGB), H and W pixels. Images stay uint8 until they are on the device. They are a
tensor in memory or, where they do not fit, a `finetune.stream.Streamed`, which decodes the rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) while something long goes on; total is 0 when it is not known."""


class Images(Protocol):
    """What is asked of images uint8 (N, 3, H, W): a tensor answers it, and so do images that are decoded as wanted."""

    @property
    def shape(self) -> torch.Size:
        """(N, 3, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | torch.Tensor, /) -> torch.Tensor:
        """Return images uint8 (B, 3, H, W) of a slice, or of int64 (B,) rows."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    Attributes:
        images: uint8 (N, 3, H, W), values 0..255.
        labels: int64 (N,), indices into `classes`.
        classes: class names, the same tuple in every split of a data set.
    """

    images: Images
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RawData:
    """A data set as a reader found it, before anything is held out.

    Attributes:
        name: short name for folders and tables.
        train: every training image there is.
        val: the validation split that the data bring, or None.
        test: the test split that the data bring, or None.
        notes: sentences to show the user (what was skipped).
        hold_out_test: True where the data are one pile of images, from which a test split has to be taken.
    """

    name: str
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    notes: tuple[str, ...] = ()
    hold_out_test: bool = False


@dataclass(frozen=True)
class DataSplits:
    """A data set, split and ready for a run.

    Attributes:
        name: short name for folders and tables (`cifar100`, or the folder's name).
        train: images to learn from, after `--limit` and without the validation images.
        val: images held out of train, or None with `--val-fraction 0`.
        test: images read once at the end, or None when the data bring none.
        sha256: identity of the whole data set as found on disk (every split, before limit and validation split):
            pixels, class names and split, not file order or layout.
        test_sha256: the same for the test split alone, or None.
        notes: sentences to show the user (what was held out, what was skipped).
    """

    name: str
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    sha256: str
    test_sha256: str | None
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.train.classes


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """Return "a, b, c" for a sentence; names beyond `limit` are counted ("a, b and 3 more")."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")
