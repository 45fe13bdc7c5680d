"""The test split of a finished run that left it unread: read now, once, because this run was chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune.device import pick_device
from finetune.evaluate import logits_of
from finetune.events import Events
from finetune.images import ImageSet
from finetune.inference import evaluation_batch
from finetune.metrics import is_uneven
from finetune.outcome import test_figures
from finetune.predictions import illustrate, write_predictions
from finetune.recipe import Recipe
from finetune.report import write_report
from finetune.results import read_results
from finetune.rundir import PREDICTIONS, open_run_directory
from finetune.trained import load_trained
from weights.errors import RunError


def read_test(folder: Path, images: ImageSet, events: Events) -> dict[str, Any]:
    """Test a finished run and write its folder as if it had read the test split itself.

    The figures are those that it would have had: the same cut, the same prefix in fp32, the same batches. Its times
    stay as they were.

    Args:
        folder: the run directory.
        images: the test split.
        events: told of progress; may raise to end the work, then nothing has changed.

    Returns:
        The new summary.

    Raises:
        RunError: the folder holds no finished run, or cannot be written.
        UsageError: the device's memory is too small.
        WeightsError: its model is damaged.
    """
    directory, recipe = open_run_directory(folder)
    with directory:
        if directory.read_summary() is None:
            raise RunError(f"{folder} is no finished run; go on with finetune run --resume {folder}")
        summary, rows = read_results(folder)
        trained = load_trained(folder)
        batch = evaluation_batch(trained.recipe or Recipe())
        device = pick_device(recipe.device)
        advice = f"end other programs that use it, and go on with finetune sweep --resume {folder.parent}"
        logits = logits_of(trained, images, device, torch.float32, batch, events, advice)
        figures = test_figures(logits, images.labels, trained.temperature.value)
        errors = {
            "test_error": figures.pop("calibration_error"),
            "test_error_scaled": figures.pop("calibration_error_scaled"),
        }
        uneven = summary["data"]["uneven"] or is_uneven(torch.bincount(images.labels).tolist())
        summary |= figures
        summary["calibration"] |= errors
        summary["data"] |= {"test": len(images), "uneven": uneven}
        predictions = illustrate(logits, images.labels, images.images)
        write_predictions(folder / PREDICTIONS, predictions)
        directory.write_recipe(replace(recipe, hold_test=False))
        write_report(folder, summary, rows, trained.classes, predictions)
        directory.write_summary(summary)
    return summary
