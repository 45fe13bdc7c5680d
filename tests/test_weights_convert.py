"""Wrappers, prefixes, and timm's own conversions of foreign names."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from weights.convert import plain_names, timm_names
from weights.errors import WeightsError
from weights.guess import guess_network
from weights.load import load_into

ONE = torch.ones(1)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "net"])
def test_state_dicts_inside_checkpoints(key: str) -> None:
    assert list(plain_names({"epoch": 1, key: {"a.weight": ONE}, "optimizer": {"lr": 0.1}})) == ["a.weight"]


def test_averaged_weights_go_first_and_wrappers_nest() -> None:
    found = plain_names({"state_dict": {"a": ONE}, "state_dict_ema": {"a": ONE * 2}})
    assert found["a"].item() == 2
    assert list(plain_names({"model": {"state_dict": {"module.a": ONE}}})) == ["a"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.model."])
def test_prefixes_are_stripped_when_every_name_has_them(prefix: str) -> None:
    assert list(plain_names({f"{prefix}a.weight": ONE, f"{prefix}b": ONE})) == ["a.weight", "b"]
    assert list(plain_names({f"{prefix}a.weight": ONE, "b": ONE})) == [f"{prefix}a.weight", "b"]


def test_counters_of_averaged_models_and_other_entries_are_left_out() -> None:
    assert list(plain_names({"n_averaged": ONE, "module.a": ONE, "version": 3})) == ["a"]


def test_parameters_become_plain_tensors() -> None:
    found = plain_names(torch.nn.Linear(2, 2).state_dict(keep_vars=True))
    assert not found["weight"].requires_grad


@pytest.mark.parametrize("held", [{}, {"epoch": 3}, {"state_dict": {}}, [ONE], ONE, None])
def test_no_tensors_is_an_error(held: object) -> None:
    with pytest.raises(
        WeightsError, match=r"^The checkpoint holds .+; expected a state dict, so give a file that holds one\.$"
    ):
        plain_names(held)


def original_convnext_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's names to those of the original ConvNeXt repository."""
    names = {}
    for name in state:
        old = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        if ".downsample." in old:
            stage, rest = old.removeprefix("stages.").split(".downsample.")
            old = f"downsample_layers.{stage}.{rest}"
        old = old.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        names[name] = old.replace("head.norm.", "norm.").replace("head.fc.", "head.")
    return {names[n]: t for n, t in state.items()}


def test_original_convnext_names_are_converted_by_timm() -> None:
    torch.manual_seed(0)
    source, target = timm.create_model("test_convnext"), timm.create_model("test_convnext")
    foreign = original_convnext_names(source.state_dict())
    assert set(foreign) != set(source.state_dict())
    account = load_into(target, foreign, head=("head.fc",), where="file.pth", keep_head=True)
    assert account.unexpected == ()
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in source.state_dict().items())


def test_torchvision_densenet_names_are_converted_by_timm() -> None:
    model = timm.create_model("densenet121")
    current = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    old = {n.replace(".norm1.", ".norm.1.").replace(".conv1.", ".conv.1."): t for n, t in current.items()}
    assert set(old) != set(current)
    assert set(timm_names(old, model)) == set(current)


def test_position_embeddings_are_resized_and_kernels_are_not() -> None:
    small = timm.create_model("test_vit", img_size=32)
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    resized = timm_names(state, small, head=("head",))
    assert resized["pos_embed"].shape == small.state_dict()["pos_embed"].shape
    assert all(resized[n] is t for n, t in state.items() if n != "pos_embed")
    fine = timm.create_model("test_vit", img_size=32, patch_size=8).state_dict()
    assert timm_names(fine, small)["patch_embed.proj.weight"] is fine["patch_embed.proj.weight"]
    with pytest.raises(WeightsError, match=r"wrong shape: patch_embed\.proj\.weight \(64, 3, 8, 8\), expected "):
        load_into(small, fine, head=("head",), where="file.pth")


def test_fitting_names_and_hopeless_ones_stay_as_they_are() -> None:
    for name in ("test_vit", "test_convnext", "test_resnet"):
        model = timm.create_model(name)
        state = model.state_dict()
        assert timm_names(state, model).keys() == state.keys()
        partial = {n: t for n, t in state.items() if "blocks.1" not in n and "layer4" not in n}
        assert timm_names(partial, model).keys() == partial.keys()
        foreign = {"something.else": ONE, "pos_embed": ONE}
        assert timm_names(foreign, model) == foreign
    assert timm_names({"weight": ONE}, torch.nn.Linear(1, 1)) == {"weight": ONE}


@pytest.mark.parametrize(
    ("arch", "guess"),
    [
        ("resnet34", "resnet34"),
        ("resnet50", "resnet50"),
        ("resnet26", "a ResNet"),
        ("vgg11", "a VGG"),
        ("test_vit", "a vision transformer"),
        ("convnext_atto", "a ConvNeXt"),
        ("regnety_002", "a RegNet"),
        ("mobilenetv3_small_050", "a MobileNet or EfficientNet"),
    ],
)
def test_networks_are_guessed_from_names(arch: str, guess: str) -> None:
    assert guess_network(timm.create_model(arch).state_dict()) == guess


def test_no_guess_without_an_idea() -> None:
    assert guess_network(["a.weight", "b"]) == ""
