"""Which network a run builds: names that are near, and the settings that a checkpoint was trained with."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.arch import resolve_network, settings_with_weights
from finetune.recipe import Recipe
from weights.arch import resolve_arch
from weights.errors import UsageError, WeightsError
from weights.locate import Found


def settings(name: str, model_args: dict[str, Any] | None, **given: Any) -> dict[str, Any]:
    found = Found(None, resolve_arch(name), "local file model.safetensors", model_args)
    return settings_with_weights(Recipe(arch=name, **given), found)


def refused(name: str, model_args: dict[str, Any], **given: Any) -> str:
    with pytest.raises(WeightsError) as error:
        settings(name, model_args, **given)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("figur1", "finetune_figure1 or finetune_figure1_shared?"),
        ("finetune_figur1", "finetune_figure1 or finetune_figure1_shared?"),
        ("figure1", "finetune_figure1 or finetune_figure1_shared?"),
        ("multi_stage", "finetune_multistage"),
        ("resnet81", "resnet18"),
    ],
)
def test_near_names_are_ours_and_timms(name: str, near: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_network(name)
    assert str(error.value).startswith(f'Unknown architecture "{name}"; did you mean {near}')


def test_a_wrong_tag_and_a_name_like_no_other_are_said_as_before() -> None:
    with pytest.raises(UsageError, match='resnet18 has no pretrained weights "tv_in2k"; did you mean tv_in1k'):
        resolve_network("resnet18.tv_in2k")
    with pytest.raises(UsageError, match='Unknown architecture "zzzzzzzz"; expected a timm name'):
        resolve_network("zzzzzzzz")


def test_a_checkpoints_settings_need_not_be_repeated_and_may_be() -> None:
    stated = {"blocks": [3, 3, 3]}
    assert settings("finetune_multistage", stated) == stated
    assert settings("finetune_multistage", stated, blocks=("3", "3", "3")) == {"blocks": (3, 3, 3)}
    assert settings("finetune_multistage", {}) == {}
    assert settings("finetune_multistage", None, blocks=("1", "1", "1")) == {"blocks": (1, 1, 1)}
    assert settings("finetune_singlestage", {"blocks": 4}, blocks=("4",)) == {"blocks": (4,)}
    assert settings("finetune_identity", {"shortcut": "A", "img_size": 32}) == {"shortcut": "A"}
    assert settings("test_resnet", {"drop_rate": 0.5}) == {}


def test_dropout_shapes_no_tensor_so_it_may_change() -> None:
    assert settings("finetune_vgg16", {"hidden": 64, "dropout": 0.1}, dropout=0.3) == {"hidden": 64, "dropout": 0.3}


def test_a_setting_that_disagrees() -> None:
    assert refused("finetune_multistage", {"blocks": [3, 3, 3]}, blocks=("2", "2", "2")) == (
        "--blocks is 2,2,2 and the weights (local file model.safetensors) were trained with 3,3,3; leave --blocks out, "
        "or give other weights."
    )
    assert refused("finetune_identity", {}, shortcut="A").startswith("--shortcut is A and the weights (local file")
    assert "were trained with 512; leave --hidden out" in refused("finetune_vgg16", {}, hidden=64)


@pytest.mark.parametrize("stated", [{"blocks": [3, 3]}, {"blocks": "3,3,3"}, {"blocks": 1.5}])
def test_a_config_that_states_what_cannot_be(stated: dict[str, Any]) -> None:
    words = refused("finetune_multistage", stated)
    assert words.startswith(
        "The config.json of the weights (local file model.safetensors) has model_args that finetune_mu"
    )
    assert words.endswith("; mend it, or give the weights alone in another folder.")
