"""Settings left at auto that depend on the model as well as on the data.

Once features are cached, a stage of convolutions that starts from random values and trains for long is where the time
goes. Muon moves such a stage much further in an epoch than SGD does. What it gains pays for cheaper epochs: on random
windows of the feature maps, and on fewer of the easy images. docs/decisions/0012 has the measurements.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from finetune.layers import Selection
from finetune.recipe import AUTO, Recipe, resolve_auto

LONG = 200_000  # images in all epochs together; 240,000 and 400,000 were measured (docs/decisions/0012), fewer were not
BATCH = 384  # Muon's products cost the same for a batch of any size, so small ones cost most
SKIPPED = 0.6  # a tenth more than InfoBatch takes (Qin et al. 2024, section 4.1); measured with the rest


def settle_auto(recipe: Recipe, images: int, fresh_stage: bool) -> Recipe:
    """Fill in optimizer and skip_easy, and with Muon the batch size; say whether windows may be taken.

    Args:
        recipe: what is set in it stays.
        images: training images.
        fresh_stage: of `trains_fresh_stage`.
    """
    passes = images * (resolve_auto(recipe, images).epochs or 1)
    long = fresh_stage and passes >= LONG and recipe.optimizer in (AUTO, "muon")
    whole = recipe.patience == 0 and recipe.budget is None  # else training may end before its epochs on all images
    return replace(
        recipe,
        optimizer=("muon" if long else "sgd") if recipe.optimizer == AUTO else recipe.optimizer,
        windows="off" if recipe.windows == AUTO and not long else recipe.windows,
        skip_easy=(SKIPPED if long and whole else 0.0) if recipe.skip_easy is None else recipe.skip_easy,
        batch_size=BATCH if recipe.batch_size is None and long else recipe.batch_size,
    )


def choice_told(given: Recipe, settled: Recipe) -> str | None:
    """Return a sentence on what auto chose where that is not the plain way; None where it is."""
    if given.optimizer != AUTO or settled.optimizer != "muon":
        return None
    less = ""
    if settled.skip_easy:
        less = f", windows of large feature maps, and leaves out {100 * settled.skip_easy:.0f} % of the easier images"
    return (
        "Most of what trains are convolutions that start fresh, and they train long: auto takes muon, "
        f"{settled.batch_size} images per step{less}. --optimizer sgd trains plainly."
    )


def trains_fresh_stage(model: nn.Module, selection: Selection, fresh: Collection[str]) -> bool:
    """Whether most of what trains, behind a frozen part, is convolutions that start from random values.

    Args:
        model: with its parameters' names.
        selection: what trains.
        fresh: names of trained parameters that start fresh.
    """
    sizes = dict(model.named_parameters())
    convolutions = sum(sizes[name].numel() for name in fresh if sizes[name].ndim == 4)
    return bool(selection.frozen) and 2 * convolutions > sum(sizes[name].numel() for name in selection.trained)
