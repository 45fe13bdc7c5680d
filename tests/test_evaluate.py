"""`finetune eval`: the figures of a run's own test again, and of data that are not its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import make_images, write_class_folders, write_image_folder
from make_run import metrics, tensors, tiny_recipe, write_weights
from typer.testing import CliRunner

from cli.main import app
from finetune import evaluate as evaluating
from finetune.data import load_data
from finetune.eval_data import choose_images
from finetune.evaluate import Evaluation, evaluate
from finetune.events import Events
from finetune.features import Prefix
from finetune.held_test import read_test
from finetune.metrics import top_k_accuracy
from finetune.pipeline import run
from finetune.recipe import Recipe
from finetune.stream import Streamed
from finetune.trained import load_trained
from weights.errors import DataError, UsageError

MADE = make_images(90, 60, classes=6)


@dataclasses.dataclass(frozen=True)
class Place:
    """Photos of six classes, of which one test image is a train image too, and a run on them."""

    photos: Path
    folder: Path
    recipe: Recipe
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("evaluate")
    write_image_folder(root / "photos", made=MADE)
    one = next((root / "photos" / "train" / "class_02").iterdir())
    shutil.copy(one, root / "photos" / "test" / "class_02" / "leak.png")
    recipe = tiny_recipe(root / "photos", write_weights(root / "w.safetensors"), root / "cache", epochs=3)
    return Place(root / "photos", root / "run", recipe, run(recipe, root / "run"))


def of(place: Place, data: str | None = None, **settings: Any) -> Evaluation:
    return evaluate(load_trained(place.folder), data, device="cpu", **settings)


def test_the_runs_own_figures_to_the_bit(place: Place) -> None:
    result = of(place)
    saved = tensors(place.folder / "predictions.safetensors")
    assert torch.equal(result.logits, saved["logits"])
    assert torch.equal(result.images.labels, saved["labels"])
    figures, summary = result.as_dict(), place.summary
    assert figures["accuracy"] == summary["test_accuracy"]
    assert figures["loss"] == summary["test_loss"]
    assert figures["top5_accuracy"] == summary["test_top5_accuracy"] is not None
    assert figures["mean_recall"] == summary["test_mean_recall"]
    calibration = summary["calibration"]
    assert figures["calibration"] == {
        "temperature": calibration["temperature"],
        "reason": calibration["reason"],
        "error": calibration["test_error"],
        "error_scaled": calibration["test_error_scaled"],
    }
    assert figures["uneven"] is summary["data"]["uneven"] is False


@pytest.mark.parametrize("settings", [{"train_layers": ("all",)}, {"cache": "off", "ema": 0.5}, {"precision": "bf16"}])
def test_other_ways_to_compute_give_the_runs_figures_too(
    place: Place, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Uncut, with features as they are wanted, and trained in bf16, whose test runs in fp32."""
    recipe = dataclasses.replace(place.recipe, epochs=1, **settings)
    summary = run(recipe, tmp_path / "run")
    result = evaluate(load_trained(tmp_path / "run"), str(place.photos), device="cpu")
    assert torch.equal(result.logits, tensors(tmp_path / "run" / "predictions.safetensors")["logits"])
    assert result.as_dict()["loss"] == summary["test_loss"]


def test_bf16_comes_close(place: Place) -> None:
    exact, rough = of(place).logits, of(place, precision="bf16").logits
    assert not torch.equal(rough, exact)
    assert float((rough - exact).norm() / exact.norm()) < 0.1


def test_every_figure_is_of_the_predictions(place: Place) -> None:
    """The figures of the JSON, computed from logits and labels alone."""
    result = of(place)
    figures = json.loads(json.dumps(result.as_dict()))
    labels, guesses = result.images.labels.numpy(), result.logits.argmax(1).numpy()
    assert figures["images"] == len(labels) == 61
    assert [one["name"] for one in figures["classes"]] == list(MADE.classes)
    for index, one in enumerate(figures["classes"]):
        assert one["images"] == (labels == index).sum()
        assert one["accuracy"] == pytest.approx(100 * (guesses[labels == index] == index).mean())
        assert figures["confusion"][index] == np.bincount(guesses[labels == index], minlength=6).tolist()
    chances = result.logits.double().softmax(1).numpy()
    confidence, right = chances.max(1), guesses == labels
    places = np.ceil(confidence * 15)
    error = sum(abs(right[places == b].sum() - confidence[places == b].sum()) for b in set(places)) / len(labels)
    assert figures["calibration"]["error"] == pytest.approx(100 * error)
    assert figures["top5_accuracy"] == top_k_accuracy(result.logits, result.images.labels, 5)


def test_images_that_train_holds_too(place: Place) -> None:
    result = of(place)
    assert result.repeated is not None
    (row,) = result.repeated.nonzero().flatten().tolist()
    data = load_data(str(place.photos), image_size=32)
    assert data.test is not None
    assert data.val is not None
    learned = torch.cat([data.train.images, data.val.images])
    assert any(torch.equal(data.test.images[row], image) for image in learned)
    others = torch.arange(61) != row
    right = result.logits.argmax(1) == result.images.labels
    assert result.as_dict()["repeated"] == {
        "images": 1,
        "accuracy_without": pytest.approx(100 * right[others].double().mean().item()),
    }


def test_the_other_splits_are_those_of_the_run(place: Place) -> None:
    val = of(place, split="val")
    assert len(val.images) == place.summary["data"]["val"]
    assert val.as_dict()["accuracy"] == metrics(place.folder)[-1]["val_accuracy"] == place.summary["val_accuracy"]
    train = of(place, split="train")
    assert len(train.images) == place.summary["data"]["train"]
    assert train.as_dict()["accuracy"] == place.summary["train_accuracy"]
    assert train.as_dict()["repeated"] is None


def test_one_pile_is_all_test_images(place: Place, tmp_path: Path) -> None:
    """Classes by name: three of the six, in folders, without train and test."""
    some = make_images(30, 0, classes=6, seed=5)
    keep = some.train_labels >= 3
    write_class_folders(tmp_path / "pile", some.train[keep], some.train_labels[keep], some.classes)
    notes: list[str] = []
    result = of(place, str(tmp_path / "pile"), events=Events(note=notes.append))
    assert sorted(result.images.labels.tolist()) == sorted(some.train_labels[keep].tolist())
    assert result.repeated is not None
    assert not result.repeated.any(), "none of these is an image of the run"
    figures = result.as_dict()
    assert [one["images"] for one in figures["classes"]] == [0, 0, 0, 5, 5, 5]
    assert figures["classes"][0]["accuracy"] is None
    assert notes == [
        "pile has no train and test folders, so all of its 15 images are test images.",
        "class_00, class_01, class_02 are among the model's classes and not in pile.",
    ]


def test_images_that_the_run_learned_from_are_known_in_other_data(place: Place, tmp_path: Path) -> None:
    """What counts is what the model was trained on, not what the other data call train."""
    pile = tmp_path / "pile"
    for name in ("class_00", "class_01"):
        (pile / name).mkdir(parents=True)
        image = sorted((place.photos / "train" / name).iterdir())[0]
        (pile / name / "copied.png").write_bytes(image.read_bytes())
    result = of(place, str(pile))
    assert result.repeated is not None
    assert result.repeated.tolist() == [True, True]
    chosen = choose_images(
        load_trained(place.folder), str(pile), data_dir=None, labels=None, split="test", events=Events()
    )
    assert isinstance(chosen.learned and chosen.learned.images, Streamed), "no second data set is kept in memory"
    notes: list[str] = []
    moved = tmp_path / "moved"
    shutil.copytree(place.folder, moved)
    recipe = moved / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(place.photos), str(tmp_path / "gone")))
    unknown = evaluate(load_trained(moved), str(pile), device="cpu", events=Events(note=notes.append))
    assert unknown.repeated is None
    assert any(
        note.startswith("Whether the model was trained on some of these images is not known: ") for note in notes
    )


def test_an_output_in_no_folder_is_refused_before_any_work(place: Place, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(place.folder), "--output", str(tmp_path / "no" / "p.safetensors")])
    assert done.exit_code == 2
    assert "lies in a folder that does not exist" in done.stderr


def test_a_model_of_coarse_labels_takes_folders_of_its_classes(place: Place) -> None:
    trained = load_trained(place.folder)
    assert trained.recipe is not None
    coarse = dataclasses.replace(trained, recipe=dataclasses.replace(trained.recipe, labels="coarse"))
    assert evaluate(coarse, str(place.photos), device="cpu").as_dict()["accuracy"] == place.summary["test_accuracy"]
    with pytest.raises(UsageError, match="--labels coarse needs CIFAR-100"):
        evaluate(trained, str(place.photos), labels="coarse")


def test_the_pile_of_the_run_itself_keeps_its_test_images(place: Place, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "pile", MADE.train, MADE.train_labels, MADE.classes)
    summary = run(dataclasses.replace(place.recipe, data=str(tmp_path / "pile"), epochs=1), tmp_path / "run")
    result = evaluate(load_trained(tmp_path / "run"), device="cpu")
    assert len(result.images) == summary["data"]["test"] == 9
    assert result.as_dict()["accuracy"] == summary["test_accuracy"]


def test_other_classes_are_named(place: Place, tmp_path: Path) -> None:
    other = make_images(8, 8, classes=2)
    write_image_folder(tmp_path / "pets", made=dataclasses.replace(other, classes=("cat", "class_01")))
    with pytest.raises(DataError) as error:
        of(place, str(tmp_path / "pets"))
    assert str(error.value) == (
        f"pets has classes that {place.folder} was not trained on: cat; it knows class_00, class_01, class_02, "
        "class_03, class_04, class_05. Give data of the same classes."
    )


def test_memory_that_runs_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen part always takes as many images, so there a smaller batch is no help."""

    def full(*arguments: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def said(place_of_error: object, name: str, batch: int) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(place_of_error, name, full)
            with pytest.raises(UsageError) as error:
                of(place, split="train", batch_size=batch)
        return str(error.value)

    whole = "images need more memory than cpu has; give a smaller --batch-size, or --device cpu."
    frozen = "The frozen part takes 64 images at a time, which need more memory than cpu has; end other programs that "
    assert said(evaluating, "predict", 12) == f"Batches of 12 {whole}"
    assert said(Prefix, "__call__", 65) == f"Batches of 65 {whole}"
    assert said(Prefix, "__call__", 64) == f"{frozen}use it, or give --device cpu."
    assert said(evaluating, "prepare_prefix", 12) == f"{frozen}use it, or give --device cpu."
    images = of(place).images
    monkeypatch.setattr(Prefix, "__call__", full)
    before = (place.folder / "summary.json").read_bytes()
    with pytest.raises(UsageError) as error:
        read_test(place.folder, images, Events())
    assert str(error.value) == f"{frozen}use it, and go on with finetune sweep --resume {place.folder.parent}."
    assert (place.folder / "summary.json").read_bytes() == before


def test_options_that_cannot_be_right(place: Place, tmp_path: Path) -> None:
    for settings, words in (
        ({"split": "tset"}, "--split is 'tset'; it can be train, val or test."),
        ({"precision": "fp8"}, "--precision is 'fp8'; finetune eval takes fp32 or bf16."),
        ({"batch_size": 0}, "--batch-size is 0; give a whole number of at least 1."),
    ):
        with pytest.raises(UsageError) as error:
            of(place, **settings)
        assert str(error.value) == words
    write_image_folder(tmp_path / "photos", made=make_images(12, 0, classes=6))
    with pytest.raises(DataError, match="photos has no test images, only train; give another --split, or a folder of"):
        of(place, str(tmp_path / "photos"))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place.folder / name, tmp_path / name)
    with pytest.raises(UsageError, match=r"--data is missing, and .* holds no recipe.toml that names the data"):
        evaluate(load_trained(tmp_path))


def test_the_command(place: Place, tmp_path: Path) -> None:
    words = ["eval", str(place.folder), "--data", str(place.photos), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "p.safetensors")])
    assert done.exit_code == 0, done.stderr
    accuracy = place.summary["test_accuracy"]
    assert f"test accuracy   {accuracy:.2f} %, top 5 " in done.stdout
    assert "also in train   1 image, pixel for pixel; " in done.stdout
    assert "classes, the worst first" in done.stdout
    written, saved = tensors(tmp_path / "p.safetensors"), tensors(place.folder / "predictions.safetensors")
    assert written.keys() == saved.keys() >= {"logits", "labels", "shown", "pictures"}
    assert all(torch.equal(written[name], saved[name]) for name in saved)
    as_json = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(as_json.stdout) == json.loads(json.dumps(of(place).as_dict()))


def test_uneven_classes_lead_with_their_mean_recall(place: Place, tmp_path: Path) -> None:
    made = make_images(60, 40, classes=4)
    few = (made.train_labels != 0) | (np.arange(60) < 20)
    uneven = dataclasses.replace(made, train=made.train[few], train_labels=made.train_labels[few])
    write_image_folder(tmp_path / "photos", made=uneven)
    weights = place.recipe.weights
    recipe = tiny_recipe(tmp_path / "photos", Path(weights), tmp_path / "cache", class_weights="balanced", epochs=1)
    summary = run(recipe, tmp_path / "run")
    assert summary["data"]["uneven"] is True
    page = (tmp_path / "run" / "report.html").read_text()
    assert f'<p class="result">{summary["test_mean_recall"]:.2f} %</p>' in page
    assert "mean per-class recall on 40 test images" in page
    plain = run(dataclasses.replace(recipe, class_weights="none"), tmp_path / "plain")
    assert plain["test_loss"] != summary["test_loss"]
