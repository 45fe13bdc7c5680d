"""Decoded images that stay in the cache: when they are used, when they must not be, and what they may cost."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import PIL
import pytest
import torch
from make_data import make_images, write_image_folder, write_shards
from make_run import metrics, model_bytes, tiny_recipe, write_weights

from finetune import cache, decoded, placement, stream
from finetune.cache import list_entries, make_room
from finetune.data import read_data
from finetune.decoded import DecodedCache
from finetune.images import RawData
from finetune.pipeline import run
from weights.errors import RunError

USED = "were decoded by an earlier command, and no file has changed since."
LIMIT = 10**9


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep images that were decoded quickly, of files that have just been written."""
    monkeypatch.setattr(decoded, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(decoded, "SETTLED_SECONDS", 0.0)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files each decoding of a data set had."""
    counts: list[int] = []
    plain = stream.decode_files

    def counting(files: object, *arguments: object) -> None:
        counts.append(len(files))  # type: ignore[arg-type]
        plain(files, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "decode_files", counting)
    return counts


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty training and twenty test images of 32 x 32 pixels."""
    write_image_folder(tmp_path / "photos", made=make_images(40, 20))
    return tmp_path / "photos"


def read(data: Path, notes: list[str] | None = None, **settings: int) -> RawData:
    """Read a data set through the cache beside it."""
    kept = DecodedCache(data.parent / "cache", settings.pop("limit", LIMIT), ([] if notes is None else notes).append)
    return read_data(str(data), kept=kept, **{"image_size": 24, **settings})  # type: ignore[arg-type]


def same(one: RawData, other: RawData) -> bool:
    """Tell whether two readings have the same images with the same labels."""
    pairs = [(one.train, other.train), (one.test, other.test)]
    return all(
        ours is not None
        and theirs is not None
        and torch.equal(ours.images[:], theirs.images[:])
        and torch.equal(ours.labels, theirs.labels)
        for ours, theirs in pairs
    )


@pytest.mark.usefixtures("at_once")
def test_a_second_reading_decodes_nothing(photos: Path, decodings: list[int]) -> None:
    notes: list[str] = []
    first, second = read(photos, notes), read(photos, notes)
    assert decodings == [60]
    assert same(first, second)
    assert notes == [f"The 60 images {USED}"]
    [entry] = list_entries(photos.parent / "cache")
    assert entry.bytes >= 60 * 3 * 24 * 24
    assert entry.about["data"] == "photos"


@pytest.mark.usefixtures("at_once")
def test_shards_are_kept_too(tmp_path: Path, decodings: list[int]) -> None:
    write_shards(tmp_path / "shards", make_images(40, 20), each=15)
    assert same(read(tmp_path / "shards"), read(tmp_path / "shards"))
    assert decodings == [60]
    shard = tmp_path / "shards" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes())
    read(tmp_path / "shards")
    assert decodings == [60, 60]


def _other_content_at_the_same_time(photos: Path) -> None:
    """As careful as a program can be: the same size, the same inode, the same time of the last change."""
    file = photos / "train" / "class_00" / "00000.png"
    before = file.stat()
    file.write_bytes(bytes(reversed(file.read_bytes())))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def _another_place(photos: Path) -> None:
    (photos / "train" / "class_00" / "00000.png").rename(photos / "train" / "class_01" / "00000.png")


def _one_file_less(photos: Path) -> None:
    (photos / "test" / "class_00" / "00000.png").unlink()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("change", [_other_content_at_the_same_time, _another_place, _one_file_less])
def test_other_files_are_other_images(photos: Path, change: Callable[[Path], None]) -> None:
    kept = DecodedCache(photos.parent / "cache", LIMIT, print)
    files = sorted(photos.rglob("*.png"))
    before = kept.identity(files, 24)
    assert before is not None
    assert kept.identity(files, 24) == before
    change(photos)
    files = sorted(photos.rglob("*.png"))
    assert kept.identity(files, 24) not in (None, before)


@pytest.mark.usefixtures("at_once")
def test_what_decides_the_pixels_is_in_the_key(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DecodedCache(photos.parent / "cache", LIMIT, print)
    files = sorted(photos.rglob("*.png"))
    before = kept.identity(files, 24)
    assert kept.identity(files, 25) != before
    assert kept.identity(files[::-1], 24) != before
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert kept.identity(files, 24) != before
    monkeypatch.undo()
    monkeypatch.setattr(decoded, "FORMAT", 0)
    assert kept.identity(files, 24) != before


def test_what_has_just_changed_or_was_decoded_quickly_is_not_kept(
    photos: Path, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(decoded, "SETTLED_SECONDS", 1e6)
    read(photos)
    monkeypatch.setattr(decoded, "LEAST_SECONDS", 1e6)
    monkeypatch.setattr(decoded, "SETTLED_SECONDS", 0.0)
    read(photos)
    read(photos)
    assert decodings == [60, 60, 60]
    assert not list_entries(photos.parent / "cache")


@pytest.mark.usefixtures("at_once")
def test_a_file_that_changes_while_it_is_read_is_not_kept(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stream.decode_files

    def changing(*arguments: object) -> None:
        plain(*arguments)  # type: ignore[arg-type]
        _other_content_at_the_same_time(photos)

    monkeypatch.setattr(stream, "decode_files", changing)
    read(photos)
    assert not list_entries(photos.parent / "cache")


@pytest.mark.usefixtures("at_once")
def test_a_flipped_bit_is_noticed(photos: Path, decodings: list[int]) -> None:
    notes: list[str] = []
    first = read(photos)
    [entry] = list_entries(photos.parent / "cache")
    file = entry.folder / "tensor-0.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert same(read(photos, notes), first)
    assert notes == [f"Kept images {entry.key} were damaged; they are decoded anew."]
    assert same(read(photos), first)
    assert decodings == [60, 60], "what was decoded anew is kept again"


@pytest.mark.usefixtures("at_once")
def test_what_a_kill_left_is_completed(photos: Path, decodings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK_BYTES", 7 * 3 * 24 * 24)
    first = read(photos)
    [entry] = list_entries(photos.parent / "cache")
    journal = entry.folder / "chunks.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:4]))
    assert same(read(photos), first)
    assert same(read(photos), first)
    assert decodings == [60, 60]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("side", ['"24"', "0", "25", "true", "null", "1e9"])
def test_a_side_that_cannot_be(photos: Path, decodings: list[int], side: str) -> None:
    first = read(photos)
    [entry] = list_entries(photos.parent / "cache")
    about = entry.folder / "about.json"
    about.write_text(about.read_text().replace('"side": 24', f'"side": {side}'))
    assert same(read(photos), first)
    assert decodings == [60, 60]


@pytest.mark.usefixtures("at_once")
def test_images_make_no_room_for_themselves_but_for_features(photos: Path) -> None:
    bytes_kept = 60 * 3 * 24 * 24
    read(photos, limit=int(1.9 * bytes_kept))
    assert not list_entries(photos.parent / "cache"), "half of what is free is for features"
    read(photos, limit=int(2.1 * bytes_kept))
    [entry] = list_entries(photos.parent / "cache")
    read(photos, limit=int(2.1 * bytes_kept), image_size=20)
    assert list_entries(photos.parent / "cache") == [entry]
    make_room(photos.parent / "cache", 2 * bytes_kept, int(2.1 * bytes_kept), [])
    assert not list_entries(photos.parent / "cache")


@pytest.mark.usefixtures("at_once")
def test_where_the_disk_is_short_photos_give_way_and_features_do_not(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos.parent / "cache"
    read(photos)
    features = root / "features" / "older"
    features.mkdir()
    (features / "about.json").write_text("{}")
    os.utime(features, (0, 0))
    monkeypatch.setattr(cache, "free_disk", lambda _: cache.DISK_RESERVE + 1000)
    make_room(root, 1000, LIMIT, [])
    assert len(list_entries(root)) == 2, "there is room"
    make_room(root, 1001, LIMIT, [])
    assert [entry.key for entry in list_entries(root)] == ["older"]


@pytest.mark.usefixtures("at_once")
def test_a_disk_that_is_nearly_full(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoded.DISK_RESERVE == placement.DISK_RESERVE
    monkeypatch.setattr(decoded, "DISK_RESERVE", 10**18)
    read(photos)
    assert not list_entries(photos.parent / "cache")


@pytest.mark.usefixtures("at_once")
def test_a_cache_that_cannot_be_written_ends_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RunError("The feature cache X cannot be written (No space left on device).")

    monkeypatch.setattr(cache.Entry, "write_chunk", refuse)
    notes: list[str] = []
    assert len(read(photos, notes).train) == 40
    assert notes == [
        "The decoded images are not kept for the next command: The feature cache X cannot be written (No space left on "
        "device)."
    ]


@pytest.mark.usefixtures("at_once")
def test_what_does_not_fit_in_memory_is_streamed_as_ever(photos: Path, decodings: list[int]) -> None:
    read(photos)
    streamed = read(photos, image_memory=60 * 3 * 24 * 24)
    assert not isinstance(streamed.train.images, torch.Tensor)
    assert decodings == [60, 60]


@pytest.mark.usefixtures("at_once")
def test_runs_use_them_to_the_same_result(photos: Path, decodings: list[int], tmp_path: Path) -> None:
    recipe = tiny_recipe(photos, write_weights(tmp_path / "test_resnet.safetensors"), tmp_path / "cache")
    first, second = run(recipe, tmp_path / "first"), run(recipe, tmp_path / "second")
    assert decodings == [60]
    assert model_bytes(tmp_path / "second") == model_bytes(tmp_path / "first")
    assert metrics(tmp_path / "second") == metrics(tmp_path / "first")
    assert second["data"] == first["data"]
    run(replace(recipe, cache="off", cache_dir=tmp_path / "other"), tmp_path / "third")
    assert decodings == [60, 60]
    assert not list_entries(tmp_path / "other")
