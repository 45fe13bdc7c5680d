"""`finetune predict` and `finetune.load`: what a trained model says of images, and of everything that is none."""

from __future__ import annotations

import ast
import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from make_data import make_images, write_class_folders, write_image_folder
from make_run import change_config, tiny_recipe, write_weights
from PIL import Image
from typer.testing import CliRunner, Result

import finetune
from cli.main import app
from finetune.classifier import Classifier, Prediction, Unreadable
from finetune.evaluate import evaluate
from finetune.inputs import find_images
from finetune.pipeline import run
from finetune.trained import load_trained
from weights.errors import DataError, UsageError, WeightsError

MADE = make_images(48, 24, size=48)  # larger than the model's 32 x 32 pixels
SMALL = make_images(0, 12, size=20, seed=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, on which `run` was trained, and `small`, a folder of classes with smaller images."""
    root = tmp_path_factory.mktemp("predict")
    write_image_folder(root / "photos", made=MADE)
    write_class_folders(root / "small", SMALL.test, SMALL.test_labels, SMALL.classes)
    recipe = tiny_recipe(root / "photos", write_weights(root / "w.safetensors"), root / "cache", epochs=2)
    run(recipe, root / "run")
    return root


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """The model's two files, to be changed."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place / "run" / name, tmp_path / name)
    return tmp_path


def load(folder: Path, **settings: Any) -> Classifier:
    return Classifier(load_trained(folder), device="cpu", **settings)


def chances(predictions: list[Prediction], classes: tuple[str, ...]) -> torch.Tensor:
    """Probabilities (N, C) in the order of the classes."""
    rows = [{one.name: one.probability for one in prediction.topk} for prediction in predictions]
    return torch.tensor([[row[name] for name in classes] for row in rows], dtype=torch.float64)


def invoke(*words: object, **settings: Any) -> Result:
    result = CliRunner().invoke(app, ["predict", *map(str, words), "--device", "cpu"], **settings)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*words: object, code: int = 1, **settings: Any) -> str:
    """The one line that an error becomes; nothing is on standard output."""
    result = invoke(*words, **settings)
    assert (result.exit_code, result.stdout) == (code, "")
    line = result.stderr.rstrip("\n")
    assert line.startswith("Error: ")
    assert "\n" not in line
    return line.removeprefix("Error: ")


# What is predicted


@pytest.mark.parametrize("name", ["photos/test", "small"])
def test_predictions_are_those_of_eval(place: Path, name: str) -> None:
    """Images that are scaled down when they are decoded, and images that are scaled up for the model."""
    classifier = load(place / "run")
    result = evaluate(load_trained(place / "run"), str(place / name.partition("/")[0]), device="cpu")
    predictions = classifier.predict(place / name)
    assert len(predictions) == len(result.logits) >= 12
    assert [one.label for one in predictions] == [classifier.classes[index] for index in result.logits.argmax(1)]
    expected = (result.logits.double() / classifier.temperature).softmax(1)
    assert torch.allclose(chances(predictions, classifier.classes), expected, atol=1e-5)


@pytest.mark.parametrize(("crop_pct", "tolerance"), [(1.0, 1e-5), (0.875, 0.02)])
def test_predictions_are_those_of_timm(copy: Path, crop_pct: float, tolerance: float) -> None:
    """timm resizes pixels that are whole numbers, so a crop, for which it scales up first, rounds a little."""
    change_config(copy, lambda config: config["pretrained_cfg"].update(crop_pct=crop_pct))
    change_config(copy, lambda config: config["finetune"].update(temperature=1))
    pixels = make_images(0, 12, size=32, seed=5).test.transpose(0, 2, 3, 1)
    images = [Image.fromarray(one) for one in pixels]
    model = timm.create_model(f"local-dir:{copy}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(torch.stack([prepare(image) for image in images]))
    classifier = load(copy)
    predictions = classifier.predict(images)
    assert [one.label for one in predictions] == [classifier.classes[index] for index in logits.argmax(1)]
    assert torch.allclose(chances(predictions, classifier.classes), logits.double().softmax(1), atol=tolerance)
    whole = logits.double().softmax(1)
    change_config(copy, lambda config: config["pretrained_cfg"].update(crop_pct=1.0))
    same = torch.allclose(chances(load(copy).predict(images), classifier.classes), whole, atol=1e-4)
    assert same is (crop_pct == 1)


def test_images_that_are_not_square_become_so_as_in_timm(copy: Path) -> None:
    change_config(copy, lambda config: config["finetune"].update(temperature=1))
    noise = make_images(0, 2, size=64, seed=5).test.transpose(0, 2, 3, 1)
    images = [Image.fromarray(noise[0, :32]), Image.fromarray(noise[1, :, :32])]
    given, timms = [], []
    for mode in ("center", "squash", "border"):
        config = json.loads((copy / "config.json").read_text())
        config["pretrained_cfg"] |= {"crop_mode": mode, "interpolation": "bilinear"}
        (copy / "config.json").write_text(json.dumps(config))
        model = timm.create_model(f"local-dir:{copy}", pretrained=True).eval()
        prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        with torch.no_grad():
            timms.append(model(torch.stack([prepare(image) for image in images])).double().softmax(1))
        classifier = load(copy)
        given.append(chances(classifier.predict(images), classifier.classes))
    same = [[torch.allclose(one, other, atol=1e-3) for other in timms] for one in given]
    assert same == [[True, False, False], [False, True, False], [False, False, True]]


def test_top_k(place: Path) -> None:
    classifier = load(place / "run")
    for wrong in (0, "2", 2.5, None):
        with pytest.raises(UsageError, match=f"--topk is {wrong!r}; give a whole number of at least 1"):
            classifier.predict(place / "small", topk=wrong)  # type: ignore[arg-type]
    everything, two = classifier.predict(place / "small"), classifier.predict(place / "small", topk=2)
    for all_classes, first in zip(everything, two, strict=True):
        assert sorted(one.name for one in all_classes.topk) == list(classifier.classes), "four of at most five"
        values = [one.probability for one in all_classes.topk]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)
        assert first.topk == all_classes.topk[:2]
        assert (first.label, first.probability) == (first.topk[0].name, first.topk[0].probability)


def test_probabilities_are_calibrated(place: Path, copy: Path) -> None:
    change_config(copy, lambda config: config["finetune"].update(temperature=1))
    plain = load(copy).predict(place / "small")
    change_config(copy, lambda config: config["finetune"].update(temperature=3, reason="for this test"))
    classifier = load(copy)
    assert (classifier.temperature, classifier.temperature_reason) == (3, "for this test")
    expected = (chances(plain, classifier.classes).log() / 3).softmax(1)
    assert torch.allclose(chances(classifier.predict(place / "small"), classifier.classes), expected, atol=1e-9)


def test_what_is_said_of_an_image_does_not_depend_on_the_others(place: Path) -> None:
    paths = [str(place / "small"), str(place / "photos" / "test")]
    mixed = load(place / "run").predict(paths)
    alone = load(place / "run", batch_size=1).predict(paths)
    assert [one.path for one in mixed] == [one.path for one in alone]
    classes = load_trained(place / "run").classes
    assert torch.allclose(chances(mixed, classes), chances(alone, classes), atol=1e-5)


def test_images_are_read_as_they_are_needed(place: Path) -> None:
    files, asked = find_images([place / "photos" / "train"]).files, []

    def one_by_one() -> Iterator[str]:
        for file in files:
            asked.append(file)
            yield file

    batches = load(place / "run", batch_size=6).predict_batches(one_by_one())
    assert len(next(batches)) == 6
    assert len(asked) == 12, "the batch, and the one that is decoded meanwhile"
    assert sum(map(len, batches)) == 48 - 6


def test_bf16_comes_close(place: Path) -> None:
    exact, rough = (load(place / "run", precision=name).predict(place / "small") for name in ("fp32", "bf16"))
    assert exact != rough
    classes = load_trained(place / "run").classes
    assert torch.allclose(chances(exact, classes), chances(rough, classes), atol=0.05)


# From Python


def test_files_images_and_pixels_are_the_same(place: Path) -> None:
    assert "torch" not in _modules_after("import finetune; finetune.load")
    classifier = finetune.load(place / "run", device="cpu")
    assert repr(classifier).startswith("Classifier(test_resnet, 4 classes, temperature ")
    assert isinstance(classifier.model, torch.nn.Module)
    assert classifier.classes == MADE.classes
    files = find_images([place / "photos" / "test"]).files
    named = classifier.predict(files)
    assert [one.path for one in named] == list(files)
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    given = [Image.open(files[0]), *pixels[1:]]
    for unnamed in (classifier.predict(given), classifier.predict(pixels)):
        assert [one.topk for one in unnamed] == [one.topk for one in named]
        assert unnamed[0].path is None
    for single in (files[0], Path(files[0]), pixels[0], Image.open(files[0])):
        assert [one.label for one in classifier.predict(single)] == [named[0].label]
    grey = pixels[0, :, :, 0]
    assert classifier.predict(grey)[0].topk == classifier.predict(np.stack([grey] * 3, axis=2))[0].topk
    assert classifier.predict([]) == []


def _modules_after(code: str) -> list[str]:
    script = f"{code}; import sys; print(*sys.modules)"
    root = Path(finetune.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True
    ).stdout.split()


def test_what_is_no_image(place: Path, tmp_path: Path) -> None:
    classifier = load(place / "run")
    cases: tuple[tuple[Any, str], ...] = (
        (None, "An image is a NoneType; give a path, a Pillow image or a uint8 array."),
        ([3], "An image is a int; give a path, a Pillow image or a uint8 array."),
        (np.zeros((4, 4, 3)), "An image is an array of float64 (4, 4, 3); give uint8 pixels, (height, width, 3) or"),
        (np.zeros((3, 4, 4), np.uint8), "An image is an array of uint8 (3, 4, 4); give uint8 pixels"),
        (np.zeros((0, 4, 3), np.uint8), "An image is an array of uint8 (0, 4, 3); give uint8 pixels"),
    )
    for given, words in cases:
        with pytest.raises(UsageError) as error:
            classifier.predict(given)
        assert str(error.value).startswith(words)
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError) as unread:
        classifier.predict(tmp_path / "empty.png")
    assert str(unread.value) == (
        f"{tmp_path}/empty.png cannot be read (empty file); leave it out, or use predict_batches, which goes on with "
        "the others."
    )
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with Image.open(tmp_path / "half.png") as half:
        (batch,) = classifier.predict_batches([half])
    assert isinstance(batch[0], Unreadable)
    assert batch[0].path is None
    (batch,) = classifier.predict_batches([Image.new("RGB", (0, 9))])
    assert batch == [Unreadable(None, "it has no pixels")]


def test_models_that_cannot_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load(place / "run")
    monkeypatch.setattr(classifier.model, "forward", lambda inputs: torch.full((len(inputs), 4), torch.nan))
    with pytest.raises(WeightsError, match="gives outputs that are not finite numbers; use --precision fp32, or"):
        classifier.predict(place / "small")

    def full(inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(classifier.model, "forward", full)
    with pytest.raises(UsageError, match="A batch of 12 images needs more memory than cpu has; give a smaller --batch"):
        classifier.predict(place / "small")


# Which files


def test_strays_are_passed_over_in_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.JPG", "a/deep/er/3.webp", ".hidden/4.png", ".5.png", "a/.ipynb_checkpoints/3.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "notes.txt").touch()
    found = ("in/a/deep/er/3.webp", "in/b/1.JPG", "in/b/2.png")
    note = ("1 file (.txt) passed over: no image by the suffix.",)
    folder = find_images(["in"])
    assert (folder.files, folder.notes) == (found, note)
    for pattern in ("in/**", "in/**/*", "in/*"):
        assert (find_images([pattern]).files, find_images([pattern]).notes) == (found, note)
    assert find_images(["in/*/?.[pJ]*"]).files == ("in/b/1.JPG", "in/b/2.png")
    assert find_images(["in/notes.txt", "in/b"]).files == ("in/notes.txt", *found[1:]), "what is named is meant"
    (tmp_path / "[1].png").touch()
    assert find_images(["[1].png"]).files == ("[1].png",)
    listed = find_images(["-", "in/b"], lambda: ["in/a\n", "gone.png\r\n", "\n"])
    assert listed.files == ("in/a/deep/er/3.webp", "gone.png", *found[1:])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images(["~/in/b/2.png"]).files == (f"{tmp_path}/in/b/2.png",)


def test_paths_without_images(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").touch()
    expected = "expected an image, a folder of images, or a quoted pattern such as 'photos/*.jpg'."
    images = "expected files that end in .jpg, .png or the like."
    for path, words in (
        ("gone.jpg", f"There is nothing at gone.jpg; {expected}"),
        ("", f"There is nothing at an empty path; {expected}"),
        ("empty", f"empty holds no images; {images}"),
        ("texts", f"texts holds no images, only 1 file (.txt); {images}"),
        ("*.jpg", f"The pattern *.jpg finds no images; {images}"),
        ("texts/*", f"The pattern texts/* finds no images, only 1 file (.txt); {images}"),
    ):
        with pytest.raises(DataError) as error:
            find_images([path])
        assert str(error.value) == words
    monkeypatch.setattr("finetune.inputs.walk", denied)
    with pytest.raises(DataError) as error:
        find_images(["texts"])
    assert str(error.value) == "texts/in cannot be read (Permission denied); make it readable, or give another path."
    assert refused(place / "run", "gone.jpg") == f"There is nothing at gone.jpg; {expected}"
    assert refused(place / "run", code=2) == (
        "There are no images to predict; give files, folders or a quoted pattern, or - for a list."
    )
    assert refused(place / "run", "-", input="\n") == (
        "Standard input names no images; expected a list of paths, one in each line."
    )


def denied(folder: Path) -> list[Path]:
    raise PermissionError(errno.EACCES, "Permission denied", str(folder / "in"))


# The command


def test_json_csv_and_table_say_the_same(place: Path) -> None:
    words = (place / "run", place / "small", "--batch-size", 5)
    done = invoke(*words, "--json")
    assert done.exit_code == 0
    rows = json.loads(done.stdout)
    assert rows == [one.as_dict() for one in load(place / "run", batch_size=5).predict(place / "small")]
    assert len(rows) == 12
    assert rows[0].keys() == {"path", "topk"}
    assert rows[0]["path"] == str(place / "small" / "class_00" / "00000.png")
    assert [one.keys() for one in rows[0]["topk"]] == [{"class", "probability"}] * 4
    lines = list(csv.DictReader(io.StringIO(invoke(*words, "--csv").stdout)))
    for row, line in zip(rows, lines, strict=True):
        assert line.pop("path") == row["path"]
        ranks = range(1, len(row["topk"]) + 1)
        read = [{"class": line[f"class_{n}"], "probability": float(line[f"probability_{n}"])} for n in ranks]
        assert read == row["topk"]
        assert len(line) == 2 * len(row["topk"])
    table = invoke(*words, "--topk", 1, env={"COLUMNS": "300"}).stdout.splitlines()
    assert table[:2] == ["12 images, 4 classes", table[1]]
    assert table[1].split() == ["image", "class", "probability"]
    for row, shown in zip(rows, table[2:14], strict=True):
        best = row["topk"][0]
        assert shown.split() == [row["path"], best["class"], f"{100 * best['probability']:.1f}", "%"]


def test_the_temperature_is_told(place: Path, copy: Path) -> None:
    change_config(
        copy, lambda config: config["finetune"].update(temperature=1.5, reason="fitted on 7 validation images")
    )
    said = "Probabilities are calibrated with temperature 1.5 (fitted on 7 validation images)."
    assert invoke(copy, place / "small").stdout.splitlines()[-1] == said
    assert invoke(copy, place / "small", "--csv").stderr == ""
    change_config(copy, lambda config: config.pop("finetune"))
    said = "Probabilities are not calibrated: the temperature is 1 (config.json holds none)."
    assert invoke(copy / "model.safetensors", place / "small").stdout.splitlines()[-1] == said
    assert invoke(copy, place / "small", "--json").stderr == said + "\n"


def test_files_that_cannot_be_read_are_named_and_the_others_predicted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = [str(path) for path in sorted((place / "small" / "class_01").iterdir())]
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    listed = "\n".join([good[0], "empty.png", "text.jpg", "gone.png", good[1], good[2]])
    done = invoke(place / "run", "-", "--json", "--batch-size", 2, input=listed)
    assert done.exit_code == 1
    assert [row["path"] for row in json.loads(done.stdout)] == good
    assert done.stderr.splitlines()[-4:] == [
        "empty.png passed over: empty file",
        "text.jpg passed over: no image that Pillow knows",
        "gone.png passed over: No such file or directory",
        "Error: 3 images of 6 could not be read; replace or remove what is named above.",
    ]
    only = invoke(place / "run", "empty.png", "--json")
    assert (only.exit_code, json.loads(only.stdout)) == (1, [])
    assert only.stderr.splitlines()[-1] == (
        "Error: 1 image of 1 could not be read; replace or remove what is named above."
    )
    heading = invoke(place / "run", "empty.png", "--csv", "--topk", 1)
    assert (heading.exit_code, heading.stdout) == (1, "path,class_1,probability_1\n")


def test_a_progress_bar_leaves_standard_output_alone(place: Path, tmp_path: Path) -> None:
    """On a terminal rich sends what is printed beside a bar to standard error."""
    words = (place / "run", place / "small", "--batch-size", 4)
    plain, live = invoke(*words, "--json"), invoke(*words, "--json", env={"FORCE_COLOR": "1"})
    assert "\x1b[?25l" in live.stderr, "a bar was shown"
    assert live.stdout == plain.stdout


def test_names_that_are_not_utf8(place: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        shutil.copy(next((place / "small" / "class_00").iterdir()), name)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    listed = invoke(place / "run", "-", "--csv", "--topk", 1, input=name)
    assert listed.exit_code == 0
    assert "caf\\udce9.png,class_" in listed.stdout
    as_json = invoke(place / "run", tmp_path, "--json")
    assert os.fsencode(json.loads(as_json.stdout)[0]["path"]) == name


def test_options_that_cannot_be_right(place: Path) -> None:
    words = (place / "run", place / "small")
    assert refused(*words, "--topk", 0, code=2) == "--topk is 0; give a whole number of at least 1."
    assert refused(*words, "--json", "--csv", code=2) == "--json and --csv were both given; choose one."
    assert refused(*words, "--batch-size", 0, code=2) == "--batch-size is 0; give a whole number of at least 1."
    assert refused(*words, "--precision", "fp8", code=2) == (
        "--precision is 'fp8'; finetune predict takes fp32 or bf16."
    )


def test_checkpoints_that_cannot_be_used(place: Path, copy: Path) -> None:
    """The sentences are those of tests/test_trained.py; here they reach the terminal."""
    image = place / "small" / "class_00"
    good = (copy / "config.json").read_text()
    change_config(copy, lambda config: config.pop("label_names"))
    assert "lacks the names of the classes" in refused(copy, image)
    (copy / "config.json").write_text(good)
    change_config(copy, lambda config: config.update(architecture="resnet19"))
    assert "names a network that cannot be built here" in refused(copy, image)
    (copy / "config.json").write_text(good)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is truncated, damaged or not a weight file" in refused(copy, image)
    (copy / "config.json").unlink()
    assert "config.json is missing, which names the network and the classes" in refused(weights, image)


def test_the_code_of_the_page(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(finetune.__file__).parents[1] / "docs" / "predict.md"
    script, python = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run", "runs/photos")
    shutil.copytree(place / "small" / "class_03", "new-photos")
    shutil.copy("new-photos/00003.png", "photo.jpg")
    expected = load(place / "run").predict("new-photos")
    monkeypatch.setattr(sys, "stdin", io.StringIO(invoke("runs/photos", "new-photos", "--json").stdout))
    exec(compile(script, "docs/predict.md", "exec"), {})
    found = {path.name: path.parent.name for path in Path("sorted").rglob("*.png")}
    assert found == {Path(str(one.path)).name: one.label for one in expected}
    exec(compile(python, "docs/predict.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [[one.path, one.label] for one in expected]
    assert list(ast.literal_eval(lines[-1])) == [one.name for one in expected[0].topk[:2]]
