"""From a recipe to a model: input sizes, networks that read values while they are built, and others' snapshots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from make_run import tiny_recipe, write_weights
from torch import nn

from finetune.models import build, check_size, find_weights, prepare_model, preprocessing_of
from finetune.recipe import Recipe
from weights.arch import resolve_arch
from weights.errors import UsageError, WeightsError
from weights.save import write_config


def recipe(weights: Path, arch: str = "test_vit", **settings: Any) -> Recipe:
    """Return a recipe whose data and cache are never asked for."""
    return tiny_recipe(Path("data"), weights, Path("cache"), arch, **settings)


@pytest.fixture
def run_at_96(tmp_path: Path) -> Path:
    """A folder as a run of test_vit at 96 pixels leaves it; timm's own size is 160."""
    arch = resolve_arch("test_vit")
    model, model_args = build(arch, 5, 96)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_config(
        tmp_path / "config.json",
        arch=arch,
        num_classes=5,
        classes=list("abcde"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        input_size=(3, 96, 96),
        model_args=model_args,
    )
    return tmp_path


def test_a_run_at_another_size_is_built_at_that_size(run_at_96: Path) -> None:
    prepared = prepare_model(recipe(run_at_96, image_size=None), 3)
    assert prepared.preprocessing.size == 96
    assert prepared.model_args == {"img_size": 96}
    assert prepared.account is not None
    assert prepared.account.resized == ()
    kept = safetensors.torch.load_file(run_at_96 / "model.safetensors")["pos_embed"]
    assert torch.equal(prepared.model.get_parameter("pos_embed"), kept)


def test_weights_that_fit_their_own_size_alone(tmp_path: Path) -> None:
    """LeViT's table of attention biases has a row for each offset, and timm does not resize it."""
    weights = tmp_path / "levit_128s.safetensors"
    safetensors.torch.save_file(timm.create_model("levit_128s").state_dict(), weights)
    with pytest.raises(WeightsError) as error:
        prepare_model(recipe(weights, "levit_128s", train_layers=("head",), image_size=128), 3)
    assert str(error.value) == (
        "The weights (local file levit_128s.safetensors) are those of levit_128s for 224 × 224 pixels, and some of "
        "them cannot be brought to 128 × 128; leave --image-size out."
    )
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(timm.create_model("levit_128").state_dict(), other)
    with pytest.raises(WeightsError, match="are those of another network"):
        prepare_model(recipe(other, "levit_128s", train_layers=("head",), image_size=128), 3)


def test_an_assertion_without_words_leaves_no_empty_bracket() -> None:
    class Halo(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(
        UsageError, match=r"^test_vit cannot take images of 32 × 32 pixels; its pretrained size is 160: "
    ):
        check_size(Halo(), resolve_arch("test_vit"), 32)


@pytest.mark.parametrize("size", [64, 160])
def test_position_embeddings_are_resized_to_the_asked_size(run_at_96: Path, size: int) -> None:
    prepared = prepare_model(recipe(run_at_96, image_size=size), 3)
    assert prepared.model.get_parameter("pos_embed").shape[1] == 1 + (size // 16) ** 2
    assert prepared.account is not None
    assert prepared.account.resized == ("pos_embed",)
    assert "; resized to the image size: pos_embed; " in prepared.account.sentence()


def test_a_network_that_reads_values_while_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vit, convnext, swin and regnet of timm 1.0.20 do, which fails where tensors have no values."""
    create = timm.create_model

    def create_reading(*arguments: Any, **settings: Any) -> nn.Module:
        torch.linspace(0, 0.1, 2)[1].item()
        return create(*arguments, **settings)

    monkeypatch.setattr(timm, "create_model", create_reading)
    assert find_weights(recipe(Path("none"))).source == "none"
    with pytest.raises(UsageError, match=r"'blocks\.99' names no layer of this model"):
        find_weights(recipe(Path("none"), train_layers=("blocks.99",)))


def test_a_snapshot_with_a_tag_of_its_own(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors")
    said = {"tag": "my_ft", "mean": [0.1, 0.2, 0.3], "input_size": [3, 64, 64]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": said}))
    prepared = prepare_model(recipe(tmp_path, "test_resnet", image_size=None), 3)
    assert prepared.arch.full_name == "test_resnet"
    assert prepared.preprocessing.mean == (0.1, 0.2, 0.3)


def test_one_mean_for_all_colours() -> None:
    arch = resolve_arch("test_resnet")
    gray = replace(arch, config={**arch.config, "mean": [0.5], "std": [0.25]})
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
    made = preprocessing_of(gray, 8)(images)
    assert torch.equal(made, torch.tensor([-2.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8))
