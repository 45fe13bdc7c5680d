"""`finetune report`: a run's page again, and pages in the browser."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from cli.console import print_lines


def report_command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Write a finished run's report.html again, from the other files of its folder.

    Example: finetune report runs/resnet18-photos-0001 --open
    """
    from finetune.report import rebuild_report

    page = rebuild_report(run)
    print_lines([str(page)])
    if open_page:
        show(page)


def show(page: Path) -> None:
    """Show a page in the user's browser; where there is none, say where the page is."""
    address = page.resolve().as_uri()
    if not webbrowser.open(address):
        print(f"No browser was found; the page is {address}", file=sys.stderr)
