"""From-scratch runs: which settings they take, and that the command trains what it says."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from make_data import make_images, write_cifar10_python
from make_networks import StudentResNet50, StudentStages, used
from torch import nn
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.augment import Preprocessing
from finetune.data import load_data
from finetune.networks import NETWORKS
from finetune.networks.figure1_shared import Figure1Shared
from finetune.networks.registry import MEAN, STD
from finetune.rates import parse_scales, require_scaled, scale_of
from finetune.recipe import check
from finetune.scratch import NETWORK_EPOCHS, baseline_recipe, choose_baseline, few_steps
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
    assert (a3.optimizer, a3.lr, a3.epochs, a3.schedule, a3.label_smoothing) == ("adam", 1e-3, 10, "constant", 0.0)
    assert (a3.batch_size, a3.augment, a3.ema) == (64, "flip", 0.999)  # ours, where nothing is prescribed
    a5 = baseline_recipe("vgg16", "assignment", {})
    assert (a5.epochs, a5.augment, a5.ema) == (1, "none", 0.0)  # one more epoch of a trained checkpoint


def test_what_the_user_gives_wins() -> None:
    recipe = baseline_recipe("figure1", "fast", {"lr": 0.3, "epochs": 2, "weights": "some.pth"})
    assert (recipe.lr, recipe.epochs, recipe.weights, recipe.keep_head) == (0.3, 2, "some.pth", True)


def test_another_optimiser_brings_a_rate_and_a_decay_of_its_kind() -> None:
    def settings(arch: str, which: str, **given: object) -> tuple[float | None, float | None]:
        recipe = baseline_recipe(arch, which, given)
        return recipe.lr, recipe.weight_decay

    assert settings("figure1", "fast") == settings("figure1", "assignment", optimizer="muon") == (0.1, 0.02)
    assert settings("figure1", "fast", optimizer="adam") == settings("figure1", "assignment") == (1e-3, 0.0)
    assert settings("figure1", "fast", optimizer="adamw", lr=0.005) == (0.005, 5e-4)
    assert settings("figure1", "fast", optimizer="sgd") == settings("figure1", "fast", optimizer="auto") == (0.2, 5e-4)
    assert settings("identity", "assignment", optimizer="sgd", weight_decay=0.1) == (0.04, 0.1)
    assert settings("identity", "assignment", optimizer="muon") == settings("identity", "fast") == (0.05, 0.02)


def test_an_optimiser_brings_nothing_else() -> None:
    for network in ("figure1_shared", "vgg16"):
        prescribed, moved = (baseline_recipe(network, "assignment", given) for given in ({}, {"optimizer": "muon"}))
        fast = baseline_recipe(network, "fast", {})
        assert moved == dataclasses.replace(
            prescribed, optimizer="muon", lr=fast.lr, lr_scales=fast.lr_scales, weight_decay=0.02
        )


def test_slower_layers_go_with_the_rate_and_the_optimiser(tmp_path: Path) -> None:
    recipe = baseline_recipe("figure1_shared", "fast", {})
    names = [name for name, _ in Figure1Shared().named_parameters()]
    require_scaled(parse_scales(recipe.lr_scales), names)
    slow = [name for name in names if scale_of(name, parse_scales(recipe.lr_scales)) != 1.0]
    assert len(slow) == 16  # weight and bias of two shortcuts in four stages
    for optimizer in ("sgd", "adam", "adamw"):
        assert baseline_recipe("figure1_shared", "fast", {"optimizer": optimizer}).lr_scales == ()
    (tmp_path / "older.toml").write_text('arch = "finetune_figure1_shared"\nlr = 0.02\n')
    assert choose_baseline(None, None, {}, tmp_path / "older.toml").lr_scales == ()
    (tmp_path / "own.toml").write_text('arch = "finetune_figure1_shared"\nepochs = 2\n')
    assert choose_baseline(None, None, {}, tmp_path / "own.toml").lr_scales == recipe.lr_scales


def test_going_on_from_a_checkpoint_is_gentler() -> None:
    assert baseline_recipe("multistage", "fast", {"weights": "runs/a3"}).lr == pytest.approx(0.02)
    assert baseline_recipe("multistage", "fast", {"weights": "runs/a3", "lr": 0.2}).lr == 0.2
    assert baseline_recipe("vgg16", "assignment", {"weights": "runs/a5"}).lr == pytest.approx(1e-4)


def test_a_run_goes_on_by_its_own_recipe(trained: Path) -> None:
    kept = choose_baseline(None, None, {"weights": str(trained / "run")}, trained / "run" / "recipe.toml")
    assert (kept.keep_head, kept.blocks) == (True, ("1", "1", "2"))


def test_the_registered_name_means_the_same() -> None:
    assert baseline_recipe("finetune_identity", "fast", {}) == baseline_recipe("identity", "fast", {})


def test_auto_is_auto() -> None:
    done = CliRunner().invoke(app, ["baseline", "--show-recipe", "--lr", "auto", "--epochs", "auto"])
    shown = tomllib.loads(done.stdout)
    assert (shown["lr"], shown["epochs"]) == ("auto", "auto")
    wrong = CliRunner().invoke(app, ["baseline", "--lr", "fast"])
    assert wrong.exit_code == 2
    assert "--lr is 'fast'; give a number, or auto." in wrong.stderr


def test_too_few_steps_are_told_with_settings_that_give_enough() -> None:
    recipe = dataclasses.replace(baseline_recipe("figure1", "fast", {}), views=1)
    assert few_steps(recipe, 400) == (
        "400 images in batches of 128 make 60 training steps in 15 epochs, which is little for a network that starts "
        "from nothing; --batch-size 16 --lr 0.0125 --epochs 20 gives it 500 or more."
    )
    assert few_steps(recipe, 50_000) is None
    better = dataclasses.replace(recipe, batch_size=16, lr=0.025, epochs=20)
    assert few_steps(better, 400) is None
    assert "; --epochs 20 gives" in str(few_steps(dataclasses.replace(better, epochs=15), 400))
    for other in ({"weights": "auto"}, {"train_layers": ("head",)}):
        assert few_steps(dataclasses.replace(recipe, **other), 400) is None


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
    assert (shown["arch"], shown["lr"], shown["epochs"]) == ("finetune_identity", 0.05, 3)
    none = ["--blocks", "none", "--lr-scales", "none"]
    done = CliRunner().invoke(app, ["baseline", "--arch", "figure1_shared", *none, "--show-recipe"])
    shown = tomllib.loads(done.stdout)
    assert (shown["blocks"], shown["lr_scales"]) == ([], [])
    done = CliRunner().invoke(app, ["baseline", "--arch", "identiti", "--show-recipe"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert 'Unknown architecture "identiti"; did you mean' in done.stderr


def test_the_assignments_page_has_commands_that_are_understood() -> None:
    text = (Path(__file__).parents[1] / "docs" / "assignments.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("    finetune baseline")]
    shown = []
    for words in commands:
        done = CliRunner().invoke(app, ["baseline", *words, "--show-recipe"])
        assert done.exit_code == 0, (words, done.stderr)
        shown.append(tomllib.loads(done.stdout))
    assert {one["arch"] for one in shown} == {f"finetune_{name}" for name in NETWORKS}
    assert {one["val_fraction"] for one in shown} == {0.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR files in `cifar`, and `run`: a multistage network of blocks 1,1,2, trained on them."""
    root = tmp_path_factory.mktemp("baseline")
    write_cifar10_python(root / "cifar", 60, 20)
    done = baseline(root, "multistage", "--blocks", "1,1,2", "--output", str(root / "run"))
    assert done.exit_code == 0, done.stderr
    return root


def baseline(root: Path, arch: str, *options: str) -> Result:
    """Train for one epoch on the images in `cifar`."""
    common = ["--epochs", "1", "--precision", "fp32", "--compile", "off", "--json", "--cache-dir", str(root / "cache")]
    return CliRunner().invoke(app, ["baseline", "--arch", arch, "--data", str(root / "cifar"), *common, *options])


def load(folder: Path) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model


def test_a_run_from_scratch_trains_everything_and_is_judged_on_images_as_they_are(trained: Path) -> None:
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert summary["arch"] == "finetune_multistage"
    assert summary["estimate"]["epochs"] == 1
    assert summary["estimate"]["seconds"].keys() == {"prefix", "train", "eval", "total"}
    assert summary["parameters"]["total"] == summary["parameters"]["trained"]
    model = load(trained / "run")
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [1, 1, 2]
    train = load_data(str(trained / "cifar")).train
    images = Preprocessing(32, MEAN, STD, "bilinear")(train.images)
    with torch.no_grad():
        right = int((model(images).argmax(1) == train.labels).sum())
    assert summary["train_accuracy"] == pytest.approx(100 * right / len(train))  # though it trained on crops


def test_one_more_epoch_from_a_run_of_ours_takes_its_settings_from_there(trained: Path, tmp_path: Path) -> None:
    weights = ["--weights", str(trained / "run" / "model.safetensors")]
    second = baseline(trained, "multistage", *weights, "--lr", "1e-6", "--output", str(tmp_path / "two"))
    assert second.exit_code == 0, second.stderr
    before, after = load(trained / "run").state_dict(), load(tmp_path / "two").state_dict()
    assert before.keys() == after.keys()
    for name in ("conv1.weight", "fc.weight"):  # gone on from, head included, and hardly moved
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["state dict", "checkpoint"])
def test_one_more_epoch_from_a_students_checkpoint(trained: Path, tmp_path: Path, kind: str) -> None:
    """As the assignments ask: Adam, one epoch, from a file that a class of somebody else's saved."""
    if kind == "state dict":
        arch, student, saved = "resnet50_layer4", used(StudentResNet50(4, bias=True)), "student.pth"
        torch.save(student.state_dict(), tmp_path / saved)
    else:
        arch, student, saved = "multistage", used(StudentStages(4, (16, 32, 64), 2, flat=True)), "student.ckpt"
        optimizer = torch.optim.Adam(student.parameters())
        student(torch.zeros(1, 3, 32, 32)).sum().backward()
        optimizer.step()
        state = {"epoch": 300, "model_state_dict": student.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / saved)
    options = ["--recipe", "assignment", "--weights", str(tmp_path / saved), "--lr", "1e-7"]
    done = baseline(trained, arch, *options, "--output", str(tmp_path / "run"))
    assert done.exit_code == 0, done.stderr
    assert "tensors loaded" in done.stderr
    head = student.get_submodule("fc" if arch == "resnet50_layer4" else "linear")
    torch.testing.assert_close(load(tmp_path / "run").fc.weight, head.weight, rtol=0, atol=1e-4)


def test_checkpoints_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    def words(arch: str, *options: str) -> str:
        done = baseline(trained, arch, "--weights", str(trained / "run"), "--output", str(tmp_path / "run"), *options)
        assert done.exit_code == 1
        assert not (tmp_path / "run").exists()
        return done.stderr

    assert "holds weights of finetune_multistage, not of finetune_singlestage: give --arch finetune_mu" in words(
        "singlestage"
    )
    assert "--blocks is 2,2,2 and the weights (local file model.safetensors) were trained with 1,1,2; leave" in words(
        "multistage", "--blocks", "2,2,2"
    )
    swapped = make_images(40, 20)
    swapped = dataclasses.replace(swapped, classes=(swapped.classes[1], swapped.classes[0], *swapped.classes[2:]))
    write_cifar10_python(tmp_path / "swapped", made=swapped)
    assert (
        "were trained with class 0 = class_00 and cifar10 has class_01 there; give data of the same classes"
        in words("multistage", "--data", str(tmp_path / "swapped"))
    )
    write_cifar10_python(tmp_path / "three", made=make_images(40, 20, classes=3))
    assert "(local file model.safetensors) were trained for 4 classes and the data have 3; give data with the" in words(
        "multistage", "--data", str(tmp_path / "three")
    )
    torch.save(StudentResNet50(4, bias=True).state_dict(), tmp_path / "other.pth")
    assert "are those of another network than finetune_multistage" in words(
        "multistage", "--weights", str(tmp_path / "other.pth")
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "figur1"], 'Unknown architecture "figur1"; did you mean finetune_figure1 or finetune_figure1_sha'),
        (["--arch", "figure1", "--blocks", "2,2,2,2"], "--blocks does not belong to figure1, which has --dropout"),
        (
            ["--arch", "identity", "--blocks", "2,2"],
            "blocks is 2,2, and this network needs 4 whole numbers of",
        ),
        (["--arch", "multistage", "--blocks", "2,0,2"], "blocks is 2,0,2, and this network needs 3 whole numbers of"),
        (["--arch", "multistage", "--blocks", ",,,"], "--blocks is ',,,' and names nothing; list what it is to hold"),
        (["--arch", "identity", "--shortcut", "C"], "shortcut is C; it can be A"),
        (["--arch", "identity", "--blocks", "2,x,2,2"], "--blocks holds 'x'; give whole numbers of at least 1"),
        (["--arch", "figure1", "--image-size", "64"], "finetune_figure1 takes images of 32 × 32 pixels and cannot be"),
        (
            ["--arch", "figure1", "--cutout", "32"],
            "--cutout 32 covers whole images of 32 pixels; give less",
        ),
    ],
)
def test_settings_that_a_network_cannot_have(options: list[str], words: str, trained: Path, tmp_path: Path) -> None:
    data = ["--data", str(trained / "cifar")]
    done = CliRunner().invoke(app, ["baseline", *options, *data, "--output", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "run").exists()
