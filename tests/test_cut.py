"""The cut: prefix and suffix together are the model, for every kind of network and without a line about any of them."""

from __future__ import annotations

import copy
import linecache
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.cut import Cut, cut_model, sources_dropped
from finetune.layers import Selection, fingerprint, freeze, require_unchanged, select_layers

# Name, input side in pixels, and its last stage as the network itself names it (with the convolution behind the stages
# where there is one); the head trains too.
TINY: dict[str, tuple[int, list[str]]] = {
    "test_resnet": (64, ["layer4"]),
    "test_vit": (32, ["blocks.5", "norm"]),
    "test_vit_relpos": (32, ["blocks.8", "norm"]),
    "test_convnext": (64, ["stages.3"]),
    "test_efficientnet": (64, ["blocks.4", "conv_head", "bn2"]),
    "test_nfnet": (64, ["stages.3", "final_conv"]),
    "test_byobnet": (64, ["stages.3"]),
    "test_mambaout": (64, ["stages.3"]),
    "test_maxvit": (160, ["stages.3"]),
    "test_coatnet": (160, ["stages.3"]),
}
NAMED: dict[str, tuple[int, list[str]]] = {
    "resnet18": (64, ["layer4"]),
    "resnet50": (64, ["layer4"]),
    "mobilenetv3_small_100": (64, ["blocks.5", "conv_head"]),
    "tf_efficientnet_lite0": (64, ["blocks.6", "conv_head", "bn2"]),
    "convnext_tiny": (64, ["stages.3"]),
    "vit_tiny_patch16_224": (64, ["blocks.11", "norm"]),
    "densenet121": (64, ["features.denseblock4", "features.norm5"]),
    "regnety_004": (64, ["s4"]),
    "vgg16_bn": (32, [f"features.{index}" for index in range(34, 44)] + ["pre_logits"]),
}


def build(arch: str, size: int) -> nn.Module:
    if not timm.is_model(arch):
        pytest.skip(f"timm {timm.__version__} has no {arch}")
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(arch).fixed_input_size and size != 160
    return timm.create_model(arch, num_classes=5, **({"img_size": size} if fixed else {})).eval()


def taken_apart(model: nn.Module, layers: list[str], size: int) -> tuple[Selection, Cut]:
    """Freeze and cut a model, looking at two images of noise."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {"classifier": "head"})
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    wanted = [name for name in layers if name in known or name in ("all", "head")]
    chosen = select_layers(model, wanted, [config["classifier"]])
    freeze(model, chosen)
    return chosen, cut_model(model, chosen, torch.randn(2, 3, size, size))


def prepared(arch: str) -> tuple[nn.Module, Selection, Cut, int]:
    size, layers = {**TINY, **NAMED}[arch]
    model = build(arch, size)
    return (model, *taken_apart(model, [*layers, "head"], size), size)


def flops(counter: FlopCounterMode, name: str) -> int:
    return sum(counter.get_flop_counts().get(name, {}).values())


@pytest.mark.parametrize("arch", [*TINY, *NAMED])
def test_the_halves_are_the_model_and_the_prefix_does_the_frozen_work(arch: str) -> None:
    model, chosen, cut, size = prepared(arch)
    assert cut.reason == ""
    assert cut.prefix is not None
    assert len(cut.crossing) == 1  # stages hand one tensor on, even those of densenet121
    images = torch.randn(3, 3, size, size)  # not the two that it was cut with: no batch size may be baked in
    with torch.no_grad():
        with FlopCounterMode(display=False) as whole:
            truth = model(images)
        with FlopCounterMode(display=False) as before:
            values = cut.prefix(images)
        logits = cut.suffix(*values)
    torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-6)
    assert all(len(value) == 3 for value in values)
    kind = type(model).__name__
    trained = sum(flops(whole, f"{kind}.{name}") for name in chosen.names)
    assert 0 < trained < whole.get_total_flops()
    assert before.get_total_flops() >= 0.95 * (whole.get_total_flops() - trained)
    tensors = dict(model.named_parameters())
    in_suffix = dict(cut.suffix.named_parameters())
    assert set(chosen.trained) <= set(in_suffix)
    assert all(parameter is tensors[name] for name, parameter in in_suffix.items())


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_efficientnet"])
def test_the_suffix_trains_as_the_model_does(arch: str) -> None:
    model, chosen, cut, size = prepared(arch)
    assert cut.prefix is not None
    twin = copy.deepcopy(model)
    images = torch.randn(4, 3, size, size)
    frozen = fingerprint(model, chosen.frozen)

    twin.train()
    twin(images).square().sum().backward()
    cut.suffix.train()
    with torch.no_grad():
        values = cut.prefix(images)
    cut.suffix(*values).square().sum().backward()

    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (name not in chosen.trained)
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5)
    require_unchanged(model, frozen)
    assert fingerprint(model, chosen.moving) == fingerprint(twin, chosen.moving)
    assert all(value is model.state_dict(keep_vars=True)[name] for name, value in cut.suffix.named_buffers())


def test_the_suffix_is_left_in_eval_mode() -> None:
    model, _, cut, _ = prepared("test_resnet")
    assert not any(module.training for module in [*model.modules(), *cut.suffix.modules()])


def test_a_layer_amid_a_block_lets_two_tensors_cross() -> None:
    model = build("resnet18", 32)
    chosen, cut = taken_apart(model, ["layer4.0.conv2", "head"], 32)
    assert len(cut.crossing) == 2  # what conv2 reads, and the shortcut around it
    assert cut.prefix is not None
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(cut.suffix(*cut.prefix(images)), model(images), rtol=1e-5, atol=1e-6)
    cut.suffix.train()
    assert not cut.suffix.get_submodule("layer4.0.bn2").training
    assert not cut.suffix.get_submodule("layer4.1").training
    assert cut.suffix.get_submodule("layer4.0.conv2").training
    frozen = fingerprint(model, chosen.frozen)
    with torch.no_grad():
        values = cut.prefix(images)
    cut.suffix(*values).sum().backward()
    require_unchanged(model, frozen)


def test_a_batch_norm_whose_weight_alone_trains_keeps_its_statistics() -> None:
    model = build("test_efficientnet", 64)
    chosen, cut = taken_apart(model, ["blocks.4.0.bn2.weight", "head"], 64)
    assert cut.prefix is not None
    frozen = fingerprint(model, chosen.frozen)
    cut.suffix.train()
    with torch.no_grad():
        values = cut.prefix(torch.randn(3, 3, 64, 64))
    cut.suffix(*values).sum().backward()
    require_unchanged(model, frozen)
    assert model.get_parameter("blocks.4.0.bn2.weight").grad is not None


def test_training_everything_is_uncut() -> None:
    model = build("test_resnet", 64)
    _, cut = taken_apart(model, ["all"], 64)
    assert cut == Cut(None, model, (), "every layer trains")


def test_training_the_first_layer_is_uncut() -> None:
    model = build("test_resnet", 64)
    _, cut = taken_apart(model, ["conv1", "head"], 64)
    assert cut == Cut(None, model, (), "no frozen layer comes before the first trained one")


class Decides(nn.Module):
    """Takes one of two ways, by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if float(x.detach().sum()) > 0 else self.two(x)


class Classifier(nn.Module):
    """Features, a body and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.body = body
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


class DecidesItself(Classifier):
    """The decision is in the model's own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.head(self.body(y) if float(y.detach().sum()) > 0 else y)


def test_a_model_that_cannot_be_traced_is_uncut_and_says_why() -> None:
    model = DecidesItself(nn.Linear(4, 4))
    _, cut = taken_apart(model, ["head"], 8)
    assert (cut.prefix, cut.suffix, cut.crossing) == (None, model, ())
    assert cut.reason.startswith("the model cannot be traced (TypeError: ")


def test_a_frozen_part_that_decides_is_called_as_it_is() -> None:
    model = Classifier(Decides()).eval()
    _, cut = taken_apart(model, ["head"], 8)
    assert cut.crossing == ("body",)
    images = torch.cat([torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8) - 3])
    for part in images.split(4):
        assert cut.prefix is not None
        assert torch.equal(cut.suffix(*cut.prefix(part)), model(part))


def test_a_part_that_decides_and_trains_in_part_goes_to_the_suffix_whole() -> None:
    model = Classifier(Decides()).eval()
    _, cut = taken_apart(model, ["body.two", "head"], 8)
    assert cut.crossing == ("stem",)
    cut.suffix.train()
    assert cut.suffix.get_submodule("body.two").training
    assert not cut.suffix.get_submodule("body.one").training


class Disagrees(nn.Module):
    """Gives something else at every call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_halves_that_do_not_give_the_models_output_are_not_used() -> None:
    body = nn.Sequential(nn.Linear(4, 4), Disagrees())
    _, cut = taken_apart(Classifier(body), ["head"], 8)
    assert cut.prefix is None
    assert cut.reason == "the two halves do not give the whole model's output"


class WithToken(nn.Module):
    """Puts a trained token, as often as there are images, before a frozen part's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.place = nn.Parameter(torch.randn(1, 4, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2) + self.place * 2
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y + self.place * 3], dim=1)
        return self.head(y.mean(1))


def test_sizes_and_constants_do_not_cross() -> None:
    model = WithToken()
    _, cut = taken_apart(model, ["token", "head"], 8)
    assert cut.prefix is not None
    for count in (1, 5):
        images = torch.randn(count, 3, 8, 8)
        with torch.no_grad():
            values = cut.prefix(images)
            assert all(len(value) == count for value in values)
            torch.testing.assert_close(cut.suffix(*values), model(images))


class WithTable(nn.Module):
    """Adds rows of a frozen table to a frozen part's output, and again where it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.table = nn.Parameter(torch.randn(2, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table * 2  # two rows, which are no images
        y = self.stem(x).mean((2, 3)) + rows[0] + self.table[1]
        return self.head(y * self.scale + rows[1] + self.table[0])


def test_a_table_with_as_many_rows_as_images_does_not_cross() -> None:
    model = WithTable()
    _, cut = taken_apart(model, ["scale", "head"], 8)
    assert cut.prefix is not None
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        values = cut.prefix(images)
        assert all(len(value) == 5 for value in values)
        torch.testing.assert_close(cut.suffix(*values), model(images))


def test_the_halves_share_no_frozen_tensor() -> None:
    """The suffix moves to its device alone; the prefix must stay whole where it is."""
    _, cut = taken_apart(WithTable(), ["scale", "head"], 8)
    assert cut.prefix is not None
    cut.suffix.double()  # changes tensors in place, as moving to a GPU does
    assert all(value.dtype == torch.float32 for value in cut.prefix.state_dict().values())
    assert len(cut.prefix(torch.randn(3, 3, 8, 8))) == len(cut.crossing)


def test_sources_of_graphs_are_let_go_and_the_graphs_still_compute() -> None:
    model, images = build("test_resnet", 64), torch.randn(2, 3, 64, 64)
    cache = {name for name in linecache.cache if "eval_with_key" in name}
    with sources_dropped():
        _, cut = taken_apart(model, ["layer4"], 64)
        assert {name for name in linecache.cache if "eval_with_key" in name} > cache
    assert {name for name in linecache.cache if "eval_with_key" in name} == cache
    assert cut.prefix is not None
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(cut.suffix)(*cut.prefix(images)), cut.suffix(*cut.prefix(images)))
