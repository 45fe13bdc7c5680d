"""From a recipe to a model with verified weights, a new head, and what trains marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import timm
import torch
from torch import nn

from finetune.arch import network_settings, resolve_network, settings_with_weights
from finetune.augment import Preprocessing
from finetune.layers import Selection, freeze, is_inside, select_layers
from finetune.rates import parse_scales, require_scaled, scales_in
from finetune.recipe import Recipe
from weights.arch import Arch
from weights.errors import ShapeError, UsageError, WeightsError
from weights.load import Account, load_into, read_tensors
from weights.locate import Found, locate

INTERPOLATIONS = ("bilinear", "bicubic")  # what torch can do on whole batches with antialiasing


@dataclass(frozen=True)
class Prepared:
    """A model ready to be cut.

    Attributes:
        model: in eval mode, on the CPU, fp32; frozen outside the selection.
        arch: the network and the preprocessing configuration that belongs to its weights.
        selection: what trains.
        fresh: names of trained parameters that start fresh instead of from pretrained values.
        preprocessing: pixels to model input.
        model_args: arguments beyond the class count that timm needs to build the model again.
        source: where the weights came from, for people.
        sha256: identity of the loaded tensors; None when nothing was loaded.
        account: what became of every tensor; None when nothing was loaded.
    """

    model: nn.Module
    arch: Arch
    selection: Selection
    fresh: frozenset[str]
    preprocessing: Preprocessing
    model_args: dict[str, Any]
    source: str
    sha256: str | None
    account: Account | None


def find_weights(recipe: Recipe) -> Found:
    """Find the recipe's weights and check its layer names, before any image is read.

    Args:
        recipe: arch, weights, weights_dir, image_size, train_layers, lr_scales and the network's settings are read.

    Raises:
        UsageError: unknown arch or layer, or a setting that the network does not have.
        WeightsError: no weights, several that could be meant, or settings that disagree with theirs.
    """
    arch, found, selection = _look_up(recipe)
    require_scaled(parse_scales(recipe.lr_scales), selection.trained)
    return found or locate(arch, recipe.weights, recipe.weights_dir)


def with_own_scales(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return the recipes of several cuts of one network, each with those of the lr_scales whose layers it trains.

    Args:
        recipes: read as by `find_weights`; they have the same lr_scales.

    Raises:
        UsageError: as for `find_weights`, or a name that has no layer in any of the cuts.
        WeightsError: as for `find_weights`.
    """
    if not any(recipe.lr_scales for recipe in recipes):
        return list(recipes)
    trained = [_look_up(recipe)[2].trained for recipe in recipes]
    require_scaled(parse_scales(recipes[0].lr_scales), dict.fromkeys(name for names in trained for name in names))
    return [replace(one, lr_scales=scales_in(one.lr_scales, own)) for one, own in zip(recipes, trained, strict=True)]


def _look_up(recipe: Recipe) -> tuple[Arch, Found | None, Selection]:
    """Return the network, its weights where no download may be needed for them, and what trains."""
    arch = resolve_network(recipe.arch)
    size = recipe.image_size or int(arch.config["input_size"][-1])
    settings, found = network_settings(recipe, arch), None
    if recipe.weights != "auto":  # a download waits until the layers are known to be there
        found = locate(arch, recipe.weights, recipe.weights_dir)
        settings = settings_with_weights(recipe, found)
    return arch, found, select_layers(outline(arch, 2, size, settings), recipe.train_layers, head_names(arch))


def prepare_model(recipe: Recipe, classes: int, found: Found | None = None) -> Prepared:
    """Build the recipe's model, load its weights and freeze what does not train.

    The new layers' random values depend on the seed alone.

    Args:
        recipe: arch, weights, weights_dir, allow_missing, train_layers, image_size, seed and the network's settings
            are read.
        classes: outputs of the new head.
        found: what `find_weights` returned; None finds them now.

    Raises:
        UsageError: unknown arch or layer, or an image size that the network cannot take.
        WeightsError: weights that are missing, damaged, unsafe or of another network.
    """
    found = found or find_weights(recipe)
    arch = found.arch
    size = recipe.image_size or int(arch.config["input_size"][-1])
    settings = settings_with_weights(recipe, found)
    torch.manual_seed(recipe.seed)
    model, model_args = build(arch, classes, size, settings)
    head = head_names(arch)
    account = None
    if found.path is not None:
        tensors = read_tensors(found.path)
        try:
            account = load_into(
                model,
                tensors,
                head=head,
                allow_missing=recipe.allow_missing,
                where=found.source,
                keep_head=recipe.keep_head,
            )
        except ShapeError as error:
            _require_own_size(arch, size, settings, head, tensors, found.source, error)
            raise
    selection = select_layers(model, recipe.train_layers, head)
    freeze(model, selection)
    loaded = set(account.loaded) if account else set()
    check_size(model, arch, size)
    return Prepared(
        model=model.eval(),
        arch=arch,
        selection=selection,
        fresh=frozenset(name for name in selection.trained if name not in loaded),
        preprocessing=preprocessing_of(arch, size),
        model_args=model_args,
        source=found.source,
        sha256=account.sha256 if account else None,
        account=account,
    )


def _require_own_size(
    arch: Arch,
    size: int,
    settings: dict[str, Any],
    head: Sequence[str],
    given: Mapping[str, torch.Tensor],
    where: str,
    error: ShapeError,
) -> None:
    """Say so where weights do not fit because of the image size: at their own every shape is right.

    Raises:
        WeightsError: with the size that they are for.
    """
    usual = int(arch.config["input_size"][-1])
    if size == usual:
        return
    own = outline(arch, 2, usual, settings).state_dict()
    body = {name: value for name, value in own.items() if not any(is_inside(name, module) for module in head)}
    if all(name in given and given[name].shape == value.shape for name, value in body.items()):
        raise WeightsError(
            f"The weights ({where}) are those of {arch.name} for {usual} × {usual} pixels, and some of them cannot be "
            f"brought to {size} × {size}; leave --image-size out."
        ) from error


def build(
    arch: Arch, classes: int, size: int, settings: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a timm model with random weights for an input size.

    Args:
        arch: the network.
        classes: outputs of its head.
        size: input side in pixels; networks with position embeddings are built for exactly this size.
        settings: further arguments for `timm.create_model`.

    Returns:
        The model and the arguments beyond the class count that were needed.

    Raises:
        UsageError: the network cannot be built for this size.
    """
    # timm's own configuration, not the weights': a run at 96 pixels says 96, and timm builds for 224 all the same.
    own = timm.get_pretrained_cfg(arch.full_name)
    fixed = bool(arch.config.get("fixed_input_size")) and (own is None or size != int(own.input_size[-1]))
    model_args: dict[str, Any] = {**(settings or {}), **({"img_size": size} if fixed else {})}
    try:
        return timm.create_model(arch.full_name, pretrained=False, num_classes=classes, **model_args), model_args
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{arch.name} cannot be built for {size} × {size} pixels{_because(error)}; its pretrained size is "
            f"{arch.config['input_size'][-1]}: leave --image-size out."
        ) from error


def outline(arch: Arch, classes: int, size: int, settings: dict[str, Any]) -> nn.Module:
    """Return a network without values where it can be built without any; arguments and errors as of `build`."""
    try:
        with torch.device("meta"):
            return build(arch, classes, size, settings)[0]
    except UsageError:  # some networks of older timm read values while they are built; a real fault is raised again
        return build(arch, classes, size, settings)[0]


def head_names(arch: Arch) -> tuple[str, ...]:
    """Return the names of the classifier modules, such as ("fc",) or ("head", "head_dist").

    Raises:
        UsageError: timm names none, so there is no head to replace.
    """
    named = arch.config.get("classifier")
    if not named:
        raise UsageError(
            f"timm names no classifier for {arch.name}, so its head cannot be replaced; choose another --arch."
        )
    return (named,) if isinstance(named, str) else tuple(named)


def preprocessing_of(arch: Arch, size: int) -> Preprocessing:
    """Return the preprocessing that belongs to a network's weights, at an input size in pixels."""
    interpolation = str(arch.config.get("interpolation") or "bicubic")
    return Preprocessing(
        size=size,
        mean=_for_each_colour(arch.config["mean"]),
        std=_for_each_colour(arch.config["std"]),
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bicubic",
    )


def _for_each_colour(values: Sequence[float]) -> tuple[float, ...]:
    """Return one value per colour; a configuration may give one for all."""
    return tuple(float(value) for value in (values if len(values) > 1 else 3 * tuple(values)))


def check_size(model: nn.Module, arch: Arch, size: int) -> None:
    """Run one image through the model, so that a size it cannot take is known before any work.

    Raises:
        UsageError: the network cannot take images of this size.
    """
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, int(arch.config["input_size"][0]), size, size))
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        usual = arch.config["input_size"][-1]
        raise UsageError(
            f"{arch.name} cannot take images of {size} × {size} pixels{_because(error)}; its pretrained size is "
            f"{usual}: choose {'a larger' if size < usual else 'another'} --image-size, or leave it out."
        ) from error


def _because(error: Exception) -> str:
    """Return an error's first line in brackets; an assertion may have none."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f" ({shorten(line, 120, placeholder=' ...')})" if line else ""  # at a space: half a number would be another
