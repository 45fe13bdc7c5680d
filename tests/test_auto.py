"""Settings left at auto that depend on the model: which runs get Muon, windows and skipping, and which do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from finetune.auto import BATCH, LONG, choice_told, settle_auto, trains_fresh_stage
from finetune.layers import select_layers
from finetune.recipe import Recipe, resolve_auto

LONG_RUN = Recipe(epochs=4)
IMAGES = LONG // 4


def make_model() -> nn.Module:
    model = nn.Module()
    model.stem = nn.Conv2d(3, 4, 3)
    model.stage = nn.Conv2d(4, 8, 3)  # 296 numbers, 288 of them the convolution's
    model.fc = nn.Linear(8, 3)  # 27
    return model


def is_stage(layers: list[str], fresh: set[str]) -> bool:
    model = make_model()
    return trains_fresh_stage(model, select_layers(model, layers, ["fc"]), frozenset(fresh))


def test_a_fresh_stage_is_mostly_convolutions_behind_something_frozen() -> None:
    head = {"fc.weight", "fc.bias"}
    stage = {"stage.weight", "stage.bias"}
    assert is_stage(["stage", "fc"], head | stage)
    assert not is_stage(["stage", "fc"], head)  # the stage starts from pretrained values
    assert not is_stage(["fc"], head)
    assert not is_stage(["all"], head | stage | {"stem.weight", "stem.bias"})  # nothing is frozen


def test_a_fresh_stage_that_trains_long_gets_muon_windows_and_fewer_images() -> None:
    settled = settle_auto(LONG_RUN, IMAGES, fresh_stage=True)
    assert (settled.optimizer, settled.windows, settled.skip_easy) == ("muon", "auto", 0.6)
    assert resolve_auto(settled, IMAGES).batch_size == BATCH
    assert settle_auto(settled, IMAGES, fresh_stage=True) == settled  # as a resumed run finds it
    told = choice_told(LONG_RUN, resolve_auto(settled, IMAGES))
    assert told is not None
    assert "auto takes muon, 384 images per step" in told
    assert "leaves out 60 % of the easier images. --optimizer sgd" in told


@pytest.mark.parametrize(
    ("images", "fresh_stage"), [(IMAGES - 1, True), (IMAGES, False)], ids=["too short", "pretrained stage"]
)
def test_other_runs_get_sgd_on_everything(images: int, fresh_stage: bool) -> None:
    settled = settle_auto(LONG_RUN, images, fresh_stage)
    assert settled == replace(LONG_RUN, optimizer="sgd", windows="off", skip_easy=0.0)
    assert choice_told(LONG_RUN, settled) is None


def test_what_is_set_stays() -> None:
    plain = settle_auto(replace(LONG_RUN, optimizer="sgd"), IMAGES, fresh_stage=True)
    assert (plain.windows, plain.skip_easy, plain.batch_size) == ("off", 0.0, None)
    own = replace(LONG_RUN, optimizer="adamw", windows="on", skip_easy=0.2, batch_size=7)
    assert settle_auto(own, IMAGES, fresh_stage=True) == own
    muon = settle_auto(replace(LONG_RUN, windows="off", skip_easy=0.0), IMAGES, fresh_stage=True)
    assert (muon.optimizer, muon.windows, muon.skip_easy) == ("muon", "off", 0.0)


@pytest.mark.parametrize("early", [{"patience": 2}, {"budget": "20m"}], ids=["patience", "budget"])
def test_a_run_that_may_end_early_leaves_no_image_out(early: dict[str, int | str]) -> None:
    settled = settle_auto(replace(LONG_RUN, **early), IMAGES, fresh_stage=True)  # type: ignore[arg-type]
    assert (settled.optimizer, settled.skip_easy) == ("muon", 0.0)
