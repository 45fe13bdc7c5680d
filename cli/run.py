"""`finetune run`: fine-tune a model."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from cli.console import Screen, print_lines
from cli.options import Config, make_recipe, recipe_options
from cli.report import show
from finetune.launch import is_first
from finetune.recipe import Recipe, flag
from weights.errors import UsageError

STOPPING = (signal.SIGINT, signal.SIGTERM)


@recipe_options
def run_command(
    settings: dict[str, Any],
    output: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/<arch>-<data>-NNNN")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this directory.", show_default=False)
    ] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show report.html in the browser at the end.")] = False,
) -> None:
    """Fine-tune a pretrained classifier on your images.

    The layers that do not train are computed once; only the rest is trained, on cached features.

    Example: finetune run --arch resnet18 --train-layers layer4,fc --data ~/photos
    """
    if resume is not None:
        only_resume(settings, output, config)
    recipe = make_recipe(settings, config)
    with Screen() as screen:
        stop = stop_on_signals(screen.interrupted)
        summary = carry_out(recipe, output, resume, screen, stop)
    show_result(summary, as_json=as_json, open_page=open_page)


def carry_out(
    recipe: Recipe, output: Path | None, resume: Path | None, screen: Screen, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Run a recipe, or go on with a run, and show it on the screen; return the summary."""
    if resume is None:
        from finetune.recipe import check

        check(recipe)  # before torch is imported: a wrong flag is answered at once
    from finetune import pipeline
    from finetune.events import Events

    events = Events(note=screen.note, progress=screen.progress, plan=screen.plan, epoch=screen.epoch)
    if resume is not None:
        return pipeline.resume(resume, events=events, stop=stop)
    return pipeline.run(recipe, output, events=events, stop=stop)


def show_result(summary: dict[str, Any], *, as_json: bool, open_page: bool) -> None:
    """Print what came of a run, and show its page when asked; of several processes only the first one does."""
    if not is_first():
        return
    print(json.dumps(summary, indent=2)) if as_json else print_lines(result_lines(summary))
    if open_page:
        show(Path(summary["output"]) / "report.html")


def only_resume(settings: dict[str, Any], output: Path | None, config: Path | None) -> None:
    """Refuse settings beside --resume: a resumed run keeps its own.

    Raises:
        UsageError: at least one was given; all are named.
    """
    given = [flag(name) for name in settings]
    given += ["--output"] if output else []
    given += ["--config"] if config else []
    if given:
        raise UsageError(
            f"--resume goes on with the run's own settings, and {', '.join(given)} was given too; leave that out, or "
            "start a new run."
        )


def stop_on_signals(note: Callable[[str], None]) -> Callable[[], bool]:
    """Catch Ctrl-C and SIGTERM; return a function that says whether one came.

    The second one ends the process at once, and in the middle of a long operation too: from the first on, both are
    left to the system. What the process was writing is swept away when the run is resumed.

    Args:
        note: says a sentence; it is called from the signal handler.
    """
    asked = False

    def catch(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)
        if is_first():
            note("Stopping at the next step; press Ctrl-C again to end at once.")

    for number in STOPPING:
        signal.signal(number, catch)
    return lambda: asked


def result_lines(summary: dict[str, Any]) -> list[str]:
    """Return a summary in a few lines for people; of uneven classes the mean recall goes first."""
    from finetune.metrics import no_test, uneven_recall

    seconds = summary["seconds"]
    test, recall = summary["test_accuracy"], uneven_recall(summary)
    first = (
        [] if recall is None else [f"mean recall     {recall:.2f} %  (every class counts the same; they are uneven)"]
    )
    return [
        *first,
        f"test accuracy   {test:.2f} %  ({summary['data']['test']:,} images, read once)"
        if test is not None
        else f"test accuracy   not known: {no_test(summary)}",
        f"train accuracy  {summary['train_accuracy']:.2f} %"
        + ("" if summary["val_accuracy"] is None else f", validation {summary['val_accuracy']:.2f} %"),
        f"frozen tensors  {summary['frozen_tensors']} unchanged, bit for bit"
        if summary["frozen_tensors"]
        else "frozen tensors  none: every layer trained",
        f"time            {seconds['total']:.0f} s: features {seconds['prefix']:.0f}, training {seconds['train']:.0f}, "
        f"evaluation {seconds['eval']:.0f}",
        f"kept in         {summary['output']}",
    ]
