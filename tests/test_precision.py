"""Number format and compilation: chosen by measurement, told with a reason, remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import precision
from finetune.precision import COMPILE_GAIN, COMPILE_SECONDS, Choice, choose, remembered, step_seconds
from weights.errors import UsageError

CPU = torch.device("cpu")
Tried = tuple[str, bool]


def _step(seconds: float) -> None:
    """A step that is not run: `_clock` reads its time off the argument."""


class Bench:
    """Stands in for the machine: what each candidate takes per step, and which candidates were built.

    Args:
        seconds: for (precision, compiled), the time of a step, or what building it raises.
    """

    def __init__(self, seconds: dict[Tried, float | Exception]) -> None:
        self.seconds = seconds
        self.built: list[Tried] = []

    def build(self, name: str, compiled: bool) -> Callable[[], None]:
        self.built.append((name, compiled))
        if isinstance(outcome := self.seconds[name, compiled], Exception):
            raise outcome

        return partial(_step, outcome)

    def choose(self, **settings: Any) -> Choice:
        usual: dict[str, Any] = {
            "images_per_step": 64,
            "work": 10**9,
            "precision": "auto",
            "compile_mode": "off",
            "compiler": "g++",
            "device": CPU,
        }
        return choose(self.build, **{**usual, **settings})


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "step_seconds", lambda step, device: step.args[0])


BF16_FASTER: dict[Tried, float | Exception] = {
    ("fp32", False): 0.64,
    ("bf16", False): 0.32,
    ("fp32", True): 0.5,
    ("bf16", True): 0.16,
}


def test_the_faster_format_wins() -> None:
    assert Bench(BF16_FASTER).choose() == Choice("bf16", False, 200.0, 0.0, "fp32 100 img/s, bf16 200 img/s", 100.0)
    slow_bf16 = Bench({("fp32", False): 0.32, ("bf16", False): 0.64}).choose()
    assert slow_bf16 == Choice("fp32", False, 200.0, 0.0, "fp32 200 img/s, bf16 100 img/s", 200.0)
    assert (str(slow_bf16), slow_bf16.dtype) == ("fp32, eager", torch.float32)


def test_a_format_that_was_asked_for_is_taken_and_the_other_not_tried() -> None:
    bench = Bench(BF16_FASTER)
    assert bench.choose(precision="fp32") == Choice("fp32", False, 100.0, 0.0, "fp32 100 img/s", 100.0)
    assert bench.built == [("fp32", False)]
    assert bench.choose(precision="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("error", [RuntimeError("not implemented for 'BFloat16'"), NotImplementedError("bf16")])
def test_where_bf16_does_not_run_fp32_does(error: Exception) -> None:
    choice = Bench({("fp32", False): 0.64, ("bf16", False): error}).choose()
    assert (choice.precision, choice.rate) == ("fp32", 100.0)


def test_a_format_that_does_not_fit_in_memory_is_not_taken() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert Bench({("fp32", False): full, ("bf16", False): 0.32}).choose().precision == "bf16"
    both = Bench({("fp32", False): full, ("bf16", False): full})

    def said(**settings: Any) -> str:
        with pytest.raises(UsageError) as error:
            both.choose(**settings)
        return str(error.value)

    many, rest = "images needs more memory than cpu has; give", "a smaller --image-size, or train fewer layers."
    assert said(batch=64) == f"A step of 64 {many} a smaller --batch-size or {rest}"
    tried = "which was tried and fits, or"
    assert said(batch=64, fits={"bf16": 32}.get) == f"A step of 64 {many} --batch-size 32, {tried} {rest}"
    shared = said(batch=255, fits={"bf16": 16}.get)  # among four processes, each with 64 of them at most
    assert shared == f"A step of 255 {many} --batch-size 64, {tried} {rest}"
    assert said() == (
        "The frozen part takes 64 images at a time, which need more memory than cpu has; end other programs that use "
        "it, or give a smaller --image-size or --device cpu."
    )


def test_fp32_that_does_not_run_is_no_choice_but_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        Bench({("fp32", False): RuntimeError("out of memory")}).choose()


def test_compiling_is_tried_only_where_it_can_pay() -> None:
    enough = int(COMPILE_SECONDS / COMPILE_GAIN * 200)  # images at 200 a second
    bench = Bench(BF16_FASTER)
    short = bench.choose(compile_mode="auto", work=enough - 1000)
    assert (short.compiled, short.compile_seconds) == (False, 0.0)
    seconds = (enough - 1000) / 200
    assert short.reason == f"fp32 100 img/s, bf16 200 img/s; {seconds:.0f} s of work would not repay compiling"
    assert ("bf16", True) not in bench.built
    long = bench.choose(compile_mode="auto", work=enough + 1000)
    assert (long.precision, long.compiled, long.rate) == ("bf16", True, 400.0)
    assert long.reason == "fp32 100 img/s, bf16 200 img/s, compiled 400 img/s after 0 s"
    assert ("fp32", True) not in bench.built  # only the format that won
    thrice = Bench(BF16_FASTER).choose(compile_mode="auto", work=enough + 1000, compilations=3)
    assert not thrice.compiled  # what pays for compiling one size of input does not pay for three


def test_compiled_is_not_kept_when_it_is_slower() -> None:
    slower = {**BF16_FASTER, ("bf16", True): 0.64}
    choice = Bench(slower).choose(compile_mode="auto")
    assert (choice.compiled, choice.rate) == (False, 200.0)
    assert choice.reason.endswith("compiled 100 img/s after 0 s")


def test_compiled_is_kept_when_it_was_asked_for() -> None:
    slower = {**BF16_FASTER, ("bf16", True): 0.64}
    choice = Bench(slower).choose(compile_mode="on", work=1)
    assert (choice.compiled, choice.rate) == (True, 100.0)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_compiling_that_fails_leaves_it_eager_and_says_so(mode: str) -> None:
    broken = {**BF16_FASTER, ("bf16", True): LookupError("no such symbol\nand a long story")}
    choice = Bench(broken).choose(compile_mode=mode)
    reason = "fp32 100 img/s, bf16 200 img/s; compiling failed (LookupError: no such symbol)"
    assert choice == Choice("bf16", False, 200.0, 0.0, reason, 100.0)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_without_a_compiler_it_is_eager_and_says_so(mode: str) -> None:
    bench = Bench(BF16_FASTER)
    choice = bench.choose(compile_mode=mode, compiler=None)
    assert (choice.compiled, choice.rate) == (False, 200.0)
    assert choice.reason == (
        "fp32 100 img/s, bf16 200 img/s; not compiled: no C++ compiler found (install g++ or clang++)"
    )
    assert ("bf16", True) not in bench.built


def test_a_step_is_timed_by_its_fastest_repeat_after_one_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], [9.0, 2.0, 3.0]
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])

    def step() -> None:
        now[0] += took.pop(0)

    assert step_seconds(step, CPU) == 2.0
    assert took == []


ABOUT = {"device": "a processor", "arch": "resnet18", "work": 3}
CHOICE = Choice("bf16", True, 400.0, 12.5, "bf16 400 img/s")


class Measure:
    """Counts how often something is measured."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Choice:
        self.times += 1
        return replace(CHOICE, rate=400.0 + self.times - 1)


def test_a_choice_is_measured_once_per_situation(tmp_path: Path) -> None:
    measure = Measure()
    assert remembered(tmp_path, ABOUT, measure) == CHOICE
    assert remembered(tmp_path, dict(reversed(ABOUT.items())), measure) == CHOICE
    assert measure.times == 1
    for name in ABOUT:
        remembered(tmp_path, {**ABOUT, name: "another"}, measure)
    assert measure.times == 1 + len(ABOUT)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"choice": {}}',
        b'{"choice": 5}',
        b'{"choice": {"precision": "fp64", "compiled": false, "rate": 1.0, "compile_seconds": 0.0, "reason": ""}}',
        b'{"choice": {"precision": "fp32", "compiled": false, "rate": "1", "compile_seconds": 0.0, "reason": ""}}',
        b'{"choice": {"precision": "fp32", "compiled": false, "rate": 0.0, "compile_seconds": 0.0, "reason": ""}}',
    ],
)
def test_a_damaged_memory_is_measured_anew_and_mended(tmp_path: Path, damage: bytes) -> None:
    measure = Measure()
    remembered(tmp_path, ABOUT, measure)
    (file,) = (tmp_path / "measurements").glob("*.json")
    assert json.loads(file.read_text())["about"] == ABOUT
    file.write_bytes(damage)
    assert remembered(tmp_path, ABOUT, measure).rate == 401.0
    assert remembered(tmp_path, ABOUT, measure).rate == 401.0
    assert measure.times == 2


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "measurements").write_text("a file where a folder belongs")
    measure = Measure()
    assert remembered(tmp_path, ABOUT, measure) == CHOICE
    assert remembered(tmp_path, ABOUT, measure).rate == 401.0
