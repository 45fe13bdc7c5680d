"""`finetune baseline`: train a network from scratch, to compare transfer with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import Screen
from cli.options import Config, recipe_options, without_auto
from cli.run import carry_out, only_resume, show_result, stop_on_signals
from finetune.recipe import check, to_toml
from finetune.scratch import BY_RECIPE, DECIDED, FIRST, RECIPES, choose_baseline


def _baseline(
    settings: dict[str, Any],
    arch: Annotated[
        str | None,
        typer.Option(help="One of our networks (finetune list), or any timm architecture.", show_default=FIRST),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="fast is ours; assignment is what the assignments prescribe.",
            metavar="fast|assignment",
            show_default=RECIPES[0],
        ),
    ] = None,
    show_recipe: Annotated[bool, typer.Option("--show-recipe", help="Print the settings, train nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/<arch>-<data>-NNNN")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this directory.", show_default=False)
    ] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show report.html in the browser at the end.")] = False,
) -> None:
    """Train a network from scratch, to see what transfer learning is worth.

    The same images, loop and run directory as `finetune run`. With --weights, training goes on from a checkpoint of the
    same network and classes.

    Example: finetune baseline --arch figure1 --data cifar100
    """
    if resume is not None:
        named = {name: value for name, value in (("arch", arch), ("recipe", recipe)) if value is not None}
        only_resume({**settings, **named}, output, config)
    chosen = choose_baseline(arch, recipe, without_auto(settings), config)
    check(chosen)
    if show_recipe:
        from finetune.arch import resolve_network

        resolve_network(chosen.arch)
        print(to_toml(chosen), end="")
        return
    with Screen() as screen:
        summary = carry_out(chosen, output, resume, screen, stop_on_signals(screen.interrupted))
    show_result(summary, as_json=as_json, open_page=open_page)


baseline_command = recipe_options(
    _baseline, without=(*DECIDED, "arch"), shown=dict.fromkeys(BY_RECIPE, "by the recipe")
)
