"""Every command has help, a page that says what it says now, and a test that calls it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer
from make_pages import ROOT, load


@pytest.fixture(scope="module")
def make_cli() -> Any:
    return load("docs/make_cli.py")


def calls(source: str) -> Iterator[tuple[str, ...]]:
    """Yield the words that a test gives to the command line, as far as they are written out.

    They stand at the start of a list (`["run", "--lr", ...]`), behind "cli" in one (a process of its own), or are the
    arguments of a function of the test file's own (`invoke("cache", "list")`).
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List):
            items = node.elts
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.islower():
            items = node.args
        else:
            continue
        words = [item.value if isinstance(item, ast.Constant) else None for item in items]
        words = words[words.index("cli") + 1 :] if "cli" in words else words
        yield tuple(takewhile(lambda word: isinstance(word, str), words))


def lacking(make_cli: Any, root: typer.Typer, docs: Path, tests: Iterable[str]) -> list[str]:
    """Return what the commands of `root` lack: help, a page below `docs`, a call in one of the sources of `tests`."""
    called = {words for source in tests for words in calls(source) if "--help" not in words}
    lacks = []
    for name, command in make_cli.commands(root):
        words = tuple(name.split()[1:])
        lacks += [] if command.help else [f"{name} has no help"]
        for parameter in command.params:
            lacks += [] if parameter.help else [f"{name} has no help for {parameter.opts[0]}"]
        if not getattr(command, "commands", {}) and not any(given[: len(words)] == words for given in called):
            lacks.append(f"no test calls {name}")
    for path, text in make_cli.render(root).items():
        page = docs / path
        there = page.read_text(encoding="utf-8") if page.exists() else ""
        if not (there.startswith(text) and (there == text or text.endswith(make_cli.MARK + "\n"))):
            lacks.append(f"docs/{path} is missing or says something else; run `make docs-pages`")
    return lacks


def test_every_command_has_help_a_page_and_a_test(make_cli: Any) -> None:
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")]
    assert (
        lacking(make_cli, make_cli.app, ROOT / "docs", [one for one in sources if "app" in one or "cli" in one]) == []
    )


def test_every_page_belongs_to_a_command_and_has_notes(make_cli: Any) -> None:
    pages = {page.name: page for page in (ROOT / "docs" / "commands").iterdir()}
    assert {f"commands/{name}" for name in pages} | {"cli.md"} == set(make_cli.render())
    for name, page in pages.items():
        notes = page.read_text(encoding="utf-8").partition(make_cli.MARK)[2]
        assert notes.strip().removeprefix(make_cli.NOTES).strip(), f"write examples and notes below the mark of {name}"


def made_up() -> typer.Typer:
    """A command line with one command that has everything and one that has nothing."""
    app = typer.Typer()

    @app.callback()
    def everything() -> None:
        """Made up."""

    @app.command("whole")
    def whole(lr: float = typer.Option(0.1, help="A rate, 0 < rate * 2 | none.")) -> None:
        """Has all of it.

        Example: finetune whole --lr 0.3
        """

    @app.command("bare")
    def bare(path: str) -> None:
        pass

    return app


def test_a_command_without_help_page_or_test_is_noticed(make_cli: Any, tmp_path: Path) -> None:
    make_cli.write(tmp_path, make_cli.render(made_up()))
    (tmp_path / "commands" / "bare.md").unlink()
    sources = ['CliRunner().invoke(app, ["whole", "--lr", lr])', 'invoke("bare", "--help")', 'Path("bare")']
    # What Typer adds to every command line has Typer's help.
    assert lacking(make_cli, made_up(), tmp_path, sources) == [
        "finetune bare has no help",
        "finetune bare has no help for path",
        "no test calls finetune bare",
        "docs/commands/bare.md is missing or says something else; run `make docs-pages`",
    ]


def test_pages_keep_what_people_wrote_and_follow_the_commands(make_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "bare.md").write_text("# Bare things\n\nA guide.\n")
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "gone.md").write_text("Of a command that is no more.\n")
    pages = make_cli.render(made_up())
    make_cli.write(tmp_path, pages)
    whole = tmp_path / "commands" / "whole.md"
    assert whole.read_text() == pages["commands/whole.md"]
    whole.write_text("stale\n" + make_cli.MARK + "\n\nMine.\n")
    make_cli.write(tmp_path, pages)
    assert whole.read_text() == pages["commands/whole.md"] + "\nMine.\n"
    assert "| `--lr LR` | A rate, 0 &lt; rate \\* 2 \\| none. | `0.1` |" in whole.read_text()
    assert "```sh\nfinetune whole --lr 0.3\n```" in whole.read_text()
    assert sorted(page.name for page in whole.parent.iterdir()) == ["bare.md", "whole.md"]
    assert "[Bare things](../bare.md)" in (whole.parent / "bare.md").read_text()
    assert "| [finetune whole](commands/whole.md) | Has all of it. |" in (tmp_path / "cli.md").read_text()


def test_every_option_stands_on_its_commands_page(make_cli: Any) -> None:
    pages = make_cli.render()
    assert (
        "`--labels` | CIFAR-100's 100 fine or 20 coarse classes. One of `fine`, `coarse`." in pages["commands/run.md"]
    )
    for name, command in make_cli.commands():
        for parameter in command.params if " " in name else []:
            names = parameter.opts if parameter.opts[0].startswith("-") else [make_cli._value(parameter)]
            assert all(f"`{one}" in pages[f"commands/{name.split()[1]}.md"] for one in names), (name, names)
