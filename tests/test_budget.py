"""Runs that have to end in time, judged by a clock that moves when the test says so."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_data import make_images, write_cifar100_python
from make_run import metrics, model_bytes, tiny_recipe, write_weights
from torch import nn

from finetune import pipeline, rundir
from finetune.budget import Budget, PacedSchedule
from finetune.events import Events
from finetune.fit import Listener, Progress, Split, Trainer, fit
from finetune.inference import predict
from finetune.optim import make_schedule
from finetune.order import epoch_batches
from finetune.pipeline import resume, run
from finetune.recipe import Recipe, from_table, read_toml
from weights.errors import RunError, StoppedError, TrainingError, UsageError


class Clock:
    """Seconds that pass only when `now` is changed."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def walk(
    recipe: Recipe, steps: int, until: float, cost: Callable[[int], float], peak: float = 0.1
) -> tuple[list[float], float]:
    """Take steps (counted from 1) that cost so many seconds; return their rates and the second of the end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    clock = Clock()
    schedule = PacedSchedule(optimizer, recipe, steps, Budget(until, clock))
    rates: list[float] = []
    while not schedule.over:
        rates.append(optimizer.param_groups[0]["lr"])
        clock.now += cost(len(rates))
        schedule.step()
    return rates, clock.now


@pytest.mark.parametrize("name", ["onecycle", "cosine", "constant"])
def test_with_time_to_spare_the_rates_are_those_without_a_budget(name: str) -> None:
    recipe = Recipe(schedule=name)
    rates, _ = walk(recipe, 50, until=1e6, cost=lambda step: 1.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = make_schedule(optimizer, recipe, 50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, rel=1e-9)


def test_a_machine_that_is_too_slow_walks_the_whole_curve_in_fewer_steps() -> None:
    rates, end = walk(Recipe(), 100, until=40.5, cost=lambda step: 1.0)
    assert len(rates) == end == 41  # one step over at most
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates.index(max(rates)) in (8, 9)  # a fifth of the way, as in a run of that many steps
    assert rates[-1] < 0.1 / 500


def test_a_machine_that_becomes_slower_still_ends_in_time_and_low() -> None:
    rates, end = walk(Recipe(), 100, until=60, cost=lambda step: 1.0 if step <= 20 else 4.0)
    assert (len(rates), end) == (30, 60.0)
    assert rates[-1] < 0.1 / 50


def test_a_machine_that_becomes_faster_takes_all_steps() -> None:
    rates, end = walk(Recipe(), 100, until=60, cost=lambda step: 5.0 if step <= 5 else 0.1)
    assert len(rates) == 100
    assert end < 35
    assert rates[10:30] == sorted(rates[10:30], reverse=True)  # it goes on from where it was, and never back up
    assert rates[-1] < 0.1 / 500


def test_a_slow_first_step_takes_nothing_from_the_curve() -> None:
    """The first step may compile, which says nothing about the others."""
    rates, _ = walk(Recipe(), 100, until=130, cost=lambda step: 30.0 if step == 1 else 0.5)
    assert rates == pytest.approx(walk(Recipe(), 100, until=1e6, cost=lambda step: 0.0)[0])


class Rows:
    """A source that holds its inputs: float32 (N, 6)."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.values[rows],)


SMALL = Recipe(epochs=3, batch_size=8, augment="none", lr=0.05, head_lr_scale=1.0)
SPLIT = Split(Rows(torch.randn(30, 6, generator=torch.Generator().manual_seed(0))), torch.arange(30) % 4, 1)
SIZES = [len(rows) for rows, _ in epoch_batches(30, 4, 1, 0, SMALL)]


def make_trainer(until: float, clock: Clock, recipe: Recipe = SMALL) -> Trainer:
    """A small network of whose training steps each takes a second."""
    torch.manual_seed(0)
    suffix = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(values: torch.Tensor) -> torch.Tensor:
        clock.now += 1
        return suffix(values)

    budget = Budget(until, clock)
    return Trainer(suffix, frozenset(), recipe, 30, torch.float32, torch.device("cpu"), forward, budget=budget)


def listen(save: Callable[[Progress, bool], None] = lambda progress, best: None, *, stop_after: int = 99) -> Listener:
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > stop_after

    return Listener(batch=lambda epoch, done, of: None, epoch=lambda row: None, save=save, stop=stop)


def test_a_budget_shorter_than_an_epoch() -> None:
    trainer, progress = make_trainer(2.5, Clock()), Progress()
    assert fit(trainer, SPLIT, SPLIT, progress, listen())
    assert progress.epoch == 1
    assert progress.unseen == 30 - sum(SIZES[:3])
    assert 1 < progress.rows[0]["train_loss"] < 3  # a mean over the images that were seen
    assert progress.rows[0]["val_loss"] is not None
    assert trainer.optimizer.param_groups[0]["lr"] < 0.05 / 1000
    assert fit(trainer, SPLIT, SPLIT, progress, listen())  # as after a resume: there is nothing left to do
    assert progress.epoch == 1


@pytest.mark.parametrize(("until", "moved", "steps"), [(1e6, 6, 12), (6.5, 4, 7)])
def test_norms_keep_still_from_the_middle_of_the_time(until: float, moved: int, steps: int) -> None:
    clock = Clock()
    trainer = make_trainer(until, clock, dataclasses.replace(SMALL, freeze_norms=0.5))
    assert fit(trainer, SPLIT, None, Progress(), listen())
    assert (int(trainer.suffix[1].num_batches_tracked), clock.now) == (moved, steps)


def test_a_resumed_run_decides_as_the_one_that_was_not_stopped() -> None:
    straight, whole = make_trainer(9.5, Clock()), Progress()
    assert fit(straight, SPLIT, None, whole, listen())
    assert (whole.epoch, whole.unseen) == (3, 30 - sum(SIZES[:2]))

    saved = io.BytesIO()
    clock = Clock()
    first = make_trainer(9.5, clock)

    def save(progress: Progress, best: bool) -> None:
        torch.save({"trainer": first.state(), "progress": asdict(progress), "clock": clock.now}, saved)

    assert not fit(first, SPLIT, None, Progress(), listen(save, stop_after=5))
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    second, rest = make_trainer(1e6, Clock(state["clock"])), Progress(**state["progress"])
    second.load_state(state["trainer"])
    assert fit(second, SPLIT, None, rest, listen())
    assert (rest.epoch, rest.unseen) == (whole.epoch, whole.unseen)
    for name, value in straight.suffix.state_dict().items():
        assert torch.equal(second.suffix.state_dict()[name], value), name


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of whole runs, which stands still on its own."""
    clock = Clock()
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(perf_counter=clock))
    return clock


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Four epochs of three batches, every layer trained, so that no features are computed."""
    root = tmp_path_factory.mktemp("budget")
    write_cifar100_python(root / "cifar", made=make_images(48, 20))
    weights = write_weights(root / "test_resnet.safetensors")
    return tiny_recipe(root / "cifar", weights, root / "cache", train_layers=("all",), epochs=4, budget="70s")


def ticking(clock: Clock, notes: list[str]) -> Events:
    """Events by which every training step takes ten seconds."""

    def progress(what: str, done: int, total: int) -> None:
        clock.now += 10 * what.startswith("epoch")

    return Events(note=notes.append, progress=progress)


def test_a_run_ends_in_time_and_says_where(
    recipe: Recipe, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "keep_time", lambda *_: None)  # from evaluation's true seconds, never twice the same
    notes: list[str] = []
    summary = run(recipe, tmp_path / "run", events=ticking(clock, notes))
    assert notes[-1] == "--budget 70s ended training after 2.7 of 4 epochs."
    assert summary["ended_by_budget"] == {"budget": "70s", "epochs": 2.67, "of": 4}
    assert (summary["epochs"], len(metrics(tmp_path / "run"))) == (3, 3)
    assert summary["images_seen"] == 43 + 43 + 29  # batches of 15, 14 and 14
    assert summary["seconds"]["total"] == 80.0
    written = from_table(read_toml(tmp_path / "run" / "recipe.toml"), "")
    assert (written.epochs, written.budget) == (4, "70s")  # on a faster machine there may be time for all

    reached: list[bool] = []
    clock.now = 0.0
    stopping = ticking(clock, notes)

    def progress(what: str, done: int, total: int) -> None:
        stopping.progress(what, done, total)
        reached.extend([True] * (what.startswith("epoch 2") and done == 1))

    with pytest.raises(StoppedError):
        run(recipe, tmp_path / "again", events=Events(progress=progress), stop=lambda: bool(reached))
    path = tmp_path / "again" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert resume(tmp_path / "again", events=ticking(clock, notes))["images_seen"] == summary["images_seen"]
    assert model_bytes(tmp_path / "again") == model_bytes(tmp_path / "run")

    (tmp_path / "again" / "summary.json").unlink()
    state["trainer"]["schedule"] = {"last_epoch": 3}  # as when a budget was turned into a number of epochs
    torch.save(state, path)
    with pytest.raises(RunError, match=r"was begun by another version of finetune, .* start a new run with --config"):
        resume(tmp_path / "again")


def test_evaluation_that_is_slower_than_planned(
    recipe: Recipe, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan knows nothing of it, the first epoch shows it, and the passes after training fall within the budget."""

    def slow(*given: Any, **named: Any) -> torch.Tensor:
        clock.now += 20
        return predict(*given, **named)

    monkeypatch.setattr("finetune.fit.time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr("finetune.sharing.predict", slow)
    long = dataclasses.replace(recipe, epochs=40, budget="400s")
    summary = run(long, tmp_path / "run", events=ticking(clock, []))
    assert 250 < summary["seconds"]["total"] <= 400
    assert summary["seconds"]["eval"] == 20 * (summary["epochs"] + 3)  # training images, validation once more, test


def test_a_disk_that_is_slow(recipe: Recipe, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint shows it, and the files that are written after training fall within the budget."""
    monkeypatch.setattr("finetune.fit.time", SimpleNamespace(perf_counter=clock))
    written = rundir.write_atomically

    def slow(*given: Any) -> None:
        clock.now += 15 * (Path(given[0]).name == "checkpoint.pt")
        written(*given)

    monkeypatch.setattr(rundir, "write_atomically", slow)
    summary = run(dataclasses.replace(recipe, epochs=40, budget="400s"), tmp_path / "run", events=ticking(clock, []))
    assert 250 < summary["seconds"]["total"] <= 400 - 15
    assert summary["ended_by_budget"]["of"] == 40


def test_no_epoch_begins_when_evaluation_took_the_rest_of_the_time() -> None:
    clock = Clock()
    trainer, progress = make_trainer(10.0, clock), Progress()

    def save(now: Progress, best: bool) -> None:
        clock.now += 6  # the first epoch took four seconds

    assert fit(trainer, SPLIT, None, progress, listen(save))
    assert (progress.epoch, progress.unseen, progress.out_of_time) == (1, 0, True)


def test_a_budget_that_leaves_no_time_to_train(recipe: Recipe, clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^--budget 1e-9s leaves no time to train: start, features, evaluation and test"
    ):
        run(dataclasses.replace(recipe, budget="1e-9s"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_that_features_used_up(recipe: Recipe, clock: Clock, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        clock.now += 100 * what.startswith("features")

    own: dict[str, Any] = {"train_layers": ("layer4", "fc"), "cache_dir": tmp_path / "cache", "budget": "50s"}
    with pytest.raises(TrainingError) as error:
        run(dataclasses.replace(recipe, **own), tmp_path / "run", events=Events(progress=progress))
    assert str(error.value) == (
        "The time of --budget was over before training began, after 5 min 0 s. Features on disk are kept: go on with "
        f"finetune run --resume {tmp_path / 'run'}, whose time begins anew, or start a run with more."
    )
    assert resume(tmp_path / "run")["epochs"] == 4
