"""`--log tensorboard`: the event file says what metrics.jsonl says, also after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from make_run import cifar_recipe, model_bytes
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import finetune.tensorboard
from finetune.events import Events
from finetune.pipeline import resume, run
from finetune.recipe import Recipe, check
from finetune.tensorboard import TensorBoard
from weights.errors import RunError, StoppedError, UsageError

ROW = {"epoch": 1, "train_loss": 2.5, "val_loss": None, "seconds": 3.0, "eval_seconds": 1.0}


def scalars(folder: Path) -> Iterator[tuple[int, str, float, float]]:
    """Yield (step, tag, value, time) of every scalar in a folder's event files, as they were written."""
    for file in sorted(folder.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                yield event.step, value.tag, value.tensor.float_val[0], event.wall_time


def test_a_resumed_run_has_every_epoch_once_and_the_model_is_the_same(tmp_path: Path) -> None:
    recipe = cifar_recipe(tmp_path)
    run(recipe, tmp_path / "without")
    done: list[int] = []
    events = Events(epoch=lambda row, epochs: done.append(row["epoch"]))
    with pytest.raises(StoppedError):
        run(dataclasses.replace(recipe, log="tensorboard"), tmp_path / "run", events=events, stop=lambda: bool(done))
    folder = tmp_path / "run" / "tensorboard"
    assert {step for step, *_ in scalars(folder)} == {1}
    resume(tmp_path / "run")

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    wanted = [(row["epoch"], name, value) for row in rows for name, value in row.items() if name != "epoch"]
    found = [(step, tag, value) for step, tag, value, _ in scalars(folder)]
    assert [one[:2] for one in found] == [one[:2] for one in wanted]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in wanted], rel=1e-6)  # float32
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "without")


def test_rows_are_written_once_without_what_is_not_known_and_dated_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune.tensorboard, "time", SimpleNamespace(time=lambda: 1000.0))
    rows = [ROW, {**ROW, "epoch": 2}]
    log = TensorBoard(tmp_path / "log", rows)
    log.write(rows)
    log.write([*rows, {**ROW, "epoch": 3}])
    log.close()
    found = list(scalars(tmp_path / "log"))
    assert [step for step, *_ in found] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [tag for _, tag, *_ in found[:3]] == ["train_loss", "seconds", "eval_seconds"]
    assert [when for *_, when in found[::3]] == [996, 1000, 1000]  # the second epoch took 4 s


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = Recipe(log="tensorboard")
    check(recipe)
    monkeypatch.setattr(
        finetune.tensorboard, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    with pytest.raises(UsageError) as error:
        run(recipe, tmp_path / "run")
    assert str(error.value) == (
        "--log tensorboard needs the extra `tensorboard`, which is not installed; add it with pip install tensorboard, "
        "or leave --log out."
    )
    assert not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    with pytest.raises(RunError) as error:
        TensorBoard(tmp_path / "log", [])
    assert str(error.value) == (
        f"Could not write {tmp_path / 'log'}: File exists; free the space, or run again without --log tensorboard."
    )
