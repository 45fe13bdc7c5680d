"""Links in data folders: those that lead out are refused, and those that nobody opens are of no interest."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_data import write_cifar100_binary
from make_hostile import damage, write_photos

from finetune.data import load_data
from finetune.folder import FOLLOW
from weights.errors import DataError


def refused(data: Path | str, **options: Path) -> str:
    with pytest.raises(DataError) as error:
        load_data(str(data), **options)  # type: ignore[arg-type]
    return str(error.value)


def test_links_that_nobody_opens_may_lead_anywhere(tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", write_photos(tmp_path / "elsewhere")
    write_photos(photos / "train")
    damage(photos / "train" / "cat" / "readme.txt", elsewhere / "cat" / "0.png")
    damage(photos / "train" / "cat" / "around", photos / "train" / "cat" / "around")
    damage(photos / "raw", elsewhere)  # beside the splits
    note = f"2 files (.txt, no suffix) in {photos} passed over: no image by the suffix."
    assert note in load_data(str(photos)).notes
    damage(photos / "more" / "x.png", elsewhere / "cat" / "0.png")
    damage(photos / "train" / "dog" / "more", photos / "more")  # within the folder, and from there out of it
    assert refused(photos).startswith(f"{photos}/train/dog/more/x.png is a link that leads out of {photos}; expected")


def test_a_link_to_nothing_is_called_that(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    link, gone = photos / "cat" / "lost.png", tmp_path / "gone.png"
    damage(link, gone)
    assert refused(photos) == f"{link} is a link to {gone}, which is not there; mend the link, or remove it."


def test_links_among_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for place in (data / "set", elsewhere):
        write_cifar100_binary(place, 8, 2)
    damage(data / "set" / "readme.txt", elsewhere / "train.bin")
    damage(tmp_path / "link", data / "set")
    assert len(load_data(str(tmp_path / "link"), val_fraction=0).train) == 8
    link = damage(data / "set" / "test.bin", elsewhere / "test.bin")
    for place in (data / "set", data):
        words = f"{link} is a link that leads out of {place}; expected a folder that holds its own files, so copy what"
        assert refused(place).startswith(words)
    assert refused("cifar100", data_dir=data).startswith(f"{link} is a link that leads out of {data}/set; expected")
    (data / "set").rename(tmp_path / "gone")
    damage(data / "set", elsewhere)
    assert refused(data).startswith(f"{data}/set is a link that leads out of {data}; expected")
    assert len(load_data("cifar100", data_dir=data, val_fraction=0).train) == 8, "a link in a folder of data sets"
    monkeypatch.setenv(FOLLOW, "1")
    assert len(load_data(str(tmp_path / "gone"), val_fraction=0).test or ()) == 2
