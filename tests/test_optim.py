"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from finetune.optim import make_optimizer, make_schedule, parameter_groups
from finetune.recipe import Recipe

RECIPE = Recipe(lr=0.02, head_lr_scale=10.0, weight_decay=0.001, momentum=0.8)
FRESH = frozenset({"head.weight", "head.bias"})


def make_suffix() -> nn.Module:
    module = nn.Module()
    module.conv = nn.Conv2d(2, 3, 1)
    module.norm = nn.BatchNorm2d(3)
    module.head = nn.Linear(3, 4)
    module.still = nn.Linear(3, 4).requires_grad_(False)
    return module


def stepped(schedule: str, steps: int, *, warmup: float = 0.2) -> list[list[float]]:
    """Take exactly as many steps as the schedule was made for; return each group's rate at every step."""
    recipe = replace(RECIPE, schedule=schedule, warmup=warmup)
    optimizer = make_optimizer(make_suffix(), FRESH, recipe)
    scheduler = make_schedule(optimizer, recipe, steps)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [list(column) for column in zip(*rates, strict=True)]


def test_groups_have_their_own_rates_and_decay() -> None:
    suffix = make_suffix()
    names = {id(parameter): name for name, parameter in suffix.named_parameters()}
    found = {
        (group["lr"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}  # type: ignore[attr-defined]
        for group in parameter_groups(suffix, FRESH, RECIPE)
    }
    assert found == {
        (0.02, 0.001): {"conv.weight"},
        (0.02, 0.0): {"conv.bias", "norm.weight", "norm.bias"},
        (0.2, 0.001): {"head.weight"},
        (0.2, 0.0): {"head.bias"},
    }


def test_convolutions_that_start_fresh_decay_faster_unless_a_decay_is_given() -> None:
    suffix = make_suffix()
    fresh = FRESH | {"conv.weight", "conv.bias"}

    def decays(recipe: Recipe, fresh: frozenset[str]) -> dict[str, float]:
        names = {id(parameter): name for name, parameter in suffix.named_parameters()}
        groups = parameter_groups(suffix, fresh, recipe)
        return {names[id(one)]: group["weight_decay"] for group in groups for one in group["params"]}  # type: ignore[attr-defined]

    auto = replace(RECIPE, weight_decay=None)
    plain = dict.fromkeys(("conv.bias", "norm.weight", "norm.bias", "head.bias"), 0.0)
    assert decays(auto, fresh) == {**plain, "conv.weight": 2e-3, "head.weight": 5e-4}
    assert decays(auto, FRESH) == {**plain, "conv.weight": 5e-4, "head.weight": 5e-4}
    assert decays(replace(auto, optimizer="adamw"), fresh)["conv.weight"] == 5e-4
    assert decays(RECIPE, fresh)["conv.weight"] == RECIPE.weight_decay


def test_frozen_parameters_are_in_no_group() -> None:
    suffix = make_suffix().requires_grad_(False)
    assert parameter_groups(suffix, FRESH, RECIPE) == []


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_each_optimiser_is_pytorchs_own(name: str, kind: type) -> None:
    optimizer = make_optimizer(make_suffix(), FRESH, replace(RECIPE, optimizer=name))
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02, 0.2, 0.2]


def orthogonality(matrix: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest singular value."""
    values = torch.linalg.svdvals(matrix.flatten(1))
    return float(values.min()), float(values.max())


def test_muon_moves_convolutions_and_matrices_by_orthogonal_steps_but_for_the_classifier() -> None:
    torch.manual_seed(0)
    suffix = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 16), nn.Linear(16, 4))
    fresh = frozenset({"3.weight", "3.bias"})
    optimizer = make_optimizer(suffix, fresh, replace(RECIPE, optimizer="muon", weight_decay=0.0))
    before = {name: value.detach().clone() for name, value in suffix.named_parameters()}
    for value in suffix.parameters():
        value.grad = torch.randn_like(value)
    optimizer.step()
    moved = {name: value.detach() - before[name] for name, value in suffix.named_parameters()}
    for name in ("0.weight", "2.weight"):  # half of SGD's rate; Newton-Schulz leaves singular values of 0.7 to 1.2
        low, high = orthogonality(moved[name])
        assert low / 0.01 > 0.5, name
        assert high / 0.01 < 1.3, name
    for name, rate in (("3.weight", 0.1), ("3.bias", 0.1), ("1.weight", 0.01), ("0.bias", 0.01)):
        sizes = moved[name].abs()  # Adam's first step has one size for every number
        assert torch.allclose(sizes, sizes.max().expand_as(sizes), rtol=1e-3), name
        assert 1 <= float(sizes.max()) / (0.04 * rate) < 2, name


def test_muon_has_a_weight_decay_of_its_own_unless_one_is_given() -> None:
    def decays(**settings: float | None) -> set[float]:
        recipe = replace(RECIPE, optimizer="muon", **settings)  # type: ignore[arg-type]
        return {group["weight_decay"] for group in make_optimizer(make_suffix(), FRESH, recipe).param_groups}

    assert decays(weight_decay=None) == {0.02, 0.0}
    assert decays(weight_decay=0.3) == {0.3, 0.0}


def test_sgd_has_nesterov_momentum_unless_momentum_is_zero() -> None:
    group = make_optimizer(make_suffix(), FRESH, RECIPE).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.8, True)
    plain = make_optimizer(make_suffix(), FRESH, replace(RECIPE, momentum=0.0)).param_groups[0]
    assert (plain["momentum"], plain["nesterov"]) == (0.0, False)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.99])
def test_a_schedule_lasts_exactly_as_long_as_the_run(schedule: str, steps: int, warmup: float) -> None:
    rates = stepped(schedule, steps, warmup=warmup)  # warnings are errors, and one step too many is one
    assert [len(group) for group in rates] == [steps] * 4
    assert all(0 < rate <= 0.2 + 1e-12 for group in rates for rate in group)


def test_the_head_learns_ten_times_faster_at_every_step() -> None:
    for schedule in ("onecycle", "cosine", "constant"):
        backbone, _, head, _ = stepped(schedule, 20)
        assert head == pytest.approx([10 * rate for rate in backbone], rel=1e-6)


def test_onecycle_rises_to_the_peak_and_falls_to_nearly_nothing() -> None:
    rates = stepped("onecycle", 100, warmup=0.2)[0]
    peak = max(range(100), key=rates.__getitem__)
    assert rates[peak] == pytest.approx(0.02, rel=0.01)
    assert peak in (19, 20)
    assert rates[0] == pytest.approx(0.02 / 25)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02 / 1000


def test_cosine_rises_in_a_line_and_falls_along_a_cosine() -> None:
    rates = stepped("cosine", 50, warmup=0.2)[0]
    assert rates[:10] == pytest.approx([0.02 * (step + 1) / 11 for step in range(10)])
    assert rates[10:] == pytest.approx([0.01 * (1 + math.cos(math.pi * step / 40)) for step in range(40)])


def test_cosine_without_warmup_starts_at_the_peak() -> None:
    rates = stepped("cosine", 10, warmup=0.0)[0]
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])


def test_constant_stays() -> None:
    assert stepped("constant", 5) == [[0.02] * 5, [0.02] * 5, [0.2] * 5, [0.2] * 5]
