"""`finetune predict`: a trained model names what is in images."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from cli.console import LongTable, Screen, print_lines, printable
from finetune.recipe import Recipe
from weights.errors import DataError, UsageError

if TYPE_CHECKING:
    from finetune.classifier import Classifier, Prediction

HELP = {item.name: item.metadata["help"] for item in dataclasses.fields(Recipe)}
PATHS_HELP = (
    "Images, folders (read at any depth), quoted patterns, or - for a list on standard input, a path in each line."
)


def predict_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory, or a model.safetensors with its config.json beside it.")
    ],
    paths: Annotated[list[str] | None, typer.Argument(help=PATHS_HELP, show_default=False)] = None,
    topk: Annotated[int | None, typer.Option(help="Classes for each image.", show_default="5, or all if fewer")] = None,
    precision: Annotated[str, typer.Option(help="Number format.", metavar="fp32|bf16")] = "fp32",
    device: Annotated[str, typer.Option(help=HELP["device"])] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.", show_default="the run's own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on standard output, a line for each image.")] = False,
) -> None:
    """Predict the classes of images with a trained model.

    Needs neither the data nor the weights that the model was trained from. A file that cannot be read is named and
    passed over; the exit code is 1 then.

    Example: finetune predict runs/resnet18-photos-0001 ~/new-photos
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv were both given; choose one.")
    from finetune.classifier import TOPK, Unreadable, load_classifier
    from finetune.inputs import find_images

    classifier = load_classifier(checkpoint, device=device, precision=precision, batch_size=batch_size)
    found = find_images(paths or [], _lines)
    count = min(TOPK if topk is None else topk, len(classifier.classes))
    printer: Printer = Json() if as_json else Csv(count) if as_csv else Rows(classifier, found.files)
    unreadable = done = 0
    with Screen() as screen:
        for note in found.notes:
            screen.note(note)
        if (as_json or as_csv) and classifier.temperature == 1:
            screen.note(temperature_line(classifier))
        screen.progress("predicting", 0, len(found.files))
        for batch in classifier.predict_batches(found.files, count):
            with screen.results():
                printer.add([one for one in batch if not isinstance(one, Unreadable)])
            for one in batch:
                if isinstance(one, Unreadable):
                    unreadable += 1
                    screen.note(f"{_printable(one.path)} passed over: {one.reason}")
            done += len(batch)
            screen.progress("predicting", done, len(found.files))
    printer.end()
    if unreadable:
        images = "1 image" if unreadable == 1 else f"{unreadable:,} images"
        raise DataError(f"{images} of {done:,} could not be read; replace or remove what is named above.")


FORMULA = ("=", "+", "-", "@")  # how formulas of spreadsheets begin; an apostrophe before them makes them text


def _lines() -> Iterator[str]:
    """Yield the lines of standard input, whatever bytes the paths are made of."""
    return map(os.fsdecode, sys.stdin.buffer)


def _printable(path: str | None) -> str:
    """Return a path in characters that can be printed: bytes that are not UTF-8 become escapes."""
    return (path or "").encode("utf-8", "backslashreplace").decode()


def temperature_line(classifier: Classifier) -> str:
    """Return a sentence on whether the probabilities can be believed."""
    if classifier.temperature == 1:
        return f"Probabilities are not calibrated: the temperature is 1 ({classifier.temperature_reason})."
    return (
        f"Probabilities are calibrated with temperature {classifier.temperature:g} ({classifier.temperature_reason})."
    )


class Printer(Protocol):
    """Prints predictions on standard output as they come."""

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Print some."""

    def end(self) -> None:
        """Print what follows the last one."""


class Json:
    """One JSON list, a line for each image."""

    def __init__(self) -> None:
        self._before = "["

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Print some of the list."""
        for one in predictions:
            sys.stdout.write(self._before + json.dumps(one.as_dict()))
            self._before = ",\n "

    def end(self) -> None:
        """Close the list."""
        print("[]" if self._before == "[" else "]")


class Csv:
    """A line for each image: its path, then class and probability in turn.

    Args:
        count: classes for each image.
    """

    def __init__(self, count: int) -> None:
        self._writer = csv.writer(sys.stdout, lineterminator="\n")
        self._heading: list[str] = ["path"]
        for rank in range(1, count + 1):
            self._heading += [f"class_{rank}", f"probability_{rank}"]

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Print some lines."""
        self._begin()
        for one in predictions:
            cells = [value for each in one.topk for value in (plain_cell(each.name), each.probability)]
            self._writer.writerow([plain_cell(_printable(one.path)), *cells])

    def end(self) -> None:
        """Print the heading, if no image has brought it."""
        self._begin()

    def _begin(self) -> None:
        if self._heading:
            self._writer.writerow(self._heading)
        self._heading = []


def plain_cell(text: str) -> str:
    """Return a name as a cell of CSV that a spreadsheet shows and does not compute; JSON has names as they are."""
    text = printable(text)
    return f"'{text}" if text.startswith(FORMULA) else text


class Rows:
    """A table for people: the classes of each image below each other.

    Args:
        classifier: whose predictions they are.
        files: all that will be in the table, as far as they can be read.
    """

    def __init__(self, classifier: Classifier, files: Sequence[str]) -> None:
        self._classifier = classifier
        title = f"{len(files):,} image{'s' * (len(files) != 1)}, {len(classifier.classes):,} classes"
        columns = [
            ("image", "left", map(_printable, files)),
            ("class", "left", classifier.classes),
            ("probability", "right", ("100.0 %",)),
        ]
        self._table = LongTable(title, columns)

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Print some rows."""
        rows = [
            [_printable(one.path) if rank == 0 else "", each.name, f"{100 * each.probability:.1f} %"]
            for one in predictions
            for rank, each in enumerate(one.topk)
        ]
        if rows:
            self._table.add(rows)

    def end(self) -> None:
        """Print a sentence on the temperature."""
        print_lines(["", temperature_line(self._classifier)])
