"""Skipping easy images: which are left out, how the rest counts, and that a resumed run goes on alike."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from finetune.order import epoch_batches
from finetune.recipe import Recipe
from finetune.skipping import Skipping

N, EPOCHS = 100, 8
LOSSES = torch.arange(N, 0, -1.0)  # the last image is the easiest


def test_the_first_and_the_last_epochs_see_every_image() -> None:
    skipping = Skipping(N, EPOCHS, 0.5)
    assert [skipping.kept(epoch) for epoch in range(EPOCHS)] == [100, 70, 70, 70, 70, 70, 70, 100]
    assert skipping.cost == pytest.approx(0.775)
    assert [Skipping(N, 16, 0.5).skips(epoch) for epoch in (0, 1, 13, 14, 15)] == [False, True, True, False, False]
    for epochs in (1, 2):
        assert Skipping(N, epochs, 0.5).cost == 1.0
    assert Skipping(N, EPOCHS, 0.0).cost == 1.0


def chosen(skipping: Skipping, epoch: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = skipping.choose(LOSSES, epoch, seed)
    assert found is not None
    return found


def test_only_easy_images_are_left_out_and_the_others_of_them_count_for_them() -> None:
    skipping = Skipping(N, EPOCHS, 0.5)
    kept, weights = chosen(skipping, 1, seed=0)
    assert int(kept.sum()) == skipping.kept(1) == 70
    assert bool(kept[:40].all())  # the hard ones
    assert set(weights[:40].tolist()) == {1.0}
    assert set(weights[40:].tolist()) == {2.0}
    assert float(weights[kept].sum()) == N  # the mean gradient is that of all images
    assert torch.equal(kept, chosen(skipping, 1, seed=0)[0])
    assert not torch.equal(kept, chosen(skipping, 2, seed=0)[0])
    assert not torch.equal(kept, chosen(skipping, 1, seed=1)[0])
    assert skipping.choose(LOSSES, 0, seed=0) is None


def test_an_epoch_that_a_budget_ended_is_a_part_of_the_images_that_it_would_have_seen() -> None:
    skipping = Skipping(N, EPOCHS, 0.5)
    assert [skipping.done(epoch, 35) for epoch in (1, 2)] == [0.65, 1.5]
    assert skipping.done(2, 0) == 2


def test_a_large_share_of_few_images_keeps_one_easy_image_to_count_for_the_others() -> None:
    skipping = Skipping(5, EPOCHS, 0.9)  # three easy images, of which 0.9 rounds to all
    kept, weights = skipping.choose(LOSSES[:5], 1, seed=0)
    assert kept is not None
    assert int(kept.sum()) == skipping.kept(1) == 3
    assert float(weights[kept].sum()) == 5
    assert Skipping(1, EPOCHS, 0.9).kept(1) == 1


def test_an_epoch_visits_the_kept_images_once_in_the_order_they_would_have_had() -> None:
    recipe = dataclasses.replace(Recipe(), epochs=EPOCHS, batch_size=10)
    kept = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.7
    plan = list(epoch_batches(N, 8, 2, 1, recipe, kept))
    everything = list(epoch_batches(N, 10, 2, 1, recipe))
    rows, views = (torch.cat(part) for part in zip(*plan, strict=True))
    all_rows, all_views = (torch.cat(part) for part in zip(*everything, strict=True))
    assert torch.equal(rows, all_rows[kept[all_rows]])
    assert torch.equal(views, all_views[kept[all_rows]])
