"""The run directory: which folder a run gets, when it is refused, and what a damaged file says."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from finetune.recipe import Recipe
from finetune.rundir import RunDirectory, create_run_directory, open_run_directory, require_empty
from weights.errors import RunError


def create_words(output: Path) -> str:
    with pytest.raises(RunError) as error:
        create_run_directory(output, "name")
    return str(error.value)


@pytest.fixture
def begun(tmp_path: Path) -> RunDirectory:
    """A run that has written its recipe and nothing else."""
    directory = create_run_directory(tmp_path / "run", "name")
    with directory:
        directory.write_recipe(Recipe())
    return directory


def test_numbers_count_up_and_fill_no_gap_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [create_run_directory(None, name).path.as_posix() for name in ("a-b", "a-b", "c")]
    assert made == ["runs/a-b-0001", "runs/a-b-0002", "runs/c-0001"]
    (tmp_path / "runs" / "a-b-0003").touch()  # a file of that name is in the way as well
    assert create_run_directory(None, "a-b").path.name == "a-b-0004"


def test_an_output_folder_is_made_with_its_parents_or_taken_when_empty(tmp_path: Path) -> None:
    assert create_run_directory(tmp_path / "x" / "y", "name").path.is_dir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()  # what a killed run may leave
    assert create_run_directory(tmp_path / "empty", "name").path == tmp_path / "empty"


def test_folders_that_hold_something_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert create_words(tmp_path) == f"{tmp_path} already holds notes.txt; give another --output."
    (tmp_path / "recipe.toml").touch()
    assert create_words(tmp_path).endswith(f"give another --output (or go on with --resume {tmp_path}).")
    (tmp_path / "summary.json").touch()
    assert create_words(tmp_path) == f"{tmp_path} already holds a finished run; give another --output."
    assert {entry.name for entry in tmp_path.iterdir()} == {"notes.txt", "recipe.toml", "summary.json"}


def test_what_cannot_be_made_is_known_before_there_is_anything_to_lose(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "shut").mkdir(mode=0o500)
    for place in (tmp_path / "file", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(RunError) as error:
            require_empty(place)
        assert str(error.value) == (
            f"--output {place} cannot be a folder, since {tmp_path / 'file'} is a file; give another --output."
        )
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match=r"cannot be a folder, since .*link is a link to nothing; give another"):
        require_empty(tmp_path / "link" / "run")
    require_empty(tmp_path / "new" / "run")
    if os.access(tmp_path / "shut", os.W_OK):  # root may write everywhere
        return
    with pytest.raises(RunError, match=r"run cannot be created, since .*shut cannot be written; give another --output"):
        require_empty(tmp_path / "shut" / "run")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = create_words(tmp_path / "file")
    assert words == f"{tmp_path / 'file'} cannot be created (File exists); give another --output."
    assert "cannot be created (Not a directory)" in create_words(tmp_path / "file" / "run")


def test_one_run_at_a_time(begun: RunDirectory) -> None:
    again, recipe = open_run_directory(begun.path)
    assert recipe == Recipe()
    with begun:
        assert (begun.path / ".lock").exists()
        with pytest.raises(RunError, match="is in use by another run; wait until that one has ended, or give another"):
            again.__enter__()
    with again:
        pass
    assert [entry.name for entry in begun.path.iterdir()] == ["recipe.toml"]


def test_the_lock_goes_when_the_run_fails(begun: RunDirectory) -> None:
    def fail() -> None:
        with begun:
            raise RunError("no")

    with pytest.raises(RunError, match="no"):
        fail()
    assert not (begun.path / ".lock").exists()


def test_what_a_kill_left_half_written_is_swept_away(begun: RunDirectory) -> None:
    (begun.path / ".checkpoint.pt.0123abcd.tmp").write_bytes(b"half")
    (begun.path / "notes.tmp").write_text("mine")
    with begun:
        pass
    assert sorted(entry.name for entry in begun.path.iterdir()) == ["notes.tmp", "recipe.toml"]


def test_no_run_to_open(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=re.escape(f"--resume {tmp_path}: it holds no recipe.toml; give the folder")):
        open_run_directory(tmp_path)
    with pytest.raises(RunError, match="it does not exist; give the folder of a run that was started before"):
        open_run_directory(tmp_path / "none")


def test_files_come_back_as_they_went(begun: RunDirectory) -> None:
    assert begun.read_summary() is None
    assert begun.read_checkpoint() is None
    begun.write_summary({"epochs": 1})
    begun.write_metrics([{"epoch": 1, "val_loss": None}, {"epoch": 2, "val_loss": 0.5}])
    begun.write_checkpoint({"progress": {"epoch": 1}, "tensor": torch.arange(3)})
    assert begun.read_summary() == {"epochs": 1}
    lines = (begun.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["val_loss"] for line in lines] == [None, 0.5]
    state = begun.read_checkpoint()
    assert state is not None
    assert state["tensor"].tolist() == [0, 1, 2]
    begun.drop_checkpoint()
    begun.drop_checkpoint()
    assert begun.read_checkpoint() is None


def test_a_damaged_summary(begun: RunDirectory) -> None:
    (begun.path / "summary.json").write_text('{"epochs": ')
    with pytest.raises(RunError, match=r"summary.json is damaged \(.*\); delete it and resume the run again"):
        begun.read_summary()


def test_a_flipped_bit_in_a_checkpoint(begun: RunDirectory) -> None:
    path = begun.path / "checkpoint.pt"
    begun.write_checkpoint({"progress": {}, "tensor": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged \(\S*data/0 does not match its checksum\); delete"):
        begun.read_checkpoint()


@pytest.mark.parametrize("kind", ["empty", "text", "half", "tensor", "other", "code"])
def test_a_damaged_checkpoint(begun: RunDirectory, kind: str) -> None:
    path = begun.path / "checkpoint.pt"
    begun.write_checkpoint({"progress": {}, "tensor": torch.zeros(1000)})
    whole = path.read_bytes()
    if kind in ("empty", "text", "half"):
        path.write_bytes({"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2]}[kind])
    else:
        torch.save({"tensor": torch.zeros(3), "other": {"a": 1}, "code": {"progress": Path()}}[kind], path)
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged \(.+\); delete it to start this run from its first"):
        begun.read_checkpoint()
