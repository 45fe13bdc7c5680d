"""From the text of `--data` to a data set: names, paths, places that are searched, and downloads."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from make_data import (
    make_images,
    write_archive,
    write_cifar10_python,
    write_cifar100_binary,
    write_cifar100_python,
    write_class_folders,
    write_image_folder,
)

from finetune import downloads
from finetune.data import load_data
from weights.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the places that are searched inside the test's own folder, and the network out of it."""

    def refuse(*_: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FINETUNE_DATA", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    return tmp_path


def test_search_order(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spots = [places / "given", places / "env", places / "here" / "data", downloads.data_cache()]
    for seed, spot in enumerate(spots):
        write_cifar100_python(spot / "cifar-100-python", made=make_images(seed=seed))
    monkeypatch.setenv("FINETUNE_DATA", str(spots[1]))
    for seed, spot in enumerate(spots):
        splits = load_data("cifar100", data_dir=spots[0], val_fraction=0)
        assert splits.test is not None
        assert torch.equal(splits.test.images, torch.from_numpy(make_images(seed=seed).test)), spot
        (spot / "cifar-100-python").rename(spot / ".hidden")


def test_a_name_finds_its_own_kind(places: Path) -> None:
    write_cifar100_python(places / "data" / "cifar-100-python", made=make_images(classes=6))
    write_cifar10_python(places / "data" / "cifar-10-batches-py", made=make_images(classes=5))
    assert load_data("cifar10", data_dir=places / "data").name == "cifar10"
    assert len(load_data("cifar100", data_dir=places / "data").classes) == 6
    direct = load_data("cifar100", data_dir=places / "data" / "cifar-100-python")
    assert len(direct.classes) == 6


def test_an_archive_beside_what_it_unpacks_to_counts_as_one(places: Path) -> None:
    write_cifar100_python(places / "data" / "cifar-100-python")
    write_archive(places / "data" / "cifar-100-python.tar.gz", places / "data" / "cifar-100-python")
    assert load_data("cifar100", data_dir=places / "data").name == "cifar100"
    assert load_data(str(places / "data")).name == "cifar100"
    (places / "data" / "cifar-100-python" / "train").unlink()
    with pytest.raises(DataError, match="cifar-100-python has no file train"):
        load_data(str(places / "data"))


@pytest.mark.parametrize("data", ["cifar100", "path"])
def test_several_data_sets_are_listed(places: Path, data: str) -> None:
    write_cifar100_python(places / "data" / "cifar-100-python")
    write_cifar100_binary(places / "data" / "cifar-100-binary")
    with pytest.raises(DataError, match=r"holds 2 data sets: .*cifar-100-binary, .*cifar-100-python; give --data"):
        load_data(str(places / "data") if data == "path" else data, data_dir=places / "data")


def test_an_image_folder_beside_cifar_is_listed_too(places: Path) -> None:
    write_cifar100_python(places / "data" / "cifar-100-python")
    write_image_folder(places / "data" / "flowers", 8, 4)
    with pytest.raises(
        DataError, match=r"holds 2 data sets: .*cifar-100-python, .*flowers; give --data the path of one"
    ):
        load_data(str(places / "data"))


def test_the_folder_that_holds_one_data_set(places: Path) -> None:
    write_cifar100_binary(places / "one" / "inner")
    (places / "one" / "readme.txt").write_text("hello")
    assert load_data(str(places / "one")).name == "cifar100"
    write_image_folder(places / "two" / "flowers", 8, 4)
    assert load_data(str(places / "two")).name == "flowers"
    write_cifar10_python(places / "cifar-10-batches-py")
    (places / "three").mkdir()
    write_archive(places / "three" / "cifar-10-python.tar.gz", places / "cifar-10-batches-py")
    assert load_data(str(places / "three")).name == "cifar10"


def test_relative_and_home_paths(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(places))
    write_image_folder(places / "here" / "flowers", 8, 4)
    assert load_data("flowers").name == "flowers"
    assert load_data("~/here/flowers").name == "flowers"
    monkeypatch.chdir(places / "here" / "flowers")
    assert load_data(".").name == "flowers"


def test_a_name_wins_over_a_folder(places: Path) -> None:
    made = make_images(20, 0)
    write_class_folders(places / "here" / "cifar100", made.train, made.train_labels, made.classes)
    assert load_data("./cifar100").classes == made.classes
    with pytest.raises(DataError, match="CIFAR-100 is not in"):
        load_data("cifar100")


@pytest.mark.parametrize(
    ("data", "near"), [("cifr10", "; did you mean cifar10"), ("shapes", "; did you mean shapes10"), ("xyz", r"\.$")]
)
def test_unknown_names(data: str, near: str) -> None:
    with pytest.raises(
        UsageError, match=rf"--data '{data}' is neither a path that exists nor one of cifar10, .*{near}"
    ):
        load_data(data)


def test_an_empty_name() -> None:
    with pytest.raises(UsageError, match="--data '' is neither"):
        load_data("")


@pytest.mark.parametrize("data", ["some/where", "data.tar.gz"])
def test_missing_paths(data: str) -> None:
    with pytest.raises(DataError, match=f"There is nothing at {data}; expected a data set"):
        load_data(data)


def test_paths_to_something_else(places: Path) -> None:
    (places / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt is a file; expected a folder"):
        load_data(str(places / "notes.txt"))
    (places / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds nothing; expected CIFAR files, a CIFAR .tar.gz, a folder of"):
        load_data(str(places / "empty"))
    for index in range(7):
        (places / "empty" / f"{index}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty holds 0.png, 1.png, .* and 2 more; expected CIFAR files"):
        load_data(str(places / "empty"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "medium"}, "--labels is 'medium'; expected fine or coarse"),
        ({"labels": "coarse"}, "--labels coarse needs CIFAR-100, but shapes10 has no coarse labels"),
        ({"image_size": 0}, "--image-size is 0; expected at least 1 pixel"),
        ({"val_fraction": 1.0}, "--val-fraction is 1; expected 0 or more and less than 1"),
        ({"limit": 0}, "--limit is 0; expected at least 1 training image"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data("shapes10", **settings)


def test_coarse_labels_of_an_image_folder(places: Path) -> None:
    write_image_folder(places / "flowers", 8, 4)
    with pytest.raises(UsageError, match=r"--labels coarse needs CIFAR-100, but .*flowers has no coarse labels"):
        load_data(str(places / "flowers"), labels="coarse")


# Downloads


def test_without_a_network_the_message_says_where_it_looked_and_three_ways_on(places: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data("cifar100", data_dir=places / "given")
    message = str(caught.value)
    assert message.startswith(
        f"CIFAR-100 is not in --data-dir {places}/given (no such folder), $FINETUNE_DATA (not set), "
        f"the current folder's data (no such folder), the cache {places}/cache/finetune-timm/data (no such folder), "
        "and the download failed (no network in tests)."
    )
    assert "Put cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz into" in message
    assert "give --data the path of a copy" in message
    assert "--data shapes100" in message
    assert list((places / "cache" / "finetune-timm" / "data").iterdir()) == []


def test_downloading_switched_off(places: Path) -> None:
    with pytest.raises(
        DataError, match=r"CIFAR-10 is not in .*, and downloading is switched off\. Put cifar-10-python"
    ):
        load_data("cifar10", download=False)


def test_a_download_is_checked_kept_and_read(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_cifar100_python(places / "cifar-100-python")
    write_archive(places / "server.tar.gz", places / "cifar-100-python")
    asked = []

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, md5))
        (Path(root) / filename).write_bytes((places / "server.tar.gz").read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    for _ in range(2):  # the second time from the cache
        splits = load_data("cifar100")
        assert splits.test is not None
        assert torch.equal(splits.test.images, torch.from_numpy(made.test))
    url = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert asked == [(url, "eb9058c3a382ffc7106e4002c42a8d85")]
    cache = downloads.data_cache()
    assert [path.name for path in cache.iterdir()] == ["cifar-100-python.tar.gz"]


def test_a_wrong_checksum_leaves_nothing(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"half a fi")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    with pytest.raises(DataError, match=r"the download failed \(File not found or corrupted\.\)"):
        load_data("cifar10")
    assert list(downloads.data_cache().iterdir()) == []
