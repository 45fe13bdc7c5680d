"""Tar shards of strangers: what leads elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_data import as_png, make_images, write_tar

from finetune.data import read_data
from finetune.folder import FOLLOW
from weights.errors import DataError

PNG = as_png(make_images(1, 0, size=4).train[0])
TWO = {"0.png": PNG, "0.cls": b"ant", "1.png": PNG, "1.cls": b"bee"}


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_data(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_links_among_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    for folder in (shards, elsewhere):
        folder.mkdir()
        write_tar(folder / "train-0.tar", TWO)
    (elsewhere / "classes.txt").write_text("ant\nbee\n")
    (shards / "readme.txt").symlink_to(elsewhere / "classes.txt")  # is not opened
    (tmp_path / "link").symlink_to(shards)
    (tmp_path / "link.tar").symlink_to(shards / "train-0.tar")
    for name in ("link", "link.tar"):
        assert len(read_data(str(tmp_path / name)).train) == 2
    link = shards / "classes.txt"
    link.symlink_to(elsewhere / "classes.txt")
    words = f"{link} is a link that leads out of {shards}; expected a folder that holds its own files, so copy what it"
    assert refused(shards).startswith(words)
    assert refused(shards / "train-0.tar").startswith(words)
    link.unlink()
    (shards / "test-0.tar").symlink_to(elsewhere / "train-0.tar")
    assert refused(shards).startswith(f"{shards}/test-0.tar is a link that leads out of {shards}; expected")
    monkeypatch.setenv(FOLLOW, "1")
    assert len(read_data(str(shards)).train) == 2
