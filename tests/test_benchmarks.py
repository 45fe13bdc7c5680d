"""The benchmarks run on tiny data, and their arithmetic is right; what they measure is nobody's test."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from make_data import write_cifar100_python
from typer.testing import CliRunner

from cli.main import app
from finetune.data import load_data
from finetune.recipe import Recipe, check

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def whole_job(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("whole_job")


def figures(**known: float) -> dict[str, float]:
    names = ("features", "train", "eval", "test_features", "test", "sample", "start", "checkpoint")
    return {**dict.fromkeys(names, 0.0), **known}


def test_the_job_is_projected_as_the_documents_say(whole_job: Any) -> None:
    script = figures(start=10, train=50, eval=100)
    assert whole_job.epoch_seconds(script) == 1000 + 100
    assert whole_job.job_seconds(script) == 10 + 15 * 1100
    cached = figures(
        start=30, features=110, train=500, eval=1000, checkpoint=2, test_features=50, test=100, sample=200
    )  # fmt: skip
    assert whole_job.epoch_seconds(cached) == 100 + 10 + 2
    assert whole_job.job_seconds(cached) == 30 + 1000 + 15 * 112 + 200 + 100 + 50


def test_every_candidate_reads_the_same_part_of_the_data(whole_job: Any, tmp_path: Path) -> None:
    write_cifar100_python(tmp_path / "all", 40, 20)
    whole, name = load_data(str(tmp_path / "all"), val_fraction=0), "cifar100"
    assert whole_job.write_part(str(tmp_path / "all"), tmp_path / "part", 24, 8) == name
    part = load_data(str(tmp_path / "part"), val_fraction=0)
    assert part.test is not None
    assert whole.test is not None
    assert part.classes == whole.classes
    assert torch.equal(part.train.images, whole.train.images[:24])
    assert torch.equal(part.train.labels, whole.train.labels[:24])
    assert torch.equal(part.test.images, whole.test.images[:8])
    with pytest.raises(SystemExit, match=r"40 training and 20 test images, and 41 and 8 are wanted; lower --images"):
        whole_job.write_part(str(tmp_path / "all"), tmp_path / "more", 41, 8)


def test_a_run_is_taken_apart_and_chooses_as_for_the_whole_job(whole_job: Any, tmp_path: Path) -> None:
    write_cifar100_python(tmp_path / "data", 40, 20)
    watched_run = importlib.import_module("watched_run").watched_run
    found = watched_run(
        tmp_path / "data", "layer4,fc", tmp_path, arch="test_resnet", weights="none", image_size=32, batch_size=8,
        device="cpu", compile="off", val_fraction=0.2,
    )  # fmt: skip
    phases = ("features", "train", "eval", "test_features", "test", "sample", "checkpoint", "known")
    assert all(found[phase] > 0 for phase in phases)
    remembered = [json.loads(path.read_text())["about"] for path in (tmp_path / "cache/measurements").glob("*.json")]
    work = {about["part"]: about["work"] for about in remembered}
    assert work == {part: count.bit_length() for part, count in whole_job.WORK.items()}


def test_the_parts_of_a_network_add_up(whole_job: Any, tmp_path: Path) -> None:
    write_cifar100_python(tmp_path / "all", 40, 20)
    utilisation = importlib.import_module("utilisation")
    args = argparse.Namespace(
        data=str(tmp_path / "all"), images=16, arch="test_resnet", train_layers="layer4,fc", weights="none",
        allow_missing="", image_size=32, rounds=1, batch_size=8, compile="off", windows="off",
        device="cpu",
    )  # fmt: skip
    parts, _ = utilisation.prepare_parts(args, tmp_path)
    work = {part.name: part.multiply_adds for part in parts}
    whole = work["whole model, evaluation"]
    assert work["prefix"] + work["suffix, evaluation"] == whole
    assert 2 * whole < work["whole model, training"] < 3 * whole  # the first layer needs no gradient of the images
    assert 2 * work["suffix, evaluation"] < work["suffix, training"] < 3 * work["suffix, evaluation"]
    found = utilisation.measure(parts, 1, 32)
    assert list(found) == ["matrix product", *work]
    assert all(rate > 0 for (rate,) in found.values())


def test_the_script_runs_in_a_process_of_its_own_whose_memory_is_watched(whole_job: Any, tmp_path: Path) -> None:
    write_cifar100_python(tmp_path / "all", 60, 20)
    whole_job.write_part(str(tmp_path / "all"), tmp_path / "part", 48, 8)
    options = {
        "--step": "script bf16", "--folder": tmp_path, "--train-layers": "fc", "--arch": "test_resnet",
        "--images": 32, "--batch-size": 8, "--image-size": 32,
    }  # fmt: skip
    command = [
        sys.executable,
        str(BENCHMARKS / "run_vs_script.py"),
        *(str(word) for pair in options.items() for word in pair),
    ]
    done = importlib.import_module("record").run_process(command)
    measured = json.loads(done.output)
    assert measured["train"] > 0
    assert measured["eval"] > 0
    assert measured["known"] < done.seconds
    assert 0.1 < done.peak < 16


def test_both_candidates_train_a_network_from_scratch(
    whole_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar100_python(tmp_path / "all", 40, 20)
    part = tmp_path / "part"
    whole_job.write_part(str(tmp_path / "all"), part, 32, 2)
    scratch = importlib.import_module("scratch")
    monkeypatch.setattr("finetune.allocator.tune_allocator", lambda: None)  # it is for a process of its own
    assert scratch.ours(part, "multistage", 8, "off") > 0
    command = [sys.executable, str(BENCHMARKS / "scratch.py"), "--step", "plain", "--arch", "multistage"]
    command += ["--data", str(part), "--images", "32", "--batch-size", "8"]
    assert float(importlib.import_module("record").run_process(command).output) > 0
    rates = {"plain": [10.0, 20.0, 30.0], "ours": [50.0, 20.0, 60.0]}
    assert scratch.row("figure1", rates) == ["figure1", "20", "50", "2.50", "1.00 to 5.00", "2.5", "reached"]
    assert scratch.row("vgg16", rates)[-2:] == ["", ""]


def test_a_sweep_stands_beside_its_single_runs(whole_job: Any) -> None:
    benchmark = importlib.import_module("sweep")
    args = argparse.Namespace(arch="resnet18", data="D", limit=100, every_test=False)
    alone = [{"name": "fc, 0.1", "seconds": seconds, "peak": 1.0, "val_accuracy": 50.0} for seconds in (60.0, 140.0)]
    runs = [{"name": "fc-lr0.1", "seconds": 20.0, "val_accuracy": None}, {**alone[0], "seconds": 10.0}]
    measured = {"sweep": {"seconds": 90.0, "peak": 2.0, "runs": runs, "features": 30.0}, "alone": alone}
    text = benchmark.told(args, [measured])
    assert "less than 50 %: reached. Memory at its peak: sweep 2.0 GiB, single runs 1.0 GiB." in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["sweep", "90", "45 %"] in rows
    assert ["fc, 0.1", "60", "20", "50.00 %", "diverged"] in rows


def test_an_estimate_is_judged_by_taken_over_expected(whole_job: Any) -> None:
    estimate = importlib.import_module("estimate")
    seconds = {"prefix": 0.0, "train": 10.0, "eval": 0.4, "total": 20.0}
    taken = {"prefix": 0.0, "train": 12.5, "eval": 0.9, "total": 19.0, "compile": 3.0}
    found = [estimate.times({"estimate": {"seconds": seconds}, "seconds": taken})]
    assert found == [{"prefix": (0, 0), "train": (10, 12.5), "eval": (0.4, 0.9), "total": (20, 19)}]
    found += [{**found[0], "train": (10.0, 4.0), "total": (10.0, 11.0)}, {**found[0], "train": (10.0, 10.0)}]
    assert estimate.overview(found) == [
        ["features", "0", "", ""],
        ["training", "3", "1.00", "0.40"],  # 0.40 is further from 1 than 1.25
        ["evaluation", "0", "", ""],  # under a second
        ["whole run", "3", "0.95", "1.10"],
    ]
    assert estimate.overview([{**found[0], "prefix": (0.0, 2.0)}])[0] == ["features", "1", "inf", "inf"]
    jobs = estimate.JOBS[:3]
    name, *cells = estimate.detail(jobs, found)[0]
    assert name == "resnet18, fc, 224 px, none, 600 × 10"
    assert cells == ["0.0 of 0.0", "12.5 of 10.0 (1.25)", "0.9 of 0.4", "19.0 of 20.0 (0.95)"]


def test_the_ten_runs_differ_and_their_commands_are_understood(
    whole_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real commands, up to where they would begin to work."""
    recipes: list[Recipe] = []

    def carry_out(recipe: Recipe, output: Path, *_: Any) -> dict[str, Any]:
        check(recipe)
        recipes.append(recipe)
        return {"output": str(output)}

    monkeypatch.setattr("cli.run.carry_out", carry_out)
    monkeypatch.setattr("cli.baseline.carry_out", carry_out)
    monkeypatch.setattr("cli.run.stop_on_signals", lambda note: None)
    monkeypatch.setattr("cli.baseline.stop_on_signals", lambda note: None)
    for job in importlib.import_module("estimate").JOBS:
        words = job.words(tmp_path / "part", tmp_path / "job", ["--weights", "W", "--allow-missing", "layer4"])
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == {"output": str(tmp_path / "job" / "run")}
    assert len(recipes) == 10
    assert {recipe.train_layers for recipe in recipes} == {("fc",), ("layer4", "fc"), ("all",), ("head",)}
    assert {recipe.augment for recipe in recipes} == {"none", "flip", "crop"}
    assert {recipe.weights for recipe in recipes if recipe.arch == "resnet18"} == {"W"}
    assert {recipe.weights for recipe in recipes if recipe.arch != "resnet18"} == {"none"}
    assert len({(recipe.arch, recipe.train_layers, recipe.image_size, recipe.limit) for recipe in recipes}) == 10
    assert all((recipe.limit or 0) <= 2000 for recipe in recipes)


def test_a_process_that_fails_says_why(whole_job: Any) -> None:
    run_process = importlib.import_module("record").run_process
    with pytest.raises(SystemExit, match=r"ended with 3:\nno luck"):
        run_process([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])


def test_a_result_is_dated_and_never_overwritten(whole_job: Any, tmp_path: Path) -> None:
    write_result = importlib.import_module("record").write_result
    about = {"date": "2026-01-02", "command": "python b.py", "commit": "abc"}
    first = write_result(tmp_path, "speed", about, "| a |", {"a": [1.5]})
    second = write_result(tmp_path, "speed", about, "| b |", {})
    assert (first.name, second.name) == ("2026-01-02-speed.md", "2026-01-02-speed-2.md")
    assert {"    python b.py", "- commit: abc", "| a |"} <= set(first.read_text().splitlines())
    assert json.loads(first.with_suffix(".json").read_text()) == {"conditions": about, "figures": {"a": [1.5]}}


def test_a_recorded_command_names_no_folder_of_one_machine(whole_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = importlib.import_module("record")
    script = str(record.ROOT / "benchmarks" / "utilisation.py")
    monkeypatch.setattr(sys, "argv", [script, "--data", "/somewhere/private/cifar", "--rounds", "3"])
    assert record.command_line() == "python benchmarks/utilisation.py --data .../cifar --rounds 3"
