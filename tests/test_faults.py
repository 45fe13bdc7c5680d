"""Faults of the system while a run works: a disk that is full or shut, files that vanish, a clock that jumps.

Each ends in one sentence that says what to do; nothing half-written is believed afterwards, nothing finished is done
again. The disk's refusals are injected (make_faults.py), because the tests may run as root, whom no permission binds.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from make_data import write_image_folder
from make_faults import Disk, watched
from make_features import TWO_TENSORS, Counted, builder, expected, image_set, same, values
from make_run import cifar_recipe, metrics, model_bytes

from finetune import cache, decode, features
from finetune.augment import make_views
from finetune.cache import Entry, clear, list_entries
from finetune.data import load_data
from finetune.events import Events
from finetune.export import export
from finetune.grid import make_grid
from finetune.pipeline import resume, run
from finetune.recipe import Recipe
from finetune.sweep import resume_sweep, sweep
from finetune.trained import load_trained
from weights import load
from weights.errors import DataError, FinetuneError, RunError, WeightsError

CHUNK_ROWS = 16
ROWS = 2 * 58 + 6 + 20  # both views of the training images, validation, test
IN_ORDER = (
    "recipe.toml", "about.json", "tensor-0.bin", "chunks.jsonl", "checkpoint.pt", "metrics.jsonl", "model.safetensors",
    "config.json", "predictions.safetensors", "report.html", "summary.json",
)  # fmt: skip
"""All that a run writes, in the order in which it begins to."""
NAMES = ("layer4+fc-lr0.01", "layer4+fc-lr0.02")


@pytest.fixture(scope="module", autouse=True)
def computed() -> Iterator[list[int]]:
    """Make chunks small, and note how many rows of features are computed at a time."""
    compute, rows = features.compute_rows, list[int]()

    def noted(*arguments: Any) -> Any:
        made = compute(*arguments)
        rows.append(len(made[0]))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CHUNK_BYTES", CHUNK_ROWS * 3072)  # test_resnet's features at 32 pixels have 3 kB an image
        patch.setattr(features, "compute_rows", noted)
        yield rows


@dataclasses.dataclass(frozen=True)
class Whole:
    """The undisturbed run, and what it did to the disk."""

    recipe: Recipe
    folder: Path
    operations: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("faults")
    recipe = cifar_recipe(root)
    with watched(Disk(root)) as disk:
        run(recipe, root / "run")
    return Whole(recipe, root / "run", disk.operations)


def at(name: str) -> Callable[[int, str], bool]:
    """What refuses an operation of this name, and so all that follow."""
    return lambda number, operation: operation == name


def go_on(recipe: Recipe, folder: Path, events: Events | None = None) -> dict[str, Any]:
    """Resume a run, or start it when it has not begun."""
    begun = (folder / "recipe.toml").exists()
    return resume(folder, events=events) if begun else run(recipe, folder, events=events)


def refused(disk: Disk, begin: Callable[[], object]) -> str:
    """Do something on a disk that refuses, and return what is said of it; nothing half-written may stay."""
    with watched(disk), pytest.raises(FinetuneError) as error:
        begin()
    assert disk.refused
    assert "\n" not in str(error.value)
    assert not list(disk.root.rglob("*.tmp"))
    return str(error.value)


def require_same(folder: Path, whole: Whole) -> None:
    for name in ("model.safetensors", "predictions.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert metrics(folder) == metrics(whole.folder)
    assert {entry.name for entry in folder.iterdir()} == {entry.name for entry in whole.folder.iterdir()}


# A disk that is full.


def test_a_disk_that_is_full_at_one_file_after_the_other(whole: Whole, tmp_path: Path, computed: list[int]) -> None:
    """Each attempt ends at another file; the last one finds room again and ends as if nothing had been."""
    writes = [name.removeprefix("write ") for name in whole.operations if name.startswith("write ")]
    assert tuple(dict.fromkeys(writes)) == ("entry.json", *IN_ORDER)  # a remembered timing, which a run can do without
    recipe, folder = dataclasses.replace(whole.recipe, cache_dir=tmp_path / "cache"), tmp_path / "run"
    epochs: list[str] = []
    events = Events(progress=lambda what, done, of: epochs.append(what) if what[:5] == "epoch" and done == of else None)
    computed.clear()
    for name in IN_ORDER:
        words = refused(Disk(tmp_path, at(f"write {name}")), lambda: go_on(recipe, folder, events))
        assert "No space left on device" in words
        assert "free" in words
        begun = name != "recipe.toml"
        assert words.endswith(f". What was finished is kept: go on with finetune run --resume {folder}") == begun
    go_on(recipe, folder, events)
    require_same(folder, whole)
    assert sum(computed) <= ROWS + 2 * CHUNK_ROWS, "two chunks were refused, the others are computed once"
    assert epochs == ["epoch 1 of 2", "epoch 1 of 2", "epoch 2 of 2"], "an epoch with a checkpoint is not trained again"


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_operation(whole: Whole, tmp_path: Path) -> None:
    """Runs of their own, each refused from one operation on: of every lock, folder, file, write, sync and rename the
    first and the last."""
    first = {name: number for number, name in reversed(list(enumerate(whole.operations)))}
    last = {name: number for number, name in enumerate(whole.operations)}
    for number in sorted({*first.values(), *last.values()}):
        name = whole.operations[number]
        root = tmp_path / str(number)
        recipe = dataclasses.replace(whole.recipe, cache_dir=root / "cache")
        root.mkdir()
        disk = Disk(root, lambda count, operation, number=number: count == number)  # type: ignore[misc]
        words = refused(disk, lambda recipe=recipe, root=root: run(recipe, root / "run"))  # type: ignore[misc]
        assert "No space left on device" in words, name
        go_on(recipe, root / "run")
        require_same(root / "run", whole)
        shutil.rmtree(root)


def test_a_disk_that_is_full_in_a_sweep(whole: Whole, tmp_path: Path) -> None:
    """What goes on is the sweep, also when the file was one of a run in it."""
    recipe = dataclasses.replace(whole.recipe, epochs=1)
    grid = make_grid(recipe, lr="0.01,0.02")
    folder = tmp_path / "sweep"
    advice = f". What was finished is kept: go on with finetune sweep --resume {folder}"
    words = refused(Disk(tmp_path, at("write summary.json")), lambda: sweep(recipe, grid, folder))
    assert words.startswith(f"Could not write {folder / NAMES[0] / 'summary.json'}: No space left on device; free the")
    assert words.endswith(advice)
    assert words.count("go on with") == 1
    words = refused(Disk(tmp_path, at("write sweep.html")), lambda: resume_sweep(folder))
    assert words.endswith(advice)
    result = resume_sweep(folder)
    assert result.chosen is not None
    sweep(recipe, grid, tmp_path / "other")
    for name in NAMES:
        assert model_bytes(folder / name) == model_bytes(tmp_path / "other" / name)


@pytest.mark.parametrize("operation", ["make .finetune", "write model.safetensors", "write config.json"])
def test_a_disk_that_is_full_in_an_export(whole: Whole, tmp_path: Path, operation: str) -> None:
    trained, output = load_trained(whole.folder), tmp_path / "model.safetensors"
    disk = Disk(tmp_path, lambda number, name: name.startswith(operation))
    words = refused(disk, lambda: export(trained, "safetensors", output))
    assert words.endswith(": No space left on device; free the space or choose another folder.")
    assert list(tmp_path.iterdir()) == []


# A disk that is shut, as when the system found it damaged, or somebody took the permission.


def test_an_output_that_cannot_be_written(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shut = Disk(tmp_path, lambda number, name: True, errno.EROFS)
    words = refused(shut, lambda: run(whole.recipe, folder))
    assert words == f"{folder} cannot be created (Read-only file system); give another --output."
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    closed = Disk(tmp_path, at("lock .lock"), errno.EACCES)
    words = refused(closed, lambda: run(whole.recipe, folder))
    assert words == f"{folder} cannot be written (Permission denied); give another --output."
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_shut_in_the_middle_of_a_run(whole: Whole, tmp_path: Path) -> None:
    folder, checkpoints = tmp_path / "run", list[int]()

    def second(number: int, name: str) -> bool:
        if name == "create checkpoint.pt":
            checkpoints.append(number)
        return len(checkpoints) == 2

    words = refused(Disk(tmp_path, second, errno.EROFS), lambda: run(whole.recipe, folder))
    assert words == (
        f"Could not write {folder / 'checkpoint.pt'}: Read-only file system; make it writable or choose another "
        f"folder. What was finished is kept: go on with finetune run --resume {folder}"
    )
    words = refused(Disk(tmp_path, at("lock .lock"), errno.EROFS), lambda: resume(folder))
    assert words == f"{folder} cannot be written (Read-only file system); make it writable."
    epochs: list[int] = []
    resume(folder, events=Events(epoch=lambda row, of: epochs.append(row["epoch"])))
    assert epochs == [2]
    require_same(folder, whole)


# Files that vanish while they are read.


def test_an_image_that_vanishes_while_the_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path / "photos", 8, 4)
    look = decode._shared_side

    def vanish(files: list[Path]) -> int | None:
        side = look(files)
        files[0].unlink()
        return side

    monkeypatch.setattr(decode, "_shared_side", vanish)
    with pytest.raises(DataError) as error:
        load_data(str(tmp_path / "photos"), image_size=32)
    gone = tmp_path / "photos" / "train" / "class_00" / "00000.png"
    assert str(error.value) == (
        f"1 of 12 images cannot be read: {gone} (No such file or directory); replace or remove them."
    )


@pytest.mark.parametrize("read", ["_read_safetensors", "_refuse_impostors"])
def test_weights_that_vanish_while_they_are_read(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    """Between a look at the first bytes and the rest, of either kind of file."""
    path = tmp_path / "weights.bin"
    path.write_bytes((whole.folder / "model.safetensors").read_bytes() if read == "_read_safetensors" else b"PK")
    step = getattr(load, read)

    def vanish(*arguments: Any) -> Any:
        path.unlink()
        return step(*arguments)

    monkeypatch.setattr(load, read, vanish)
    with pytest.raises(WeightsError) as error:
        load.read_tensors(path)
    assert str(error.value) == (
        f"Could not read the weights {path} (No such file or directory); give a file that can be read."
    )


def test_features_that_vanish_are_not_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch makes a mapped file of zeros where there is none."""
    data, finish = image_set(18), Entry.finish

    def vanish(entry: Entry) -> None:
        finish(entry)
        (entry.folder / "tensor-1.bin").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Entry, "finish", vanish)
        with pytest.raises(RunError, match=r"tensor-1\.bin was deleted or cut short while a run used it; start or"):
            values(builder(tmp_path, Counted(TWO_TENSORS).prepared(), where="disk"), data)
    assert same(values(builder(tmp_path, Counted(TWO_TENSORS).prepared(), where="disk"), data), expected(data))


def test_a_cache_that_is_deleted_while_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, write = image_set(18), Entry.write_chunk

    def vanish(entry: Entry, number: int, rows: Any) -> None:
        shutil.rmtree(entry.folder)
        write(entry, number, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Entry, "write_chunk", vanish)
        with pytest.raises(RunError, match=r"cannot be written \(No such file or directory\); free some disk space"):
            values(builder(tmp_path, Counted(TWO_TENSORS).prepared()), data)
    assert same(values(builder(tmp_path, Counted(TWO_TENSORS).prepared()), data), expected(data))


def test_what_cannot_be_deleted_is_not_counted_as_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values(builder(tmp_path, Counted(TWO_TENSORS).prepared()), image_set(4))
    found = list_entries(tmp_path)
    with watched(Disk(tmp_path, at("lock entry.lock"), errno.EROFS)):
        assert clear(tmp_path, found) == 0
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *given, **named: None)
        assert clear(tmp_path, found) == 0
    assert clear(tmp_path, found) == found[0].bytes > 0


# A clock that jumps.


def test_a_clock_that_jumps_changes_nothing(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day goes back and forth by days; durations come from a clock that only goes on."""
    jumps, now = iter(range(10**6)), time.time
    monkeypatch.setattr(time, "time", lambda: now() + (-1) ** next(jumps) * 1e6)
    recipe = dataclasses.replace(whole.recipe, budget="1h", cache_dir=tmp_path / "cache")
    summary = run(recipe, tmp_path / "run")
    assert summary["ended_by_budget"] is None
    assert summary["images_seen"] == json.loads((whole.folder / "summary.json").read_text())["images_seen"]
    assert all(0 <= value < 1e5 for value in summary["seconds"].values())


def test_entries_from_the_future_do_not_push_out_what_a_run_uses(tmp_path: Path) -> None:
    """The clock was set back since they were used; a run's own entries are the oldest then."""
    data, views = image_set(18), make_views("flip", 18, 8, count=None, seed=0)
    values(builder(tmp_path, Counted(TWO_TENSORS).prepared()), image_set(18, seed=1))
    future = list_entries(tmp_path)[0]
    os.utime(future.folder, (2**33, 2**33))
    for images in (36, 0):
        counted = Counted(TWO_TENSORS)
        values(builder(tmp_path, counted.prepared(), limit=int(2.5 * future.bytes)), data, views)
        assert counted.images == images
    assert future.key not in [entry.key for entry in list_entries(tmp_path)]
