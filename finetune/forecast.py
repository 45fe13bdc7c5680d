"""From measured rates to the plan: work, time per phase, disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.cut import Cut
from finetune.device import device_name
from finetune.images import DataSplits
from finetune.memory import optimizer_states
from finetune.models import Prepared
from finetune.placement import free_disk
from finetune.plan import Disk, Plan, Streaming
from finetune.recipe import Recipe
from finetune.skipping import Skipping
from finetune.stream import Streamed
from finetune.units import parse_seconds

if TYPE_CHECKING:
    from finetune.compute import Computing

EVALUATION_SPEEDUP = 3.0  # a forward pass against forward and backward: one of three passes of equal size
TRAIN_SAMPLE = 10_000  # train images for train_accuracy: its standard error is below half a percent


def make_plan(
    recipe: Recipe,
    data: DataSplits,
    prepared: Prepared,
    cut: Cut,
    computing: Computing,
    device: torch.device,
    missing: tuple[int, int],
    held: int,
    cache_dir: Path,
    images: tuple[str, int],
    processes: int = 1,
) -> Plan:
    """Plan a run whose computing is decided.

    Args:
        recipe: with epochs and batch size filled in.
        data: the splits.
        prepared: the model.
        cut: the model, cut.
        computing: number formats with their measured rates, places.
        device: where it runs.
        missing: feature rows to compute in each process, of train and validation, and of the test.
        held: bytes of features that the cache holds already.
        cache_dir: folder of the cache.
        images: where images lie that every epoch looks at, and their bytes.
        processes: that share the work.
    """
    streaming = _streaming(data)
    return Plan(
        arch=prepared.arch.full_name,
        image_size=prepared.preprocessing.size,
        data=data.name,
        classes=len(data.classes),
        counts=(len(data.train), len(data.val or ()), len(data.test or ())),
        device=device_name(device),
        parameters=_parameters(prepared, cut),
        multiply_adds=_multiply_adds(prepared, cut),
        trained_layers=prepared.selection.names,
        prefix=computing.prefix.choice if computing.prefix else None,
        training=computing.training,
        placement=computing.placement,
        window_share=computing.windows.cost if computing.windows else 1.0,
        seen_share=_seen_share(recipe, len(data.train)),
        feature_views=0 if computing.placement.where in ("off", "uncut") else processes * sum(missing),
        disk=_disk(recipe, data, prepared, cut, computing, held, cache_dir),
        epochs=recipe.epochs or 1,
        budget=parse_seconds(recipe.budget, "--budget") if recipe.budget else None,
        batch_size=recipe.batch_size or 1,
        images=images,
        processes=processes,
        streaming=streaming,
        done=0,
        **_seconds(recipe, data, computing, missing, processes, 0.0 if streaming is None else 1 / streaming.rate),
    )


def _streaming(data: DataSplits) -> Streaming | None:
    images = data.train.images
    if not isinstance(images, Streamed):
        return None
    return Streaming(images.decoder.bytes, images.decoder.memory, images.decoder.rate)


def _seconds(
    recipe: Recipe, data: DataSplits, computing: Computing, missing: tuple[int, int], processes: int, decoding: float
) -> dict[str, float]:
    """Return the expected time of each phase, by the plan's names; `decoding` an image takes where it is streamed.

    Images are decoded ahead, but by the cores that compute, so both times count. A GPU may be faster than this.
    Processes are taken not to disturb each other.
    """
    counts = tuple(len(split or ()) / processes for split in (data.train, data.val, data.test))
    prefix_rate = computing.prefix.choice.rate if computing.prefix else 0.0
    test_rate = computing.prefix.for_test.choice.rate or prefix_rate if computing.prefix else 0.0
    live = computing.placement.where == "off"
    train_rate = computing.training.rate
    share = computing.windows.cost if computing.windows else 1.0
    uncut = computing.placement.where == "uncut"
    before = (1 / prefix_rate if live else 0.0) + (decoding if live or uncut else 0.0)  # of each image in each epoch
    per_image = share / train_rate + before
    eval_image = 1 / (EVALUATION_SPEEDUP * train_rate) + before
    exact_rate = computing.training.exact_rate or train_rate  # the test runs in fp32
    test_image = 1 / (EVALUATION_SPEEDUP * exact_rate) + (1 / test_rate if live else 0.0)
    test_image += decoding if live or uncut else 0.0
    # Validation images are looked at once more at the end, for the temperature.
    test_seconds = counts[2] * test_image + (min(TRAIN_SAMPLE / processes, counts[0]) + counts[1]) * eval_image
    cached = not live and prefix_rate > 0
    test_features = missing[1] * (1 / test_rate + decoding) if cached else 0.0
    return {
        "feature_seconds": missing[0] * (1 / prefix_rate + decoding) + test_features if cached else 0.0,
        "epoch_seconds": counts[0] * _seen_share(recipe, len(data.train)) * per_image,
        "eval_seconds": (recipe.epochs or 1) * counts[1] * eval_image + test_seconds,
        "test_feature_seconds": test_features,
        "test_seconds": test_seconds,
    }


def _seen_share(recipe: Recipe, images: int) -> float:
    """Return the mean share of the training images that an epoch sees."""
    return Skipping(images, recipe.epochs or 1, recipe.skip_easy or 0.0).cost


def _parameters(prepared: Prepared, cut: Cut) -> tuple[int, int, int]:
    """Return how many parameters there are, how many train, and how many are frozen behind the cut."""
    trained = set(prepared.selection.trained)
    sizes = {name: value.numel() for name, value in prepared.model.named_parameters()}
    behind = sum(value.numel() for value in cut.suffix.parameters() if not value.requires_grad)
    return sum(sizes.values()), sum(count for name, count in sizes.items() if name in trained), behind


def _multiply_adds(prepared: Prepared, cut: Cut) -> tuple[int, int]:
    """Return the multiply-adds of one image before the cut and behind it."""
    side, images = prepared.preprocessing.size, 2
    device = next(cut.suffix.parameters()).device
    pixels = torch.zeros(images, 3, side, side)
    with torch.no_grad():
        with FlopCounterMode(display=False) as before:
            values = cut.prefix(pixels) if cut.prefix is not None else (pixels,)
        with FlopCounterMode(display=False) as after:
            cut.suffix(*(value.to(device) for value in values))
    # A multiply-add is two floating-point operations.
    return before.get_total_flops() // 2 // images, after.get_total_flops() // 2 // images


def _disk(
    recipe: Recipe,
    data: DataSplits,
    prepared: Prepared,
    cut: Cut,
    computing: Computing,
    held: int,
    cache_dir: Path,
) -> Disk:
    """Return what the run takes on disk: features, the finished run directory, the checkpoint on the way."""
    trained = sum(value.nbytes for value in cut.suffix.parameters() if value.requires_grad)
    suffix = sum(value.nbytes for value in cut.suffix.state_dict().values())
    copies = 1 + bool(recipe.ema) + bool(recipe.patience)  # as it is, its moving average, its best epoch
    scores = len(data.test or ()) * (4 * len(data.classes) + 8)  # float32 logits and an int64 label per test image
    placement = computing.placement
    return Disk(
        cache_dir=cache_dir,
        held=held,
        write=placement.bytes - held if placement.on_disk else 0,
        free=free_disk(cache_dir),
        model=sum(value.nbytes for value in prepared.model.state_dict().values()) + scores,
        checkpoint=copies * suffix + optimizer_states(recipe) * trained,
    )
