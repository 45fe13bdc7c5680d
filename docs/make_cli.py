"""Write docs/cli.md from the commands themselves: `python docs/make_cli.py`, or `make docs`.

The text is laid out here, at a fixed width and without colours, and not taken from Typer's help screen, which looks
different from version to version and from terminal to terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from cli.main import app

TARGET = Path(__file__).with_name("cli.md")
WIDTH = 80
INDENT = 26

HEAD = """\
# Commands

<!-- Written by docs/make_cli.py from the commands' own help. Do not edit: run `make docs`. -->

Every command also takes `-h` and `--help`. Results go to standard output; progress, notes and errors go to standard
error. Exit codes: 0 done, 2 an option that cannot be right, 130 stopped by Ctrl-C or SIGTERM, 1 any other error.
"""


def render() -> str:
    """Return the whole text of docs/cli.md."""
    parts = [HEAD]
    for name, command in commands():
        text = "\n".join(_help(name, command)).rstrip()
        parts.append(f"## {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def commands() -> Iterator[tuple[str, Any]]:
    """Yield (full name, Typer command) of `finetune`, its commands and theirs, in the order of the help screen."""
    yield from _below("finetune", typer.main.get_command(app))


def _below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _below(f"{name} {child}", inner)


def _help(name: str, command: Any) -> Iterator[str]:
    """Yield the lines of one command's help."""
    children = getattr(command, "commands", {})
    arguments = [parameter for parameter in command.params if not parameter.opts[0].startswith("-")]
    options = [parameter for parameter in command.params if parameter not in arguments]
    usage = [name, *(_value(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])]
    yield "Usage: " + " ".join([*usage, *(["COMMAND"] if children else [])])
    for paragraph in (command.help or "").split("\n\n"):
        yield ""
        yield from textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False)
    panels: dict[str, list[Any]] = {"Arguments": arguments}
    for option in options:
        panels.setdefault(option.rich_help_panel or "Options", []).append(option)
    for title, parameters in panels.items():
        if parameters:
            yield from ("", f"{title}:")
            for parameter in parameters:
                yield from _entry(_names(parameter), _text(parameter))
    if children:
        yield from ("", "Commands:")
        for child, inner in children.items():
            yield from _entry(child, (inner.help or "").split("\n\n")[0])


def _entry(left: str, text: str) -> Iterator[str]:
    """Yield a name and its explanation in two columns; a long name has a line to itself."""
    lines = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False) or [""]
    left = "  " + left
    if len(left) > INDENT - 2:
        yield left
    else:
        yield (left.ljust(INDENT) + lines.pop(0)).rstrip()
    for line in lines:
        yield " " * INDENT + line


def _names(parameter: Any) -> str:
    if not parameter.opts[0].startswith("-"):
        return _value(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {_value(parameter)}"


def _value(parameter: Any) -> str:
    """Return what stands for a parameter's value: its choices, or the last word of its name (`cache_dir`: DIR)."""
    return parameter.metavar or parameter.name.rpartition("_")[2].upper()


def _text(parameter: Any) -> str:
    """Return a parameter's help with its default, where it has one worth showing."""
    shown = parameter.show_default
    default = shown if isinstance(shown, str) else parameter.default if shown else None
    if default is None or default is False or default == "" or parameter.required:
        return parameter.help or ""
    return f"{parameter.help or ''} [default: {default}]".strip()


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"{TARGET} written")
