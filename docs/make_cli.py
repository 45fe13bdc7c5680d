"""Write the pages of the commands from the commands themselves: `python docs/make_cli.py`, or `make docs-pages`.

    docs/cli.md              every command in one line, and what holds for all of them
    docs/commands/NAME.md    a page per command: what it does, usage, options; then notes that people write

What a page says below MARK is kept. A new command has a page after the next call, with a link to docs/NAME.md where
there is one; the page of a command that is gone goes as well.

The text is laid out here and not taken from Typer's help screen, which looks different from version to version and
from terminal to terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from cli.main import app

DOCS = Path(__file__).resolve().parent
MARK = "<!-- What follows is written by hand; `make docs-pages` keeps it. -->"
NOTES = "## Examples and notes"
WIDTH = 120

INDEX = """\
# Commands

<!-- Written by docs/make_cli.py from the commands' own help. Do not edit: run `make docs-pages`. -->

{table}

Every command also takes `-h` and `--help`. `finetune` alone lists the commands, `finetune --version` prints the
version, and `finetune --install-completion` makes the shell complete commands and options
([quickstart.md](quickstart.md#7-completion-in-the-shell)).

Results go to standard output; progress, notes and errors go to standard error. Exit codes: 0 done, 2 an option that
cannot be right, 130 stopped by Ctrl-C or SIGTERM, 1 any other error. What to do about an error is in
[troubleshooting.md](troubleshooting.md).
"""

HEAD = """\
# {name}

<!-- Written by docs/make_cli.py from the command's own help, down to the next such line: run `make docs-pages`. -->
"""


def render(root: typer.Typer = app) -> dict[str, str]:
    """Return {path below docs/: text} of all generated pages; those of commands end with MARK."""
    top = typer.main.get_command(root)
    pages = {"cli.md": INDEX.format(table="\n".join(_index(top)))}
    for name, command in _children(top):
        parts = [HEAD.format(name=f"finetune {name}"), *_section(f"finetune {name}", command, 2), MARK]
        pages[f"commands/{name}.md"] = "\n".join(parts) + "\n"
    return pages


def write(docs: Path, pages: dict[str, str]) -> None:
    """Write generated pages and keep what people wrote below the mark; drop the pages of commands that are gone."""
    for page in (docs / "commands").glob("*.md"):
        if f"commands/{page.name}" not in pages:
            page.unlink()
    for path, text in pages.items():
        page = docs / path
        page.parent.mkdir(exist_ok=True)
        page.write_text(text + (notes(docs, page) if text.endswith(MARK + "\n") else ""), encoding="utf-8")


def notes(docs: Path, page: Path) -> str:
    """Return what stands below a page's mark, or what a new page begins with."""
    if page.exists():
        return page.read_text(encoding="utf-8").partition(MARK + "\n")[2]
    guide = docs / page.name
    if not guide.exists():
        return ""
    title = guide.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
    return f"\n{NOTES}\n\n[{title}](../{guide.name}) shows it at work.\n"


def commands(root: typer.Typer = app) -> Iterator[tuple[str, Any]]:
    """Yield (full name, Typer command) of `finetune`, its commands and theirs, in the order of the help screen."""
    yield from _below("finetune", typer.main.get_command(root))


def _below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, inner in _children(command):
        yield from _below(f"{name} {child}", inner)


def _children(command: Any) -> list[tuple[str, Any]]:
    return [(name, inner) for name, inner in getattr(command, "commands", {}).items() if not inner.hidden]


def _index(top: Any) -> Iterator[str]:
    yield from ("| command | what it does |", "|---|---|")
    for name, command in _children(top):
        yield f"| [finetune {name}](commands/{name}.md) | {_plain(_paragraphs(command)[0])} |"


def _section(name: str, command: Any, level: int) -> Iterator[str]:
    """Yield the lines of one command: its help, usage, options, and the same for its sub-commands."""
    first, *rest = _paragraphs(command)
    examples = [text for text in rest if text.startswith("Example")]
    for text in [first, *(text for text in rest if text not in examples)]:
        yield "\n".join(textwrap.wrap(_plain(text), WIDTH, break_on_hyphens=False)) + "\n"
    yield f"```text\n{_usage(name, command)}\n```\n"
    for text in examples:
        yield "Example:\n"
        yield f"```sh\n{text.partition(':')[2].strip()}\n```\n"
    for title, parameters in _panels(command):
        yield f"{'#' * level} {title}\n"
        yield f"| {'argument' if title == 'Arguments' else 'option'} | meaning | default |"
        yield "|---|---|---|"
        yield from (_row(parameter) for parameter in parameters)
        yield ""
    for child, inner in _children(command):
        yield f"{'#' * level} {name} {child}\n"
        yield from _section(f"{name} {child}", inner, level + 1)


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(part.split()) for part in (command.help or "").split("\n\n")]


def _usage(name: str, command: Any) -> str:
    """Return the line that says what goes where, required options included."""
    words = [name, *(_value(one) if one.required else f"[{_value(one)}]" for one in _arguments(command))]
    options = [one for one in command.params if one not in _arguments(command)]
    words += [f"{one.opts[0]} {_value(one)}" for one in options if one.required]
    words += ["[OPTIONS]"] if any(not one.required for one in options) else []
    return " ".join([*words, *(["COMMAND"] if _children(command) else [])])


def _arguments(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if not parameter.opts[0].startswith("-")]


def _panels(command: Any) -> list[tuple[str, list[Any]]]:
    """Return (title, parameters) of each part of a command's help that has any."""
    panels: dict[str, list[Any]] = {"Arguments": [*_arguments(command)]}
    for option in command.params:
        if option not in panels["Arguments"]:
            panels.setdefault(option.rich_help_panel or "Options", []).append(option)
    return [(title, parameters) for title, parameters in panels.items() if parameters]


def _row(parameter: Any) -> str:
    """Return one parameter as a row of a table: names and value, meaning, default."""
    choices = [] if parameter.metavar is None else parameter.metavar.split("|")
    names = [*parameter.opts, *parameter.secondary_opts] if parameter.opts[0].startswith("-") else []
    value = "" if names and (parameter.is_flag or len(choices) > 1) else _value(parameter)
    left = ", ".join(f"`{name}`" for name in names[:-1]) + (", " if len(names) > 1 else "")
    left += f"`{' '.join([*names[-1:], *([value] if value else [])])}`"
    meaning = _plain(parameter.help or "")
    if len(choices) > 1:
        meaning += f" One of {', '.join(f'`{one}`' for one in choices)}."
    return f"| {left} | {meaning.strip()} | {_default(parameter)} |"


def _value(parameter: Any) -> str:
    """Return what stands for a parameter's value: its metavar, or the last word of its name (`cache_dir`: DIR)."""
    return (parameter.metavar or parameter.name.rpartition("_")[2].upper()) + ("..." if parameter.nargs == -1 else "")


def _default(parameter: Any) -> str:
    """Return a parameter's default, where it has one worth showing."""
    if parameter.required:
        return "required"
    shown = parameter.show_default
    default = shown if isinstance(shown, str) else parameter.default if shown else None
    if default in (None, False, "", "False"):
        return ""
    return _plain(str(default)) if " " in str(default) else f"`{default}`"


def _plain(text: str) -> str:
    """Return text with what Markdown would read as markup escaped; words in backquotes stay code."""
    parts = text.split("`")
    parts[::2] = [part.replace("|", r"\|").replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    write(DOCS, render())
    print(f"{DOCS / 'cli.md'} and {DOCS / 'commands'} written")
