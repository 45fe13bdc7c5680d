"""What people see: progress bars on a terminal, plain lines in a pipe. The only module that knows rich.

Everything goes to standard error, so that standard output holds results alone (`--json` can be piped).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from finetune.events import Pace, epoch_line

if TYPE_CHECKING:
    from finetune.plan import Plan

_ACTED_ON = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, the line feed among them, line separators, and marks that turn the direction of writing."""

WIDEST, LEAST = 40, 20  # columns of a LongTable beside the first one, and the first one: what is longer is folded


class Screen:
    """Turns a run's events into text.

    Args:
        quiet: show errors only.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._pace = Pace()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    def note(self, text: str) -> None:
        """Print a sentence."""
        self.console.print(Text(printable(text)), style="dim" if self.live else None)

    def interrupted(self, text: str) -> None:
        """Print a sentence from a signal handler.

        It goes past rich and Python's buffers, whose locks the interrupted code may hold. The cursor that a progress
        bar hides comes back, because a second signal ends the process without another word.
        """
        shown = f"\n\x1b[?25h{text}\n" if self.live else f"{text}\n"
        with suppress(OSError, ValueError):  # standard error is closed
            os.write(sys.stderr.fileno(), shown.encode())

    def plan(self, plan: Plan) -> None:
        """Print the plan."""
        self._end_bar()
        for line in plan.sentences():
            self.console.print(Text(printable(line)))

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Print a finished epoch's figures."""
        self._end_bar()
        self.console.print(Text(printable(epoch_line(row, epochs))))

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far something has come."""
        if what != self._what:
            self._end_bar()
            self._what = what
        if self.live:
            self._show_bar(what, done, total)
        elif (line := self._pace.line(what, done, total)) is not None:
            self.console.print(Text(printable(line)))
        if total and done >= total:
            self._end_bar()

    @contextmanager
    def results(self) -> Iterator[None]:
        """Take the bar off the terminal while results go to standard output.

        A bar that stays would send them to standard error, where it is itself, and be drawn between their lines.
        """
        if self._bar is not None:
            self._bar.stop()
        yield
        sys.stdout.flush()
        if self._bar is not None:
            self._bar.start()

    def _show_bar(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(printable(what), total=total or None)
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task, self._what = None, None, ""


def printable(text: str) -> str:
    """Return text with escapes in place of what a terminal would act on: control characters, and marks that turn the
    direction of writing. Names of files and classes come from strangers, and may hold commands for the terminal.

    Args:
        text: one line.
    """
    return _ACTED_ON.sub(lambda found: repr(found[0])[1:-1], text)


def _text(text: str) -> Text:
    return Text(printable(text))


def print_error(text: str) -> None:
    """Print an error's one text to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]Error:[/] ", end="")
    print(printable(text), file=sys.stderr, flush=True)


def print_table(title: str, columns: list[tuple[str, str]], rows: list[list[str]]) -> None:
    """Print a table to standard output.

    Args:
        title: above the table.
        columns: (heading, "left" or "right").
        rows: texts, printed as they are but for control characters.
    """
    console = Console(highlight=False)
    # Text, because rich takes plain strings for its markup: a class may be called [bold].
    table = Table(
        title=_text(title), title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for heading, justify in columns:
        table.add_column(_text(heading), justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    console.print(table)


class LongTable:
    """A table that is printed part after part on standard output, its columns as wide in each of them.

    Args:
        title: above the table.
        columns: (heading, "left" or "right", all texts that will be in it). The first column gives way where they do
            not fit beside each other.
    """

    def __init__(self, title: str, columns: list[tuple[str, str, Iterable[str]]]) -> None:
        self.title, self.columns = title, columns
        self.console = Console(highlight=False)
        widest = [max(cell_len(printable(text)) for text in (heading, *texts)) for heading, _, texts in columns]
        beside = [min(width, WIDEST) for width in widest[1:]]
        self.widths = [max(LEAST, min(widest[0], self.console.width - sum(width + 2 for width in beside))), *beside]
        self._begun = False

    def add(self, rows: list[list[str]]) -> None:
        """Print rows; above the first ones title and headings."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=not self._begun)
        if not self._begun:
            self.console.print(Text(printable(self.title), style="bold"))
        self._begun = True
        for (heading, justify, _), width in zip(self.columns, self.widths, strict=True):
            side: Literal["left", "right"] = "right" if justify == "right" else "left"
            table.add_column(heading, justify=side, overflow="fold", width=width)
        for row in rows:
            table.add_row(*map(_text, row))
        self.console.print(table)


def print_lines(lines: list[str]) -> None:
    """Print lines to standard output, as they are but for control characters."""
    for line in lines:
        print(printable(line))
