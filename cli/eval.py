"""`finetune eval`: a trained model on a data set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Screen, print_lines, print_table
from cli.options import require_predictions
from finetune.recipe import Recipe

if TYPE_CHECKING:
    from finetune.evaluate import Evaluation

SHOWN = 10  # worst classes and confused pairs
OWN = "the run's own"
SPLIT_HELP = "Which images. A folder of classes without train and test folders is all test images."
HELP = {item.name: item.metadata["help"] for item in dataclasses.fields(Recipe)}


def eval_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory, or a model.safetensors with its config.json beside it.")
    ],
    data: Annotated[str | None, typer.Option(help=HELP["data"], show_default=OWN)] = None,
    data_dir: Annotated[Path | None, typer.Option(help=HELP["data_dir"], show_default=False)] = None,
    labels: Annotated[str | None, typer.Option(help=HELP["labels"], metavar="fine|coarse", show_default=OWN)] = None,
    split: Annotated[str, typer.Option(help=SPLIT_HELP, metavar="train|val|test")] = "test",
    precision: Annotated[str, typer.Option(help="fp32 gives the figures of the run.", metavar="fp32|bf16")] = "fp32",
    device: Annotated[str, typer.Option(help=HELP["device"])] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.", show_default=OWN)] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write logits and labels here, as safetensors.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON on standard output.")] = False,
) -> None:
    """Evaluate a trained model: accuracy, classes, confusions, calibration, repeated images.

    On the data of its own run it gives that run's test figures exactly.

    Example: finetune eval runs/resnet18-photos-0001 --data ~/more-photos
    """
    from finetune.evaluate import evaluate
    from finetune.events import Events
    from finetune.predictions import illustrate, write_predictions
    from finetune.trained import load_trained

    if output is not None:
        require_predictions(output, "--output")
    with Screen() as screen:
        result = evaluate(
            load_trained(checkpoint),
            data,
            data_dir=data_dir,
            labels=labels,
            split=split,
            precision=precision,
            device=device,
            batch_size=batch_size,
            events=Events(note=screen.note, progress=screen.progress),
        )
    if output is not None:
        write_predictions(output, illustrate(result.logits, result.images.labels, result.images.images))
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        print_evaluation(result)
        print_lines([f"predictions     {output}"] if output is not None else [])


def print_evaluation(result: Evaluation) -> None:
    """Print the figures, the worst classes and the most confused pairs."""
    figures = result.as_dict()
    classes = [one for one in figures["classes"] if one["images"]]
    classes.sort(key=lambda one: one["accuracy"])
    columns = [("class", "left"), ("images", "right"), ("recall", "right"), ("precision", "right")]
    rows = [
        [one["name"], f"{one['images']:,}", f"{one['accuracy']:.1f} %", _percent(one["precision"])]
        for one in classes[:SHOWN]
    ]
    title = f"the {SHOWN} worst of {len(classes)} classes" if len(classes) > SHOWN else "classes, the worst first"
    print_table(title, columns, rows)
    pairs = _confused(figures)
    if pairs:
        print()
        print_table("most confused", [("is", "left"), ("taken for", "left"), ("images", "right")], pairs)
    print_lines(["", *figure_lines(figures)])


def figure_lines(figures: dict[str, Any]) -> list[str]:
    """Return an evaluation's figures in a few lines; of uneven classes the mean recall goes first."""
    top5 = "" if figures["top5_accuracy"] is None else f", top 5 {figures['top5_accuracy']:.2f} %"
    accuracy = (
        f"{figures['split']} accuracy".ljust(16)
        + f"{figures['accuracy']:.2f} %{top5}  ({figures['images']:,} images of {figures['data']})"
    )
    why = "  (every class counts the same; they are uneven)" if figures["uneven"] else ""
    recall = f"mean recall     {figures['mean_recall']:.2f} %{why}"
    calibration = figures["calibration"]
    scaled = (
        f"{calibration['error_scaled']:.2f} with temperature {calibration['temperature']:g}"
        if calibration["temperature"] != 1
        else "temperature 1"
    )
    lines = [recall, accuracy] if figures["uneven"] else [accuracy, recall]
    lines += [
        f"loss            {figures['loss']:.4f}",
        f"calibration     {calibration['error']:.2f} points off, {scaled} ({calibration['reason']})",
    ]
    repeated = figures["repeated"]
    if repeated is not None:
        without, count = repeated["accuracy_without"], repeated["images"]
        said = f"; {without:.2f} % without {'it' if count == 1 else 'them'}" if count and without is not None else ""
        lines.append(f"also in train   {count:,} image{'' if count == 1 else 's'}, pixel for pixel{said}")
    return lines


def _confused(figures: dict[str, Any]) -> list[list[str]]:
    """Return the most confused pairs as rows of a table."""
    names = [one["name"] for one in figures["classes"]]
    found = [
        (count, is_, taken)
        for is_, row in enumerate(figures["confusion"])
        for taken, count in enumerate(row)
        if count and is_ != taken
    ]
    found.sort(key=lambda one: (-one[0], one[1], one[2]))
    return [
        [names[is_], names[taken], f"{count:,} of {figures['classes'][is_]['images']:,}"]
        for count, is_, taken in found[:SHOWN]
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
