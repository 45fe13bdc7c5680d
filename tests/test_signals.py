"""Ctrl-C and SIGTERM, beyond the one signal of test_resume.py: before a run begins, and a second time."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from make_process import finish, start
from make_run import cifar_recipe, metrics, model_bytes
from typer.testing import CliRunner

import cli.run
from cli.main import app
from finetune.events import Events
from finetune.pipeline import resume, run
from finetune.recipe import Recipe, to_toml
from weights.errors import StoppedError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("signals")
    return cifar_recipe(root)


def hold_second_epoch() -> None:
    """Make a run stay in its second epoch for good, whatever it is asked."""
    from finetune.fit import Trainer

    whole = Trainer.train_epoch

    def train_epoch(self: Trainer, split: object, epoch: int, report: object, stop: object) -> object:
        if epoch == 1:
            Path("held").touch()
            while True:
                time.sleep(0.01)
        return whole(self, split, epoch, report, stop)  # type: ignore[arg-type]

    Trainer.train_epoch = train_epoch  # type: ignore[assignment, method-assign]


def wait_for(process: BaseProcess, path: Path, ending: str) -> None:
    """Wait until a file is there and ends as it should."""
    while not (path.exists() and path.read_text().endswith(ending)):
        if not process.is_alive():
            pytest.fail(f"the run ended first: {(path.parent / 'err.txt').read_text()}")
        time.sleep(0.01)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_the_run_can_go_on(
    recipe: Recipe, tmp_path: Path, second: signal.Signals
) -> None:
    """The process dies by the signal, which a shell reports as 130 (143 for SIGTERM); its lock died with it."""
    run(recipe, tmp_path / "whole")
    (tmp_path / "own.toml").write_text(to_toml(recipe))
    process = start(tmp_path, "run", "--config", "own.toml", "--output", "run", prepare=hold_second_epoch)
    wait_for(process, tmp_path / "held", "")
    os.kill(process.pid or 0, signal.SIGINT)
    wait_for(process, tmp_path / "err.txt", "Stopping at the next step; press Ctrl-C again to end at once.\n")
    os.kill(process.pid or 0, second)
    assert finish(process) == -second
    assert (tmp_path / "run" / ".lock").exists(), "nobody was left to delete it"
    resume(tmp_path / "run")
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    names = [{entry.name for entry in (tmp_path / name).iterdir()} for name in ("run", "whole")]
    assert names[0] == names[1]


def test_a_stop_before_the_run_began_leaves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache")  # so that number formats have to be timed
    with pytest.raises(StoppedError) as error:
        run(own, tmp_path / "run", stop=lambda: True)
    assert str(error.value) == "Stopped before the run began; nothing was written, so start it again."
    assert list(tmp_path.iterdir()) == []


def test_a_stop_while_a_run_is_prepared_to_go_on(recipe: Recipe, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache")
    begun: list[object] = []
    with pytest.raises(StoppedError, match="what was finished is kept"):
        run(own, tmp_path / "run", events=Events(plan=begun.append), stop=lambda: bool(begun))
    for path in (tmp_path / "cache" / "measurements").iterdir():
        path.unlink()
    with pytest.raises(StoppedError) as error:
        resume(tmp_path / "run", stop=lambda: True)
    assert str(error.value) == f"Stopped; go on with: finetune run --resume {tmp_path / 'run'}"


def test_ctrl_c_before_anything_was_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Recipe:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.run, "make_recipe", interrupt)
    result = CliRunner().invoke(app, ["run"])
    assert (result.exit_code, result.output) == (130, "")
