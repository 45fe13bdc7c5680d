"""Finished runs side by side: what differed, what it cost, what it brought, and why.

Runs are compared only on the same images: the data set and the test split must have the same identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.recipe import AUTO, MUON_DECAY, Recipe, from_table, peak_rate, read_toml, to_table
from finetune.results import read_results
from finetune.rundir import RECIPE
from weights.errors import UsageError
from weights.guard import shortened

# Settings that say where and how fast, not what was learned: a difference in them explains no accuracy.
PLACES = (
    "data", "data_dir", "weights", "weights_dir", "cache", "cache_dir", "cache_limit", "memory_budget", "image_memory",
    "device", "hold_test", "log",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What a run directory says of its run.

    Attributes:
        name: the directory's name, with as much of its path as tells it from the others.
        path: the directory.
        summary: summary.json.
        rows: metrics.jsonl, one per epoch.
        settings: recipe.toml.
    """

    name: str
    path: str
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def accuracy(self) -> float | None:
        """Test accuracy in percent; None without a test split."""
        value = self.summary["test_accuracy"]
        return None if value is None else float(value)

    def by_time(self) -> tuple[list[float], list[float], str]:
        """Return (seconds since the start, accuracy in percent) after each epoch, and what the accuracy is of.

        Time counts choosing formats and compiling, features (the test's come after the last epoch and do not count),
        training and evaluation. Accuracy is of validation images where there are some, else of the training images in
        passing: the test split is read once and has no curve.
        """
        key = "val_accuracy" if all(row["val_accuracy"] is not None for row in self.rows) else "train_accuracy"
        spent = self.summary["seconds"]
        test = float(self.summary["features"].get("test_seconds", 0.0))
        clock = float(spent["compile"]) + float(spent["prefix"]) - test
        seconds, values = [], []
        for row in self.rows:
            clock += row["seconds"] + row["eval_seconds"]
            seconds.append(clock)
            values.append(float(row[key]))
        return seconds, values, "validation" if key == "val_accuracy" else "training"


@dataclass(frozen=True)
class Explained:
    """Why one run's test accuracy is higher than another's, in percentage points.

    test = train - (train - test), so the difference in test accuracy is exactly the difference in training accuracy
    minus the difference in the gap between the two.

    Attributes:
        better: name of the run with the higher test accuracy.
        other: name of the other.
        points: difference in test accuracy, 0 or more.
        fit: difference in training accuracy: what the better run gains by fitting the images better.
        gap: how much smaller the better run's gap between training and test is.
    """

    better: str
    other: str
    points: float
    fit: float
    gap: float

    @property
    def sentence(self) -> str:
        """The conclusion that follows from the numbers."""
        if self.points < 0.05:  # 0.0 as it is printed
            return f"{self.better} and {self.other} get the same share of the test images right."
        if self.fit > 0 and self.fit >= self.gap:
            why = "less under-fitting" if self.gap < 0.1 * self.points else "less under-fitting and less over-fitting"
        else:
            why = "less over-fitting" if self.fit < 0.1 * self.points else "less over-fitting and less under-fitting"
        return (
            f"{self.better} gets {self.points:.1f} points more of the test images right than {self.other}: "
            f"{self.fit:+.1f} from how well the training images are fitted, {self.gap:+.1f} from the gap between "
            f"training and test. It helps by {why}."
        )


@dataclass(frozen=True)
class Comparison:
    """Runs on the same data.

    Attributes:
        runs: in the order given.
        differing: settings that are not the same in all runs, with each run's value; what was used, not "auto".
        explained: the best run against each of the others; empty without a test split.
    """

    runs: tuple[RunResult, ...]
    differing: dict[str, list[Any]]
    explained: tuple[Explained, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        runs = [
            {
                "name": run.name,
                "path": run.path,
                "arch": run.summary["arch"],
                "parameters": run.summary["parameters"],
                "epochs": run.summary["epochs"],
                "train_loss": [row["train_loss"] for row in run.rows],
                "train_accuracy": run.summary["train_accuracy"],
                "val_accuracy": run.summary["val_accuracy"],
                "test_accuracy": run.accuracy,
                "seconds": run.summary["seconds"],
                "images_seen": run.summary["images_seen"],
            }
            for run in self.runs
        ]
        explained = [{**asdict(one), "sentence": one.sentence} for one in self.explained]
        equal = equal_time(self.runs)
        return {
            "data": self.runs[0].summary["data"],
            "runs": runs,
            "differing": self.differing,
            "explained": explained,
            "equal_time": None if equal is None else asdict(equal),
        }


@dataclass(frozen=True)
class EqualTime:
    """What each run had reached when the quickest one had ended.

    Attributes:
        seconds: since the start of each run, features and compiling included.
        images: what the accuracy is of: validation or training.
        accuracies: in percent, in the order of the runs; None before a run's first epoch was done.
    """

    seconds: float
    images: str
    accuracies: tuple[float | None, ...]


def equal_time(runs: Sequence[RunResult]) -> EqualTime | None:
    """Return each run's accuracy at equal time; None where some have validation images and others do not."""
    curves = [run.by_time() for run in runs if run.rows]
    if len(curves) < len(runs) or len({kind for _, _, kind in curves}) > 1:
        return None
    limit = min(seconds[-1] for seconds, _, _ in curves)
    reached = []
    for seconds, values, _ in curves:
        done = [value for clock, value in zip(seconds, values, strict=True) if clock <= limit + 1e-9]
        reached.append(done[-1] if done else None)
    return EqualTime(limit, curves[0][2], tuple(reached))


def compare(paths: Sequence[Path]) -> Comparison:
    """Read finished runs and set them side by side.

    Args:
        paths: two run directories or more.

    Raises:
        UsageError: fewer than two, or runs on different data or test splits.
        RunError: a folder that is no finished run.
    """
    if len(paths) < 2:
        raise UsageError(f"finetune compare got {len(paths)} run directory; give at least two.")
    runs = [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    first = runs[0]
    for run in runs[1:]:
        for key, what in (("sha256", "data"), ("test_sha256", "test images")):
            if run.summary["data"].get(key) != first.summary["data"].get(key):
                raise _data_differ(first, run, what)
    tables = [_used(run) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    differing = {name: [table.get(name) for table in tables] for name in names}
    weights = [run.summary["weights"] for run in runs]
    if any(one["sha256"] != weights[0]["sha256"] for one in weights):
        differing["weights"] = [one["source"] if one["sha256"] else "none" for one in weights]
    differing = {name: values for name, values in differing.items() if any(value != values[0] for value in values)}
    return Comparison(tuple(runs), differing, tuple(_explain(runs)))


def _data_differ(first: RunResult, other: RunResult, what: str) -> UsageError:
    """Return the error of runs on different data; photos that were decoded to two sizes are different data."""
    names = [str(run.summary["data"]["name"]) for run in (first, other)]
    sizes = [run.settings.get("image_size") for run in (first, other)]
    way = "give runs on the same data"
    if names[0] == names[1] and sizes[0] != sizes[1]:
        names = [f"{name} at --image-size {size}" for name, size in zip(names, sizes, strict=True)]
        way += ", at one --image-size"
    return UsageError(
        f"{first.path} and {other.path} were made on different {what} ({names[0]} and {names[1]}), so their results "
        f"cannot be compared; {way}."
    )


def _used(run: RunResult) -> dict[str, Any]:
    """Return what a run was trained with: recipe.toml keeps `auto` for what follows from other settings."""
    usual = to_table(Recipe())  # an older recipe.toml lacks settings that came later; they had no effect then
    table = {name: value for name, value in {**usual, **run.settings}.items() if name not in PLACES}
    table["lr"] = peak_rate(from_table({name: table[name] for name in ("lr", "optimizer")}, RECIPE))
    if table["weight_decay"] == AUTO and table["optimizer"] == "muon":
        table["weight_decay"] = MUON_DECAY
    if table["views"] == AUTO:
        table["views"] = {"none": 1, "crop": table["epochs"]}.get(table["augment"], 2)  # as it is and mirrored
    windows = run.summary.get("windows")
    table["windows"] = windows["sides"] if windows else "off"
    return table


def _explain(runs: Sequence[RunResult]) -> list[Explained]:
    """Explain the best run's lead over each of the others."""
    tested = [(run.accuracy, run) for run in runs if run.accuracy is not None]
    if not tested:
        return []
    top, best = max(tested, key=lambda pair: pair[0])
    found = []
    for accuracy, run in tested:
        if run is best:
            continue
        fit = float(best.summary["train_accuracy"]) - float(run.summary["train_accuracy"])
        points = top - accuracy
        found.append(Explained(best.name, run.name, points, fit, points - fit))
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ from one another."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(len(parts) for parts in whole) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"{paths[0]} is given twice; give each run directory once.")


def _read(path: Path, name: str) -> RunResult:
    summary, rows = read_results(path)
    table = read_toml(path / RECIPE)
    known = {setting: value for setting, value in table.items() if setting in to_table(Recipe())}
    # What this version does not know is shown all the same, as a text.
    others = {setting: shortened(str(value)) for setting, value in table.items() if setting not in known}
    return RunResult(name, str(path), summary, rows, {**_typed(known, path), **others})


def _typed(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return settings as `to_table` has them, only those that are there."""
    whole = to_table(from_table(table, str(path / RECIPE)))
    return {setting: whole[setting] for setting in table}


def percent(value: float | None) -> str:
    """Return a share in percent with its sign, or nothing where there is none."""
    return "" if value is None else f"{value:.2f} %"


def in_words(value: object) -> str:
    """Return a setting's value as the command line takes it; an empty list is none."""
    return (",".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
