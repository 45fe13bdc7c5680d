"""The feature cache as runs use it: features larger than memory, and images in another order."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from make_features import TWO_TENSORS, Counted, builder, expected, image_set, same, values
from make_run import cifar_recipe, metrics, model_bytes

from finetune.cache import list_entries
from finetune.pipeline import run
from finetune.recipe import Recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("runs")
    return cifar_recipe(root)


def test_features_of_three_times_the_memory_budget_give_the_same_losses(recipe: Recipe, tmp_path: Path) -> None:
    """They are read from mapped files, and every bit is as in memory."""
    in_ram = run(dataclasses.replace(recipe, cache="ram"), tmp_path / "ram")
    budget = f"{in_ram['features']['bytes'] // 3}B"
    mapped = run(dataclasses.replace(recipe, cache_dir=tmp_path / "cache", memory_budget=budget), tmp_path / "disk")
    assert (in_ram["features"]["where"], mapped["features"]["where"]) == ("ram", "disk")
    assert mapped["features"]["bytes"] == in_ram["features"]["bytes"]
    assert metrics(tmp_path / "disk") == metrics(tmp_path / "ram")
    assert (mapped["test_loss"], mapped["train_accuracy"]) == (in_ram["test_loss"], in_ram["train_accuracy"])
    assert model_bytes(tmp_path / "disk") == model_bytes(tmp_path / "ram")


def test_permuted_images_are_computed_anew(tmp_path: Path) -> None:
    data = image_set(18)
    values(builder(tmp_path, Counted(TWO_TENSORS).prepared()), data)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    permuted = dataclasses.replace(data, images=data.images[order], labels=data.labels[order])
    counted = Counted(TWO_TENSORS)
    assert same(values(builder(tmp_path, counted.prepared()), permuted), expected(permuted))
    assert counted.images == 18


def test_a_limit_keeps_the_last_used_entries(tmp_path: Path) -> None:
    """Three sets take turns in a cache with room for two: the one that was not used for longest goes."""
    sets = {seed: image_set(18, seed=seed) for seed in range(3)}
    size = 18 * sum(row.bytes for row in TWO_TENSORS)

    def computed(seed: int) -> int:
        for entry in list_entries(tmp_path):  # a while ago: clocks of file systems may be coarser than this test
            os.utime(entry.folder, (entry.used - 10, entry.used - 10))
        counted = Counted(TWO_TENSORS)
        assert same(
            values(builder(tmp_path, counted.prepared(), limit=int(2.9 * size)), sets[seed]), expected(sets[seed])
        )
        return counted.images

    assert [computed(seed) for seed in (0, 1, 0, 2, 0, 1)] == [18, 18, 0, 18, 0, 18]
