"""Which layers train: names, freezing that holds, and the proof that nothing frozen moved."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from finetune.layers import fingerprint, freeze, require_unchanged, select_layers
from weights.errors import TrainingError, UsageError


def make_model() -> nn.Module:
    """Two stages whose names begin alike, a dropout and a head."""
    return nn.Sequential(
        OrderedDict(
            layer4=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
            layer40=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            drop=nn.Dropout(0.5),
            fc=nn.Linear(4, 5),
        )
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return make_model()


@pytest.fixture(scope="module")
def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


@pytest.fixture
def resnet(_resnet: nn.Module) -> nn.Module:
    return copy.deepcopy(_resnet)


def test_a_name_stands_for_what_lies_below_it_and_no_more(model: nn.Module) -> None:
    chosen = select_layers(model, ["layer4"], ["fc"])
    assert chosen.trained == ("layer4.0.weight", "layer4.0.bias", "layer4.1.weight", "layer4.1.bias")
    assert chosen.moving == ("layer4.1.running_mean", "layer4.1.running_var", "layer4.1.num_batches_tracked")
    assert chosen.covers("layer4")
    assert chosen.covers("layer4.1.running_var")
    assert not chosen.covers("layer40")
    assert not chosen.covers("layer40.0.weight")


def test_every_tensor_is_trained_moving_or_frozen_and_never_two_of_these(resnet: nn.Module) -> None:
    chosen = select_layers(resnet, ["layer4", "head"], ["fc"])
    groups = [*chosen.trained, *chosen.moving, *chosen.frozen]
    assert sorted(groups) == sorted(resnet.state_dict())


def test_head_is_the_classifier_whatever_its_name(model: nn.Module) -> None:
    assert select_layers(model, ["head"], ["fc"]).trained == ("fc.weight", "fc.bias")
    both = select_layers(model, ["head"], ["fc", "layer40.0"])
    assert both.trained == ("layer40.0.weight", "layer40.0.bias", "fc.weight", "fc.bias")


def test_all_is_everything(model: nn.Module) -> None:
    chosen = select_layers(model, ["all"], ["fc"])
    assert chosen.trained == tuple(name for name, _ in model.named_parameters())
    assert chosen.frozen == ()
    assert chosen.covers("")


def test_a_single_parameter_can_be_named(model: nn.Module) -> None:
    chosen = select_layers(model, ["fc.bias"], ["fc"])
    assert chosen.trained == ("fc.bias",)
    assert not chosen.covers("fc")


def test_names_given_twice_count_once(model: nn.Module) -> None:
    assert select_layers(model, ["fc", "head", "fc"], ["fc"]).names == ("fc",)


def test_an_unknown_name_is_told_with_near_ones(model: nn.Module) -> None:
    with pytest.raises(UsageError) as error:
        select_layers(model, ["layer41"], ["fc"])
    assert str(error.value) == (
        "'layer41' names no layer of this model; did you mean layer4.1, layer4 or layer40.1? Its top-level layers are "
        "layer4, layer40, pool, flat, drop, fc; 'all' and 'head' work everywhere (see `finetune layers ARCH`)."
    )


def test_an_unknown_name_without_near_ones_is_told_too(model: nn.Module) -> None:
    with pytest.raises(UsageError) as error:
        select_layers(model, ["fc", "zzz"], ["fc"])
    assert str(error.value) == (
        "'zzz' names no layer of this model. Its top-level layers are layer4, layer40, pool, flat, drop, fc; 'all' and "
        "'head' work everywhere (see `finetune layers ARCH`)."
    )


def test_layers_without_parameters_cannot_train(model: nn.Module) -> None:
    with pytest.raises(UsageError) as error:
        select_layers(model, ["pool", "drop"], ["fc"])
    assert str(error.value) == (
        "--train-layers pool,drop holds no parameter, so nothing would train; name at least one layer with weights, "
        "such as 'head'."
    )


def test_frozen_parameters_take_no_gradient(model: nn.Module) -> None:
    chosen = select_layers(model, ["fc"], ["fc"])
    freeze(model, chosen)
    wanting = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert tuple(wanting) == chosen.trained


def train_everywhere(model: nn.Module) -> None:
    """Call `.train()` on the model and then on every module in it, as careless code would."""
    model.train()
    for module in list(model.modules()):
        module.train()


def test_frozen_modules_stay_in_eval_whatever_is_called(model: nn.Module) -> None:
    freeze(model, select_layers(model, ["layer4", "fc"], ["fc"]))
    train_everywhere(model)
    in_train = {name for name, module in model.named_modules() if module.training}
    assert in_train == {"", "layer4", "layer4.0", "layer4.1", "pool", "flat", "drop", "fc"}


def test_eval_still_switches_everything_off(model: nn.Module) -> None:
    freeze(model, select_layers(model, ["layer4", "fc"], ["fc"]))
    model.train().eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a deep copy"])
def test_frozen_statistics_do_not_move_in_train_mode(resnet: nn.Module, copied: bool) -> None:
    chosen = select_layers(resnet, ["layer4", "head"], ["fc"])
    freeze(resnet, chosen)
    before = fingerprint(resnet, chosen.frozen)
    moving = fingerprint(resnet, chosen.moving)
    model = copy.deepcopy(resnet) if copied else resnet
    train_everywhere(model)
    model(torch.randn(4, 3, 64, 64))
    assert fingerprint(model, chosen.frozen) == before
    moved = fingerprint(model, chosen.moving)
    assert all(moved[name] != digest for name, digest in moving.items())  # the forward pass was one that moves things


def test_a_deep_copy_freezes_itself_and_not_the_original(model: nn.Module) -> None:
    freeze(model, select_layers(model, ["fc"], ["fc"]))
    twin = copy.deepcopy(model)
    frozen, original = twin.get_submodule("layer4"), model.get_submodule("layer4")
    original.training = True  # by force, to see whether the copy's train() reaches over here
    frozen.train()
    assert original.training
    assert not frozen.training


def test_a_batch_norm_of_which_only_parameters_are_named_keeps_its_statistics(resnet: nn.Module) -> None:
    chosen = select_layers(resnet, ["layer4.0.bn1.weight", "layer4.0.bn1.bias", "head"], ["fc"])
    freeze(resnet, chosen)
    before = fingerprint(resnet, chosen.frozen)
    train_everywhere(resnet)
    resnet(torch.randn(4, 3, 64, 64)).sum().backward()
    require_unchanged(resnet, before)
    assert resnet.get_parameter("layer4.0.bn1.weight").grad is not None


def test_a_fingerprint_differs_by_value_shape_and_dtype() -> None:
    module = nn.Module()
    for name, tensor in {
        "a": torch.zeros(4),
        "shape": torch.zeros(2, 2),
        "dtype": torch.zeros(4, dtype=torch.int32),
        "value": torch.tensor([0.0, 0.0, 0.0, -0.0]),
        "same": torch.zeros(4),
    }.items():
        module.register_buffer(name, tensor)
    prints = fingerprint(module, ["a", "shape", "dtype", "value", "same"])
    assert prints["a"] == prints["same"]
    assert len(set(prints.values())) == 4


def test_a_fingerprint_does_not_depend_on_memory_layout() -> None:
    module = nn.Conv2d(3, 8, 3)
    before = fingerprint(module, ["weight"])
    assert fingerprint(module.to(memory_format=torch.channels_last), ["weight"]) == before


@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "layer2.0.bn1.running_var", "bn1.num_batches_tracked"])
def test_one_moved_tensor_is_noticed_and_named(resnet: nn.Module, name: str) -> None:
    chosen = select_layers(resnet, ["layer4", "fc"], ["fc"])
    before = fingerprint(resnet, chosen.frozen)
    require_unchanged(resnet, before)
    tensor = resnet.state_dict()[name]
    flat = tensor.view(-1)
    flat[-1:] = torch.nextafter(flat[-1:], flat[-1:] + 1) if tensor.is_floating_point() else flat[-1:] + 1
    with pytest.raises(TrainingError) as error:
        require_unchanged(resnet, before)
    assert str(error.value) == (
        f"Frozen tensors moved during training ({name}); they were to stay bit-identical to the loaded weights, so "
        "this result is not kept. Please report it with the run's recipe.toml."
    )


def test_many_moved_tensors_are_counted(resnet: nn.Module) -> None:
    before = fingerprint(resnet, ["bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "conv1.0.weight"])
    with torch.no_grad():
        for name in before:
            resnet.state_dict()[name].add_(1)
    with pytest.raises(TrainingError, match=r"\(bn1\.weight, bn1\.bias, bn1\.running_mean and 2 more\)"):
        require_unchanged(resnet, before)


def test_trained_tensors_may_move(resnet: nn.Module) -> None:
    chosen = select_layers(resnet, ["fc"], ["fc"])
    before = fingerprint(resnet, chosen.frozen)
    with torch.no_grad():
        resnet.get_parameter("fc.bias").add_(1)
    require_unchanged(resnet, before)
