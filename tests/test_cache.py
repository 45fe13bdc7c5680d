"""The feature cache: what is written is read back, damage is noticed, and room is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from make_features import (
    CPU,
    FP32,
    NONE,
    PLAIN,
    TWO_TENSORS,
    Counted,
    builder,
    expected,
    image_set,
    notes_of,
    same,
    values,
)

from finetune import cache, features
from finetune.augment import make_views
from finetune.cache import Entry, Stored, clear, list_entries, make_room
from finetune.events import Events
from finetune.features import Prefix, RowShape
from finetune.images import ImageSet
from finetune.prefix import PreparedPrefix
from weights.errors import RunError

# What is written is read back equal.


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four rows."""
    monkeypatch.setattr(cache, "CHUNK_BYTES", 4 * sum(row.bytes for row in TWO_TENSORS))


@pytest.mark.parametrize(("where", "on_disk"), [("ram", False), ("ram", True), ("disk", True)])
@pytest.mark.usefixtures("small_chunks")
def test_features_are_what_the_prefix_gives(tmp_path: Path, where: str, on_disk: bool) -> None:
    data = image_set(18)
    for _ in range(2):  # written, then read
        made = builder(tmp_path, Counted(TWO_TENSORS).prepared(), where=where, on_disk=on_disk)
        got = values(made, data)
        assert same(got, expected(data))
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert notes_of(made) == []
    assert (tmp_path / "features").exists() == on_disk


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_views_are_kept_apart_and_mixed_as_asked(tmp_path: Path, where: str) -> None:
    data = image_set(6)
    rows = (RowShape((3, 8, 8), torch.float32),)
    made = Prefix(lambda images: (images,), PLAIN, torch.float32, 4, CPU, rows)
    views = make_views("flip", 6, 8, count=None, seed=0)
    got = builder(tmp_path, PreparedPrefix(made, FP32, {}, 0), where=where).features(data, views, "train")
    order, which = torch.tensor([5, 0, 3, 3]), torch.tensor([1, 0, 0, 1])
    images = views.apply(data.images[order], order, which)
    assert torch.equal(got.take(order, which)[0], PLAIN(images))


@pytest.mark.usefixtures("small_chunks")
def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    data, views = image_set(18), make_views("flip", 18, 8, count=None, seed=0)
    first, second = Counted(TWO_TENSORS), Counted(TWO_TENSORS)
    values(builder(tmp_path, first.prepared()), data, views)
    assert first.images == 2 * 18
    done = []
    made = builder(tmp_path, second.prepared())
    made.events = Events(progress=lambda what, now, total: done.append((what, now, total)))
    values(made, data, views)
    assert second.images == 0
    assert done[-1] == ("features of train", 36, 36)


@pytest.mark.usefixtures("small_chunks")
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    data = image_set(18)
    first, second = Counted(TWO_TENSORS), Counted(TWO_TENSORS)
    made = builder(tmp_path, first.prepared())

    def stop() -> None:
        if first.images >= 8:
            raise KeyboardInterrupt

    made.stop = stop
    with pytest.raises(KeyboardInterrupt):
        values(made, data)
    again = builder(tmp_path, second.prepared())
    assert again.entries(data, NONE)[0][0].missing_rows() == 18  # nothing is known before the journal is read
    assert same(values(again, data), expected(data))
    assert second.images == 10
    assert notes_of(again) == []


# Damage is noticed, and only what is damaged is computed again.


def written(folder: Path, data: ImageSet) -> Path:
    """Fill the cache, return the entry's folder."""
    made = builder(folder, Counted(TWO_TENSORS).prepared())
    values(made, data)
    return made.entries(data, NONE)[0][0].folder


def mended(folder: Path, data: ImageSet, where: str = "ram") -> tuple[int, list[str]]:
    """Read a damaged cache; return how many images were computed again, and the notes. It is whole afterwards."""
    counted, control = Counted(TWO_TENSORS), Counted(TWO_TENSORS)
    made = builder(folder, counted.prepared(), where=where)
    assert same(values(made, data), expected(data))
    assert same(values(builder(folder, control.prepared()), data), expected(data))
    assert control.images == 0
    return counted.images, notes_of(made)


def note(entry: Path, chunks: int) -> str:
    return f"Cached features {entry.name} were damaged in {chunks} chunks; these were computed again."


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("tensor", [0, 1])
@pytest.mark.usefixtures("small_chunks")
def test_a_flipped_bit_is_noticed(tmp_path: Path, where: str, tensor: int) -> None:
    data = image_set(18)
    entry = written(tmp_path, data)
    file = entry / f"tensor-{tensor}.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert mended(tmp_path, data, where) == (4, [note(entry, 1)])


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_was_cut_short_is_noticed(tmp_path: Path, where: str) -> None:
    data = image_set(18)
    entry = written(tmp_path, data)
    os.truncate(entry / "tensor-0.bin", 9 * TWO_TENSORS[0].bytes)  # within the third of five chunks
    assert mended(tmp_path, data, where) == (10, [note(entry, 3)])


@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_is_gone_is_made_again(tmp_path: Path) -> None:
    data = image_set(18)
    entry = written(tmp_path, data)
    (entry / "tensor-1.bin").unlink()
    assert mended(tmp_path, data) == (18, [note(entry, 5)])


@pytest.mark.usefixtures("small_chunks")
def test_a_journal_line_that_was_cut_short_costs_its_chunk(tmp_path: Path) -> None:
    data = image_set(18)
    entry = written(tmp_path, data)
    journal = entry / "chunks.jsonl"
    journal.write_text(journal.read_text().rstrip("\n")[:-5])
    assert mended(tmp_path, data) == (2, [])  # the last chunk has two rows


@pytest.mark.usefixtures("small_chunks")
def test_an_unreadable_line_amid_the_journal_costs_its_chunk(tmp_path: Path) -> None:
    data = image_set(18)
    entry = written(tmp_path, data)
    journal = entry / "chunks.jsonl"
    lines = [line for line in journal.read_text().splitlines() if line]
    journal.write_text("\n".join([lines[0], "{", *lines[2:]]))
    assert mended(tmp_path, data) == (4, [])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_without_a_journal_nothing_is_believed(tmp_path: Path, content: bytes | None) -> None:
    data = image_set(18)
    journal = written(tmp_path, data) / "chunks.jsonl"
    journal.unlink()
    if content is not None:
        journal.write_bytes(content)
    assert mended(tmp_path, data) == (18, [])


@pytest.mark.usefixtures("small_chunks")
def test_bytes_that_no_journal_line_lists_are_not_believed(tmp_path: Path) -> None:
    """A kill between the bytes and the line, or in the bytes."""
    data = image_set(18)
    entry = written(tmp_path, data)
    journal = entry / "chunks.jsonl"
    lines = [line for line in journal.read_text().splitlines() if line]
    journal.write_text("\n".join(lines[:2]) + "\n")
    assert mended(tmp_path, data) == (10, [])


# Places that cannot be written, and room.


def test_a_cache_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(RunError) as error:
        values(builder(file, Counted(TWO_TENSORS).prepared()), image_set(4))
    assert str(error.value) == (
        f"The feature cache {file / 'features'} cannot be written (Not a directory); free some disk space, point "
        "--cache-dir elsewhere, or use --cache ram or --cache off."
    )


def test_a_full_disk_is_told_and_the_chunk_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    data = image_set(4)
    made = builder(tmp_path, Counted(TWO_TENSORS).prepared())
    entry = made.entries(data, NONE)[0][0]
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(RunError) as error:
            values(made, data)
    assert str(error.value) == (
        f"The feature cache {entry.folder} cannot be written (No space left on device); free some disk space, point "
        "--cache-dir elsewhere, or use --cache ram or --cache off."
    )
    entry.load_journal()
    assert entry.missing_rows() == 4


def make_entry(folder: Path, key: str, *, used: int, rows: int = 10) -> Entry:
    """Write an entry of 100 bytes a row, last used at a time."""
    entry = Entry(folder / "features" / key, rows, ((25,),), (torch.float32,))
    entry.open({"data": key})
    entry.write_chunk(0, [torch.zeros(rows, 25)])
    os.utime(entry.folder, (used, used))
    return entry


def left(folder: Path) -> list[str]:
    return [entry.key for entry in list_entries(folder)]


def test_entries_are_listed_with_the_last_used_first(tmp_path: Path) -> None:
    assert list_entries(tmp_path) == []
    make_entry(tmp_path, "old", used=1)
    make_entry(tmp_path, "new", used=3)
    make_entry(tmp_path, "mid", used=2)
    found = list_entries(tmp_path)
    assert [entry.key for entry in found] == ["new", "mid", "old"]
    assert found[0].about["data"] == "new"
    assert found[0].about["rows"] == 10
    assert found[0].bytes >= 1000
    (tmp_path / "features" / "mid" / "about.json").write_text("{")
    assert list_entries(tmp_path)[1].about == {}


def test_what_a_kill_leaves_of_a_description_hides_no_entry(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "half", used=1)
    half_written = entry.folder / ".about.json.0a1b2c3d.tmp"
    half_written.write_text("{")
    assert left(tmp_path) == ["half"]
    entry.open({"data": "half"})
    assert not half_written.exists()


def test_reading_an_entry_counts_as_use(tmp_path: Path) -> None:
    data = image_set(4)
    entry = written(tmp_path, data)
    os.utime(entry, (1, 1))
    make_entry(tmp_path, "other", used=2)
    assert left(tmp_path) == ["other", entry.name]
    values(builder(tmp_path, Counted(TWO_TENSORS).prepared()), data)
    assert left(tmp_path) == [entry.name, "other"]


def test_room_is_made_by_the_least_recently_used(tmp_path: Path) -> None:
    for used, key in enumerate(["a", "b", "c", "d"], start=1):
        make_entry(tmp_path, key, used=used)
    total = sum(entry.bytes for entry in list_entries(tmp_path))
    make_room(tmp_path, 100, total + 100, [])
    assert left(tmp_path) == ["d", "c", "b", "a"]
    make_room(tmp_path, 500, total, [])
    assert left(tmp_path) == ["d", "c", "b"]
    make_room(tmp_path, 2500, total, ["b"])  # the run's own entry stays, whatever its age
    assert left(tmp_path) == ["b"]


def test_a_run_makes_room_for_itself(tmp_path: Path) -> None:
    make_entry(tmp_path, "old", used=1)
    data = image_set(4)
    values(builder(tmp_path, Counted(TWO_TENSORS).prepared(), limit=1200), data)
    assert "old" not in left(tmp_path)
    assert len(left(tmp_path)) == 1


def test_a_view_does_not_make_room_by_deleting_another(tmp_path: Path) -> None:
    data, views = image_set(4), make_views("flip", 4, 8, count=None, seed=0)
    made = builder(tmp_path, Counted(TWO_TENSORS).prepared())
    values(made, data, views)
    first = made.entries(data, views)[0][0].folder.name
    found = list_entries(tmp_path)
    clear(tmp_path, [stored for stored in found if stored.key == first])
    counted = Counted(TWO_TENSORS)
    values(builder(tmp_path, counted.prepared(), limit=found[0].bytes), data, views)
    assert counted.images == 4  # the first view's; the second's were still there


def test_clearing_frees_what_it_says(tmp_path: Path) -> None:
    make_entry(tmp_path, "a", used=1)
    make_entry(tmp_path, "b", used=2)
    found = list_entries(tmp_path)
    assert clear(tmp_path, found) == sum(entry.bytes for entry in found)
    assert left(tmp_path) == []


def test_clearing_leaves_what_a_run_is_writing(tmp_path: Path) -> None:
    make_entry(tmp_path, "busy", used=1)
    make_entry(tmp_path, "idle", used=2)
    by_key: dict[str, Stored] = {entry.key: entry for entry in list_entries(tmp_path)}
    with FileLock(tmp_path / "features" / "busy.lock"):
        assert clear(tmp_path, list(by_key.values())) == by_key["idle"].bytes
        assert left(tmp_path) == ["busy"]


def test_two_runs_share_an_entry_and_the_second_waits(tmp_path: Path) -> None:
    """While one run holds the lock, the other says that it waits; then it reads instead of computing."""
    data = image_set(4)
    counted = Counted(TWO_TENSORS)
    made = builder(tmp_path, counted.prepared())
    entry, about = made.entries(data, NONE)[0]
    entry.folder.parent.mkdir(parents=True)
    held = entry.lock.acquire()
    notes = notes_of(made)

    def note(text: str) -> None:  # stands in for the other run: it finishes while this one waits
        notes.append(text)
        entry.open(about)
        features.compute_view(
            Counted(TWO_TENSORS).prepared().prefix, data, NONE, 0, entry=entry, into=[], report=lambda images: None
        )
        held.lock.release()

    made.events = Events(note=note)
    assert same(values(made, data), expected(data))
    assert counted.images == 0
    assert notes == ["Another run is computing these features; waiting for it to finish."]


def test_a_stop_ends_the_wait_for_another_run(tmp_path: Path) -> None:
    class Stopped(Exception):
        """What a run raises when it is asked to stop."""

    def stop() -> None:
        raise Stopped

    data = image_set(18)
    waiting = builder(tmp_path, Counted(TWO_TENSORS).prepared())
    waiting.stop = stop
    entry = waiting.entries(data, NONE)[0][0]
    entry.folder.parent.mkdir(parents=True)
    with entry.lock, pytest.raises(Stopped):
        values(waiting, data)
