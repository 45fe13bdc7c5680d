"""Batches and splits, shared out among the processes of a run.

Every process draws the batches that one process alone would draw. Where features are computed ahead, each holds those
of a block of every split, and trains on the rows of a batch that lie in its block; where batches are computed as they
are wanted, each takes an equal share. Shares may be uneven: losses are weighted so that the mean of the processes'
gradients is the gradient of the mean over the whole batch (docs/decisions/0011).

Legend: B images in a batch, R of them in this process's part, N images of a split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from finetune.augment import Views
from finetune.images import ImageSet
from finetune.inference import Source, lies_on_device, predict
from finetune.ranks import Ranks
from finetune.stream import Streamed
from weights.errors import UsageError

LEAST = 2  # rows in a step: none is no step, and a batch norm needs two


@dataclass(frozen=True)
class Split:
    """A split as the loop sees it.

    Attributes:
        source: gives inputs.
        labels: int64 (N,), on the CPU.
        views: views per image in the source.
        own: the rows that the source can give in this process; None for any.
    """

    source: Source
    labels: torch.Tensor
    views: int
    own: range | None = None


@dataclass(frozen=True)
class Part:
    """What one process trains on of a batch.

    Attributes:
        rows: int64 (R,), places in the split; those from `count` on only fill up and count for nothing.
        views: int64 (R,), the view of each.
        count: how many count.
        whole: B.
        scale: what makes of a mean over R the part's share in the mean over B; None where the part is the batch.
    """

    rows: torch.Tensor
    views: torch.Tensor
    count: int
    whole: int
    scale: float | None

    @property
    def trained(self) -> torch.Tensor:
        """The rows that count."""
        return self.rows[: self.count]

    def counts(self, weights: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
        """Return how much each row's image counts, float32 (R,) on the device; None where each counts once.

        Args:
            weights: float32 (N,), how much each image of the split counts, on the device; all the same when None.
            rows: `rows` on the device.
        """
        if self.scale is None:
            return None if weights is None else weights[rows]
        counts = torch.ones(len(rows), device=rows.device) if weights is None else weights[rows]
        counts[self.count :] = 0
        return counts

    def scaled(self, counts: torch.Tensor | None) -> torch.Tensor | None:
        """Return what losses are multiplied with before their mean over R is taken, given what `counts` returned."""
        return counts if counts is None or self.scale is None else counts * self.scale


def parts_of(ranks: Ranks, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], own: range | None) -> list[Part]:
    """Return this process's parts of an epoch's batches (rows, views); other arguments as for `part_of`."""
    return [part_of(ranks, rows, views, own) for rows, views in batches]


def part_of(ranks: Ranks, rows: torch.Tensor, views: torch.Tensor, own: range | None) -> Part:
    """Return this process's part of a batch.

    Args:
        ranks: of this process.
        rows: int64 (B,), the whole batch's places in the split.
        views: int64 (B,), the view of each.
        own: the rows whose features this process holds; None where it can have any.
    """
    if ranks.alone:
        return Part(rows, views, len(rows), len(rows), None)
    places = _places(ranks, rows, own)
    filled = max(LEAST, len(places))
    part = rows.new_full((filled,), own.start if own else int(rows[0]))
    seen = views.new_zeros(filled)
    part[: len(places)], seen[: len(places)] = rows[places], views[places]
    return Part(part, seen, len(places), len(rows), filled * ranks.size / len(rows))


def _places(ranks: Ranks, rows: torch.Tensor, own: range | None) -> torch.Tensor:
    """Return where in a batch's rows this process's part stands: int64."""
    if own is None:
        return torch.arange(len(rows)).tensor_split(ranks.size)[ranks.rank]
    return torch.nonzero((rows >= own.start) & (rows < own.stop)).flatten()


@dataclass(frozen=True)
class Shard:
    """The features of a block of a split's rows, asked for by the split's own numbers.

    Attributes:
        features: gives rows of the block, from 0.
        rows: the block.
    """

    features: Source
    rows: range

    @property
    def on_device(self) -> bool:
        """Whether the features lie on the device, so that rows may be given there."""
        return lies_on_device(self.features)

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the crossing tensors of rows of the block; arguments as for `Features.take`."""
        return self.features.take(rows - self.rows.start, views)


def own_block(ranks: Ranks, data: ImageSet, views: Views) -> tuple[ImageSet, Views]:
    """Return the images of a split, with their views, whose features this process computes and holds."""
    if ranks.alone:
        return data, views
    rows = ranks.part(len(data))
    part = slice(rows.start, rows.stop)
    draws = None if views.draws is None else views.draws[:, part].contiguous()
    images = data.images.part(np.arange(len(data))[part]) if isinstance(data.images, Streamed) else data.images[part]
    return replace(data, images=images, labels=data.labels[part]), replace(views, draws=draws)


def require_rows(ranks: Ranks, counts: dict[str, int]) -> None:
    """Refuse splits with fewer images than processes.

    Args:
        ranks: of this process.
        counts: images of each split, by its name for people; none is no split.

    Raises:
        UsageError: naming the split.
    """
    for name, count in counts.items():
        if 0 < count < ranks.size:
            raise UsageError(
                f"{count} {name} image{'' if count == 1 else 's'} cannot be shared by {ranks.size} processes; start "
                f"{count} at most."
            )


def shared_logits(
    ranks: Ranks,
    module: nn.Module,
    split: Split,
    rows: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int,
) -> torch.Tensor:
    """Return logits float32 (R, classes) of images in all processes, each having computed its part of them.

    Args:
        ranks: of this process.
        module: takes what the source gives; the same in all processes.
        split: the images' split.
        rows: int64 (R,), which images.
        device: where the module is.
        dtype: torch.bfloat16 runs under autocast; torch.float32 does not.
        batch: images at a time.

    Raises:
        DivergedError: a logit is not finite.
    """
    if ranks.alone:
        return predict(module, split.source, rows, device, dtype, batch=batch)
    places = _places(ranks, rows, split.own)
    some = rows[places] if len(places) else rows.new_tensor([split.own.start if split.own else 0])
    logits = predict(module, split.source, some, device, dtype, batch=batch)[: len(places)]
    whole = logits.new_zeros(len(rows), logits.shape[1])
    whole[places] = logits
    return ranks.sum(whole)


def shared_losses(ranks: Ranks, losses: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return each image's last loss, whichever process saw it.

    Args:
        ranks: of this process.
        losses: float32 (N,).
        rows: int64, which images this process saw in this epoch; no other process saw them.
    """
    if ranks.alone:
        return losses
    seen = torch.zeros(len(losses), device=losses.device)
    seen[rows.to(losses.device)] = 1
    theirs, anywhere = ranks.sum(losses * seen), ranks.sum(seen) > 0
    return torch.where(anywhere.to(losses.device), theirs.to(losses.device), losses)


def synchronise_batch_norms(ranks: Ranks, suffix: nn.Module, device: torch.device) -> None:
    """Let trained batch norms take their statistics over the batches of all processes: on GPUs, where PyTorch can.

    Frozen ones stay as they are. Weights and statistics are the same tensors afterwards, under the same names.
    """
    if ranks.alone or device.type != "cuda":
        return
    found = [
        name
        for name, module in suffix.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and "train" not in vars(module)  # freeze() puts it there
    ]
    twins: dict[nn.Module, nn.Module] = {}
    for name in found:
        module = suffix.get_submodule(name)
        if module not in twins:
            twins[module] = convert_sync_batchnorm(module)
        parent, _, child = name.rpartition(".")
        setattr(suffix.get_submodule(parent), child, twins[module])
