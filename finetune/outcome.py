"""What a finished run leaves behind: figures, the model and its predictions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.compute import Computing
from finetune.forecast import TRAIN_SAMPLE
from finetune.images import DataSplits
from finetune.inference import evaluation_batch, score
from finetune.metrics import calibrate, confusion_matrix, is_uneven, mean_recall, top_5_accuracy
from finetune.models import Prepared
from finetune.ranks import Ranks
from finetune.recipe import PLACES, Recipe, to_table
from finetune.rundir import CONFIG, MODEL
from finetune.sharing import Split, shared_logits
from finetune.skipping import Skipping
from finetune.temperature import NOT_FITTED, Temperature, fit_temperature
from weights.save import save_checkpoint, write_config


def train_figures(
    module: nn.Module, train: Split, device: torch.device, dtype: torch.dtype, recipe: Recipe, ranks: Ranks
) -> dict[str, float]:
    """Return train_accuracy in percent, in eval mode, of up to 10,000 training images drawn by the seed.

    With cached views of `--augment crop` it is of each image's first one, which may be shifted and mirrored.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    rows = torch.randperm(len(train.labels), generator=generator)[:TRAIN_SAMPLE]
    logits = shared_logits(ranks, module, train, rows, device, dtype, batch=evaluation_batch(recipe))
    return {"train_accuracy": score(logits, train.labels[rows])[1]}


def val_temperature(
    module: nn.Module, val: Split | None, device: torch.device, dtype: torch.dtype, recipe: Recipe, ranks: Ranks
) -> Temperature:
    """Return the temperature that the validation images ask of the finished model; 1 when there are none."""
    if val is None:
        return NOT_FITTED
    rows = torch.arange(len(val.labels))
    logits = shared_logits(ranks, module, val, rows, device, dtype, batch=evaluation_batch(recipe))
    return fit_temperature(logits, val.labels)


def test_logits(module: nn.Module, test: Split, device: torch.device, recipe: Recipe, ranks: Ranks) -> torch.Tensor:
    """Return logits float32 (N, classes) of the test split; what trained runs in fp32 whatever it trained in."""
    rows = torch.arange(len(test.labels))
    return shared_logits(ranks, module, test, rows, device, torch.float32, batch=evaluation_batch(recipe))


def test_figures(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> dict[str, float | None]:
    """Return the test split's figures: shares in percent, loss in nats.

    The error of calibration is given of the logits as they are, and of the logits divided by the temperature.
    """
    loss, accuracy = score(logits, labels)
    return {
        "test_accuracy": accuracy,
        "test_loss": loss,
        "test_top5_accuracy": top_5_accuracy(logits, labels),
        "test_mean_recall": mean_recall(confusion_matrix(logits.argmax(1), labels, logits.shape[1])),
        "calibration_error": calibrate(logits, labels).error,
        "calibration_error_scaled": calibrate(logits, labels, temperature).error,
    }


def summarise(
    recipe: Recipe,
    data: DataSplits,
    prepared: Prepared,
    computing: Computing,
    progress: Mapping[str, Any],
    figures: Mapping[str, float | None],
    temperature: Temperature,
    seconds: Mapping[str, float],
    processes: int,
) -> dict[str, Any]:
    """Return the summary of a finished run, as written to summary.json.

    It is called when the frozen tensors have been proved unchanged. `processes` are those that finished the run, be
    they more or fewer than began it.
    """
    trained = set(prepared.selection.trained)
    sizes = {name: value.numel() for name, value in prepared.model.named_parameters()}
    kept = progress["best_epoch"] if recipe.patience and progress["best_epoch"] else progress["epoch"]
    row = progress["rows"][kept - 1] if progress["rows"] else {}  # of the weights that were kept, not of the last
    prefix = computing.prefix.choice if computing.prefix else None
    windows = computing.windows
    formats = {computing.training.precision} | ({prefix.precision} if prefix else set())
    return {
        "arch": prepared.arch.full_name,
        "test_accuracy": figures.get("test_accuracy"),
        "test_loss": figures.get("test_loss"),
        "test_top5_accuracy": figures.get("test_top5_accuracy"),
        "test_mean_recall": figures.get("test_mean_recall"),
        "train_accuracy": figures["train_accuracy"],
        "val_accuracy": row.get("val_accuracy"),
        "calibration": _calibration_facts(temperature, figures),
        "epochs": progress["epoch"],
        "kept_epoch": kept,
        "images_seen": progress["images_seen"],
        "ended_by_budget": _budget_facts(recipe, progress, len(data.train)) if progress["out_of_time"] else None,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "estimate": progress["estimate"],
        "parameters": {
            "total": sum(sizes.values()),
            "trained": sum(size for name, size in sizes.items() if name in trained),
        },
        "trained_layers": [name or "all" for name in prepared.selection.names],
        "frozen_unchanged": True,
        "frozen_tensors": len(prepared.selection.frozen),
        "weights": {"source": prepared.source, "sha256": prepared.sha256},
        "data": _data_facts(data),
        "device": _trained_device(prepared.model),
        "processes": processes,
        "precision": "fp32" if formats == {"fp32"} else "bf16",
        "compile": bool(computing.training.compiled or (prefix and prefix.compiled)),
        "computed": computing.choices(),
        "features": {
            "where": computing.placement.where,
            "bytes": computing.placement.bytes,
            "test_seconds": round(figures["test_feature_seconds"] or 0.0, 3),  # of seconds.prefix, after training
        },
        "windows": {"map": windows.side, "sides": list(windows.sides)} if windows else None,
        "versions": _versions(),
    }


def _trained_device(model: nn.Module) -> str:
    """Return the kind of device of what trained: a frozen part that only gave features stays on the CPU."""
    return next(value for value in model.parameters() if value.requires_grad).device.type


def _budget_facts(recipe: Recipe, progress: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Return how far --budget let training come, in epochs."""
    done = Skipping(images, recipe.epochs or 1, recipe.skip_easy or 0.0).done(progress["epoch"], progress["unseen"])
    return {"budget": recipe.budget, "epochs": round(done, 2), "of": recipe.epochs}


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "timm", "finetune-timm")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this project, run from its folder without being installed
        return "not installed"


def _calibration_facts(temperature: Temperature, figures: Mapping[str, float | None]) -> dict[str, Any]:
    errors = {
        "test_error": figures.get("calibration_error"),
        "test_error_scaled": figures.get("calibration_error_scaled"),
    }
    return {**temperature.as_dict(), **errors}


def _data_facts(data: DataSplits) -> dict[str, Any]:
    """Return the data set's identity and counts; `uneven` is that of the training images or of the test images."""
    learned_and_tested = (data.train, data.test)
    return {
        "name": data.name,
        "sha256": data.sha256,
        "test_sha256": data.test_sha256,
        "classes": len(data.classes),
        "uneven": any(is_uneven(torch.bincount(part.labels).tolist()) for part in learned_and_tested if part),
        "train": len(data.train),
        "val": len(data.val or ()),
        "test": len(data.test or ()),
    }


def write_model(folder: Path, recipe: Recipe, data: DataSplits, prepared: Prepared, temperature: Temperature) -> None:
    """Write model.safetensors and config.json, which timm loads as "local-dir:FOLDER".

    The metadata hold what shaped the result and no paths, times or versions: equal runs give equal bytes.
    """
    preprocessing = prepared.preprocessing
    size = [3, preprocessing.size, preprocessing.size]
    settings = {name: value for name, value in to_table(recipe).items() if name not in PLACES}
    about = {
        "arch": prepared.arch.full_name,
        "classes": list(data.classes),
        "preprocessing": {
            "input_size": size,
            "interpolation": preprocessing.interpolation,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        },
        "trained_layers": list(prepared.selection.names),
        "weights_sha256": prepared.sha256,
        "settings": {**settings, "data": data.name},
    }
    save_checkpoint(folder / MODEL, prepared.model.state_dict(), about)
    write_config(
        folder / CONFIG,
        arch=prepared.arch,
        num_classes=len(data.classes),
        classes=data.classes,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        input_size=size,
        model_args=prepared.model_args,
        finetune=temperature.as_dict(),
    )
