"""A trained model from its folder: what is read, and the sentence for everything that may be wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from make_data import make_images, write_image_folder
from make_run import change_config, tensors, tiny_recipe, write_weights

from finetune.pipeline import run
from finetune.temperature import Temperature
from finetune.trained import load_trained
from weights.errors import WeightsError

CLASSES = tuple(f"class_{index:02d}" for index in range(4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on photos of four classes."""
    root = tmp_path_factory.mktemp("trained")
    write_image_folder(root / "photos", made=make_images(40, 8))
    recipe = tiny_recipe(root / "photos", write_weights(root / "w.safetensors"), root / "cache", epochs=1)
    run(recipe, root / "run")
    return root / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The two files of the model, to be damaged."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished / name, tmp_path / name)
    return tmp_path


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as error:
        load_trained(path)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "HERE")


def test_everything_a_run_knew_comes_back(finished: Path) -> None:
    trained = load_trained(finished)
    assert trained.classes == CLASSES
    assert (trained.arch.name, trained.preprocessing.size) == ("test_resnet", 32)
    assert trained.trained_layers == ("layer4", "fc")
    assert trained.recipe is not None
    assert (trained.recipe.batch_size, trained.recipe.val_fraction) == (16, 0.1)
    assert not trained.model.training
    state, saved = trained.model.state_dict(), tensors(finished / "model.safetensors")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    summary = trained.summary()
    assert summary is not None
    assert trained.temperature == Temperature(summary["calibration"]["temperature"], summary["calibration"]["reason"])
    told = ("fitted on 4 validation images", "4 validation images leave none", "4 validation images do not tell")
    assert trained.temperature.reason.startswith(told)
    assert load_trained(finished / "model.safetensors").classes == CLASSES


def test_timm_passes_over_the_temperature(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["finetune"].keys() == {"temperature", "reason"}
    model = timm.create_model(f"local-dir:{finished}", pretrained=True)
    assert "temperature" not in json.dumps(model.pretrained_cfg)


def test_a_folder_of_another_program(copy: Path) -> None:
    """Without what only finetune writes, the model loads; its temperature is 1, and nobody knows what trained."""
    plain = tensors(copy / "model.safetensors")
    safetensors.torch.save_file(plain, copy / "model.safetensors")
    change_config(copy, lambda config: config.pop("finetune"))
    trained = load_trained(copy)
    assert (trained.temperature.value, trained.trained_layers, trained.recipe) == (1.0, None, None)
    assert trained.summary() is None
    assert trained.classes == CLASSES


def test_what_is_not_there(copy: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == (
        "There is nothing at HERE; expected a run directory, or a model.safetensors with its config.json beside it."
    )
    assert "is no .safetensors file; expected a run directory" in refused(copy / "config.json")
    (copy / "config.json").unlink()
    assert refused(copy) == (
        "HERE/config.json is missing, which names the network and the classes; put it back beside the weights."
    )
    (copy / "model.safetensors").unlink()
    assert refused(copy) == "HERE holds no model.safetensors; give a run directory that finetune run has finished."
    (copy / "sweep.toml").touch()
    assert refused(copy).startswith("HERE holds the runs of a sweep; give one of them, such as")
    (copy / "checkpoint.pt").touch()
    assert "is a run that was not finished" in refused(copy)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda config: config.pop("architecture"), 'HERE/config.json lacks "architecture"; expected the config.json'),
        (lambda config: config.update(architecture="resnet19"), 'cannot be built here (Unknown architecture'),
        (lambda config: config.pop("label_names"), 'HERE/config.json lacks the names of the classes ("label_names")'),
        (lambda config: config.update(num_classes=5), "has num_classes 5 but 4 label_names; mend"),
        (lambda config: config.pop("pretrained_cfg"), 'HERE/config.json lacks "pretrained_cfg"'),
        (lambda config: config["pretrained_cfg"].update(mean=[0.5]), 'has "mean" [0.5] in "pretrained_cfg"; expected'),
        (lambda config: config["pretrained_cfg"].update(crop_pct="all"), 'has "crop_pct" \'all\' in "pretrained_cfg"'),
        (lambda config: config["pretrained_cfg"].update(crop_mode="fit"), "expected one of center, squash, border."),
        (lambda config: config["pretrained_cfg"].update(input_size=[3, 32, 64]), "expected 3 colours and a square"),
        (lambda config: config["finetune"].update(temperature=0), "has a temperature of 0; expected a number above 0"),
        (lambda config: config.update(model_args={"wings": 2}), "does not describe a network that can be built"),
        (lambda config: config.update(model_args=["wings"]), 'HERE/config.json has a wrong "model_args"; expected'),
        (lambda config: config.update(label_names=None, pretrained_cfg="a1"), "lacks the names of the classes"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_right(copy: Path, edit: Callable[[dict[str, Any]], object], words: str) -> None:
    change_config(copy, edit)
    assert words in refused(copy)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_config(copy: Path, damage: bytes) -> None:
    (copy / "config.json").write_bytes(damage)
    assert refused(copy).startswith("HERE/config.json is damaged (")


def test_weights_that_do_not_belong_to_the_config(copy: Path) -> None:
    path = copy / "model.safetensors"
    state = tensors(path)
    safetensors.torch.save_file({**state, "fc2.weight": torch.zeros(1)}, path)
    assert "holds 1 tensors that test_resnet has no place for (fc2.weight)" in refused(copy)
    safetensors.torch.save_file({name: value for name, value in state.items() if name != "fc.weight"}, path)
    assert "missing fc" in refused(copy)
    change_config(copy, lambda config: config.update(num_classes=3, label_names=list(CLASSES[:3])))
    safetensors.torch.save_file(state, path)
    assert "fc.weight" in refused(copy)
    path.write_bytes(path.read_bytes()[:1000])
    assert "is truncated, damaged or not a weight file" in refused(copy)
