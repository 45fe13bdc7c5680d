"""`finetune compare`: finished runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import print_lines, print_table
from cli.options import require_page

if TYPE_CHECKING:
    from finetune.compare import Comparison


def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, two or more, on the same data at the same size.")
    ],
    html: Annotated[
        Path | None,
        typer.Option("--html", "--output", help="Write a page with curves here.", show_default="no page"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on standard output.")] = False,
) -> None:
    """Compare finished runs: settings, losses, accuracy, time, and why one is better.

    The page shows the curves against epochs and against time.

    Example: finetune compare runs/figure1-cifar100-0001 runs/resnet18-cifar100-0001 --html compare.html
    """
    from finetune.compare import compare

    if html is not None:
        require_page(html, "--html")
    result = compare(runs)
    if html is not None:
        from finetune.compare_page import write_page

        write_page(html, result)
    if as_json:
        print(json.dumps({**result.as_dict(), "page": None if html is None else str(html)}, indent=2))
        return
    print_comparison(result)
    print_equal_time(result)
    print_lines(["", *(one.sentence for one in result.explained)])
    print_lines([] if html is None else [f"page: {html}"])


def print_comparison(result: Comparison) -> None:
    """Print what the runs came to, and the settings that differ."""
    from finetune.compare import in_words, percent
    from finetune.metrics import uneven_recall

    columns = [("", "left"), *((run.name, "right") for run in result.runs)]
    summaries = [run.summary for run in result.runs]
    rows = [
        ["network", *(one["arch"] for one in summaries)],
        ["parameters", *(f"{one['parameters']['total']:,}" for one in summaries)],
        ["of them trained", *(f"{one['parameters']['trained']:,}" for one in summaries)],
        ["epochs done", *(str(one["epochs"]) for one in summaries)],
        ["images seen", *(f"{one['images_seen']:,}" for one in summaries)],
        ["seconds", *(f"{one['seconds']['total']:,.0f}" for one in summaries)],
        ["train accuracy", *(f"{one['train_accuracy']:.2f} %" for one in summaries)],
        ["validation accuracy", *(percent(one["val_accuracy"]) for one in summaries)],
        ["test accuracy", *(percent(one["test_accuracy"]) for one in summaries)],
        ["mean recall", *(percent(uneven_recall(one)) for one in summaries)],
    ]
    rows = [row for row in rows if any(row[1:])]
    if result.differing:
        rows.append(["settings that differ:", *("" for _ in result.runs)])
    rows += [[name, *(in_words(value) for value in values)] for name, values in result.differing.items()]
    print_table(f"{len(summaries)} runs on {summaries[0]['data']['name']}", columns, rows)
    epochs = max(len(run.rows) for run in result.runs)
    losses = []
    for epoch in range(epochs):
        cells = [f"{run.rows[epoch]['train_loss']:.4f}" if epoch < len(run.rows) else "" for run in result.runs]
        losses.append([str(epoch + 1), *cells])
    print()
    print_table("mean training loss", [("epoch", "right"), *columns[1:]], losses)


def print_equal_time(result: Comparison) -> None:
    """Print what each run had reached when the quickest one had ended, or why that cannot be said."""
    from finetune.compare import equal_time
    from finetune.plan import duration

    equal = equal_time(result.runs)
    if equal is None:
        lines = ["no accuracy at equal time: some of the runs have validation images and others do not"]
    else:
        cells = ["no epoch done yet" if value is None else f"{value:.2f} %" for value in equal.accuracies]
        reached = [f"{run.name} {cell}" for run, cell in zip(result.runs, cells, strict=True)]
        lines = [f"{equal.images} accuracy after {duration(equal.seconds)}: {', '.join(reached)}"]
    print_lines(["", *lines])
