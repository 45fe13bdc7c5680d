"""A stand-in for the frozen part, and a feature cache filled from it, for tests of the cache alone.

Import with `from make_features import ...`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.augment import Preprocessing, Views
from finetune.events import Events
from finetune.features import Prefix, RowShape
from finetune.images import ImageSet
from finetune.placement import Placement
from finetune.precision import Choice
from finetune.prefix import PreparedPrefix
from finetune.sources import FeatureBuilder

CPU = torch.device("cpu")
PLAIN = Preprocessing(8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear")
FP32 = Choice("fp32", False, 100.0, 0.0, "")


def image_set(count: int, *, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 5, tuple("abcde"))


def builder(
    folder: Path, made: PreparedPrefix, *, where: str = "ram", on_disk: bool = True, limit: int = 10**9
) -> FeatureBuilder:
    notes: list[str] = []
    made_builder = FeatureBuilder(made, Placement(where, on_disk, 0, ""), folder, limit, Events(note=notes.append))
    made_builder.notes = notes  # type: ignore[attr-defined]
    return made_builder


def notes_of(made: FeatureBuilder) -> list[str]:
    return made.notes  # type: ignore[attr-defined, no-any-return]


class Counted:
    """A prefix that counts the images it computes; features are of the asked-for shapes and depend on the pixels."""

    def __init__(self, rows: tuple[RowShape, ...]) -> None:
        self.rows, self.images = rows, 0

    def run(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.images += len(images)
        outputs = []
        for row in self.rows:
            seed = images.float().mean((1, 2, 3)).reshape(-1, *[1] * len(row.shape))
            ramp = torch.arange(torch.Size(row.shape).numel()).reshape(row.shape)
            outputs.append((seed + ramp).to(row.dtype))
        return tuple(outputs)

    def prepared(self) -> PreparedPrefix:
        made = Prefix(self.run, PLAIN, torch.float32, 2, CPU, self.rows)
        return PreparedPrefix(made, FP32, {"rows": [str(row) for row in self.rows]}, 0)


TWO_TENSORS = (RowShape((4, 3, 2), torch.float32), RowShape((6,), torch.bfloat16))
NONE = Views("none", 1)


def values(made: FeatureBuilder, data: ImageSet, views: Views = NONE, view: int = 0) -> list[torch.Tensor]:
    rows = torch.arange(len(data))
    return list(made.features(data, views, "train").take(rows, torch.full_like(rows, view)))


def expected(data: ImageSet, rows: tuple[RowShape, ...] = TWO_TENSORS) -> list[torch.Tensor]:
    return list(Counted(rows).run(PLAIN(data.images)))


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )
