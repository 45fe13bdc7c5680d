"""Names of networks, resolved against timm's registry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm.models
from torch import nn

from weights.arch import resolve_arch, weights_url
from weights.errors import UsageError, near_matches


@pytest.fixture
def own_network() -> Iterator[str]:
    """A network of ours without any pretrained configuration, as `register_model` gets it."""

    def finetune_weights_test(pretrained: bool = False, num_classes: int = 10, **kwargs: object) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

    timm.models.register_model(finetune_weights_test)
    yield "finetune_weights_test"
    timm.models._registry._model_entrypoints.pop("finetune_weights_test")


@pytest.mark.parametrize(
    ("text", "full_name", "given"),
    [
        ("resnet18", "resnet18.tv_in1k", False),
        ("resnet50", "resnet50.tv_in1k", False),
        ("resnet50.a1_in1k", "resnet50.a1_in1k", True),
        (" resnet18.a2_in1k ", "resnet18.a2_in1k", True),
        ("resnet34", "resnet34.a1_in1k", False),
        ("test_vit", "test_vit.r160_in1k", False),
    ],
)
def test_names_with_and_without_tag(text: str, full_name: str, given: bool) -> None:
    arch = resolve_arch(text)
    assert arch.full_name == full_name
    assert arch.full_name == f"{arch.name}.{arch.tag}"
    assert arch.tag_given is given


def test_untagged_resnet18_has_torchvisions_preprocessing() -> None:
    config = resolve_arch("resnet18").config
    assert config["interpolation"] == "bilinear"
    assert config["crop_pct"] == 0.875
    assert config["classifier"] == "fc"
    assert config["first_conv"] == "conv1"
    assert config["hf_hub_id"] == "timm/resnet18.tv_in1k"
    assert weights_url(config)[1] == "resnet18-f37072fd.pth"


def test_configuration_is_the_tags_own() -> None:
    assert resolve_arch("resnet18.a1_in1k").config["interpolation"] == "bicubic"
    assert resolve_arch("test_vit").config["mean"] == (0.5, 0.5, 0.5)
    assert resolve_arch("resnet18.a3_in1k").config["input_size"] == (3, 160, 160)


def test_own_networks_resolve_without_a_tag(own_network: str) -> None:
    arch = resolve_arch(own_network)
    assert (arch.name, arch.tag, arch.full_name) == (own_network, "", own_network)
    assert arch.config["input_size"] == (3, 224, 224)
    with pytest.raises(UsageError, match='finetune_weights_test has no pretrained weights "tv_in1k"'):
        resolve_arch(f"{own_network}.tv_in1k")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnt18", r'^Unknown architecture "resnt18"; did you mean resnet18, .+ or .+\?$'),
        ("zzzzzzzz", r'^Unknown architecture "zzzzzzzz"; expected a timm name such as resnet18 or convnext_tiny\.$'),
        ("", '^Unknown architecture ""; expected a timm name'),
        ("resnet18.tvin1k", r'^resnet18 has no pretrained weights "tvin1k"; did you mean tv_in1k'),
        ("resnet18.qqqq", r'^resnet18 has no pretrained weights "qqqq"; its tags are a1_in1k, a2_in1k, .*tv_in1k\.$'),
        (
            "vit_base_patch16_224_in21k",
            r"^Architecture .* was renamed in timm; use vit_base_patch16_224\.augreg_in21k\.$",
        ),
    ],
)
def test_unknown_names_name_near_matches(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_arch(text)


def test_a_near_match_is_offered_once() -> None:
    assert near_matches("head.1", ["head", "stem", "head", "head.fc"]) == "; did you mean head or head.fc?"
    assert near_matches("zzzz", ["head"]) == ""


def test_arch_is_hashable_and_frozen() -> None:
    assert len({resolve_arch("resnet18"), resolve_arch("resnet18.tv_in1k"), resolve_arch("resnet18")}) == 2
