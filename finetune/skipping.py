"""Skipping easy images: an epoch trains on fewer of the images that the network already gets right.

An image whose loss is low moves the weights little. InfoBatch (Qin et al. 2024, "InfoBatch: Lossless Training Speed Up
by Unbiased Dynamic Data Pruning") leaves out, anew in each epoch, a random part of the images whose last loss was below
the mean, and counts the rest of these for those left out, so the expected gradient is that of the whole set. The first
epoch sees every image, since no loss is known before it, and so do the last ones (section 3.2 there).

One thing is different here: easy are always the same share of the images, and not those below the mean loss. So the
number of steps is known before the first one, and the plan and the learning-rate schedule with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

EASY_SHARE = 0.6  # of the images; below the mean loss lay 36 to 66 % of them, later epochs more (docs/log.md)
WHOLE_SHARE = 0.875  # from this share of the epochs on every image is seen (InfoBatch, section 3.2: delta)


@dataclass(frozen=True)
class Skipping:
    """Which images each epoch trains on.

    Attributes:
        images: N, training images.
        epochs: epochs in the whole run.
        share: of the easy images, what an epoch leaves out; 0 to below 1.
    """

    images: int
    epochs: int
    share: float

    def skips(self, epoch: int) -> bool:
        """Whether an epoch (from 0) leaves images out."""
        last = min(math.floor(self.epochs * WHOLE_SHARE), self.epochs - 1)
        return self.share > 0 and 0 < epoch < last

    def kept(self, epoch: int) -> int:
        """Return how many images an epoch trains on; one easy image at least, to count for the others."""
        return self.images - (min(round(self.share * self._easy), self._easy - 1) if self.skips(epoch) else 0)

    def done(self, epoch: int, unseen: int) -> float:
        """Return how many epochs are behind after `epoch` of them, when the last one left `unseen` of its images."""
        return epoch - unseen / self.kept(epoch - 1)

    @property
    def _easy(self) -> int:
        return round(EASY_SHARE * self.images)

    @property
    def cost(self) -> float:
        """Mean share of the images that an epoch trains on, 0 to 1."""
        return sum(self.kept(epoch) for epoch in range(self.epochs)) / (self.images * self.epochs)

    def choose(self, losses: torch.Tensor, epoch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what an epoch trains on and how much it counts, or None where it is every image, once.

        Args:
            losses: float32 (N,), each image's loss when it was last seen.
            epoch: from 0.
            seed: of the run; which of the easy images are left out is drawn from it and the epoch.

        Returns:
            bool (N,), True for an image that is trained on; and float32 (N,), what its loss is multiplied with: 1, and
            for easy images as much more as makes up for those left out. Both on the CPU.
        """
        if not self.skips(epoch):
            return None
        easy = losses.cpu().argsort(stable=True)[: self._easy]
        generator = torch.Generator().manual_seed((seed + 1) * 2_000_003 + epoch)  # a stream of its own
        out = easy[torch.randperm(len(easy), generator=generator)[: self.images - self.kept(epoch)]]
        kept = torch.ones(self.images, dtype=torch.bool)
        kept[out] = False
        weights = torch.ones(self.images)
        weights[easy] = len(easy) / (len(easy) - len(out))
        return kept, weights
