"""`finetune init`: a recipe file that cannot go stale, and the commands that read it."""

from __future__ import annotations

import dataclasses
import re
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.options import PANELS
from cli.run import STOPPING
from finetune.recipe import Recipe, from_table, to_toml
from finetune.template import write_template


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, and signals as they were."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stdout(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*words: str, code: int = 2) -> str:
    done = CliRunner().invoke(app, list(words))
    assert (done.exit_code, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    return line.removeprefix("Error: ")


def test_the_file_holds_every_setting_and_reads_back_as_the_defaults() -> None:
    text = write_template(PANELS)
    table = tomllib.loads(text)
    assert set(table) == {item.name for item in dataclasses.fields(Recipe)}
    assert from_table(table, "") == Recipe()
    for item in dataclasses.fields(Recipe):
        entry = re.search(rf"^# (.+)\n{item.name} = \S.* # (.+)$", text, re.MULTILINE)
        assert entry is not None, item.name
        assert entry[1] == item.metadata["help"]
        assert all(f'"{choice}"' in entry[2] for choice in item.metadata["choices"])
    assert '\nschedule = "onecycle"           # "onecycle", "cosine" or "constant"\n' in text
    assert '\nepochs = "auto"                 # a whole number, or "auto"\n' in text
    assert '\ntrain_layers = ["head"]         # a list of texts: ["a", "b"]\n' in text


def test_a_file_that_is_there_is_kept_unless_it_may_go() -> None:
    assert stdout("init") == (
        "recipe.toml holds every setting with its default; edit it, then: finetune run --config recipe.toml\n"
    )
    whole = Path("recipe.toml").read_text()
    assert whole == write_template(PANELS)
    Path("recipe.toml").write_text("lr = 0.5\n")
    assert refused("init", code=1) == (
        "recipe.toml is there already, and is kept; give another path, or --force to replace it."
    )
    assert Path("recipe.toml").read_text() == "lr = 0.5\n"
    stdout("init", "recipe.toml", "--force")
    assert Path("recipe.toml").read_text() == whole
    assert [path.name for path in Path().iterdir()] == ["recipe.toml"]


def test_where_no_file_can_be() -> None:
    Path("photos").mkdir()
    assert refused("init", "photos", "--force", code=1) == (
        "photos is a folder; give the path of a file, such as photos/recipe.toml."
    )
    assert refused("init", "no/recipe.toml") == (
        "PATH no/recipe.toml lies in a folder that does not exist; make no, or give another."
    )


@pytest.mark.parametrize("command", ["run", "plan", "baseline"])
def test_every_command_reads_it_and_flags_win(command: str) -> None:
    Path("own.toml").write_text("batch_size = -3\n")
    assert refused(command, "--config", "own.toml").startswith("--batch-size is -3;")
    assert refused(command, "--config", "own.toml", "--batch-size", "-5").startswith("--batch-size is -5;")
    Path("own.toml").write_text("batchsize = 3\n")
    assert refused(command, "--config", "own.toml") == (
        "own.toml has an unknown setting 'batchsize'; did you mean batch_size?"
    )
    Path("own.toml").write_text('epochs = "3"\n')
    assert refused(command, "--config", "own.toml") == (
        "own.toml has epochs = '3'; it must be a whole number, or \"auto\"."
    )


def test_a_baseline_takes_a_file_over_its_recipe_and_flags_over_the_file() -> None:
    Path("own.toml").write_text('arch = "identity"\nlr = 0.03\nepochs = 3\n')
    shown = tomllib.loads(stdout("baseline", "--config", "own.toml", "--epochs", "4", "--show-recipe"))
    assert (shown["arch"], shown["lr"], shown["epochs"]) == ("finetune_identity", 0.03, 4)
    assert (shown["train_layers"], shown["augment"]) == (["all"], "crop")
    Path("whole.toml").write_text(to_toml(from_table(shown, "")))
    assert tomllib.loads(stdout("baseline", "--config", "whole.toml", "--show-recipe")) == shown
    assert tomllib.loads(stdout("baseline", "--config", "whole.toml", "--arch", "vgg16", "--show-recipe")) == {
        **shown,
        "arch": "finetune_vgg16",
    }


def test_a_baseline_refuses_a_file_that_freezes_layers() -> None:
    stdout("init")
    assert refused("baseline", "--config", "recipe.toml") == (
        "recipe.toml has train_layers = ['head'], and a baseline has ['all']; give the file to finetune run, or write "
        "one with finetune baseline --show-recipe."
    )
