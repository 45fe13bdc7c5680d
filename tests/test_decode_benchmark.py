"""The decoding benchmark at toy size: it draws photos, both sides decode the same, and the sums are right."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune import decoded

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("decode")


def test_both_sides_decode_the_same_photos(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = benchmark.draw_photos(tmp_path, 8, 50, 38)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 8
    assert size == sum(file.stat().st_size for file in files)
    with Image.open(files[0]) as photo:
        assert photo.size == (50, 38)
    ours = benchmark.decode_ours(tmp_path, 24)
    theirs = benchmark.decode_theirs(tmp_path, 24, 0, 3)
    monkeypatch.setattr(decoded, "SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(decoded, "LEAST_SECONDS", decoded.LEAST_SECONDS)  # the benchmark changes it
    again = benchmark.decode_again(tmp_path, 24)
    assert (again["images"], again["mean"]) == (ours["images"], ours["mean"])
    assert ours["images"] == theirs["images"] == 8
    assert abs(ours["mean"] - theirs["mean"]) < benchmark.NEAR / 4
    assert min(ours["seconds"], theirs["seconds"]) > 0


def found(ours: list[float], theirs: list[float], mean: float = 100) -> dict[str, list[dict[str, float]]]:
    def rounds(all_seconds: list[float], mean: float) -> list[dict[str, float]]:
        return [{"seconds": seconds, "images": 100, "mean": mean, "memory": 0.5} for seconds in all_seconds]

    again = [seconds / 50 for seconds in ours]
    return {"finetune": rounds(ours, 100), "finetune-again": rounds(again, 100), "torchvision": rounds(theirs, mean)}


def test_the_ratio_is_of_medians(benchmark: Any) -> None:
    text = benchmark.show(found([1, 2, 10], [3, 5, 4]), 2)
    assert (
        "finetune decodes 2.00 times as fast (single rounds 0.40 to 3.00), and the next command reads them 50" in text
    )
    ours, _, theirs = text.splitlines()[2:5]
    assert [cell.strip() for cell in ours.split("|")[1:-1]] == ["finetune", "50", "10 to 100", "0.50"]
    assert [cell.strip() for cell in theirs.split("|")[2:-1]] == ["25", "20 to 33", "0.50"]


def test_a_result_is_written_with_its_conditions(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"date": "2026-01-02", "commit": "abc", "device": "a CPU", "versions": "torch 2"}
    order = []

    def in_process(args: Any, name: str, folder: Path) -> dict[str, Any]:
        order.append(name)
        if name == "draw":
            return {"bytes": 240_000, "conditions": about}
        return found([2], [6])[name][0]

    monkeypatch.setattr(benchmark, "in_process", in_process)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--photos", "4", "--output", str(tmp_path)])
    benchmark.main()
    there = ["finetune", "finetune-again", "torchvision"]
    assert order == ["draw", *there, *there[::-1], *there]
    assert "finetune decodes 3.00 times as fast" in capsys.readouterr().out
    lines = (tmp_path / "2026-01-02-decode.md").read_text().splitlines()
    assert {"- commit: abc", "- device: a CPU", "- versions: torch 2"} <= set(lines)
    assert any(line.startswith("    python decode.py --photos 4 --output") for line in lines)
    assert any(line.startswith("4 JPEG photos of 500 × 375, 60 kB on average, to 224 × 224; ") for line in lines)
    assert len(json.loads((tmp_path / "2026-01-02-decode.json").read_text())["figures"]["torchvision"]) == 3


def test_sides_that_differ_are_not_compared(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "in_process", lambda args, name, folder: found([1], [1], mean=110)[name][0])
    monkeypatch.setattr(sys, "argv", ["decode.py", "--rounds", "1"])
    with pytest.raises(
        SystemExit, match=r"100 images of mean 100\.00, torchvision 100 of mean 110\.00; expected the same"
    ):
        benchmark.measure(benchmark.read_options(), tmp_path)
