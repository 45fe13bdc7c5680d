"""Whole runs on tiny data: what they leave behind, what repeats to the bit, and what is refused.

All runs are in fp32, eager and on the CPU, where equal bits are promised.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import timm
import torch
from make_data import (
    Made,
    make_images,
    write_archive,
    write_cifar100_binary,
    write_cifar100_python,
    write_class_folders,
    write_image_folder,
)
from make_run import TRAINED, metrics, model_bytes, tensors, tiny_recipe, write_weights

from finetune import features, sources
from finetune.data import load_data
from finetune.events import Events
from finetune.fit import Trainer
from finetune.pipeline import run
from finetune.plan import Plan
from finetune.recipe import Recipe, from_table, read_toml
from weights.errors import DataError, RunError, TrainingError, UsageError, WeightsError

FILES = {"config.json", "metrics.jsonl", "model.safetensors", "predictions.safetensors", "recipe.toml", "summary.json"}
MADE = make_images(48, 20)


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished run."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    weights: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cifar`, `photos`, `test_resnet.safetensors`, and a cache that the runs share."""
    root = tmp_path_factory.mktemp("pipeline")
    write_cifar100_python(root / "cifar", made=MADE)
    write_image_folder(root / "photos", made=MADE)
    write_weights(root / "test_resnet.safetensors")
    return root


@pytest.fixture(scope="module")
def done(place: Path) -> Done:
    """One run on the CIFAR files that most tests look at or compare with."""
    weights = place / "test_resnet.safetensors"
    recipe = tiny_recipe(place / "cifar", weights, place / "cache")
    return Done(place / "done", recipe, run(recipe, place / "done"), weights)


@pytest.fixture
def rows_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the batches that the prefix is given from here on."""
    seen: list[int] = []
    compute = features.compute_rows

    def spy(*arguments: Any) -> list[torch.Tensor]:
        seen.append(arguments[5] - arguments[4])
        return compute(*arguments)

    monkeypatch.setattr(features, "compute_rows", spy)
    return seen


def run_again(done: Done, output: Path, **settings: Any) -> dict[str, Any]:
    return run(dataclasses.replace(done.recipe, **settings), output)


def refused(kind: type[Exception], recipe: Recipe, output: Path) -> str:
    with pytest.raises(kind) as error:
        run(recipe, output)
    assert "\n" not in str(error.value)
    assert not output.exists(), "nothing may be left of a run that never began"
    return str(error.value)


def test_what_a_run_leaves(done: Done) -> None:
    assert {entry.name for entry in done.folder.iterdir()} - {"report.html"} == FILES
    settled = dataclasses.replace(done.recipe, optimizer="sgd", windows="off", skip_easy=0.0)  # by a short run's auto
    assert from_table(read_toml(done.folder / "recipe.toml"), "") == settled
    assert [row["epoch"] for row in metrics(done.folder)] == [1, 2]
    keys = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"]
    keys += ["seconds", "eval_seconds", "images_per_second"]
    assert list(json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[0])) == keys


def test_summary(done: Done) -> None:
    summary = json.loads((done.folder / "summary.json").read_text())
    assert {**summary, "output": str(done.folder)} == done.summary
    assert summary["seconds"].keys() == {"total", "compile", "prefix", "train", "eval"}
    assert summary["parameters"] == {"total": 373_076, "trained": 268_228}
    assert summary["weights"]["source"] == "local file test_resnet.safetensors"
    assert summary["frozen_unchanged"] is True
    assert (summary["device"], summary["precision"], summary["compile"]) == ("cpu", "fp32", False)
    assert (summary["epochs"], summary["images_seen"]) == (2, 2 * 43)
    data = summary["data"]
    assert (data["name"], data["classes"], data["train"], data["val"], data["test"]) == ("cifar100", 4, 43, 5, 20)
    assert summary["versions"].keys() >= {"python", "torch", "timm", "finetune-timm"}
    # The figures are those of the predictions beside them.
    predictions = tensors(done.folder / "predictions.safetensors")
    logits, labels = predictions["logits"], predictions["labels"]
    assert labels.tolist() == MADE.test_labels.tolist()
    assert summary["test_accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert summary["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert summary["val_accuracy"] == metrics(done.folder)[-1]["val_accuracy"]


def test_training_learns(place: Path, done: Done, tmp_path: Path) -> None:
    """Brightness gives the class away, so the tiny network must get far above the chance of 25 %."""
    summary = run_again(done, tmp_path / "run", epochs=8)
    assert summary["test_accuracy"] >= 80
    assert metrics(tmp_path / "run")[-1]["train_loss"] < metrics(tmp_path / "run")[0]["train_loss"]


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "resnet18"])
def test_the_checkpoint_is_the_model(place: Path, tmp_path: Path, arch: str) -> None:
    """Frozen tensors are the file's bits, trained ones moved, and timm gives the same logits from the folder."""
    weights = write_weights(tmp_path / f"{arch}.safetensors", arch)
    recipe = tiny_recipe(place / "photos", weights, tmp_path / "cache", arch, epochs=1)
    summary = run(recipe, tmp_path / "run")
    before, after = tensors(weights), tensors(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    inside = tuple(f"{name}." for name in TRAINED[arch])
    frozen = {name for name in before if not name.startswith(inside)}
    assert summary["frozen_tensors"] == len(frozen)
    assert {name for name in frozen if not bitwise_equal(before[name], after[name])} == set()
    assert {name for name in after.keys() - frozen if bitwise_equal(before[name], after[name])} == set()

    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["label_names"] == list(MADE.classes)
    mean, std = (torch.tensor(config["pretrained_cfg"][key])[:, None, None] for key in ("mean", "std"))
    data = load_data(str(place / "photos"), image_size=32)
    assert data.test is not None
    with torch.no_grad():
        logits = model((data.test.images / 255 - mean) / std)
    predictions = tensors(tmp_path / "run" / "predictions.safetensors")
    assert predictions["labels"].tolist() == data.test.labels.tolist()
    torch.testing.assert_close(logits, predictions["logits"], atol=1e-3, rtol=0)


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in (a, b)]
    return a.dtype == b.dtype and torch.equal(*flat)


def test_metadata_is_one_key_without_places(place: Path, done: Done) -> None:
    with safetensors.safe_open(done.folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"finetune"}
    about = json.loads(metadata["finetune"])
    assert about["classes"] == list(MADE.classes)
    assert about["trained_layers"] == ["layer4", "fc"]
    assert about["weights_sha256"] == done.summary["weights"]["sha256"]
    assert about["settings"]["lr"] == 0.01
    assert str(place) not in metadata["finetune"]
    assert "/" not in metadata["finetune"]


def test_equal_runs_give_equal_bytes(done: Done, tmp_path: Path) -> None:
    """From the recipe file, with a cache of its own, so that features are computed anew."""
    recipe = from_table(read_toml(done.folder / "recipe.toml"), "")
    run(dataclasses.replace(recipe, cache_dir=tmp_path / "cache"), tmp_path / "run")
    for name in ("model.safetensors", "config.json", "predictions.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (done.folder / name).read_bytes(), name
    assert metrics(tmp_path / "run") == metrics(done.folder)


def test_another_seed_gives_another_model(done: Done, tmp_path: Path) -> None:
    run_again(done, tmp_path / "run", seed=1)
    assert model_bytes(tmp_path / "run") != model_bytes(done.folder)


def test_the_next_run_computes_no_features(done: Done, tmp_path: Path, rows_computed: list[int]) -> None:
    plans: list[Plan] = []
    recipe = dataclasses.replace(done.recipe, lr=0.02)
    run(recipe, tmp_path / "run", events=Events(plan=plans.append))
    assert rows_computed == []
    assert plans[0].feature_views == 0
    assert plans[0].sentences()[-1].startswith("expected: no features to compute, 2 epochs of ")
    assert metrics(tmp_path / "run") != metrics(done.folder)
    run_again(done, tmp_path / "other", train_layers=("layer3", "layer4", "fc"))  # another cut: other features
    assert sum(rows_computed) == 2 * 43 + 5 + 20


LAYOUTS: dict[str, Callable[[Path, Made], Path]] = {}


def layout(write: Callable[[Path, Made], Path]) -> Callable[[Path, Made], Path]:
    LAYOUTS[write.__name__] = write
    return write


@layout
def binary(root: Path, made: Made) -> Path:
    write_cifar100_binary(root / "cifar-100-binary", made=made)
    return root


@layout
def archive(root: Path, made: Made) -> Path:
    write_cifar100_python(root / "cifar-100-python", made=made)
    write_archive(root / "cifar-100-python.tar.gz", root / "cifar-100-python")
    return root / "cifar-100-python.tar.gz"


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_cifar_layouts_give_the_same_bytes(done: Done, tmp_path: Path, name: str, rows_computed: list[int]) -> None:
    summary = run_again(done, tmp_path / "run", data=str(LAYOUTS[name](tmp_path, MADE)))
    assert model_bytes(tmp_path / "run") == model_bytes(done.folder)
    assert summary["data"] == done.summary["data"]
    assert rows_computed == [], "the same pixels in the same order are the same features"


def test_the_folder_layout_holds_the_same_data(place: Path, done: Done, tmp_path: Path) -> None:
    summary = run_again(done, tmp_path / "run", data=str(place / "photos"))
    for key in ("sha256", "test_sha256", "train", "val", "test", "classes"):
        assert summary["data"][key] == done.summary["data"][key], key
    assert summary["data"]["name"] == "photos"


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"cache": "ram"}, "ram"),
        ({"cache": "disk"}, "disk"),
        ({"memory_budget": "1kB"}, "disk"),
        ({"cache": "off"}, "off"),
        ({"memory_budget": "1kB", "cache_limit": "1kB"}, "off"),
    ],
)
def test_every_place_for_features_gives_the_same_run(
    done: Done, tmp_path: Path, settings: dict[str, Any], where: str
) -> None:
    summary = run_again(done, tmp_path / "run", **settings, cache_dir=tmp_path / "cache")
    assert summary["features"]["where"] == where
    for row, other in zip(metrics(tmp_path / "run"), metrics(done.folder), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    if where != "off":  # live batches pass the prefix in other company, which may move the last bit
        torch.testing.assert_close(
            tensors(tmp_path / "run" / "model.safetensors"), tensors(done.folder / "model.safetensors"), atol=0, rtol=0
        )
    stored = list((tmp_path / "cache").glob("features/*/"))
    assert bool(stored) == (where == "disk")


def test_crop_with_views(done: Done, tmp_path: Path, rows_computed: list[int]) -> None:
    """A view for each epoch runs uncached; the same views from the cache give the same losses."""
    crop = {"augment": "crop", "cache_dir": tmp_path / "cache"}
    live = run_again(done, tmp_path / "live", **crop)
    assert live["features"]["where"] == "off"
    assert rows_computed == []
    cached = run_again(done, tmp_path / "cached", **crop, cache="ram")
    assert cached["features"]["where"] == "ram"
    assert sum(rows_computed) == 2 * 43 + 5 + 20
    for row, other in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "live"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    rows_computed.clear()
    run_again(done, tmp_path / "three", **crop, views=3)
    assert sum(rows_computed) == 3 * 43 + 5 + 20
    assert read_toml(tmp_path / "three" / "recipe.toml")["views"] == 3
    assert read_toml(tmp_path / "live" / "recipe.toml")["views"] == "auto"


def test_training_everything_is_uncut_and_says_so(done: Done, tmp_path: Path) -> None:
    plans: list[Plan] = []
    recipe = dataclasses.replace(done.recipe, train_layers=("all",), epochs=1)
    summary = run(recipe, tmp_path / "run", events=Events(plan=plans.append))
    assert summary["features"]["where"] == "uncut"
    assert summary["frozen_tensors"] == 0
    assert summary["trained_layers"] == ["all"]
    assert "features: none, because every layer trains" in plans[0].sentences()
    assert plans[0].sentences()[-1].startswith("expected: 1 epoch of ")
    assert any("trains all: 373,076 of 373,076" in line for line in plans[0].sentences())


def test_a_single_parameter_may_train(done: Done, tmp_path: Path) -> None:
    """Its batch norm's statistics are frozen with everything else."""
    summary = run_again(done, tmp_path / "run", train_layers=("bn1.weight", "head"), epochs=1)
    assert summary["frozen_unchanged"] is True
    before, after = tensors(done.weights), tensors(tmp_path / "run" / "model.safetensors")
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])


def test_a_frozen_tensor_that_moves_ends_the_run(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step
    frozen: list[torch.Tensor] = []

    def touch(self: Trainer, *arguments: Any) -> Any:
        if not frozen:  # layer3 trains before the frozen layer4, which is so in the suffix
            frozen.extend(value for name, value in self.suffix.named_buffers() if name == "layer4.0.bn1.running_mean")
        frozen[0][0] += 1e-6
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", touch)
    with pytest.raises(TrainingError) as error:
        run_again(done, tmp_path / "run", train_layers=("layer3", "fc"))
    assert str(error.value).startswith(
        "Frozen tensors moved during training (layer4.0.bn1.running_mean); they were to stay bit-identical"
    )
    left = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert left == {"recipe.toml", "metrics.jsonl", "checkpoint.pt"}, "no model and no summary of such a run"


def test_no_test_split(place: Path, done: Done, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "photos" / "train", MADE.train, MADE.train_labels, MADE.classes)
    write_class_folders(tmp_path / "photos" / "val", MADE.test, MADE.test_labels, MADE.classes)
    notes: list[str] = []
    recipe = dataclasses.replace(done.recipe, data=str(tmp_path / "photos"), epochs=1)
    summary = run(recipe, tmp_path / "run", events=Events(note=notes.append))
    assert (summary["test_accuracy"], summary["test_loss"], summary["data"]["test"]) == (None, None, 0)
    assert summary["data"]["val"] == 20
    assert not (tmp_path / "run" / "predictions.safetensors").exists()
    assert "The data bring no test split: there is no test accuracy." in notes


def test_no_validation_split(done: Done, tmp_path: Path) -> None:
    summary = run_again(done, tmp_path / "run", val_fraction=0.0, epochs=1)
    assert (summary["data"]["train"], summary["data"]["val"], summary["val_accuracy"]) == (48, 0, None)
    assert metrics(tmp_path / "run")[0]["val_loss"] is None


def test_limit_keeps_validation_and_test(done: Done, tmp_path: Path) -> None:
    summary = run_again(done, tmp_path / "run", limit=8, epochs=1)
    assert [summary["data"][key] for key in ("train", "val", "test")] == [8, 5, 20]
    assert summary["data"]["sha256"] == done.summary["data"]["sha256"]


def test_patience_keeps_the_best_epoch(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that does harm after the first epoch; the file must hold the first epoch's model."""
    harmful = {"lr": 5.0, "head_lr_scale": 1.0, "schedule": "constant", "momentum": 0.0}
    run_again(done, tmp_path / "one", epochs=1, **harmful)
    summary = run_again(done, tmp_path / "many", epochs=6, patience=2, **harmful)
    rows = metrics(tmp_path / "many")
    best = min(rows, key=lambda row: row["val_loss"])
    assert summary["kept_epoch"] == best["epoch"]
    assert summary["epochs"] == len(rows) == min(6, best["epoch"] + 2)
    assert summary["val_accuracy"] == best["val_accuracy"], "the figure belongs to the model that was kept"


def test_a_moving_average_is_what_is_kept(done: Done, tmp_path: Path) -> None:
    summary = run_again(done, tmp_path / "run", ema=0.5)
    assert summary["frozen_unchanged"] is True
    assert metrics(tmp_path / "run")[0]["train_loss"] == metrics(done.folder)[0]["train_loss"]
    assert metrics(tmp_path / "run")[0]["val_loss"] != metrics(done.folder)[0]["val_loss"]
    assert model_bytes(tmp_path / "run") != model_bytes(done.folder)


def test_a_loss_that_is_no_number(done: Done, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        run_again(done, tmp_path / "run", lr=1e30, schedule="constant")
    assert str(error.value).startswith("The training loss became nan at step 2 (learning rate 1e+30); a finite loss")
    assert "Lower --lr" in str(error.value)
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"recipe.toml"}


def test_predictions_that_are_no_numbers(done: Done, tmp_path: Path) -> None:
    """The only step's loss is finite, and what it leaves is not."""
    with pytest.raises(TrainingError, match=r"predictions are not finite numbers .*\. Lower --lr"):
        run_again(done, tmp_path / "run", lr=1e37, head_lr_scale=1.0, schedule="constant", epochs=1, batch_size=100)
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"recipe.toml"}


def test_batches_of_one_image(done: Done, tmp_path: Path) -> None:
    one = dataclasses.replace(done.recipe, batch_size=1, epochs=1)
    assert "need at least 2; give a larger --batch-size" in refused(UsageError, one, tmp_path / "run")
    run(dataclasses.replace(one, train_layers=("head",), limit=4), tmp_path / "head")  # no batch norm there


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (UsageError, {"arch": "resnet81"}, 'Unknown architecture "resnet81"; did you mean resnet18'),
        (UsageError, {"train_layers": ("layer5",)}, "'layer5' names no layer of this model; did you mean layer4"),
        (UsageError, {"train_layers": ("act1",)}, "--train-layers act1 holds no parameter"),
        (UsageError, {"allow_missing": ("layer7",)}, 'has no layer "layer7"; did you mean'),
        (UsageError, {"epochs": 0}, "--epochs is 0"),
        (UsageError, {"cache": "ram", "memory_budget": "1kB"}, "--cache ram needs 341.0 kB for features and the"),
        (UsageError, {"cache": "disk", "cache_limit": "1kB"}, "--cache disk needs 341.0 kB for features; --cache"),
        (WeightsError, {"weights": "/none/w.pth"}, "--weights names /none/w.pth, which does not exist"),
        (DataError, {"data": "/none/cifar"}, "There is nothing at /none/cifar"),
    ],
)
def test_refused_before_anything_is_written(
    done: Done, tmp_path: Path, kind: type[Exception], settings: dict[str, Any], words: str
) -> None:
    recipe = dataclasses.replace(done.recipe, cache_dir=tmp_path / "cache", **settings)
    assert words in refused(kind, recipe, tmp_path / "run")


def test_a_network_that_cannot_take_the_size(place: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(place / "cifar", Path("none"), tmp_path / "cache", "vgg11", image_size=8)
    assert "8 × 8 pixels" in refused(UsageError, recipe, tmp_path / "run")


def test_an_output_folder_in_use_is_refused_before_the_work(done: Done, rows_computed: list[int]) -> None:
    plans: list[Plan] = []
    with pytest.raises(RunError, match="already holds a finished run; give another --output"):
        run(done.recipe, done.folder, events=Events(plan=plans.append))
    assert plans == []


def test_a_cache_folder_that_cannot_be_written(done: Done, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"feature cache .*file.* cannot be written \(Not a directory\); free some"):
        run_again(done, tmp_path / "run", cache_dir=tmp_path / "file")


def test_random_weights_are_no_secret(done: Done, tmp_path: Path) -> None:
    notes: list[str] = []
    recipe = dataclasses.replace(done.recipe, weights="none", epochs=1)
    summary = run(recipe, tmp_path / "run", events=Events(note=notes.append))
    assert summary["weights"] == {"source": "none", "sha256": None}
    assert any("keep random values" in note for note in notes)


def test_damaged_features_are_computed_again(done: Done, tmp_path: Path) -> None:
    notes: list[str] = []
    recipe = dataclasses.replace(done.recipe, cache_dir=tmp_path / "cache")
    run(recipe, tmp_path / "one")
    for path in (tmp_path / "cache").glob("features/*/tensor-0.bin"):
        with path.open("r+b") as file:
            file.write(b"\xff" * 64)
    run(recipe, tmp_path / "two", events=Events(note=notes.append))
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one") == model_bytes(done.folder)
    assert len([note for note in notes if "damaged" in note]) == 4  # two views, validation, test


def test_progress_ends_where_it_should(done: Done, tmp_path: Path) -> None:
    """Every count that is shown reaches its total, and the plan comes before any epoch."""
    told: list[tuple[str, int, int]] = []
    order: list[str] = []
    events = Events(
        progress=lambda *event: told.append(event),
        plan=lambda plan: order.append("plan"),
        epoch=lambda row, epochs: order.append(f"epoch {row['epoch']} of {epochs}"),
    )
    run(dataclasses.replace(done.recipe, cache="ram", cache_dir=tmp_path / "cache"), tmp_path / "run", events=events)
    assert order == ["plan", "epoch 1 of 2", "epoch 2 of 2"]
    last = {what: (count, total) for what, count, total in told if total}
    assert set(last) >= {"features of train", "features of validation", "features of test", "epoch 1 of 2"}
    assert {what for what, (count, total) in last.items() if count != total} == set()


def test_two_runs_may_use_one_cache(done: Done, tmp_path: Path) -> None:
    """Keys do not depend on the run: no file of an entry is named after one."""
    before = {path.name for path in (done.recipe.cache_dir or tmp_path).glob("features/*/")}
    run_again(done, tmp_path / "run", batch_size=8, optimizer="adamw", lr=1e-4, label_smoothing=0.0, ema=0.9)
    assert {path.name for path in (done.recipe.cache_dir or tmp_path).glob("features/*/")} == before
    assert sources.key_of({"a": 1}) == sources.key_of({"a": 1}) != sources.key_of({"a": 2})
