"""`finetune sweep`: settings tried against one another, on features that are computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Screen, print_lines, print_table
from cli.options import Config, make_recipe, recipe_options
from cli.report import show
from cli.run import only_resume, stop_on_signals
from finetune.grid import AXES, make_grid

if TYPE_CHECKING:
    from finetune.sweep import Sweep

PANEL = "What to try"

Cuts = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers that train, as for finetune run; once for each cut.", rich_help_panel=PANEL, show_default="head"
    ),
]
Rates = Annotated[
    str | None,
    typer.Option(
        help="Peak learning rates, such as 0.01,0.03,0.1.",
        metavar="FLOAT,...",
        rich_help_panel=PANEL,
        show_default="auto",
    ),
]
Decays = Annotated[
    str | None,
    typer.Option(
        help="Weight decays, such as 0,0.0005.",
        metavar="FLOAT,...",
        rich_help_panel=PANEL,
        show_default="auto",
    ),
]
Shots = Annotated[
    str | None,
    typer.Option(
        help="Training images of every class, such as 1,5,10,50 or 10,all: the fewer are among the more.",
        metavar="INTEGER,...",
        rich_help_panel=PANEL,
        show_default="all",
    ),
]


def _sweep(
    settings: dict[str, Any],
    train_layers: Cuts = None,
    lr: Rates = None,
    weight_decay: Decays = None,
    shots: Shots = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the sweep.", show_default="runs/sweep-<arch>-<data>-NNNN")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the sweep in this folder.", show_default=False)
    ] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show sweep.html in the browser at the end.")] = False,
) -> None:
    """Try settings against one another: every combination, on features that are computed once.

    Each combination is a run in a folder of its own. The validation images choose one, and the test images are read for
    that one alone, or not at all with --hold-test.

    Example: finetune sweep --train-layers layer4,fc --train-layers fc --lr 0.01,0.03,0.1 --data ~/photos
    """
    axes = {"train_layers": train_layers, "lr": lr, "weight_decay": weight_decay, "shots": shots}
    given = {name: value for name, value in axes.items() if value}
    if resume is not None:
        only_resume({**given, **settings}, output, config)
    recipe = make_recipe(settings, config)
    grid = make_grid(recipe, train_layers=train_layers or (), lr=lr, weight_decay=weight_decay, shots=shots)
    if resume is None:
        grid.check(recipe)  # before torch is imported: a wrong flag is answered at once
    from finetune.events import Events
    from finetune.sweep import resume_sweep, sweep

    with Screen() as screen:
        stop = stop_on_signals(screen.interrupted)
        events = Events(note=screen.note, progress=screen.progress, plan=screen.plan, epoch=screen.epoch)
        if resume is not None:
            result = resume_sweep(resume, events=events, stop=stop)
        else:
            result = sweep(recipe, grid, output, events=events, stop=stop)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        print_sweep(result)
    if open_page:
        show(Path(result.as_dict()["page"]))
    if result.chosen is None:
        raise typer.Exit(1)


def print_sweep(result: Sweep) -> None:
    """Print every run, the quickest first, and what to take from them."""
    from finetune.plan import duration
    from finetune.sweep_page import remark

    plain = result.as_dict()
    runs = sorted(plain["runs"], key=lambda run: (bool(run["diverged"]), run["seconds"]))
    columns = [("run", "left"), ("validation", "right"), ("train", "right"), ("time", "right"), ("", "left")]
    rows = []
    for run in runs:
        figures = ["", "", ""]
        if not run["diverged"]:
            figures = [f"{run['val_accuracy']:.2f} %", f"{run['train_accuracy']:.2f} %", duration(run["seconds"])]
        rows.append([run["name"], *figures, "diverged" if run["diverged"] else remark(run, plain)])
    print_table(f"{len(runs)} run{'s' * (len(runs) != 1)} of {result.arch} on {result.data}", columns, rows)
    features = f", of it features of all runs {duration(result.feature_seconds)}" if result.feature_seconds else ""
    lines = [*plain["recommendation"], f"time in all     {duration(result.seconds)}{features}"]
    print_lines(["", *lines, f"kept in         {result.output}", f"page            {plain['page']}"])


sweep_command = recipe_options(_sweep, without=AXES)
