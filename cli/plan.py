"""`finetune plan`: what a run would do and cost, before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Screen, print_lines, print_table
from cli.options import Config, make_recipe, recipe_options
from cli.run import stop_on_signals

if TYPE_CHECKING:
    from finetune.plan import Plan
    from finetune.precision import Choice


@recipe_options
def plan_command(
    settings: dict[str, Any],
    output: Annotated[Path | None, typer.Option(help="Run directory to come: is it free?", show_default=False)] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on standard output.")] = False,
) -> None:
    """Show what a run would do and what it would cost, without starting it.

    Takes the options of `finetune run` and goes its way up to the plan: it reads the data, loads the weights and times
    a few steps. The timings are remembered, so the run has the same plan. No feature is computed.

    Example: finetune plan --arch resnet18 --train-layers layer4,fc --data ~/photos --budget 20m
    """
    from finetune.recipe import check

    recipe = make_recipe(settings, config)
    check(recipe)  # before torch is imported: a wrong flag is answered at once
    from finetune.events import Events
    from finetune.job import plan_run

    with Screen() as screen:
        events = Events(note=screen.note, progress=screen.progress)
        plan = plan_run(recipe, output, events=events, stop=stop_on_signals(screen.interrupted))
    if as_json:
        print(json.dumps(plan.as_dict(), indent=2))
        return
    print_plan(plan)


def print_plan(plan: Plan) -> None:
    """Print a plan: what trains, how it is computed, where features go, and the time of each phase."""
    from finetune.placement import size

    train, val, test = plan.counts
    title = f"{plan.arch} at {plan.image_size} × {plan.image_size} pixels"
    names = [name or "all" for name in plan.trained_layers]
    columns = [(f"{', '.join(names)} {'trains' if len(names) == 1 else 'train'}", "left")]
    print_table(title, [*columns, ("parameters", "right"), ("multiply-adds per image", "right")], _layer_rows(plan))
    disk = plan.disk
    images = f"{train:,} train, {val:,} validation, {test:,} test images"
    lines = [
        "",
        f"data            {plan.data}, {plan.classes} classes: {images}",
        f"device          {plan.device}",
        f"training        {_told(plan.training)}",
        *([f"frozen part     {_told(plan.prefix)}"] if plan.prefix else []),
        *([f"images          {plan.streamed()}"] if plan.streaming else []),
        f"features        {plan.placement.reason}",
    ]
    if plan.placement.on_disk:
        there = f"{size(disk.held)} of them there already" if disk.held else "none of them there yet"
        lines.append(f"cache           {disk.cache_dir}: {there}")
    lines += [
        f"disk            {size(disk.write)} of features to write, {size(disk.free)} free; the run directory takes "
        f"{size(disk.model)},",
        f"                and {size(disk.checkpoint)} more for its checkpoint until it is finished",
        f"epochs          {_epochs(plan)}, in batches of {plan.batch_size}",
    ]
    print_lines([*lines, ""])
    print_table("expected time", [("phase", "left"), ("time", "right"), ("for", "left")], _time_rows(plan))


def _layer_rows(plan: Plan) -> list[list[str]]:
    total, trained, behind = plan.parameters
    once, every = plan.multiply_adds
    share = 100 * plan.frozen_share
    rows = [["frozen, computed once", f"{total - trained - behind:,}", f"{_billions(once)} ({share:.0f} %)"]]
    if behind:
        rows.append(["frozen, in every step", f"{behind:,}", ""])
    rows.append(["trained, in every step", f"{trained:,}", f"{_billions(every)} ({100 - share:.0f} %)"])
    return [*rows, ["in all", f"{total:,}", _billions(once + every)]]


def _time_rows(plan: Plan) -> list[list[str]]:
    from finetune.plan import duration

    seconds = plan.estimate()["seconds"]
    rows = f"{plan.feature_views:,} feature rows" if plan.feature_views else "no features to compute"
    per_epoch = f"{plan.epochs} epoch{'s' * (plan.epochs != 1)} of {duration(plan.epoch_seconds)}"
    if plan.epochs_in_budget < plan.epochs:
        per_epoch = f"about {plan.epochs_in_budget:.1f} of {per_epoch}"
    return [
        ["start", duration(plan.start_seconds), "reading data and weights, timing steps: what it took now"],
        ["prefix", duration(seconds["prefix"]), rows],
        ["training", duration(seconds["train"]), per_epoch],
        ["evaluation", duration(seconds["eval"]), "validation after each epoch, the test at the end"],
        ["total", duration(seconds["total"]), ""],
    ]


def _told(choice: Choice) -> str:
    return f"{choice} ({choice.reason})"


def _epochs(plan: Plan) -> str:
    from finetune.plan import duration

    if plan.budget is None:
        return str(plan.epochs)
    fits = f"{plan.epochs_in_budget:.1f}" if plan.epochs_in_budget < plan.epochs else str(plan.epochs)
    return f"{fits} of {plan.epochs} fit into --budget, {duration(plan.budget)}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 10**7 else f"{count / 1e6:.2f} million"
