"""Runs that are stopped or killed and go on to the bits that an undisturbed run would have had.

The killed ones are real processes. No test depends on how fast anything is: a run that is to be caught in its second
epoch waits there until a signal comes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from make_data import make_images, write_cifar100_python
from make_process import finish, start
from make_run import cifar_recipe, metrics, model_bytes, write_weights

from finetune.events import Events
from finetune.fit import Split, Trainer
from finetune.pipeline import resume, run
from finetune.plan import Plan
from finetune.recipe import Recipe, to_toml
from weights.errors import RunError, StoppedError

Report = Callable[[int, int], None]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three epochs of many small batches."""
    root = tmp_path_factory.mktemp("resume")
    return cifar_recipe(root, epochs=3, batch_size=4)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe, folder)
    return folder


def stop_when(epoch: int, batch: int) -> tuple[Events, Callable[[], bool]]:
    """Events and a stop that says yes once that batch (both counted from 1) is done."""
    reached: list[bool] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith(f"epoch {epoch} ") and done == batch:
            reached.append(True)

    return Events(progress=progress), lambda: bool(reached)


def stop_run(recipe: Recipe, folder: Path, epoch: int, batch: int) -> str:
    events, stop = stop_when(epoch, batch)
    with pytest.raises(StoppedError) as error:
        run(recipe, folder, events=events, stop=stop)
    assert not (folder / ".lock").exists()
    return str(error.value)


def test_stopped_twice_and_resumed(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """In the first epoch nothing was finished; in the second one epoch was."""
    folder = tmp_path / "run"
    words = stop_run(recipe, folder, 1, 2)
    assert words == (
        "Stopped before the first epoch was finished; what was finished is kept. "
        f"Go on with: finetune run --resume {folder}"
    )
    assert {entry.name for entry in folder.iterdir()} == {"recipe.toml"}
    events, stop = stop_when(2, 3)
    with pytest.raises(StoppedError, match="Stopped after epoch 1 of 3; what was finished is kept"):
        resume(folder, events=events, stop=stop)
    assert [row["epoch"] for row in metrics(folder)] == [1]
    plans: list[Plan] = []
    summary = resume(folder, events=Events(plan=plans.append))
    assert (plans[0].epochs, plans[0].done) == (3, 1)
    assert "2 left of 3 epochs of" in plans[0].sentences()[-1]
    short = dataclasses.replace(plans[0], budget=plans[0].start_seconds + 0.1).sentences()[-1]
    assert "left of" in short
    assert "about" not in short, "how many epochs a budget has left is not known here"
    assert plans[0].total_seconds < dataclasses.replace(plans[0], done=0).total_seconds
    assert model_bytes(folder) == model_bytes(whole)
    assert metrics(folder) == metrics(whole)
    assert summary["epochs"] == 3
    assert not (folder / "checkpoint.pt").exists()


SETTINGS: dict[str, dict[str, Any]] = {
    "cosine, moving average": {"schedule": "cosine", "ema": 0.9},
    "constant, adamw, patience": {"schedule": "constant", "optimizer": "adamw", "lr": 1e-4, "patience": 1},
    "crop, uncached, easy images skipped": {"augment": "crop", "cutout": 8, "skip_easy": 0.5},
    "all layers, adam, altflip": {
        "train_layers": ("all",),
        "optimizer": "adam",
        "lr": 1e-4,
        "augment": "altflip",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_state_is_kept(recipe: Recipe, tmp_path: Path, name: str) -> None:
    changed = dataclasses.replace(recipe, batch_size=16, **SETTINGS[name])
    expected = run(changed, tmp_path / "whole")
    stop_run(changed, tmp_path / "run", 2, 1)
    summary = resume(tmp_path / "run")
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for key in ("epochs", "kept_epoch", "test_loss", "train_accuracy", "val_accuracy", "images_seen"):
        assert summary[key] == expected[key], key


def test_stopped_while_features_are_computed(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    started: list[str] = []
    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache")
    events = Events(progress=lambda what, done, total: started.append(what) if "features" in what else None)
    with pytest.raises(StoppedError, match="before the first epoch"):
        run(own, tmp_path / "run", events=events, stop=lambda: bool(started))
    assert set(started) == {"features of train"}
    resume(tmp_path / "run")
    assert model_bytes(tmp_path / "run") == model_bytes(whole)


def test_killed_between_the_last_two_writes(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """The summary says that the run is finished; what else was to be cleared away is cleared."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint.pt").write_bytes(b"not read")
    notes: list[str] = []
    summary = resume(folder, events=Events(note=notes.append))
    assert notes == [f"{folder} is a finished run; nothing is left to do."]
    assert (summary["epochs"], summary["output"]) == (3, str(folder))
    assert {entry.name for entry in folder.iterdir()} == {entry.name for entry in whole.iterdir()}


def test_a_summary_that_cannot_be_believed_costs_no_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint.pt").write_bytes(b"not read")
    (folder / "summary.json").write_text("{}")
    with pytest.raises(RunError):
        resume(folder)
    assert (folder / "checkpoint.pt").exists()


def test_killed_before_the_files_were_written(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """After the last epoch nothing is trained again, only tested and written."""
    folder = tmp_path / "run"
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, events=Events(epoch=lambda row, epochs: interrupt(row["epoch"] == 3, reached)))
    assert reached == [3]
    assert (folder / "checkpoint.pt").exists()
    batches: list[str] = []
    resume(folder, events=Events(progress=lambda what, done, total: batches.append(what)))
    assert [what for what in batches if what.startswith("epoch")] == []
    assert model_bytes(folder) == model_bytes(whole)


def interrupt(now: bool, reached: list[int]) -> None:
    if now:
        reached.append(3)
        raise KeyboardInterrupt


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it does not exist; give the folder of a run that was started before"):
        resume(tmp_path / "none")


def test_a_checkpoint_from_before_a_setting_was_there(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    stop_run(recipe, tmp_path / "run", 2, 1)
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["recipe"]["cutout"]
    torch.save(state, path)
    resume(tmp_path / "run")
    assert model_bytes(tmp_path / "run") == model_bytes(whole)


def test_other_data(recipe: Recipe, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, data=str(tmp_path / "cifar"))
    shutil.copytree(recipe.data, own.data)
    stop_run(own, tmp_path / "run", 2, 1)
    write_cifar100_python(Path(own.data), made=make_images(64, 20, seed=1))
    with pytest.raises(RunError, match=r"was trained on other images \(sha256 \w{12}…, now \w{12}…\); bring the"):
        resume(tmp_path / "run")
    shutil.rmtree(own.data)
    shutil.copytree(recipe.data, own.data)
    assert resume(tmp_path / "run")["epochs"] == 3


def test_other_weights(recipe: Recipe, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "test_resnet.safetensors")
    own = dataclasses.replace(recipe, weights=str(weights))
    stop_run(own, tmp_path / "run", 2, 1)
    write_weights(weights, seed=2)
    with pytest.raises(RunError, match=r"began with other weights \(sha256 \w{12}…, now \w{12}…\); bring the original"):
        resume(tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_can_be_dropped(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    stop_run(recipe, tmp_path / "run", 2, 1)
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged \(.*\); delete it to start this run from its first"):
        resume(tmp_path / "run")
    path.unlink()
    resume(tmp_path / "run")
    assert model_bytes(tmp_path / "run") == model_bytes(whole)


def test_a_run_in_use(recipe: Recipe, tmp_path: Path) -> None:
    """While a run goes on, neither a second run nor a resume may touch its folder."""
    words: list[str] = []

    def epoch(row: dict[str, Any], epochs: int) -> None:
        for attempt in (lambda: resume(tmp_path / "run"), lambda: run(recipe, tmp_path / "run")):
            with pytest.raises(RunError) as error:
                attempt()
            words.append(str(error.value))

    run(dataclasses.replace(recipe, epochs=1), tmp_path / "run", events=Events(epoch=epoch))
    assert words[0].endswith("is in use by another run; wait until that one has ended, or give another --output.")
    assert words[1] == words[0]
    assert (tmp_path / "run" / "summary.json").exists()


# Real processes.


def hold_second_epoch() -> None:
    """Make a run wait after three steps of its second epoch until it is asked to stop."""
    whole = Trainer.train_epoch

    def train_epoch(self: Trainer, split: Split, epoch: int, report: Report, stop: Callable[[], bool]) -> Any:
        def hold(done: int, of: int) -> None:
            report(done, of)
            if epoch == 1 and done == 3:
                Path("held").touch()
                while not stop():
                    time.sleep(0.01)

        return whole(self, split, epoch, hold, stop)

    Trainer.train_epoch = train_epoch  # type: ignore[method-assign]


def start_held(recipe: Recipe, folder: Path, *words: str) -> BaseProcess:
    """Start a run into the folder `run` and return when it waits in its second epoch."""
    (folder / "own.toml").write_text(to_toml(recipe))
    process = start(folder, "run", "--config", "own.toml", "--output", "run", *words, prepare=hold_second_epoch)
    while not (folder / "held").exists():
        if not process.is_alive():
            pytest.fail(f"the run ended first: {(folder / 'err.txt').read_text()}")
        time.sleep(0.01)
    assert len(metrics(folder / "run")) == 1
    return process


def test_sigkill_in_the_second_epoch(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """Killed for good, resumed by another process, compared with the run of a third, this one."""
    process = start_held(recipe, tmp_path)
    os.kill(process.pid or 0, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    assert finish(start(tmp_path, "run", "--resume", "run")) == 0, (tmp_path / "err.txt").read_text()
    err = (tmp_path / "err.txt").read_text()
    assert "epoch 1/3" not in err, "the finished epoch is not trained again"
    assert "epoch 2/3" in err
    assert "kept in         run" in (tmp_path / "out.txt").read_text()
    assert model_bytes(tmp_path / "run") == model_bytes(whole)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {entry.name for entry in whole.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_stops_a_run_so_that_it_can_go_on(
    recipe: Recipe, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start_held(recipe, tmp_path, "--json")
    os.kill(process.pid or 0, number)
    assert finish(process) == 130
    assert (tmp_path / "out.txt").read_text() == "", "no summary of a run that is not finished"
    assert (tmp_path / "err.txt").read_text().splitlines()[-2:] == [
        "Stopping at the next step; press Ctrl-C again to end at once.",
        "Error: Stopped after epoch 1 of 3; what was finished is kept. Go on with: finetune run --resume run",
    ]
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "metrics.jsonl", "recipe.toml"}
    resume(tmp_path / "run")
    assert model_bytes(tmp_path / "run") == model_bytes(whole)
