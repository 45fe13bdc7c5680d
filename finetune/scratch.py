"""Training from scratch, to compare transfer with: which network, and which settings it is trained with.

Two recipes, both plain data. `assignment` is what the course assignments prescribe. `fast` is ours: the best accuracy
in the same number of epochs. Whatever the user gives wins over either.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.recipe import (
    AUTO,
    FEWEST_STEPS,
    Recipe,
    peak_rate,
    read_toml,
    suitable_batch,
    to_table,
    typed_settings,
)
from weights.errors import UsageError, near_matches

RECIPES = ("fast", "assignment")

DECIDED = ("train_layers", "head_lr_scale", "allow_missing", "keep_head", "windows")
"""Settings that follow from training from scratch; nobody gives them."""

FIRST = "figure1"
"""The network of a baseline for which none is named."""

NETWORK_EPOCHS = {
    "figure1": 15,
    "figure1_shared": 15,
    "singlestage": 10,
    "multistage": 10,
    "vgg16": 20,
    "resnet50_layer4": 20,
    "identity": 5,
}
"""Our networks and their epochs: as assigned, or where an assignment goes on from a checkpoint, a usual number."""

OTHER_EPOCHS = 15  # of timm's networks

SCRATCH: dict[str, Any] = {
    "weights": "none",
    "train_layers": ("all",),
    "head_lr_scale": 1.0,
    "lr_scales": (),
    "image_size": 32,
    "windows": "off",
}
"""What every from-scratch run has: nothing is loaded and everything trains, on images of 32 × 32 pixels."""

BY_OPTIMIZER: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.2, "weight_decay": 5e-4},
    "muon": {"lr": 0.1, "weight_decay": 0.02},
    "adam": {"lr": 1e-3, "weight_decay": 0.0},
    "adamw": {"lr": 1e-3, "weight_decay": 5e-4},
}
"""Peak rate and weight decay that suit each optimiser; auto is sgd here."""

FAST: dict[str, Any] = {
    **SCRATCH,
    "optimizer": "muon",
    **BY_OPTIMIZER["muon"],
    "batch_size": 128,
    "schedule": "onecycle",
    "label_smoothing": 0.1,
    "ema": 0.0,
    "freeze_norms": 0.0,
    "augment": "crop",
}
"""Ours: Muon, one cycle; images shifted anew in every epoch, and mirrored in every other."""

FAST_BY_NETWORK: dict[str, dict[str, Any]] = {
    # Few channels bear more; without a norm behind the last stage, less.
    "singlestage": {"lr": 0.2},
    "multistage": {"lr": 0.2},
    "identity": {"lr": 0.05},
    # Wide matrices: Muon's products, the same for any batch, take a third of the time with 128 images.
    "vgg16": {"lr": 0.05, "batch_size": 256},
    # Each use of a norm has statistics of its own in training, and all share one in evaluation: they have to be
    # trained for that. The shortcuts of 1 × 1 have no norm and come up to four times in a row: many small steps, and
    # theirs the smallest. It fits its images less well than figure1 does, so nothing is dropped.
    "figure1_shared": {
        "lr": 0.05,
        "lr_scales": ("shortcut=0.1", "shortcut_init=0.1"),
        "batch_size": 64,
        "freeze_norms": 0.5,
        "dropout": 0.0,
    },
}

GENTLER = 10
"""How many times smaller the rate is where a run goes on from a checkpoint, so that it keeps what it has learned.

A5 and A6 name Adam and no rate.
"""

BY_RECIPE = ("epochs", *(name for name in FAST if name not in DECIDED))
"""Settings whose defaults are the recipe's."""

ASSIGNMENT: dict[str, Any] = {
    **SCRATCH,
    "optimizer": "adam",
    **BY_OPTIMIZER["adam"],
    "batch_size": 64,
    "schedule": "constant",
    "label_smoothing": 0.0,
    "ema": 0.999,
    "freeze_norms": 0.0,
    "augment": "flip",
}
"""What all assignments share: Adam at 1e-3 and cross-entropy.

Where nothing is prescribed the choice is ours: 64 images per step, half of them mirrored, and what counts is a moving
average of the weights, since a rate that never falls leaves each step's noise in them.
"""

ONE_MORE_EPOCH: dict[str, Any] = {"epochs": 1, "ema": 0.0, "augment": "none"}
"""Where an assignment goes on from a trained checkpoint: Adam, and nothing else."""

ASSIGNMENT_BY_NETWORK: dict[str, dict[str, Any]] = {
    "figure1": {"batch_size": 50},
    "figure1_shared": {"batch_size": 50},
    "vgg16": ONE_MORE_EPOCH,
    "resnet50_layer4": ONE_MORE_EPOCH,
}

OPTIMIZER_BY_NETWORK: dict[str, dict[str, dict[str, Any]]] = {
    "muon": {
        network: {name: own[name] for name in ("lr", "lr_scales") if name in own}
        for network, own in FAST_BY_NETWORK.items()
    },
    # Without a norm behind its last stage it diverges at 0.2 in bf16.
    "sgd": {"identity": {"lr": 0.04}},
}
"""Where a network wants something else with that optimiser."""


def choose_baseline(arch: str | None, which: str | None, given: dict[str, Any], config: Path | None) -> Recipe:
    """Return the settings of a from-scratch run: the recipe's, over them a recipe file's, over them the user's.

    Args:
        arch: as for `baseline_recipe`; None takes the file's, or figure1.
        which: fast or assignment; None is fast.
        given: settings of the user, without those that a baseline decides.
        config: a recipe file, such as a from-scratch run's own; it need not hold everything.

    Raises:
        UsageError: no such recipe; or the file cannot be read, has an unknown setting or a wrong type, or is one of a
            run that freezes layers.
    """
    which = which or RECIPES[0]
    if config is None:
        return baseline_recipe(arch or FIRST, which, given)
    held = typed_settings(read_toml(config), str(config))
    settings = {name: value for name, value in held.items() if name not in (*DECIDED, "arch")}
    if "lr" in settings:
        settings.setdefault("lr_scales", ())  # a file of before there were any means its rate for all layers
    chosen = baseline_recipe(arch or held.get("arch", FIRST), which, {**settings, **given})
    for name in DECIDED:
        if name == "keep_head":  # it follows from the weights that the user gives now
            continue
        if name in held and held[name] != getattr(chosen, name):
            found = to_table(replace(chosen, **{name: held[name]}))[name]
            raise UsageError(
                f"{config} has {name} = {found!r}, and a baseline has {to_table(chosen)[name]!r}; give the file to "
                "finetune run, or write one with finetune baseline --show-recipe."
            )
    return chosen


def baseline_recipe(arch: str, which: str, given: dict[str, Any]) -> Recipe:
    """Return the settings of a from-scratch run.

    Args:
        arch: one of our networks, with or without `finetune_`, or any timm name.
        which: fast or assignment.
        given: settings of the user, which win.

    Raises:
        UsageError: no such recipe.
    """
    if which not in RECIPES:
        near = near_matches(which, RECIPES) or "."
        raise UsageError(f"--recipe is '{which}'{near} It can be {' or '.join(RECIPES)}.")
    short = arch.removeprefix("finetune_")
    arch = short if short in NETWORK_EPOCHS else arch
    common, special = (FAST, FAST_BY_NETWORK) if which == "fast" else (ASSIGNMENT, ASSIGNMENT_BY_NETWORK)
    settings = {
        "epochs": NETWORK_EPOCHS.get(arch, OTHER_EPOCHS),
        **common,
        **special.get(arch, {}),
        "arch": f"finetune_{arch}" if arch in NETWORK_EPOCHS else arch,
    }
    continued = given.get("weights", "none") != "none"
    settings["keep_head"] = continued  # a checkpoint of the same network and classes, to go on from
    asked = given.get("optimizer", settings["optimizer"])
    if asked != settings["optimizer"]:
        asked = "sgd" if asked == AUTO else asked
        settings["lr_scales"] = ()  # which go with a rate
        settings |= BY_OPTIMIZER.get(asked, {}) | OPTIMIZER_BY_NETWORK.get(asked, {}).get(arch, {})
    if continued:
        settings["lr"] /= GENTLER
    return replace(Recipe(), **{**settings, **given})


def few_steps(recipe: Recipe, images: int) -> str | None:
    """Return what to say of a run from scratch that has too few steps to learn, or None.

    Our recipes are for tens of thousands of images. On a few hundred, their batches leave a handful of steps to an
    epoch, at a learning rate that is too high for smaller ones: it goes down with the batch (Goyal et al. 2017,
    "Accurate, Large Minibatch SGD", section 2.1, the linear scaling rule).

    Args:
        recipe: with epochs and batch size filled in.
        images: training images.
    """
    batch, epochs = recipe.batch_size or 1, recipe.epochs or 1
    steps = epochs * -(-images // batch)
    if recipe.weights != "none" or recipe.train_layers != ("all",) or steps >= FEWEST_STEPS:
        return None
    better = min(batch, suitable_batch(images))
    flags = [] if better == batch else [f"--batch-size {better}", f"--lr {peak_rate(recipe) * better / batch:g}"]
    enough = -(-FEWEST_STEPS // -(-images // better))
    flags += [f"--epochs {enough}"] if enough > epochs else []
    return (
        f"{images:,} images in batches of {batch} make {steps:,} training steps in {epochs} epochs, which is little "
        f"for a network that starts from nothing; {' '.join(flags)} gives it {FEWEST_STEPS} or more."
    )
