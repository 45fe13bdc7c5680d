"""Completion in the shell: what `finetune` answers when bash, zsh or fish ask it."""

from __future__ import annotations

from typer.testing import CliRunner

from cli.main import app

COMMANDS = {"check", "plan", "run", "baseline", "layers", "eval", "report", "compare", "list", "demo"}


def answer(shell: str, line: str) -> str:
    """Return what the shell is told to offer at the end of a line, asked as each shell's script asks."""
    asked = {
        "_FINETUNE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    result = CliRunner().invoke(app, [], prog_name="finetune", env=asked)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_bash_is_told_the_commands_and_options() -> None:
    assert set(answer("bash", "finetune ").split()) >= COMMANDS
    assert answer("bash", "finetune ba").split() == ["baseline"]
    assert answer("bash", "finetune cache ").split() == ["list", "clear"]
    assert answer("bash", "finetune run --train").split() == ["--train-layers"]


def test_zsh_and_fish_are_told_them_with_their_help() -> None:
    for shell in ("zsh", "fish"):
        told = answer(shell, "finetune ")
        assert all(name in told for name in COMMANDS)
        assert "Show or clear cached features and photos" in told
