"""`finetune doctor`: is this machine fit for runs?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Screen, print_lines

if TYPE_CHECKING:
    from finetune.doctor import Check


def doctor_command(
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder of cached features.", show_default="the user's")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where runs are to go.", show_default="runs")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no server.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not try the compiler.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Look at versions, machine, compiler, folders, caches and servers, with a verdict and a next step for each.

    The exit code is 1 when there is a problem: something that no run, or none with the default settings, gets past.
    A warning is something that makes runs slower or forbids a setting. Nothing is changed.

    Example: finetune doctor --offline
    """
    from finetune.doctor import PROBLEM, judge, worst
    from finetune.facts import gather

    with Screen() as screen:
        facts = gather(cache_dir=cache_dir, output=output, offline=offline, compiling=not quick, note=screen.note)
    checks = judge(facts)
    if as_json:
        print(json.dumps({"verdict": worst(checks), "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print_checks(checks)
    if worst(checks) == PROBLEM:
        raise typer.Exit(1)


def print_checks(checks: list[Check]) -> None:
    """Print a line for each check, its next step below it, and how many are no `ok`."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.verdict:<8} {check.name:<{width}}  {check.found}")
        if check.next:
            lines.append(f"{'':8} {'':<{width}}  {check.next}")
    counts = {kind: sum(check.verdict == kind for check in checks) for kind in ("problem", "warning")}
    told = [f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items()]
    print_lines([*lines, "", ", ".join(told)])
