"""Runs that cannot work, or stop working: each ends in one sentence, and nothing is lost or half-written."""

from __future__ import annotations

import dataclasses
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from make_run import cifar_recipe, metrics, model_bytes

from finetune import compute, features, memory, outcome
from finetune.events import Events
from finetune.fit import Trainer
from finetune.memory import StepMemory
from finetune.pipeline import resume, run
from finetune.recipe import Recipe, check
from finetune.rundir import RunDirectory, create_run_directory, open_run_directory
from weights.errors import FinetuneError, RunError, StoppedError, TrainingError, UsageError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("bad")
    return cifar_recipe(root, epochs=3)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe, folder)
    return folder


def words_of(kind: type[FinetuneError], recipe: Recipe, output: Path, events: Events | None = None) -> str:
    with pytest.raises(kind) as error:
        run(recipe, output, events=events)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_batches_of_one_image_in_the_epochs_that_skip_easy_ones(recipe: Recipe, tmp_path: Path) -> None:
    odd = dataclasses.replace(recipe, limit=10, batch_size=2, skip_easy=0.5)
    assert words_of(UsageError, odd, tmp_path / "run").startswith(
        "7 training images, which is what --skip-easy 0.5 leaves of 10, in batches of 2 leave batches of one image, "
    )
    assert not (tmp_path / "run").exists()


# A disk that is full: the system refuses to let files grow.


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse every write that makes a file larger than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def same_after_resume(folder: Path, whole: Path) -> None:
    resume(folder)
    assert model_bytes(folder) == model_bytes(whole)
    assert metrics(folder) == metrics(whole)
    assert {entry.name for entry in folder.iterdir()} == {entry.name for entry in whole.iterdir()}


def test_a_disk_that_fills_up_while_features_are_written(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache")
    with files_of_at_most(100_000):  # the training images' features have 178 kB
        words = words_of(RunError, own, tmp_path / "run")
    assert re.fullmatch(
        r"The feature cache .*/cache/features/\w{32} cannot be written \(File too large\); free some disk space, point "
        r"--cache-dir elsewhere, or use --cache ram or --cache off\. What was finished is kept: go on with finetune "
        r"run --resume .*/run",
        words,
    )
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"recipe.toml"}
    same_after_resume(tmp_path / "run", whole)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """The checkpoint of the epoch before stays as it was, and training goes on from there."""
    folder = tmp_path / "run"
    kept: list[bytes] = []

    def epoch(row: dict[str, Any], epochs: int) -> None:
        if row["epoch"] == 1:
            kept.append((folder / "checkpoint.pt").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with files_of_at_most(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):  # puts back what `epoch` sets
        words = words_of(RunError, recipe, folder, Events(epoch=epoch))
    assert words == (
        f"Could not write {folder / 'checkpoint.pt'}: File too large; free the space or choose another folder. "
        f"What was finished is kept: go on with finetune run --resume {folder}"
    )
    assert {entry.name for entry in folder.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "recipe.toml"}
    assert [(folder / "checkpoint.pt").read_bytes()] == kept
    assert [row["epoch"] for row in metrics(folder)] == [1]
    same_after_resume(folder, whole)


def test_a_disk_that_fills_up_while_the_model_is_written(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All epochs are in the checkpoint, so that nothing is trained again."""
    folder = tmp_path / "run"
    write = outcome.write_model

    def write_on_a_full_disk(*arguments: Any) -> None:
        with files_of_at_most(500_000):
            write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(outcome, "write_model", write_on_a_full_disk)
        words = words_of(RunError, recipe, folder)
    assert words.startswith(f"Could not write {folder / 'model.safetensors'}: File too large; free the space")
    assert words.endswith(f"go on with finetune run --resume {folder}")
    assert {entry.name for entry in folder.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "recipe.toml"}
    trained: list[str] = []
    resume(folder, events=Events(progress=lambda what, done, of: trained.append(what)))
    assert [what for what in trained if what.startswith("epoch")] == []
    assert model_bytes(folder) == model_bytes(whole)


def test_a_cache_folder_that_is_full_costs_a_remembered_timing_only(recipe: Recipe, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, cache="ram", cache_dir=tmp_path / "cache", epochs=1)
    with pytest.raises(StoppedError), files_of_at_most(0):
        run(own, tmp_path / "run", events=Events(plan=stop_here))
    assert not list((tmp_path / "cache").rglob("*.json"))


def stop_here(plan: object) -> None:
    raise StoppedError("the plan was made")


# Output folders


def test_an_output_folder_that_another_run_is_using(recipe: Recipe, tmp_path: Path) -> None:
    words = f"{tmp_path / 'run'} is in use by another run; wait until that one has ended, or give another --output."
    with create_run_directory(tmp_path / "run", "name") as directory:
        assert words_of(RunError, recipe, tmp_path / "run") == words
        directory.write_recipe(recipe)
        assert words_of(RunError, recipe, tmp_path / "run") == words
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"recipe.toml"}


def test_two_runs_that_found_the_same_empty_folder(recipe: Recipe, tmp_path: Path) -> None:
    """The second one gets the lock when the first is through, and finds the folder taken."""
    first, second = (create_run_directory(tmp_path / "run", "name") for _ in range(2))
    with first:
        first.write_recipe(recipe)
    with pytest.raises(RunError, match=r"already holds recipe\.toml; give another --output"):
        second.__enter__()
    with RunDirectory(tmp_path / "run"):
        pass  # the refused one holds no lock


# Settings


def test_resume_with_other_settings_lists_them(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    folder, reached = tmp_path / "run", list[object]()
    with pytest.raises(StoppedError):
        run(recipe, folder, events=Events(epoch=lambda *row: reached.append(row)), stop=lambda: bool(reached))
    path = folder / "recipe.toml"
    text = path.read_text()
    path.write_text(text.replace('\nlr = "auto"\n', "\nlr = 0.5\n").replace("epochs = 3\n", "epochs = 5\n"))
    with pytest.raises(RunError) as error:
        resume(folder)
    assert str(error.value) == (
        f"{path} has other settings than its run began with: --epochs 5 (was 3), --lr 0.5 (was 0.01); put them back, "
        f"or start a new run with --config {path}."
    )
    elsewhere = tmp_path / "cache"  # where features lie is no matter
    path.write_text(text.replace(f'"{recipe.cache_dir}"', f'"{elsewhere}"'))
    same_after_resume(folder, whole)
    assert elsewhere.exists()


def test_resume_of_a_run_that_another_version_began(recipe: Recipe, tmp_path: Path) -> None:
    folder, reached = tmp_path / "run", list[object]()
    with pytest.raises(StoppedError):
        run(recipe, folder, events=Events(epoch=lambda *row: reached.append(row)), stop=lambda: bool(reached))
    directory, _ = open_run_directory(folder)
    with directory:
        state = directory.read_checkpoint()
        assert state is not None
        directory.write_checkpoint({name: value for name, value in state.items() if name != "format"})
    with pytest.raises(RunError, match=r"was begun by another version of finetune, .* start a new run with --config"):
        resume(folder)


@pytest.mark.parametrize("settings", [{"lr": 1e39}, {"lr": 1e36, "head_lr_scale": 1e3}, {"weight_decay": 1e40}])
def test_learning_rates_beyond_32_bits(recipe: Recipe, tmp_path: Path, settings: dict[str, float]) -> None:
    own = dataclasses.replace(recipe, **{"lr": 0.01, **settings})
    decay = own.weight_decay or 5e-4
    assert words_of(UsageError, own, tmp_path / "run") == (
        f"--lr {own.lr:g} with --head-lr-scale {own.head_lr_scale:g} and --weight-decay {decay:g} is more than 32-bit "
        "numbers can hold; lower the largest of them (0.01 is usual for --lr)."
    )
    assert not (tmp_path / "run").exists()
    check(dataclasses.replace(own, lr=1e-6, head_lr_scale=10.0, weight_decay=0.1))


def test_images_too_small_for_the_network(recipe: Recipe, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, arch="test_vit", train_layers=("head",), weights="none", image_size=8)
    words = words_of(UsageError, own, tmp_path / "run")
    assert words.startswith("test_vit cannot take images of 8 × 8 pixels (")
    assert words.endswith("; its pretrained size is 160: choose a larger --image-size, or leave it out.")
    assert not (tmp_path / "run").exists()


def test_images_too_large_for_the_network(recipe: Recipe, tmp_path: Path) -> None:
    own = dataclasses.replace(recipe, weights="none", image_size=2_000_000)
    words = words_of(UsageError, own, tmp_path / "run")
    assert "cannot take images of 2000000 × 2000000 pixels (" in words
    assert words.endswith(": choose another --image-size, or leave it out.")
    assert not (tmp_path / "run").exists()


# Memory


def test_batches_that_cannot_fit_in_memory(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2_300_000)
    own = dataclasses.replace(recipe, batch_size=58)
    words = words_of(UsageError, own, tmp_path / "run")
    found = re.fullmatch(
        r"Training in batches of 58 images needs at least (\d\.\d) MB of memory and 2\.3 MB are free; give "
        r"--batch-size (\d+) or less, or a smaller --image-size\.",
        words,
    )
    assert found, words
    assert float(found[1]) > 2.3
    assert not (tmp_path / "run").exists()
    run(dataclasses.replace(own, batch_size=int(found[2]), memory_budget="1kB"), tmp_path / "run")
    monkeypatch.setattr(memory, "free_memory", lambda: 1_000_000)
    assert words_of(UsageError, own, tmp_path / "none").endswith("give a smaller --image-size, or train fewer layers.")


def test_a_number_format_that_does_not_fit_is_not_tried(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(*about: Any) -> StepMemory:
        return StepMemory(0, 9 * 10**9 if about[2] == torch.float32 else 10**6, 10**9, shared=True)

    monkeypatch.setattr(compute, "step_memory", needs)
    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache", precision="auto", epochs=1)
    chosen = run(own, tmp_path / "run")["computed"]["training"]
    assert chosen["precision"] == "bf16"
    assert "fp32" not in chosen["reason"], "it was not even timed"


def test_a_frozen_part_that_does_not_fit(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its number format is remembered it runs first when training is timed, or when room is looked for."""

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache")
    for place, name in ((features.Prefix, "__call__"), (compute, "gpu_room")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            assert words_of(UsageError, own, tmp_path / "run") == (
                "The frozen part takes 64 images at a time, which need more memory than cpu has; end other programs "
                "that use it, or give a smaller --image-size or --device cpu."
            )
    assert not (tmp_path / "run").exists()


def test_a_device_whose_memory_runs_out(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")

    monkeypatch.setattr(Trainer, "train_epoch", step)
    words = words_of(TrainingError, recipe, tmp_path / "run")
    assert words.startswith("The device's memory ran out (CUDA out of memory. Tried to allocate 2 GiB.). Start a new")


def test_features_that_leave_no_memory_for_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dataclasses.replace(recipe, cache_dir=tmp_path / "cache", memory_budget="1GB", epochs=1)
    monkeypatch.setattr(memory, "free_memory", lambda: 2_500_000)
    words = words_of(UsageError, own, tmp_path / "run")
    found = re.search(r"2\.5 MB are free; give --memory-budget (\d+kB) or less, so that features are read from", words)
    assert words.startswith("Features in memory need 436.2 kB, training at least "), words
    assert found, words
    assert not (tmp_path / "run").exists()
    summary = run(dataclasses.replace(own, memory_budget=found[1]), tmp_path / "run")
    assert summary["features"]["where"] == "disk"
