"""benchmarks/gpu.py runs from end to end on the processor, at toy size; its figures are nobody's there."""

from __future__ import annotations

import argparse
import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.recipe import Recipe, to_table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOY = "--device cpu --arch test_resnet --network multistage --images 240 --epochs 2 --limit 32 --image-size 32 " \
    "--batch-size 8 --matrix 64 --rounds 1 --workers 0 --compile off"  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("finetune.allocator.tune_allocator", lambda: None)  # it is for a process of its own
    return importlib.import_module("gpu")


def test_all_of_it_at_toy_size(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = []

    def run(args: argparse.Namespace, name: str, arch: str, folder: Path) -> Any:  # each in this process
        steps.append((name, arch))
        return json.loads(json.dumps(gpu.step(args, name, arch, folder)))

    gpu.main([*TOY.split(), "--output", str(tmp_path)], run)
    net, ours = "test_resnet", "multistage"
    assert steps == [
        ("data", net), ("rates", net), ("plain", ours), ("ours", ours), ("script", net), ("finetune", net),
    ]  # fmt: skip
    (written,) = tmp_path.glob("*-gpu.md")
    text = written.read_text()
    assert capsys.readouterr().out.split("\n\nwritten:")[0] in text
    found = json.loads(written.with_suffix(".json").read_text())["figures"]
    assert set(found["rates"][net]["found"]) == {
        "matrix product", "prefix", *(f"{part}, {mode}" for part in ("suffix", "whole model")
                                      for mode in ("training", "evaluation")),
    }  # fmt: skip
    (job,) = found["job"]["finetune"]
    assert job["counts"] == {"train": 180, "val": 20, "test": 40}
    assert job["features"] + job["train"] + job["eval"] < job["job"]
    assert job["where"] == "ram"
    assert "180 training images in two views, 20 evaluated after each of 2 epochs, 40 tested" in text
    assert "| 30 or less |" in text
    assert "reached" not in text, "no bar is judged at another size"


def test_the_job_of_the_script_is_projected_from_its_rates(gpu: Any) -> None:
    counts = {"train": 45_000, "val": 5_000, "test": 10_000}
    seconds = gpu.projected(argparse.Namespace(epochs=15), counts, {"train": 1000.0, "eval": 2500.0})
    assert seconds == 15 * 45 + 15 * 2 + 4
    job = {"job": 20.0, "start": 9.0, "counts": counts, "formats": "", "where": "device"}
    rounds = {"script": [{"train": 1000.0, "eval": 2500.0}], "finetune": [job]}
    told = gpu.show_job(gpu.read_options(["--device", "cuda", "--workers", "8"]), rounds)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line[:1] == "|"]
    assert rows[-2:] == [
        ["times faster than the script", "35.5", "35.5 to 35.5", "10 or more", "reached"],
        ["seconds after start-up", "20.0", "20.0 to 20.0", "30 or less", "reached"],
    ]


def test_without_a_gpu_it_says_so(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    said = f"PyTorch {torch.__version__} sees no GPU here, so nothing was measured; --device cpu is for a try.\n"
    assert capsys.readouterr().out == said


def test_a_machine_without_tomli_w_writes_recipes_all_the_same(gpu: Any) -> None:
    table = to_table(Recipe(train_layers=("layer4", "fc"), lr=1e-5, data='a "b"'))
    assert tomllib.loads(gpu.bare_machine.flat_toml(table)) == table
