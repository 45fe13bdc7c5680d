"""From-scratch runs: which settings they take, and that the command trains what it says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from make_data import write_cifar10_python
from typer.testing import CliRunner

from cli.main import app
from finetune.baseline import NETWORK_EPOCHS, baseline_recipe
from finetune.networks import NETWORKS
from finetune.recipe import check
from weights.errors import UsageError


def test_every_network_has_its_epochs() -> None:
    assert set(NETWORK_EPOCHS) == set(NETWORKS)


@pytest.mark.parametrize("which", ["fast", "assignment"])
@pytest.mark.parametrize("arch", [*NETWORK_EPOCHS, "resnet18"])
def test_a_recipe_trains_everything_from_nothing(arch: str, which: str) -> None:
    recipe = baseline_recipe(arch, which, {})
    check(recipe)
    assert recipe.arch == ("resnet18" if arch == "resnet18" else f"finetune_{arch}")
    assert (recipe.weights, recipe.train_layers, recipe.image_size) == ("none", ("all",), 32)
    assert not recipe.keep_head


def test_the_assignments_settings() -> None:
    a1 = baseline_recipe("figure1", "assignment", {})
    assert (a1.optimizer, a1.lr, a1.batch_size, a1.epochs, a1.augment) == ("adam", 1e-3, 50, 15, "flip")
    a3 = baseline_recipe("multistage", "assignment", {})
    assert (a3.optimizer, a3.lr, a3.epochs, a3.augment, a3.label_smoothing) == ("adam", 1e-3, 10, "none", 0.0)
    assert baseline_recipe("vgg16", "assignment", {}).epochs == 1
    assert baseline_recipe("identity", "fast", {}).lr == 0.04


def test_what_the_user_gives_wins() -> None:
    recipe = baseline_recipe("figure1", "fast", {"lr": 0.3, "epochs": 2, "weights": "some.pth"})
    assert (recipe.lr, recipe.epochs, recipe.weights, recipe.keep_head) == (0.3, 2, "some.pth", True)


def test_the_registered_name_means_the_same() -> None:
    assert baseline_recipe("finetune_identity", "fast", {}) == baseline_recipe("identity", "fast", {})


def test_auto_is_auto() -> None:
    done = CliRunner().invoke(app, ["baseline", "--show-recipe", "--lr", "auto", "--epochs", "auto"])
    shown = tomllib.loads(done.stdout)
    assert (shown["lr"], shown["epochs"]) == ("auto", "auto")
    wrong = CliRunner().invoke(app, ["baseline", "--lr", "fast"])
    assert wrong.exit_code == 2
    assert "--lr is 'fast'; give a number, or auto." in wrong.stderr


def test_resume_takes_no_settings(tmp_path: Path) -> None:
    for given in (["--epochs", "30"], ["--arch", "figure1"], ["--recipe", "fast"]):
        done = CliRunner().invoke(app, ["baseline", "--resume", str(tmp_path), *given])
        assert done.exit_code == 2
        assert f"--resume goes on with the run's own settings, and {given[0]} was given too" in done.stderr


def test_an_unknown_recipe() -> None:
    with pytest.raises(UsageError, match="--recipe is 'fats'; did you mean fast"):
        baseline_recipe("figure1", "fats", {})


def test_show_recipe_prints_what_a_run_would_take() -> None:
    done = CliRunner().invoke(app, ["baseline", "--arch", "identity", "--show-recipe", "--epochs", "3"])
    assert done.exit_code == 0
    shown = tomllib.loads(done.stdout)
    assert (shown["arch"], shown["lr"], shown["epochs"]) == ("finetune_identity", 0.04, 3)


def test_a_run_from_scratch_and_one_more_epoch_from_its_checkpoint(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path / "cifar", 60, 20)
    common = ["--data", str(tmp_path / "cifar"), "--epochs", "1", "--precision", "fp32", "--compile", "off", "--json"]
    common += ["--arch", "multistage", "--blocks", "1,1,2", "--cache-dir", str(tmp_path / "cache")]
    first = CliRunner().invoke(app, ["baseline", *common, "--output", str(tmp_path / "first")])
    assert first.exit_code == 0, first.stderr
    summary = json.loads(first.stdout)
    assert summary["arch"] == "finetune_multistage"
    assert summary["estimate"]["epochs"] == 1
    assert summary["estimate"]["seconds"].keys() == {"prefix", "train", "eval", "total"}
    assert summary["parameters"]["total"] == summary["parameters"]["trained"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True).eval()
    assert loaded(torch.zeros(2, 3, 32, 32)).shape == (2, summary["data"]["classes"])

    weights = ["--weights", str(tmp_path / "first")]
    second = CliRunner().invoke(app, ["baseline", *common, *weights, "--lr", "1e-6", "--output", str(tmp_path / "two")])
    assert second.exit_code == 0, second.stderr
    before = loaded.state_dict()
    after = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True).state_dict()
    for name in ("conv1.weight", "fc.weight"):  # gone on from, head included, and hardly moved
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "figur1"], 'Unknown architecture "figur1"'),
        (["--arch", "figure1", "--blocks", "2,2,2,2"], "--blocks does not belong to figure1, which has --dropout"),
        (["--arch", "identity", "--blocks", "2,2"], "blocks"),
        (["--arch", "identity", "--shortcut", "C"], "shortcut is C; it can be A"),
        (["--arch", "identity", "--blocks", "2,x,2,2"], "--blocks holds 'x'; give whole numbers of at least 1"),
    ],
)
def test_settings_that_a_network_cannot_have(options: list[str], words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["baseline", *options, "--data", "shapes10", "--output", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "run").exists()
