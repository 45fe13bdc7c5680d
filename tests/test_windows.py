"""Random windows of feature maps: which part training sees, when there are any, and that a run can be repeated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from make_data import write_image_folder
from make_run import metrics, model_bytes, tiny_recipe, write_weights
from torch import nn

from finetune.pipeline import run
from finetune.recipe import Recipe
from finetune.windows import SMALLEST_SIDE, Windows, choose_windows, window_sides
from weights.errors import UsageError


def test_a_window_is_the_part_that_its_corner_says() -> None:
    maps = torch.arange(3 * 2 * 6 * 6, dtype=torch.float32).reshape(3, 2, 6, 6)
    corners = torch.tensor([[0, 0], [2, 1], [1, 2]])
    (cut,) = Windows(6, (6, 4)).cut((maps,), 1, corners)
    for image, (top, left) in enumerate(corners.tolist()):
        assert torch.equal(cut[image], maps[image, :, top : top + 4, left : left + 4])
    assert cut.is_contiguous(memory_format=torch.channels_last)


def test_corners_reach_every_place_and_differ_from_epoch_to_epoch_and_seed_to_seed() -> None:
    windows = Windows(14, (12, 12, 14))
    first, second = windows.corners(500, 0, seed=0), windows.corners(500, 1, seed=0)
    other = windows.corners(500, 0, seed=1)
    assert first is not None
    assert second is not None
    assert other is not None
    assert {tuple(corner) for corner in first.tolist()} == {(top, left) for top in range(3) for left in range(3)}
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(first, windows.corners(500, 0, seed=0))  # a resumed run draws the same
    assert windows.corners(500, 2, seed=0) is None  # the whole map


@pytest.mark.parametrize(("side", "epochs"), [(14, 8), (28, 3), (56, 15), (17, 10), (14, 1), (14, 2)])
def test_windows_end_with_the_whole_map_and_keep_its_parity(side: int, epochs: int) -> None:
    sides = window_sides(side, epochs)
    assert len(sides) == epochs
    assert sides[-1] == side  # evaluation sees whole maps, so batch norms end on them
    assert list(sides) == sorted(sides)
    assert all((side - each) % 2 == 0 and each > side / 2 for each in sides)


def test_the_cost_is_the_mean_share_of_the_area() -> None:
    assert Windows(14, (7, 14)).cost == pytest.approx((0.25 + 1) / 2)


def chosen(mode: str, shapes: list[tuple[int, ...]], suffix: nn.Module, **settings: Any) -> Windows | None:
    return choose_windows(Recipe(windows=mode, epochs=8, **settings), shapes, suffix)


class Fixed(nn.Module):
    """Takes maps of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4 * 14 * 14, 5)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc(maps.flatten(1))
        return scores


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def test_windows_are_had_when_asked_for_and_where_they_can_be_with_auto() -> None:
    assert chosen("on", [(4, 14, 14)], pooled()) == Windows(14, window_sides(14, 8))
    assert chosen("off", [(4, 14, 14)], pooled()) is None
    assert chosen("auto", [(4, 14, 14)], pooled()) == Windows(14, window_sides(14, 8))
    assert chosen("auto", [(4, 14, 14)], pooled(), patience=2) is None
    assert chosen("auto", [(4, 7, 7)], pooled()) is None
    assert chosen("auto", [(4, 14, 14)], Fixed()) is None


class Pooled(nn.Module):
    """Takes maps of any size, and adds something to each place that it scales to the map."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 14, 14))
        self.head = pooled()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(maps + nn.functional.interpolate(self.pos_embed, size=maps.shape[-2:]))
        return scores


@pytest.mark.parametrize("which", ["fixed", "position embedding", "vgg", "vit"])
def test_layers_that_need_whole_maps(which: str) -> None:
    if which == "vgg":  # scales small maps up, and gives each place of them its own weights
        vgg = timm.create_model("vgg11", num_classes=5)
        suffix, shape = nn.Sequential(vgg.pre_logits, vgg.head), (512, 14, 14)
    elif which == "vit":
        with pytest.raises(UsageError, match="what reaches them is 197x192; use"):
            chosen("on", [(197, 192)], timm.create_model("test_vit").head)
        return
    else:
        suffix, shape = Fixed() if which == "fixed" else Pooled(), (4, 14, 14)
    with pytest.raises(UsageError, match="needs layers that take maps of any size, and these do not"):
        chosen("on", [shape], suffix)


def test_a_run_that_may_end_early_gets_no_windows() -> None:
    with pytest.raises(UsageError, match="--windows on and --budget 2h do not go together"):
        chosen("on", [(4, 14, 14)], pooled(), budget="2h")
    with pytest.raises(UsageError, match="--windows on and --patience 3 do not go together"):
        chosen("on", [(4, 14, 14)], pooled(), patience=3)


def test_asking_leaves_the_trained_layers_as_they_were() -> None:
    suffix = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = {name: value.clone() for name, value in suffix.state_dict().items()}
    chosen("on", [(4, 14, 14)], suffix)
    assert suffix.training
    assert all(torch.equal(value, before[name]) for name, value in suffix.state_dict().items())


def test_windows_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UsageError, match=f"at least {SMALLEST_SIDE} x {SMALLEST_SIDE} .* reaches them is 4x7x7; use"):
        chosen("on", [(4, 7, 7)], pooled())
    with pytest.raises(UsageError, match="reaches them is nothing, since the model is not cut"):
        chosen("on", [], pooled())
    with pytest.raises(UsageError, match="reaches them is 4x14x14, 4x28x28"):
        chosen("on", [(4, 14, 14), (4, 28, 28)], pooled())


def test_a_run_on_windows_is_the_same_cached_and_uncached_and_another_than_without(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photos", 24, 8)
    weights = write_weights(tmp_path / "test_resnet.safetensors")
    recipe = tiny_recipe(tmp_path / "photos", weights, tmp_path / "cache", image_size=160, windows="on", epochs=3)
    summary = run(recipe, tmp_path / "cached")
    assert summary["windows"]["sides"][0] < summary["windows"]["map"] == summary["windows"]["sides"][-1]
    run(dataclasses.replace(recipe, cache="off"), tmp_path / "live")
    assert model_bytes(tmp_path / "live") == model_bytes(tmp_path / "cached")
    assert metrics(tmp_path / "live") == metrics(tmp_path / "cached")
    plain = run(dataclasses.replace(recipe, windows="off"), tmp_path / "plain")
    assert plain["windows"] is None
    assert metrics(tmp_path / "plain") != metrics(tmp_path / "cached")
