"""Which images an epoch trains on, in which order, and which view of each: all of it from the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from finetune.augment import alternating_views
from finetune.recipe import Recipe
from finetune.residency import send

Batch = tuple[torch.Tensor, torch.Tensor]
"""Rows and the view of each, int64 (B,)."""


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Return the seed of one epoch in one process: any two (seed, epoch, rank) of a sensible size differ."""
    return seed * 1_000_003 + epoch + rank * 2**52


def epoch_batches(
    images: int, batches: int, views: int, epoch: int, recipe: Recipe, kept: torch.Tensor | None = None
) -> Iterator[Batch]:
    """Yield one epoch's batches as (rows, views), int64 (B,) each.

    The epoch visits every image once, or those that are kept, in an order drawn from the epoch's seed. Batches differ
    in size by at most one, so none is so small that its batch-norm statistics mean nothing. With one view per epoch
    each epoch has its own; altflip takes its two in turn; otherwise each image's view is drawn.

    Args:
        images: N.
        batches: how many batches.
        views: views per image.
        epoch: number of the epoch, from 0.
        recipe: seed, augment and epochs are read.
        kept: bool (N,), True for the images that the epoch visits; all of them when None.
    """
    generator = torch.Generator().manual_seed(epoch_seed(recipe.seed, epoch))
    order = torch.randperm(images, generator=generator)
    drawn = torch.randint(views, (images,), generator=generator)
    if recipe.augment == "crop" and views == recipe.epochs:
        drawn = torch.full_like(drawn, epoch)
    elif recipe.augment == "altflip":
        drawn = alternating_views(images, epoch, recipe.seed)[order]
    if kept is not None:
        visited = kept[order]
        order, drawn = order[visited], drawn[visited]
    yield from zip(order.tensor_split(batches), drawn.tensor_split(batches), strict=True)


def on_both(planned: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, Batch]]:
    """Yield each batch as it is on the host and as it is on the device, to which a whole epoch is sent at once."""
    batches = list(planned)
    if device.type == "cpu":
        yield from zip(batches, batches, strict=True)
        return
    epoch = send(torch.stack([torch.cat(column) for column in zip(*batches, strict=True)]), device)  # (2, images)
    sizes = [len(rows) for rows, _ in batches]
    yield from zip(batches, ((rows, views) for rows, views in epoch.split(sizes, dim=1)), strict=True)
