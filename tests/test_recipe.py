"""Settings: their TOML form, their checks and every sentence of those, and what `auto` becomes."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import (
    PLACES,
    Recipe,
    check,
    flag,
    from_table,
    read_toml,
    resolve_auto,
    to_table,
    to_toml,
)
from finetune.units import parse_bytes, parse_seconds
from weights.errors import UsageError

OTHER: dict[str, Any] = {
    "arch": "resnet50.a1_in1k", "train_layers": ("layer4", "fc"), "data": 'photos "of" ünï\\code',
    "data_dir": Path("/data sets"), "labels": "coarse", "weights": "w.safetensors", "weights_dir": Path("models"),
    "allow_missing": ("layer4",), "image_size": 160, "epochs": 3, "batch_size": 7, "lr": 1e-7, "head_lr_scale": 1.0,
    "lr_scales": ("layer4=0.5",),
    "optimizer": "adamw", "momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine", "warmup": 0.0,
    "label_smoothing": 0.0, "class_weights": "balanced", "ema": 0.998, "patience": 2, "augment": "crop", "cutout": 8,
    "views": 4, "freeze_norms": 1.0, "windows": "on", "skip_easy": 0.5, "val_fraction": 0.25,
    "keep_head": True, "blocks": ("1", "2"), "shortcut": "A", "hidden": 64, "dropout": 0.1, "budget": "20m",
    "limit": 100, "seed": 7, "device": "cpu", "precision": "bf16", "compile": "on", "cache": "disk",
    "cache_dir": Path("cache"), "cache_limit": "1TB", "memory_budget": "2GiB", "image_memory": "1GB",
    "shots": 5, "hold_test": True, "log": "tensorboard",
}  # fmt: skip
"""A value for every setting that is not its default."""


def check_words(**settings: Any) -> str:
    with pytest.raises(UsageError) as error:
        check(dataclasses.replace(Recipe(), **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def table_words(table: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as error:
        from_table(table, "recipe.toml")
    return str(error.value)


def test_defaults_pass_and_go_round() -> None:
    check(Recipe())
    assert from_table(tomllib.loads(to_toml(Recipe())), "") == Recipe()


def test_every_setting_goes_round() -> None:
    recipe = Recipe(**OTHER)
    assert set(OTHER) == {item.name for item in dataclasses.fields(Recipe)}
    assert [name for name, value in to_table(Recipe()).items() if to_table(recipe)[name] == value] == []
    check(recipe)
    back = from_table(tomllib.loads(to_toml(recipe)), "")
    assert back == recipe
    assert {name: type(getattr(back, name)) for name in OTHER} == {name: type(value) for name, value in OTHER.items()}


def test_none_is_written_as_auto() -> None:
    table = to_table(Recipe())
    none = {item.name for item in dataclasses.fields(Recipe) if getattr(Recipe(), item.name) is None}
    assert {name for name in none if table[name] == "auto"} == none
    assert "image_size" in none
    assert from_table({"device": "auto", "precision": "auto"}, "").device == "auto"  # a word of its own there


def test_a_short_recipe_keeps_the_other_defaults() -> None:
    assert from_table({"lr": 1, "seed": 3}, "") == Recipe(lr=1.0, seed=3)
    assert isinstance(from_table({"lr": 1}, "").lr, float)


def test_settings_are_documented_and_places_are_settings() -> None:
    items = dataclasses.fields(Recipe)
    assert all(len(item.metadata["help"]) > 10 for item in items)
    assert set(PLACES) < {item.name for item in items}
    assert flag("label_smoothing") == "--label-smoothing"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"learning_rat": 1}, "recipe.toml has an unknown setting 'learning_rat'; delete that line."),
        ({"epoch": 1}, "recipe.toml has an unknown setting 'epoch'; did you mean epochs?"),
        ({"run": {"lr": 1}}, "recipe.toml has an unknown setting 'run'; delete that line."),
        ({"epochs": 2.5}, 'recipe.toml has epochs = 2.5; it must be a whole number, or "auto".'),
        ({"epochs": True}, 'recipe.toml has epochs = True; it must be a whole number, or "auto".'),
        ({"seed": "auto"}, "recipe.toml has seed = 'auto'; it must be a whole number."),
        ({"lr": "0.1"}, "recipe.toml has lr = '0.1'; it must be a number, or \"auto\"."),
        ({"lr": False}, 'recipe.toml has lr = False; it must be a number, or "auto".'),
        (
            {"train_layers": "layer4,fc"},
            'recipe.toml has train_layers = \'layer4,fc\'; it must be a list of texts: ["a", "b"].',
        ),
        (
            {"train_layers": ["fc", 4]},
            'recipe.toml has train_layers = [\'fc\', 4]; it must be a list of texts: ["a", "b"].',
        ),
        ({"arch": 18}, "recipe.toml has arch = 18; it must be text in quotes."),
        ({"data_dir": 1}, 'recipe.toml has data_dir = 1; it must be a path in quotes, or "auto".'),
    ],
)
def test_wrong_tables(table: dict[str, Any], words: str) -> None:
    assert table_words(table) == words


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read \(No such file or directory\); give the path of a recipe"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("lr = 0.1\nepochs = = 2\n")
    with pytest.raises(UsageError, match=r"bad.toml is no valid TOML \(.*line 2.*\); mend that line"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'data = "\xe9"\n')
    with pytest.raises(UsageError, match=r"latin.toml is no valid TOML"):
        read_toml(tmp_path / "latin.toml")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "sdg"}, "--optimizer is 'sdg'; did you mean sgd? It can be auto, sgd, adam, adamw, muon."),
        ({"labels": "x"}, "--labels is 'x'. It can be fine, coarse."),
        ({"schedule": "cos"}, "--schedule is 'cos'; did you mean cosine? It can be onecycle, cosine, constant."),
        ({"augment": ""}, "--augment is ''. It can be none, flip, altflip, crop."),
        ({"cutout": -1}, "--cutout is -1; give 0 (off) or a number of pixels, such as 8."),
        (
            {"cutout": 8, "augment": "altflip"},
            "--cutout 8 goes with --augment crop only, whose versions of an image are drawn anew; altflip has a fixed "
            "number of them.",
        ),
        ({"precision": "fp16"}, "--precision is 'fp16'; did you mean bf16? It can be auto, fp32, bf16."),
        ({"compile": "yes"}, "--compile is 'yes'. It can be auto, on, off."),
        ({"cache": "memory"}, "--cache is 'memory'. It can be auto, ram, disk, off."),
        ({"epochs": 0}, "--epochs is 0; give a whole number of at least 1."),
        ({"batch_size": -1}, "--batch-size is -1; give a whole number of at least 1."),
        ({"image_size": 0}, "--image-size is 0; give a whole number of at least 1."),
        ({"limit": 0}, "--limit is 0; give a whole number of at least 1."),
        ({"augment": "crop", "views": 0}, "--views is 0; give a whole number of at least 1."),
        ({"lr": 0.0}, "--lr is 0.0; give a number above 0."),
        ({"lr": NAN}, "--lr is nan; give a number above 0."),
        ({"head_lr_scale": INF}, "--head-lr-scale is inf; give a number above 0."),
        ({"momentum": 1.0}, "--momentum is 1.0; give a number from 0 to below 1."),
        ({"label_smoothing": -0.1}, "--label-smoothing is -0.1; give a number from 0 to below 1."),
        ({"ema": 1.5}, "--ema is 1.5; give a number from 0 to below 1."),
        ({"freeze_norms": 1.5}, "--freeze-norms is 1.5; give a number from 0 to 1."),
        ({"freeze_norms": float("nan")}, "--freeze-norms is nan; give a number from 0 to 1."),
        ({"warmup": NAN}, "--warmup is nan; give a number from 0 to below 1."),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0; give a number from 0 to below 1."),
        ({"weight_decay": -1.0}, "--weight-decay is -1.0; give 0 or more."),
        ({"weight_decay": NAN}, "--weight-decay is nan; give 0 or more."),
        ({"patience": -1}, "--patience is -1; give 0 (off) or a number of epochs."),
        ({"seed": -1}, "--seed is -1; give a whole number from 0 to 4294967295."),
        ({"seed": 2**32}, "--seed is 4294967296; give a whole number from 0 to 4294967295."),
        (
            {"views": 4},
            "--views 4 goes with --augment crop only; flip has a fixed number of outcomes, and all of them are used.",
        ),
        ({"train_layers": ()}, "--train-layers is empty; name layers to train, such as head or layer4,fc, or all."),
        ({"log": "tensorbord"}, "--log is 'tensorbord'; did you mean tensorboard? It can be none, tensorboard."),
        ({"cache_limit": "much"}, "--cache-limit is 'much'; give a size above 0 such as 500MB or 8GB."),
        ({"memory_budget": "0"}, "--memory-budget is '0'; give a size above 0 such as 500MB or 8GB."),
        ({"image_memory": "much"}, "--image-memory is 'much'; give a size above 0 such as 500MB or 8GB."),
    ],
)
def test_every_check_has_its_sentence(settings: dict[str, Any], words: str) -> None:
    assert check_words(**settings) == words


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500MB", 500 * 10**6), ("8GiB", 8 * 2**30), ("1.5 kb", 1500), (" 2 TB ", 2 * 10**12), ("7 B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "--cache-limit") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1 XB", "nan", "inf GB", "1e999", "0.1", "1G B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_bytes(text, "--cache-limit")
    assert str(error.value) == f"--cache-limit is '{text}'; give a size above 0 such as 500MB or 8GB."


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), (" 2 H ", 7200), ("20min", 1200), ("1d", 86400)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "-2h", "0s", "nan s", "inf h", "2 weeks"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_seconds(text, "--budget")
    assert str(error.value) == f"--budget is '{text}'; give a time such as 90s, 20m or 2h."


@pytest.mark.parametrize(
    ("images", "batch", "epochs"), [(1, 16, 40), (50, 16, 40), (1000, 32, 16), (5000, 128, 13), (50_000, 128, 8)]
)
def test_auto_depends_on_the_number_of_images(images: int, batch: int, epochs: int) -> None:
    recipe = resolve_auto(Recipe(), images)
    assert (recipe.batch_size, recipe.epochs, recipe.views) == (batch, epochs, None)
    assert resolve_auto(recipe, 7) == recipe  # what is settled stays


def test_auto_leaves_alone_what_was_given() -> None:
    recipe = resolve_auto(Recipe(epochs=2, batch_size=500), 50)
    assert (recipe.epochs, recipe.batch_size) == (2, 500)
    assert resolve_auto(Recipe(augment="crop", epochs=5), 50).views == 5
    assert resolve_auto(Recipe(augment="crop", epochs=5, views=3), 50).views == 3
