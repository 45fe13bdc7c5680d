"""`finetune demo`: transfer learning on the built-in data, in a few minutes and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Screen, print_lines, print_table
from cli.run import stop_on_signals

if TYPE_CHECKING:
    from finetune.demo import Demo

EPOCH_LINES = 4  # of each run: its epochs are many and short


def demo_command(
    seed: Annotated[int, typer.Option(help="Seed of all three runs.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the three run directories.", show_default="runs/demo-NNNN")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the three summaries as JSON.")] = False,
) -> None:
    """Show what pretrained layers are worth, on pictures drawn by the program.

    Trains a resnet18 on shapes100, fine-tunes its layer4 and fc on a few images of shapes10, trains the same network
    from scratch on the same images, and compares the two.
    """
    from finetune.demo import demo
    from finetune.events import Events

    with Screen() as screen:

        def epoch(row: dict[str, Any], epochs: int) -> None:
            if row["epoch"] * EPOCH_LINES // epochs > (row["epoch"] - 1) * EPOCH_LINES // epochs:
                screen.epoch(row, epochs)

        events = Events(note=screen.note, progress=screen.progress, plan=screen.plan, epoch=epoch)
        result = demo(output, seed=seed, events=events, stop=stop_on_signals(screen.interrupted))
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    print_result(result)


def print_result(result: Demo) -> None:
    """Print the three runs side by side, and what they come to."""
    columns = [("run", "left"), ("data", "left"), ("images", "right"), ("trained parameters", "right")]
    columns += [("test accuracy", "right"), ("time", "right")]
    runs = [("pretrained", result.pretrained), ("fine-tuned", result.fine_tuned), ("from scratch", result.scratch)]
    rows = [
        [
            name,
            run["data"]["name"],
            f"{run['data']['train']:,}",
            f"{run['parameters']['trained']:,}",
            f"{run['test_accuracy']:.1f} %",
            f"{run['seconds']['total']:.0f} s",
        ]
        for name, run in runs
    ]
    print_table(f"{result.scratch['arch'].partition('.')[0]}, seed {result.seed}", columns, rows)
    print_lines(["", conclusion(result), f"{result.seconds:.0f} s in all; the three runs are kept in {result.output}"])


def conclusion(result: Demo) -> str:
    """Return what the figures say about fine-tuning against training from scratch."""
    tuned, scratch = result.fine_tuned, result.scratch
    layers = " and ".join(tuned["trained_layers"])
    images = f"the same {tuned['data']['train']:,} images"
    if result.points == 0:
        return f"With {images}, fine-tuning {layers} and training from scratch end at {tuned['test_accuracy']:.1f} %."
    than = "more" if result.points > 0 else "fewer"
    return (
        f"With {images}, fine-tuning {layers} gets {tuned['test_accuracy']:.1f} % of the test images right: "
        f"{abs(result.points):.1f} points {than} than training from scratch ({scratch['test_accuracy']:.1f} %)."
    )
