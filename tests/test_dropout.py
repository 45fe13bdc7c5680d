"""Dropout around the cut, and other things that are there in train mode only."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.cut import Cut, cut_model
from finetune.layers import Selection, freeze, select_layers
from weights.errors import UsageError


def prepared(arch: str | nn.Module, layers: tuple[str, ...], size: int = 32, **settings: Any) -> tuple[nn.Module, Cut]:
    torch.manual_seed(1)
    model = arch if isinstance(arch, nn.Module) else timm.create_model(arch, num_classes=5, **settings)
    head = () if isinstance(arch, nn.Module) else (str(model.pretrained_cfg["classifier"]),)
    selection: Selection = select_layers(model, layers, head)
    freeze(model, selection)
    return model, cut_model(model, selection, torch.randn(3, 3, size, size))


def outputs(model: nn.Module, cut: Cut, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What both halves and the whole model give in train mode, with the same random numbers."""
    assert cut.prefix is not None, cut.reason
    values = cut.prefix(images)
    torch.manual_seed(seed)
    halves: Tensor = cut.suffix.train()(*values)
    torch.manual_seed(seed)
    whole: Tensor = model.train()(images)
    return halves, whole


NETWORKS = [
    ("test_resnet", ("layer4", "fc"), {"drop_rate": 0.5}),  # a function in the model's own forward
    ("test_resnet", ("fc",), {"drop_rate": 0.5}),
    ("test_vit", ("head",), {"drop_rate": 0.5, "img_size": 32}),  # a module in front of the head
    ("test_efficientnet", ("conv_head", "bn2", "head"), {"drop_rate": 0.5}),
    ("test_efficientnet", ("head",), {"drop_rate": 0.5}),
    ("test_convnext", ("head",), {"drop_rate": 0.5}),
    ("finetune_vgg16", ("head",), {"dropout": 0.5}),
]


@pytest.mark.parametrize(("arch", "layers", "settings"), NETWORKS)
def test_dropout_behind_the_frozen_layers_follows_the_mode(
    arch: str, layers: tuple[str, ...], settings: dict[str, Any]
) -> None:
    model, cut = prepared(arch, layers, **settings)
    images = torch.randn(6, 3, 32, 32)
    (one, whole), (other, _) = outputs(model, cut, images, 1), outputs(model, cut, images, 2)
    assert not torch.allclose(one, other), "drawn anew"
    if arch != "finetune_vgg16":  # whose first dropout lies in front of a frozen layer, where the model's own stays on
        assert torch.allclose(one, whole, rtol=1e-4, atol=1e-5)
    assert cut.prefix is not None
    model.eval()
    with torch.no_grad():
        plain = cut.suffix.eval()(*cut.prefix(images))
        assert torch.allclose(plain, model(images), rtol=1e-4, atol=1e-5)
        assert torch.equal(plain, cut.suffix(*cut.prefix(images))), "off in evaluation"
    assert dict(cut.suffix.named_parameters()).keys() <= dict(model.named_parameters()).keys()


def test_dropout_in_front_of_frozen_layers_stays_off() -> None:
    _, cut = prepared("test_vit", ("head",), img_size=32, pos_drop_rate=0.9, drop_path_rate=0.5)
    assert cut.prefix is not None
    assert len(cut.crossing) == 1
    images = torch.randn(4, 3, 32, 32)
    values = cut.prefix(images)
    assert torch.equal(cut.suffix.train()(*values), cut.suffix(*values))


class Odd(nn.Module):
    """Frozen layers whose own forward drops, and dropout by keyword behind them."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(self.conv(x), 0.5, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.spare = Odd.Body(), nn.Linear(8, 5), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout2d(input=self.body(x), p=0.4, training=self.training).mean((2, 3))
        return self.fc(functional.dropout(x, p=0.0, training=self.training))


def test_functions_become_modules_only_where_they_drop() -> None:
    model, cut = prepared(Odd(), ("fc", "spare"))
    assert cut.reason == "", "a layer that the model has and does not use is no reason not to cut it"
    kinds = [type(module) for module in cut.suffix.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    assert kinds == [nn.Dropout2d]
    halves, whole = outputs(model, cut, torch.randn(4, 3, 32, 32), 3)
    assert torch.allclose(halves, whole)


class Remembering(nn.Module):
    """Attention biases as LeViT's attention keeps them: a table that is remembered in eval mode."""

    def __init__(self, *, by_another_name: bool = False) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.attention_biases = nn.Parameter(torch.randn(4))
        self.attention_bias_cache: dict[str, Tensor] = {}
        self.other: dict[str, Tensor] = {}
        self.by_another_name = by_another_name

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        kept = self.other if self.by_another_name else self.attention_bias_cache
        if self.training:
            return self.head(x + self.attention_biases.flip(0))
        if "bias" not in kept:
            kept["bias"] = self.attention_biases.flip(0)
        return self.head(x + kept["bias"])


@pytest.mark.parametrize("arch", ["levit_128s", "tiny_vit_5m_224"])
def test_biases_that_are_remembered_train_by_themselves(arch: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=5).eval()
    name = [name for name, _ in model.named_parameters() if name.endswith("attention_biases")][-1]
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        model(images)  # which they remember
    model, cut = prepared(model, (name,), 224)
    assert cut.prefix is not None, cut.reason
    values = cut.prefix(images)
    with torch.no_grad():
        before = cut.suffix.eval()(*values)
    cut.suffix.train()
    for _ in range(2):
        cut.suffix(*values).square().sum().backward()
    biases = dict(cut.suffix.named_parameters())[name]
    assert biases.grad is not None
    with torch.no_grad():
        assert torch.allclose(before, cut.suffix.eval()(*values), atol=1e-6)
        assert torch.allclose(before, model.eval()(images), rtol=1e-4, atol=1e-5)
        biases.fill_(float("nan"))
        assert cut.suffix.train().eval()(*values).isnan().all(), "what trains is what is read"
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    model.train()
    assert not any(norm.training for norm in norms), "its norms stay as they are"


def test_what_the_trace_does_not_show_trains_uncut() -> None:
    model = Remembering().eval()
    model(torch.randn(1, 3, 32, 32))
    assert prepared(model, ("attention_biases",))[1].reason == ""
    other = Remembering(by_another_name=True).eval()
    other(torch.randn(1, 3, 32, 32))
    assert prepared(other, ("attention_biases", "head"))[1].reason == (
        "attention_biases trains, and tracing the model does not show where it is used"
    )


class Sized(nn.Module):
    """A stage that gives its map's size beside the map, as MViT's do; the next one reads both."""

    class Stage(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, 8, 3, 2)

        def forward(self, x: Tensor, size: list[int]) -> tuple[Tensor, list[int]]:
            x = self.conv(x.reshape(len(x), -1, *size))
            return x.flatten(1), list(x.shape[2:])

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Sized.Stage(3), Sized.Stage(8), Sized.Stage(8)])
        self.head = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, size = x.flatten(1), [32, 32]
        for stage in self.stages:
            x, size = stage(x, size)
        return self.head(x)


def test_sizes_that_are_the_same_for_any_images_are_numbers() -> None:
    model, cut = prepared(Sized(), ("stages.2", "head"))
    assert cut.prefix is not None, cut.reason
    assert len(cut.crossing) == 1
    assert {name.split(".")[1] for name, _ in cut.suffix.named_parameters() if "stages" in name} == {"2"}
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32)
        assert torch.allclose(cut.suffix(*cut.prefix(images)), model(images), atol=1e-6)


class Beside(nn.Module):
    """What trains reads the images as well as what the frozen layers make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.one(x) + self.two(x)).mean((2, 3)))


def test_images_are_no_features() -> None:
    cut = prepared(Beside(), ("two", "head"))[1]
    assert (cut.prefix, cut.reason) == (
        None,
        "what trains needs the images beside what the frozen layers make of them",
    )


class Twice(nn.Module):
    """A block that is called twice, and drops in between."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(functional.dropout(self.a(x), 0.5, self.training))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 3), Twice.Block(), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.stem(x).mean((2, 3)))))


def test_a_block_that_is_called_twice_drops_twice() -> None:
    model, cut = prepared(Twice(), ("block.b", "head"))
    assert sum(type(module) is nn.Dropout for module in cut.suffix.modules()) == 2
    halves, whole = outputs(model, cut, torch.randn(4, 3, 32, 32), 3)
    assert torch.allclose(halves, whole)


def test_layers_that_the_network_does_not_use() -> None:
    with pytest.raises(UsageError, match=r"^The network has spare.bias and does not use it, so nothing would train"):
        prepared(Odd(), ("spare",))
