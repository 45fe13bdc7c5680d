"""`finetune plan`: what it says is what the run does, and it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from make_data import make_images, write_cifar100_python
from make_run import tiny_recipe, write_weights
from typer.testing import CliRunner

from cli.main import app
from finetune.events import Events
from finetune.job import plan_run, prepare
from finetune.pipeline import resume, run
from finetune.plan import Plan
from finetune.recipe import Recipe, to_toml
from finetune.table import count_work
from weights.errors import RunError, StoppedError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("job")
    write_cifar100_python(root / "cifar", made=make_images(48, 20))
    return tiny_recipe(root / "cifar", write_weights(root / "test_resnet.safetensors"), root / "cache")


def comparable(plan: Plan) -> Plan:
    """A plan without what the clock and other programs decide."""
    return dataclasses.replace(plan, start_seconds=0.0, disk=dataclasses.replace(plan.disk, free=0))


def test_a_plan_is_the_runs_plan_and_leaves_nothing_but_timings(recipe: Recipe, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache", patience=5, ema=0.9)
    planned = plan_run(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert {entry.name for entry in (tmp_path / "cache").iterdir()} == {"measurements"}

    told: list[Plan] = []
    checkpoints: list[int] = []

    def epoch(row: dict[str, Any], epochs: int) -> None:
        checkpoints.extend(path.stat().st_size for path in (tmp_path / "run").glob("checkpoint.pt"))

    summary = run(own, tmp_path / "run", events=Events(plan=told.append, epoch=epoch))
    assert [comparable(plan) for plan in told] == [comparable(planned)]
    expected, outcome = planned.estimate(), summary["estimate"]
    assert outcome["seconds"].pop("total") > sum(outcome["seconds"].values()), "what came before the plan is counted"
    assert expected["seconds"].pop("total") > 0
    assert outcome == expected
    assert expected["epochs"] == summary["epochs"] == 2

    files = {path.name: path.stat().st_size for path in (tmp_path / "run").iterdir()}
    assert planned.disk.model == pytest.approx(files["model.safetensors"] + files["predictions.safetensors"], rel=0.05)
    assert planned.disk.checkpoint == pytest.approx(checkpoints[-1], rel=0.1)
    features = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("tensor-*.bin"))
    assert (planned.disk.write, planned.disk.held) == (features, 0) == (summary["features"]["bytes"], 0)
    again = plan_run(own)
    assert (again.disk.write, again.disk.held, again.feature_views) == (0, features, 0)


def test_a_resumed_run_keeps_its_first_estimate(recipe: Recipe, tmp_path: Path) -> None:
    told: list[Plan] = []
    done: list[int] = []
    events = Events(plan=told.append, epoch=lambda row, epochs: done.append(row["epoch"]))
    with pytest.raises(StoppedError):
        run(recipe, tmp_path / "run", events=events, stop=lambda: bool(done))
    assert done == [1]
    assert resume(tmp_path / "run")["estimate"] == told[0].estimate()


def test_the_work_is_that_of_the_whole_model(recipe: Recipe) -> None:
    job = prepare(dataclasses.replace(recipe, train_layers=("layer3.0", "fc")), Events())
    whole, _ = count_work(job.prepared.model, torch.zeros(2, 3, 32, 32))
    assert sum(job.plan.multiply_adds) == whole // 4  # of two images, and a multiply-add is two operations
    total, trained, behind = job.plan.parameters
    layers = dict(job.prepared.model.named_children())
    assert behind == sum(value.numel() for value in layers["layer4"].parameters())
    assert 0 < trained < total - behind


def test_a_budget_says_what_fits(recipe: Recipe) -> None:
    notes: list[str] = []
    long = dataclasses.replace(recipe, epochs=1000)
    whole = plan_run(long)
    plenty = plan_run(dataclasses.replace(long, budget="1d"), events=Events(note=notes.append))
    assert (plenty.budget, plenty.estimate()["epochs"]) == (86400, 1000)
    assert plenty.sentences()[-1].endswith(" in all, within --budget, 24 h 0 min")
    half = f"{0.5 * whole.total_seconds:.6f}s"
    plan = plan_run(dataclasses.replace(long, budget=half), events=Events(note=notes.append))
    fits = plan.epochs_in_budget
    assert 1 < fits < 1000
    assert plan.estimate()["seconds"]["train"] == pytest.approx(fits * plan.epoch_seconds, abs=1e-3)
    assert f"about {fits:.1f} of 1000 epochs of " in plan.sentences()[-1]
    assert not any("budget" in note for note in notes), "the plan says it, once"


def test_the_command_prints_the_plan(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("recipe.toml").write_text(to_toml(recipe))
    words = ["plan", "--config", "recipe.toml", "--budget", "1h", "--output", "run"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["data"] == {"name": "cifar100", "classes": 4, "train": 43, "val": 5, "test": 20}
    assert plan["parameters"] == {"total": 373_076, "trained": 268_228, "frozen": 373_076 - 268_228}
    assert plan["estimate"].keys() == {"epochs", "seconds"}
    assert plan["estimate"]["seconds"].keys() == {"prefix", "train", "eval", "total"}
    assert (plan["training"]["precision"], plan["training"]["compiled"]) == ("fp32", False)
    assert plan["features"]["cache_dir"] == str(recipe.cache_dir)

    text = CliRunner().invoke(app, words).stdout
    for figure in (
        r"layer4, fc train +parameters +multiply-adds per image",
        r"frozen, computed once +104,848 ",
        r"trained, in every step +268,228 ",
        r"in all +373,076 ",
        r"data +cifar100, 4 classes: 43 train, 5 validation, 20 test images",
        r"training +fp32, eager \(fp32 \d+ img/s\)",
        r"features +341\.0 kB in memory, kept on disk for the next run",
        r"epochs +2 of 2 fit into --budget, 1 h 0 min, in batches of 16",
        r"evaluation .* validation after each epoch",
        r"total ",
    ):
        assert re.search(figure, text), figure
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.toml"}


def test_a_plan_is_refused_where_the_run_would_be(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"already holds notes\.txt; give another --output"):
        plan_run(recipe, tmp_path)
