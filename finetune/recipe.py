"""A run's settings: one frozen dataclass, its checks, and its TOML form.

Every default says its reason here, once; the command line takes its defaults and help from these fields. None means
"chosen for you when the run starts", and is written as "auto" in recipe.toml.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from finetune.rates import parse_scales
from finetune.tensorboard import require_log
from finetune.units import parse_bytes, parse_seconds
from weights.errors import UsageError, near_matches
from weights.guard import read_text, shortened, told

AUTO = "auto"


def _setting(default: Any, text: str, *, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """Settings of one run. `help` in each field's metadata is what the command line shows."""

    arch: str = _setting("resnet18", "Any timm architecture, with or without a pretrained tag (resnet50.a1_in1k).")
    train_layers: tuple[str, ...] = _setting(
        ("head",), "Layers that train, by name: layer4,fc; `head` is the new classifier, `all` is everything."
    )
    data: str = _setting(
        "cifar100", "cifar10, cifar100, shapes10, shapes100, or a path to CIFAR files, image folders or tar shards."
    )
    data_dir: Path | None = _setting(None, "Where named data sets are looked up first (else $FINETUNE_DATA, ./data).")
    labels: str = _setting("fine", "CIFAR-100's 100 fine or 20 coarse classes.", choices=("fine", "coarse"))
    weights: str = _setting("auto", "auto, none, a file, or a folder of pretrained weights.")
    weights_dir: Path | None = _setting(None, "Local model directory searched by auto (else $FINETUNE_WEIGHTS).")
    allow_missing: tuple[str, ...] = _setting((), "Layers that the weights may lack; they start fresh: layer4.")
    keep_head: bool = _setting(
        False, "Load the classifier too, to go on from a checkpoint with the same classes, and train all of it gently."
    )
    blocks: tuple[str, ...] = _setting((), "Blocks per stage, of our networks that let you choose: 2,2,2,2.")
    shortcut: str | None = _setting(None, "A or B, of finetune_identity: the skip where the shape changes.")
    hidden: int | None = _setting(None, "Width of finetune_vgg16's hidden layers.")
    dropout: float | None = _setting(None, "Dropout of the network, where it has one (0 to below 1).")
    image_size: int | None = _setting(None, "Input side in pixels; auto takes the pretrained weights' own (224).")
    # Cached features make epochs cheap; small sets need enough of them to take a few hundred steps (see resolve_auto).
    epochs: int | None = _setting(None, "Passes over the training images; auto takes 8, and more for small sets.")
    batch_size: int | None = _setting(None, "Images per step; auto takes 128, and less for small sets.")
    # 0.01 moves pretrained layers gently; layers that start fresh get ten times that (docs/decisions/0002 says why).
    lr: float | None = _setting(
        None, "Peak learning rate of layers that start from pretrained weights; auto takes 0.01, adam and adamw 0.001."
    )
    head_lr_scale: float = _setting(10.0, "Learning rate of layers that start fresh (the head), as a multiple of --lr.")
    lr_scales: tuple[str, ...] = _setting(
        (),
        "Layers that learn at a multiple of their rate: layer3=0.1,shortcut=0.2 (any part of their names).",
    )
    optimizer: str = _setting(
        AUTO,
        "sgd has Nesterov momentum; auto takes muon for a stage of convolutions that starts fresh and trains long.",
        choices=(AUTO, "sgd", "adam", "adamw", "muon"),
    )
    momentum: float = _setting(0.9, "Momentum of sgd (0 to below 1).")
    weight_decay: float | None = _setting(
        None, "Weight decay; auto takes 5e-4, with sgd 2e-3 for convolutions that start fresh, with muon 0.02."
    )
    schedule: str = _setting("onecycle", "Learning-rate schedule.", choices=("onecycle", "cosine", "constant"))
    warmup: float = _setting(0.2, "Share of all steps in which the learning rate rises (onecycle, cosine).")
    label_smoothing: float = _setting(0.1, "Label smoothing (0 to below 1).")
    class_weights: str = _setting(
        "none",
        "balanced lets every class count the same in the training loss, however few its images.",
        choices=("none", "balanced"),
    )
    ema: float = _setting(0.0, "Decay of an exponential moving average of the weights, such as 0.998; 0 is off.")
    freeze_norms: float = _setting(
        0.0,
        "Share of training, at its end, in which batch norms keep their statistics (0 to 1): for norms that are used "
        "several times, or on small batches.",
    )
    budget: str | None = _setting(
        None, "Time that the run may take, such as 20m or 2h: training ends in time, its schedule with it."
    )
    patience: int = _setting(0, "Stop after this many epochs without a lower validation loss, keep the best; 0 is off.")
    augment: str = _setting(
        "flip",
        "flip mirrors half of the images at random, altflip each in every other epoch; crop does that and shifts.",
        choices=("none", "flip", "altflip", "crop"),
    )
    cutout: int = _setting(
        0, "Side in pixels of a square that crop cuts out of each image (8 suits CIFAR-100, 16 CIFAR-10); 0 is off."
    )
    views: int | None = _setting(
        None, "Versions of each image that crop draws; auto is one per epoch, as good as fresh ones."
    )
    # At the same number of epochs both cost accuracy, which muon more than makes up for (docs/decisions/0006, 0012).
    windows: str = _setting(
        AUTO,
        "Train on random windows of the feature maps, in about 70 % of the time; auto does where it takes muon.",
        choices=(AUTO, "on", "off"),
    )
    skip_easy: float | None = _setting(
        None,
        "Share of the easier images that an epoch leaves out (InfoBatch); auto takes 0.6 with its muon, else 0.",
    )
    val_fraction: float = _setting(
        0.1, "Share of train held out for validation when the data bring none; 0 trains on all."
    )
    limit: int | None = _setting(None, "Use only this many training images, the same share of every class.")
    shots: int | None = _setting(None, "Use only this many training images of every class.")
    hold_test: bool = _setting(
        False, "Leave the test images unread while settings are still being chosen; finetune eval reads them."
    )
    seed: int = _setting(0, "Seed of everything random.")
    device: str = _setting(AUTO, "auto, cpu, cuda, cuda:N or mps.")
    precision: str = _setting(
        AUTO, "auto times a few steps of each and takes the faster.", choices=(AUTO, "fp32", "bf16")
    )
    compile: str = _setting(AUTO, "auto compiles when that saves more than it costs.", choices=(AUTO, "on", "off"))
    cache: str = _setting(
        AUTO,
        "Where frozen features stay: auto keeps them and decoded photos on disk for the next run, ram, disk, or off.",
        choices=(AUTO, "ram", "disk", "off"),
    )
    cache_dir: Path | None = _setting(None, "Folder of what is kept for the next run; auto is the user's cache folder.")
    cache_limit: str = _setting("50GB", "Most that features and photos may take there on disk; the oldest go first.")
    memory_budget: str | None = _setting(
        None,
        "Most memory for features; auto is 60 % of what is free, of a GPU's own what training leaves. "
        "More is read from disk.",
    )
    image_memory: str | None = _setting(
        None, "Most memory for decoded images of folders and shards; auto is 90 % of what is free. More is streamed."
    )
    log: str = _setting(
        "none",
        "tensorboard: each epoch's figures for TensorBoard too, in the run directory; needs the extra of that name.",
        choices=("none", "tensorboard"),
    )


# Optimisers multiply learning rate and weight decay and divide by as little as 1 - 0.9; float32 ends at 3.4e38.
LARGEST_RATE = 1e37
ADAMS = ("adam", "adamw")  # they want rates of their own; Muon's follow from SGD's
MOST = 10**9  # of whole numbers: products of two fit into 64 bits
LARGEST_RECIPE = 2**18  # bytes of a recipe file; those that finetune init writes have 8 kB
DECAY = 5e-4  # what --weight-decay auto takes for all but fresh convolutions
MUON_DECAY = 0.02  # decoupled: a step takes this times the learning rate off a weight (docs/decisions/0012)
FEWEST_STEPS = 500  # the shortest schedule of Kolesnikov et al. 2020, "Big Transfer", section 3.3
PATHS = ("data_dir", "weights_dir", "cache_dir")
# Settings that say where to look, how to compute or what to log, not what is learned: not in checkpoints' metadata.
PLACES = (
    "data_dir", "weights", "weights_dir", "cache", "cache_dir", "cache_limit", "memory_budget", "image_memory",
    "device", "hold_test", "log",
)  # fmt: skip


def check(recipe: Recipe) -> None:
    """Check every value that can be checked without looking at data or weights.

    Raises:
        UsageError: the first setting that cannot be right; the sentence gives value, range and next step.
    """
    for item in dataclasses.fields(Recipe):
        value, choices = getattr(recipe, item.name), item.metadata["choices"]
        if choices and value not in choices:
            near = near_matches(str(value), choices) or "."
            raise UsageError(f"{flag(item.name)} is '{value}'{near} It can be {', '.join(choices)}.")
    for name in ("image_size", "epochs", "batch_size", "views", "limit", "shots", "hidden"):
        value = getattr(recipe, name)
        if value is not None and not 1 <= value <= MOST:
            bound = f"most {MOST:,}" if value > 1 else "least 1"
            raise UsageError(f"{flag(name)} is {value}; give a whole number of at {bound}.")
    lr = peak_rate(recipe)
    for name, number in {"lr": lr, "head_lr_scale": recipe.head_lr_scale}.items():
        if not 0 < number < float("inf"):
            raise UsageError(f"{flag(name)} is {number}; give a number above 0.")
    decay = DECAY if recipe.weight_decay is None else recipe.weight_decay
    most = max([1.0, *parse_scales(recipe.lr_scales).values()])
    scaled = f", --lr-scales {','.join(recipe.lr_scales)}" if recipe.lr_scales else ""
    if lr * max(1, recipe.head_lr_scale) * most * max(1, decay) > LARGEST_RATE:
        raise UsageError(
            f"--lr {lr:g} with --head-lr-scale {recipe.head_lr_scale:g}{scaled} and --weight-decay {decay:g} is more "
            "than 32-bit numbers can hold; lower the largest of them (0.01 is usual for --lr)."
        )
    _check_shares(recipe)
    if not 0 <= decay < float("inf"):
        raise UsageError(f"{flag('weight_decay')} is {recipe.weight_decay}; give 0 or more.")
    if not 0 <= recipe.patience <= MOST:
        raise UsageError(f"--patience is {recipe.patience}; give 0 (off) or a number of epochs.")
    if recipe.views is not None and recipe.augment != "crop":
        raise UsageError(
            f"--views {recipe.views} goes with --augment crop only; {recipe.augment} has a fixed number of outcomes, "
            "and all of them are used."
        )
    if not 0 <= recipe.cutout <= MOST:
        raise UsageError(f"--cutout is {recipe.cutout}; give 0 (off) or a number of pixels, such as 8.")
    if recipe.cutout and recipe.augment != "crop":
        raise UsageError(
            f"--cutout {recipe.cutout} goes with --augment crop only, whose versions of an image are drawn anew; "
            f"{recipe.augment} has a fixed number of them."
        )
    if not recipe.train_layers:
        raise UsageError("--train-layers is empty; name layers to train, such as head or layer4,fc, or all.")
    if not 0 <= recipe.seed < 2**32:
        raise UsageError(f"--seed is {recipe.seed}; give a whole number from 0 to {2**32 - 1}.")
    for name in ("cache_limit", "memory_budget", "image_memory"):
        if (text := getattr(recipe, name)) is not None:
            parse_bytes(text, flag(name))
    if recipe.budget is not None:
        parse_seconds(recipe.budget, "--budget")
    require_log(recipe.log)


def _check_shares(recipe: Recipe) -> None:
    """Check the settings that are part of a whole; errors as `check`."""
    below_one = {
        "momentum": recipe.momentum, "label_smoothing": recipe.label_smoothing, "ema": recipe.ema,
        "warmup": recipe.warmup, "val_fraction": recipe.val_fraction, "dropout": recipe.dropout or 0.0,
        "skip_easy": recipe.skip_easy or 0.0,
    }  # fmt: skip
    for name, number in below_one.items():
        if not 0 <= number < 1:
            raise UsageError(f"{flag(name)} is {number}; give a number from 0 to below 1.")
    if not 0 <= recipe.freeze_norms <= 1:
        raise UsageError(f"--freeze-norms is {recipe.freeze_norms}; give a number from 0 to 1.")


def peak_rate(recipe: Recipe) -> float:
    """Return the peak learning rate of pretrained layers: --lr, or what suits the optimiser."""
    if recipe.lr is not None:
        return recipe.lr
    return 0.001 if recipe.optimizer in ADAMS else 0.01


def flag(name: str) -> str:
    """Return the command-line flag of a setting: `lr` → `--lr`."""
    return "--" + name.replace("_", "-")


def with_absolute_paths(recipe: Recipe, data_names: Collection[str]) -> Recipe:
    """Return the recipe with paths that hold in every folder, for a recipe.toml that lies in another one.

    Args:
        recipe: paths as they were typed.
        data_names: every `data` that is a name and not a path.
    """
    paths: dict[str, Any] = {
        name: value.expanduser().absolute() for name in PATHS if (value := getattr(recipe, name)) is not None
    }
    if recipe.data not in data_names:
        paths["data"] = str(Path(recipe.data).expanduser().absolute())
    if recipe.weights not in (AUTO, "none"):
        paths["weights"] = str(Path(recipe.weights).expanduser().absolute())
    return dataclasses.replace(recipe, **paths)


def to_table(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain TOML values; None becomes "auto"."""
    table: dict[str, Any] = {}
    for item in dataclasses.fields(Recipe):
        value = getattr(recipe, item.name)
        if value is None:
            value = AUTO
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Path):
            value = str(value)
        table[item.name] = value
    return table


def to_toml(recipe: Recipe) -> str:
    """Return recipe.toml's text: every setting, defaults included."""
    return "# Repeat this run with: finetune run --config recipe.toml\n" + tomli_w.dumps(to_table(recipe))


def from_table(table: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from TOML values; settings that are absent keep their defaults.

    Args:
        table: names and values.
        where: what to call the source in error messages.

    Raises:
        UsageError: an unknown name (near matches are offered) or a value of the wrong type.
    """
    return Recipe(**typed_settings(table, where))


def typed_settings(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return TOML values as the recipe has them, only those that are there; arguments and errors as `from_table`."""
    known = {item.name: item for item in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            raise UsageError(
                f"{where} has an unknown setting '{shortened(name)}'"
                f"{near_matches(name, known) or '; delete that line.'}"
            )
        values[name] = _typed(known[name], value, where)
    return values


KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "tuple": 'a list of texts: ["a", "b"]',
    "Path": "a path in quotes", "str": "text in quotes",
}  # fmt: skip


def kind_of(item: dataclasses.Field[Any]) -> str:
    """Return what a setting's value is in a recipe file, in words: 'a whole number, or "auto"'."""
    kind = str(item.type)
    words = next(words for name, words in KINDS.items() if kind.startswith(name))
    return f'{words}, or "{AUTO}"' if "None" in kind else words


def _typed(item: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """Turn one TOML value into the field's type."""
    kind = str(item.type)
    if value == AUTO and "None" in kind:
        return None
    if kind.startswith("int"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind.startswith("float"):
        if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST):
            return float(value)
    elif kind.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif isinstance(value, str) and "\0" not in value:
        return Path(value) if kind.startswith("Path") else value
    raise UsageError(f"{where} has {item.name} = {told(value)}; it must be {kind_of(item)}.")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a recipe file's settings.

    Raises:
        UsageError: the file is missing, unreadable or no TOML.
    """
    try:
        return tomllib.loads(read_text(path, LARGEST_RECIPE))
    except OSError as error:
        raise UsageError(
            f"The recipe {path} cannot be read ({error.strerror}); give the path of a recipe.toml."
        ) from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        reason = shortened(str(error)) if isinstance(error, ValueError) else "nested too deeply"
        raise UsageError(f"The recipe {path} is no valid TOML ({reason}); mend that line.") from None


def suitable_batch(images: int) -> int:
    """Return images per step for a training set of `images`: at most a twentieth of it, 16 at least, 128 at most."""
    return next((size for size in (128, 64, 32) if size * 20 <= images), 16)


def resolve_auto(recipe: Recipe, images: int) -> Recipe:
    """Fill in epochs, batch size, views and learning rate for a training set of `images` images.

    Steps, not epochs, decide how far a small set gets: at least FEWEST_STEPS, within 8 to 40 epochs.
    """
    batch = recipe.batch_size or suitable_batch(images)
    per_epoch = -(-images // batch)
    epochs = recipe.epochs or min(40, max(8, -(-FEWEST_STEPS // per_epoch)))
    views = epochs if recipe.augment == "crop" and recipe.views is None else recipe.views
    return dataclasses.replace(recipe, batch_size=batch, epochs=epochs, views=views, lr=peak_rate(recipe))
