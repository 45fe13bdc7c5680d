"""Learning rates of single layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from make_run import cifar_recipe, metrics
from torch import nn

from finetune.networks.figure1_shared import Figure1Shared
from finetune.optim import MUON_RATE, make_optimizer, parameter_groups
from finetune.pipeline import run
from finetune.rates import parse_scales, require_scaled, scale_of
from finetune.recipe import Recipe, check
from weights.errors import UsageError


def test_a_name_is_any_parts_in_a_row() -> None:
    scales = parse_scales(("layer1=0.5", "shortcut = 0.2", "layer1.shortcut=3"))
    assert scales == {"layer1": 0.5, "shortcut": 0.2, "layer1.shortcut": 3.0}
    for name, scale in {
        "layer1.conv.weight": 0.5,
        "layer2.shortcut.weight": 0.2,
        "layer1.shortcut.weight": 3.0,  # the longer of two that end there
        "layer1.0.shortcut.weight": 0.2,  # the one that ends last
        "layer2.shortcut_init.weight": 1.0,
        "layer12.conv.weight": 1.0,
    }.items():
        assert scale_of(name, scales) == scale, name
    assert scale_of("layer1.conv.weight", {}) == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer3", "--lr-scales has 'layer3'; give a layer and a number above 0, such as layer3=0.1."),
        ("=2", "--lr-scales has '=2'; give a layer"),
        ("layer3=fast", "--lr-scales has 'layer3=fast'; give a layer"),
        ("layer3=0", "--lr-scales has 'layer3=0'; give a layer"),
        ("layer3=nan", "--lr-scales has 'layer3=nan'; give a layer"),
        ("layer3=inf", "--lr-scales has 'layer3=inf'; give a layer"),
        (
            "layer3=1e300",
            "--head-lr-scale 10, --lr-scales layer3=1e300 and --weight-decay 0.0005 is more than",
        ),
    ],
)
def test_what_is_no_multiple(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        check(Recipe(lr_scales=(text,)))
    assert words in str(error.value)


def test_a_name_that_comes_twice() -> None:
    with pytest.raises(UsageError, match="--lr-scales names 'fc' twice; give it one number"):
        parse_scales(("fc=1", "fc=2"))


def test_a_name_that_nothing_has() -> None:
    require_scaled({"conv1": 2.0}, ["layer1.conv1.weight", "fc.bias"])
    with pytest.raises(UsageError, match=r"--lr-scales names 'conv2', .* is called so; did you mean conv1\?"):
        require_scaled({"conv2": 2.0}, ["layer1.conv1.weight", "fc.bias"])


def test_groups_have_their_rates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    recipe = Recipe(lr=0.1, head_lr_scale=10.0, lr_scales=("0=0.5", "2.bias=3"), optimizer="sgd")
    rate = {
        name: group["lr"]
        for group in parameter_groups(model, {"2.weight", "2.bias"}, recipe)
        for parameter in group["params"]
        for name, known in model.named_parameters()
        if known is parameter
    }
    assert rate == pytest.approx(
        {"0.weight": 0.05, "0.bias": 0.05, "1.weight": 0.1, "1.bias": 0.1, "2.weight": 1.0, "2.bias": 3.0}
    )


def test_muon_takes_them_too() -> None:
    model = Figure1Shared(10)
    recipe = Recipe(lr=0.1, optimizer="muon", lr_scales=("shortcut=0.2",))
    groups = make_optimizer(model, (), recipe).param_groups
    slow = {id(model.get_parameter(f"layer{stage}.shortcut.weight")) for stage in range(1, 5)}
    held = [group for group in groups if slow & {id(parameter) for parameter in group["params"]}]
    assert [group["lr"] for group in held] == pytest.approx([0.1 * 0.2 * MUON_RATE])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_run_at_a_multiple_is_a_run_at_that_rate(tmp_path: Path) -> None:
    recipe = cifar_recipe(tmp_path, optimizer="sgd", head_lr_scale=1.0)
    layers = tuple(f"{layer}=3" for layer in recipe.train_layers)
    run(replace(recipe, lr=0.01, lr_scales=layers), tmp_path / "scaled")
    run(replace(recipe, lr=0.03), tmp_path / "plain")
    assert metrics(tmp_path / "scaled")[-1]["train_loss"] == pytest.approx(
        metrics(tmp_path / "plain")[-1]["train_loss"]
    )
    run(replace(recipe, lr=0.01), tmp_path / "slower")
    assert metrics(tmp_path / "slower")[-1]["train_loss"] != metrics(tmp_path / "plain")[-1]["train_loss"]


def test_a_name_is_looked_up_before_anything_is_written(tmp_path: Path) -> None:
    recipe = cifar_recipe(tmp_path, lr_scales=("layer9=2",))
    with pytest.raises(UsageError, match="--lr-scales names 'layer9', and nothing that trains is called so"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
