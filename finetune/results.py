"""What a finished run left behind, read and checked: summary.json and metrics.jsonl.

A run directory may come from a stranger, and its figures go into tables, pages and arithmetic. Each is looked at once,
here: whoever gets a summary from `read_results` finds what is named below, of the kind that is named. Figures that
older versions did not have may be absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.rundir import CONFIG, METRICS, SUMMARY
from weights.errors import RunError
from weights.guard import parse_json, read_json, read_text, told

LARGEST = 1e15  # of any figure; larger ones are none, and their differences get lost in a chart
MOST_EPOCHS = 1_000_000  # a chart has a place for each

Shape = Mapping[str, Any] | Callable[[object], bool]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST  # NaN is not


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _epoch(value: object) -> bool:
    return _whole(value) and int(value) <= MOST_EPOCHS  # type: ignore[call-overload]


def _above_zero(value: object) -> bool:
    return _number(value) and float(value) > 1e-6  # type: ignore[arg-type]


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _by_name(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(fits(part) for part in value.values())


def _maybe(shape: Shape) -> Callable[[object], bool]:
    return lambda value: value is None or not _misfit(value, shape, "")


# A name that ends in ? may be absent. What is not named here is not used.
_SUMMARY: dict[str, Any] = {
    "arch": _text,
    "test_accuracy": _maybe(_number),
    "test_loss": _maybe(_number),
    "test_top5_accuracy?": _maybe(_number),
    "test_mean_recall?": _maybe(_number),
    "train_accuracy": _number,
    "val_accuracy": _maybe(_number),
    "calibration?": _maybe(
        {
            "temperature": _above_zero,
            "reason": _text,
            "test_error?": _maybe(_number),
            "test_error_scaled?": _maybe(_number),
        }
    ),
    "epochs": _epoch,
    "kept_epoch": _epoch,
    "images_seen": _whole,
    "ended_by_budget?": _maybe({"budget": _text, "epochs": _number, "of": _whole}),
    "seconds": {"total": _number, "prefix": _number, "train": _number, "eval": _number},
    "estimate?": _maybe({"seconds?": _maybe(_by_name(_number))}),
    "parameters": {"total": _above_zero, "trained": _whole},
    "trained_layers": _texts,
    "frozen_unchanged": _flag,
    "frozen_tensors": _whole,
    "weights": {"source": _text, "sha256": _maybe(_text)},
    "data": {
        "name": _text,
        "sha256": _text,
        "test_sha256?": _maybe(_text),
        "classes": _whole,
        "uneven?": _flag,
        "train": _whole,
        "val": _whole,
        "test": _whole,
    },
    "device": _text,
    "processes?": _whole,
    "precision": _text,
    "compile": _flag,
    "features": {"where": _text, "bytes": _whole, "test_seconds?": _number},
    "versions": _by_name(_text),
}
_ROW: dict[str, Any] = {
    "epoch": _epoch,
    "train_loss": _number,
    "train_accuracy": _number,
    "val_loss": _maybe(_number),
    "val_accuracy": _maybe(_number),
    "lr": _number,
    "seconds": _number,
    "eval_seconds": _number,
}


def read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a finished run's summary, and its rows of metrics.jsonl, one per epoch.

    Raises:
        RunError: the folder holds no finished run, or a file of it is damaged.
    """
    summary = read_summary(folder)
    try:
        rows = [parse_json(line) for line in read_text(folder / METRICS).splitlines() if line.strip()]
        for row in rows:
            _require(row, _ROW)
        if len(rows) > MOST_EPOCHS:
            raise ValueError(f"{len(rows):,} epochs")
    except (OSError, ValueError) as error:
        raise no_run(folder, METRICS, error) from error
    return summary, rows


def read_summary(folder: Path) -> dict[str, Any]:
    """Return a finished run's summary.

    Raises:
        RunError: the folder holds no finished run, or its summary is damaged.
    """
    try:
        summary: dict[str, Any] = read_json(folder / SUMMARY)
        _require(summary, _SUMMARY)
        tested = summary["test_accuracy"] is not None
        if tested != (summary["test_loss"] is not None) or (summary.get("test_mean_recall") is not None and not tested):
            raise ValueError("only some figures of a test are there")
    except (OSError, ValueError) as error:
        raise no_run(folder, SUMMARY, error) from error
    return summary


def read_classes(folder: Path) -> list[str]:
    """Return a finished run's class names, in label order.

    Raises:
        RunError: config.json is absent, damaged, or names none.
    """
    try:
        config = read_json(folder / CONFIG)
        _require(config, {"label_names": _texts})
    except (OSError, ValueError) as error:
        raise no_run(folder, CONFIG, error) from error
    return list(config["label_names"])


def no_run(folder: Path, name: str, error: Exception) -> RunError:
    """Return the error for a folder whose file of this name cannot be used."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RunError(
        f"{folder} is no finished run ({name}: {reason}); give a folder that finetune run or finetune baseline has "
        "finished."
    )


def _require(value: object, shape: Shape) -> None:
    if misfit := _misfit(value, shape, ""):
        raise ValueError(misfit)


def _misfit(value: object, shape: Shape, place: str) -> str:
    """Return what is wrong with a value in a few words, "" when nothing is."""
    if callable(shape):
        return "" if shape(value) else f"{place or 'it'} is {told(value)}"
    if not isinstance(value, dict):
        return f"{place or 'it'} is no JSON object"
    for key, part in shape.items():
        name = key.removesuffix("?")
        inner = f"{place}.{name}".lstrip(".")
        if name in value:
            if found := _misfit(value[name], part, inner):
                return found
        elif name == key:
            return f"{inner} is missing"
    return ""
