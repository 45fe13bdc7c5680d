"""The feature cache's key: change one ingredient of what makes features, and they are not found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import cache, prefix
from finetune.augment import Preprocessing, Views, make_views
from finetune.cache import key_of
from finetune.cut import Cut, cut_model
from finetune.events import Events
from finetune.images import ImageSet
from finetune.layers import freeze, select_layers
from finetune.placement import Placement
from finetune.precision import Choice
from finetune.prefix import PreparedPrefix, prepare_prefix
from finetune.sources import FeatureBuilder

CPU = torch.device("cpu")
PLAIN = Preprocessing(8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear")
FP32 = Choice("fp32", False, 100.0, 0.0, "")
ROWS = 20


class Network(nn.Module):
    """A convolution with a batch norm (frozen), and a head. `scale` is no tensor and stands in no printed form."""

    def __init__(self, *, kernel: int = 3, slope: float = 0.1, scale: float = 2.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(slope)
        self.body = Scaled(scale)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.act(self.norm(self.conv(x)))).mean((2, 3)))


class Scaled(nn.Module):
    """Multiplies by a number that it does not show."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("hidden", torch.ones(()), persistent=False)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale * self.weight * self.hidden


def image_set(count: int = ROWS, *, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 5, tuple("abcde"))


def prepared(
    change: Callable[[Network], None] = lambda model: None,
    *,
    preprocessing: Preprocessing = PLAIN,
    choice: Choice = FP32,
    **settings: float,
) -> PreparedPrefix:
    """Make the prefix of a network with fixed weights, after a change to it."""
    torch.manual_seed(0)
    model = Network(**settings)  # type: ignore[arg-type]
    with torch.no_grad():
        change(model)
    return prepare_prefix(cut_of(model), preprocessing, image_set(4).images, CPU, lambda build: choice)


def cut_of(model: Network) -> Cut:
    chosen = select_layers(model, ["head"], ["head"])
    freeze(model, chosen)
    return cut_model(model, chosen, torch.randn(2, 3, 8, 8))


def keys(made: PreparedPrefix, data: ImageSet | None = None, views: Views | None = None) -> list[str]:
    """Return the keys of a set's entries, in the order of its views."""
    data = data or image_set()
    builder = FeatureBuilder(made, Placement("ram", True, 0, ""), Path("unused"), 10**9, Events())
    entries = builder.entries(data, views or make_views("none", len(data), 8, count=1, seed=0))
    return [entry.folder.name for entry, _ in entries]


@pytest.fixture(scope="module")
def usual() -> str:
    return keys(prepared())[0]


def test_the_same_ingredients_give_the_same_key(usual: str) -> None:
    assert keys(prepared()) == [usual]
    assert len(usual) == 32


def test_the_key_changes_with_a_weight(usual: str) -> None:
    def change(model: Network) -> None:
        model.conv.weight[3, 2, 2, 2] += 1e-6

    assert keys(prepared(change)) != [usual]


def test_the_key_changes_with_a_statistic(usual: str) -> None:
    assert keys(prepared(lambda model: model.norm.running_var[0].add_(1e-6))) != [usual]  # type: ignore[union-attr, index]


def test_the_key_changes_with_a_buffer_that_is_in_no_checkpoint(usual: str) -> None:
    assert keys(prepared(lambda model: model.body.hidden.add_(1e-6))) != [usual]


def test_the_key_does_not_change_with_what_trains(usual: str) -> None:
    assert keys(prepared(lambda model: model.head.weight.add_(1))) == [usual]


def test_the_key_changes_with_the_graph(usual: str) -> None:
    def change(model: Network) -> None:
        model.conv.stride = (2, 2)

    assert keys(prepared(change)) != [usual]
    assert keys(prepared(slope=0.2)) != [usual]  # the activation, which has no tensor


def test_the_key_changes_with_a_number_inside_a_module_that_stays_whole(usual: str) -> None:
    assert keys(prepared(scale=3.0)) != [usual]


def test_the_key_changes_with_the_cut(usual: str) -> None:
    torch.manual_seed(0)
    model = Network()
    chosen = select_layers(model, ["body", "head"], ["head"])
    freeze(model, chosen)
    cut = cut_model(model, chosen, torch.randn(2, 3, 8, 8))
    assert keys(prepare_prefix(cut, PLAIN, image_set(4).images, CPU, lambda build: FP32)) != [usual]


def test_the_key_changes_with_a_pixel(usual: str) -> None:
    data = image_set()
    data.images[7, 1, 2, 3] ^= 1
    assert keys(prepared(), data) != [usual]


def test_the_key_changes_with_the_order_of_images_and_their_number(usual: str) -> None:
    data = image_set()
    swapped = replace(data, images=data.images[[1, 0, *range(2, ROWS)]])
    fewer = replace(data, images=data.images[:-1], labels=data.labels[:-1])
    assert usual not in [*keys(prepared(), swapped), *keys(prepared(), fewer)]


def test_the_key_does_not_change_with_labels(usual: str) -> None:
    data = image_set()
    assert keys(prepared(), replace(data, labels=data.labels.flip(0))) == [usual]


def test_every_view_has_a_key_of_its_own(usual: str) -> None:
    flip = keys(prepared(), views=make_views("flip", ROWS, 8, count=None, seed=0))
    crop = keys(prepared(), views=make_views("crop", ROWS, 8, count=2, seed=0))
    other_draws = keys(prepared(), views=make_views("crop", ROWS, 8, count=2, seed=1))
    cutout = keys(prepared(), views=make_views("crop", ROWS, 8, count=2, seed=0, cutout=2))
    colour = keys(prepared(), views=make_views("crop", ROWS, 8, count=2, seed=0, cutout=2, fill=(1, 2, 3)))
    assert len({*flip, *crop, *other_draws, *cutout, *colour, usual}) >= 10
    assert not {*flip[1:], *crop, *other_draws, *cutout, *colour} & {usual}


@pytest.mark.parametrize(
    "preprocessing",
    [
        replace(PLAIN, size=16),
        replace(PLAIN, interpolation="bicubic"),
        replace(PLAIN, mean=(0.5, 0.4, 0.31)),
        replace(PLAIN, std=(0.2, 0.25, 0.31)),
    ],
    ids=["image size", "interpolation", "mean", "std"],
)
def test_the_key_changes_with_the_preprocessing(usual: str, preprocessing: Preprocessing) -> None:
    assert keys(prepared(preprocessing=preprocessing)) != [usual]


def test_the_key_changes_with_the_number_format(usual: str) -> None:
    assert keys(prepared(choice=replace(FP32, precision="bf16"))) != [usual]


def test_the_key_changes_with_compilation(usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "compile_module", lambda module: module)
    assert keys(prepared(choice=replace(FP32, compiled=True))) != [usual]


def test_the_key_changes_with_folding(usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "FP32_ERROR", -1.0)  # no folded prefix is good enough
    made = prepared()
    assert made.folded == 0
    assert keys(made) != [usual]


def test_the_key_changes_with_the_kind_of_device(usual: str) -> None:
    """A GPU adds in another order. Nothing runs there, so the identity alone is made."""
    made = prepared()
    frozen = cut_of(Network()).prefix
    assert frozen is not None
    here, there = (
        prefix._identity(frozen, replace(made.prefix, device=torch.device(name)), FP32, made.folded)
        for name in ("cpu", "cuda")
    )
    assert key_of(here) != key_of(there)


def test_every_ingredient_has_a_test_in_this_file() -> None:
    """Who adds one adds its test above, and its name here."""
    builder = FeatureBuilder(prepared(), Placement("ram", True, 0, ""), Path("unused"), 10**9, Events())
    ((_, about),) = builder.entries(image_set(), Views("none", 1))
    assert about.keys() == {
        "prefix", "images", "view", "image_size", "interpolation", "mean", "std", "dtype", "folded", "compiled",
        "device", "torch", "timm",
    }  # fmt: skip


@pytest.mark.parametrize("library", ["torch", "timm"])
def test_the_key_changes_with_the_version(usual: str, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr(getattr(prefix, library), "__version__", "0.0.1")
    assert keys(prepared()) != [usual]


def test_the_key_changes_with_the_cache_format(usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FORMAT", 0)
    assert keys(prepared()) != [usual]


def test_a_key_does_not_depend_on_the_order_of_ingredients() -> None:
    assert key_of({"a": 1, "b": (1, 2)}) == key_of({"b": [1, 2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_the_test_split_has_the_features_of_fp32_eager_whatever_was_chosen(usual: str) -> None:
    compiled = prepared(choice=replace(FP32, compiled=True))
    assert keys(compiled) != [usual]
    assert keys(compiled.for_test) == keys(prepared().for_test) == [usual]
    assert keys(prepared(choice=replace(FP32, precision="bf16")).for_test) == [usual]
