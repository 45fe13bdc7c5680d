"""`finetune demo`: three real runs at toy size, and what the command says about them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli.demo
import finetune.demo
from cli.main import app
from finetune.demo import Amount, Demo, demo
from finetune.events import Events
from finetune.recipe import check, from_table, read_toml
from finetune.shapes import SHAPES
from weights.errors import RunError

TOY = Amount(pretrain_images=100, pretrain_epochs=1, images=40, tune_epochs=2, scratch_epochs=3)
FOLDERS = ("pretrained", "fine-tuned", "from-scratch")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, list[str]]:
    """The demo's result at toy size, on fewer drawn images, and the notes it gave."""
    folder = tmp_path_factory.mktemp("demo")
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "shapes100", SHAPES["shapes100"]._replace(train=100, test=100))
        patch.setitem(SHAPES, "shapes10", SHAPES["shapes10"]._replace(train=60, test=50))
        result = demo(folder / "out", seed=3, amount=TOY, cache_dir=folder / "cache", events=Events(note=notes.append))
    return result, notes


def test_three_runs_leave_their_directories_and_true_summaries(toy: tuple[Demo, list[str]]) -> None:
    result, notes = toy
    for name, summary in zip(FOLDERS, (result.pretrained, result.fine_tuned, result.scratch), strict=True):
        folder = Path(result.output) / name
        stored = json.loads((folder / "summary.json").read_text())
        assert {**stored, "output": str(folder)} == summary
        assert (folder / "report.html").is_file()
        assert from_table(read_toml(folder / "recipe.toml"), "recipe").seed == result.seed == 3
    assert [note.partition(":")[0] for note in notes if " of 3" in note] == [
        "1 of 3, pretrained", "2 of 3, fine-tuned", "3 of 3, from-scratch",
    ]  # fmt: skip
    assert result.points == result.fine_tuned["test_accuracy"] - result.scratch["test_accuracy"]
    assert result.seconds >= sum(
        run["seconds"]["total"] for run in (result.pretrained, result.fine_tuned, result.scratch)
    )


def test_the_fine_tuned_run_starts_from_the_pretrained_one(toy: tuple[Demo, list[str]]) -> None:
    result, notes = toy
    assert result.pretrained["weights"]["sha256"] is None
    assert result.scratch["weights"]["sha256"] is None
    assert result.fine_tuned["weights"]["source"] == "local file model.safetensors"
    assert "120 tensors loaded; the head (fc) starts fresh" in notes
    assert result.fine_tuned["trained_layers"] == ["layer4", "fc"]
    assert result.fine_tuned["frozen_tensors"] == 90
    assert result.scratch["trained_layers"] == ["all"]


def test_both_rivals_see_the_same_few_images(toy: tuple[Demo, list[str]]) -> None:
    result, _ = toy
    assert result.pretrained["data"]["name"] == "shapes100"
    assert result.fine_tuned["data"] == result.scratch["data"]
    assert result.fine_tuned["data"]["train"] == 40
    assert (result.pretrained["epochs"], result.fine_tuned["epochs"], result.scratch["epochs"]) == (1, 2, 3)


def test_the_usual_recipes_are_settings_a_user_could_give() -> None:
    wanted = finetune.demo.recipes(Path("out"), seed=1, amount=Amount())
    assert tuple(wanted) == FOLDERS
    for recipe in wanted.values():
        check(recipe)
    assert (
        Amount().scratch_epochs >= Amount().tune_epochs
    )  # at least as many steps for the run that starts from nothing


def test_a_folder_with_files_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RunError, match=r"already holds thesis\.txt; give another --output\.$"):
        demo(tmp_path, cache_dir=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


@pytest.fixture
def command(toy: tuple[Demo, list[str]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Runs `finetune demo` with the toy's result (or another) in place of the work; returns its output and settings."""
    seen: dict[str, Any] = {}

    def call(*arguments: str, result: Demo = toy[0]) -> tuple[str, dict[str, Any]]:
        def instead(output: Path | None, **settings: Any) -> Demo:
            seen.update(settings, output=output)
            return result

        monkeypatch.setattr(finetune.demo, "demo", instead)
        monkeypatch.setattr(cli.demo, "stop_on_signals", lambda note: lambda: False)
        outcome = CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "120"})
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout, seen

    return call


def test_json_is_the_three_summaries(
    command: Callable[..., tuple[str, dict[str, Any]]], toy: tuple[Demo, list[str]]
) -> None:
    text, seen = command("--json", "--seed", "7", "--output", "somewhere")
    assert json.loads(text) == toy[0].as_dict()
    assert (seen["seed"], seen["output"]) == (7, Path("somewhere"))


def test_the_table_holds_the_runs_figures(
    command: Callable[..., tuple[str, dict[str, Any]]], toy: tuple[Demo, list[str]]
) -> None:
    result = toy[0]
    text, seen = command()
    assert (seen["seed"], seen["output"]) == (0, None)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for name, run, images, trained in (
        ("pretrained shapes100", result.pretrained, 100, "11,227,812"),
        ("fine-tuned shapes10", result.fine_tuned, 40, "8,398,858"),
        ("from scratch shapes10", result.scratch, 40, "11,181,642"),
    ):
        figures = f"{run['test_accuracy']:.1f} % {run['seconds']['total']:.0f} s"
        assert f"{name} {images} {trained} {figures}" in lines
    assert any(line.endswith(f"the three runs are kept in {result.output}") for line in lines)


@pytest.mark.parametrize(
    ("tuned", "scratch", "told"),
    [
        (78.0, 42.5, "gets 78.0 % of the test images right: 35.5 points more than training from scratch (42.5 %)."),
        (40.0, 42.5, "gets 40.0 % of the test images right: 2.5 points fewer than training from scratch (42.5 %)."),
        (42.5, 42.5, "fine-tuning layer4 and fc and training from scratch end at 42.5 %."),
    ],
)
def test_the_conclusion_follows_from_the_figures(
    command: Callable[..., tuple[str, dict[str, Any]]],
    toy: tuple[Demo, list[str]],
    tuned: float,
    scratch: float,
    told: str,
) -> None:
    result = dataclasses.replace(
        toy[0],
        fine_tuned={**toy[0].fine_tuned, "test_accuracy": tuned},
        scratch={**toy[0].scratch, "test_accuracy": scratch},
        points=tuned - scratch,
    )
    text, _ = command(result=result)
    assert told in text
    assert "With the same 40 images, fine-tuning layer4 and fc" in text


def test_help_names_data_and_options() -> None:
    outcome = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "120"})
    assert outcome.exit_code == 0
    for word in ("shapes100", "shapes10", "--seed", "--output", "--json", "runs/demo-NNNN"):
        assert word in outcome.output
