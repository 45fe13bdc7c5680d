"""Image folders: what is found, which label it has, and what is refused."""

from __future__ import annotations

import errno
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import make_images, write_class_folders, write_image_folder
from PIL import Image

from finetune.data import load_data
from finetune.folder import read_folder
from finetune.grid import SWEEP
from finetune.rundir import RECIPE
from finetune.survey import survey_folder
from weights.errors import DataError


def save(path: Path, colour: object = (10, 20, 30), *, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]


# What is found


def test_splits_and_labels(tmp_path: Path) -> None:
    made = write_image_folder(tmp_path / "flowers", 12, 8, n_val=4)
    raw = read_folder(tmp_path / "flowers", image_size=224)
    assert raw.name == "flowers"
    assert raw.train.classes == made.classes
    assert raw.val is not None
    assert raw.test is not None
    assert (len(raw.train), len(raw.val), len(raw.test)) == (12, 4, 8)
    by_class = np.argsort(made.train_labels, kind="stable")  # files are read class after class, by name
    assert torch.equal(raw.train.images, torch.from_numpy(made.train[by_class]))
    assert raw.train.labels.tolist() == made.train_labels[by_class].tolist()
    assert raw.train.images.dtype == torch.uint8
    assert not raw.hold_out_test


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    write_image_folder(tmp_path, 8, 4, n_val=4)
    (tmp_path / "val").rename(tmp_path / name)
    splits = load_data(str(tmp_path))
    assert splits.val is not None
    assert (len(splits.train), len(splits.val)) == (8, 4)


def test_two_validation_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4, n_val=4)
    save(tmp_path / "valid" / "class_00" / "a.png")
    with pytest.raises(DataError, match="holds val and valid; expected one validation folder"):
        load_data(str(tmp_path))


def test_no_test_split_is_noted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 0, n_val=4)
    splits = load_data(str(tmp_path))
    assert splits.test is None
    assert splits.test_sha256 is None
    assert splits.notes == ("The data bring no test split: there is no test accuracy.",)


def test_a_class_missing_from_test_does_not_shift_labels(tmp_path: Path) -> None:
    for name in ("apple", "banana", "cherry"):
        save(tmp_path / "train" / name / "1.png")
    save(tmp_path / "test" / "cherry" / "1.png")
    (tmp_path / "test" / "banana").mkdir()
    splits = load_data(str(tmp_path), image_size=8, val_fraction=0)
    assert splits.test is not None
    assert splits.test.classes == ("apple", "banana", "cherry")
    assert splits.test.labels.tolist() == [2]
    assert splits.notes == (
        "1 test image is a training image too, pixel for pixel, so the test accuracy is too good; see finetune check.",
        "The test images are of 1 of 3 classes: there are none of apple, banana, and test figures say nothing about "
        "them.",
    )


def test_a_class_missing_from_validation_is_named(tmp_path: Path) -> None:
    made = write_image_folder(tmp_path, 8, 4, n_val=8)
    for file in (tmp_path / "val" / "class_01").iterdir():
        file.unlink()
    splits = load_data(str(tmp_path))
    assert splits.val is not None
    assert splits.val.classes == made.classes
    assert splits.val.labels.tolist() == [0, 0, 2, 2, 3, 3]
    assert splits.notes == (
        "The validation images are of 3 of 4 classes: there are none of class_01, and validation figures say nothing "
        "about it.",
    )


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_does_not_have(tmp_path: Path, split: str) -> None:
    write_image_folder(tmp_path, 8, 4)
    save(tmp_path / split / "durian" / "1.png", size=(32, 32))
    with pytest.raises(
        DataError, match=f"{split}/durian is no class of the training images; expected one of class_00, .*class_03\\.$"
    ):
        load_data(str(tmp_path))
    (tmp_path / split / "durian").rename(tmp_path / split / "Class_02")
    with pytest.raises(DataError, match=rf"{split}/Class_02 is no class .*; did you mean class_02, .*\?$"):
        load_data(str(tmp_path))


def test_one_folder_of_classes_holds_out_the_same_test_for_every_seed(tmp_path: Path) -> None:
    made = make_images(60, 0)
    write_class_folders(tmp_path / "pile", made.train, made.train_labels, made.classes)
    first, second = (load_data(str(tmp_path / "pile"), seed=seed) for seed in (0, 1))
    assert first.test is not None
    assert second.test is not None
    assert first.val is not None
    assert second.val is not None
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.val.images, second.val.images)
    assert (len(first.train), len(first.val), len(first.test)) == (49, 5, 6)
    assert (first.sha256, first.test_sha256) == (second.sha256, second.test_sha256)
    assert first.notes == ("The data bring no test split: 6 images were held out, the same for every seed.",)


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        for index in range(4):
            save(tmp_path / name / f"{index}.png", (index, 0, 0))
    assert load_data(str(tmp_path)).classes == ("bus", "train")


def test_hidden_files_are_passed_over_and_strays_counted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4)
    for hidden in (".DS_Store", "train/.DS_Store", "train/class_00/.DS_Store", "train/class_00/._00000.png"):
        (tmp_path / hidden).write_bytes(b"Mac")
    for hidden in ("train/.ipynb_checkpoints/a.png", "train/class_00/.ipynb_checkpoints/a.png", "train/__MACOSX/a.png"):
        save(tmp_path / hidden)
    (tmp_path / "train" / "class_01" / "notes.txt").write_text("stray")
    (tmp_path / "test" / "README").write_text("stray")
    splits = load_data(str(tmp_path), val_fraction=0)
    assert len(splits.train) == 8
    assert splits.classes == ("class_00", "class_01", "class_02", "class_03")
    assert splits.notes == (f"2 files (.txt, no suffix) in {tmp_path} passed over: no image by the suffix.",)


def test_images_outside_class_folders_are_counted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4)
    save(tmp_path / "train" / "loose.png", size=(32, 32))
    splits = load_data(str(tmp_path), val_fraction=0)
    assert (len(splits.train), len(splits.classes)) == (8, 4)
    assert splits.notes == (f"1 image in {tmp_path} passed over: in no class folder.",)


def test_links_nested_folders_and_names_of_any_script(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "elsewhere" / f"{index}.png", (index, 0, 0))
        save(tmp_path / "data" / "train" / "été" / "deep" / "er" / f"写真{index}.png", (0, index, 0))
    (tmp_path / "data" / "train" / "naïve").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data" / "train" / "été" / "写真3.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "photos").symlink_to(tmp_path / "data", target_is_directory=True)
    raw = read_folder(tmp_path / "photos", image_size=8)
    assert raw.train.classes == ("naïve", "été")
    assert raw.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    shown = raw.train.images[:, :, 3, 3].tolist()
    assert shown == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [2, 0, 0]]


def test_names_agree_however_their_accents_are_written(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    for name in (apart, "bar"):
        save(tmp_path / "train" / name / "1.png")
    save(tmp_path / "test" / composed / "1.png")
    raw = read_folder(tmp_path, image_size=8)
    assert raw.train.classes == ("bar", composed)
    assert raw.test is not None
    assert raw.test.labels.tolist() == [1]
    save(tmp_path / "train" / composed / "2.png")
    with pytest.raises(
        DataError, match="train holds two folders for the class café, spelt with different bytes; merge"
    ):
        read_folder(tmp_path, image_size=8)


def test_a_class_name_that_is_not_utf8(tmp_path: Path) -> None:
    save(tmp_path / "bar" / "1.png")
    try:
        save(tmp_path / os.fsdecode(b"caf\xe9") / "1.png")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    with pytest.raises(DataError, match=r"holds a folder named b'caf\\xe9', which is not UTF-8; rename it"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("place", ["train/lone", "lone"])
def test_one_class(tmp_path: Path, place: str) -> None:
    save(tmp_path / place / "1.png")
    message = r"holds one class folder \(lone\); expected a folder of images for each of two or more classes"
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))


def test_splits_without_class_folders_are_not_classes(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "test" / "1.png")
    with pytest.raises(
        DataError,
        match="holds test and train with images but no class folders in them; expected a folder for each class",
    ):
        load_data(str(tmp_path))


def test_folders_of_runs_among_the_classes(tmp_path: Path) -> None:
    """As `finetune run --data .` leaves them."""
    photos = tmp_path / "photos"
    write_image_folder(tmp_path / "made", 12, 0)
    (tmp_path / "made" / "train").rename(photos)
    before = read_folder(photos, image_size=24)
    for run in (photos / "runs" / "resnet18-photos-0001", photos / "by-hand", photos / "out" / "of" / "sight"):
        run.mkdir(parents=True)
        for name in (RECIPE, "model.safetensors", "report.html"):
            (run / name).touch()
    (photos / "runs" / "sweep-0001").mkdir()
    (photos / "runs" / "sweep-0001" / SWEEP).touch()
    raw = read_folder(photos, image_size=24)
    assert (raw.train.classes, len(raw.train)) == (before.train.classes, len(before.train))
    assert raw.notes == tuple(
        f"{photos / name} passed over: it holds runs and no images." for name in ("by-hand", "out", "runs")
    )
    assert survey_folder(photos).classes == before.train.classes
    (photos / "runs" / "resnet18-photos-0001" / RECIPE).unlink()
    (photos / "runs" / "sweep-0001" / SWEEP).unlink()
    with pytest.raises(DataError, match="runs holds no images but 2 files"):
        read_folder(photos, image_size=24)


def test_an_empty_class(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="train/empty holds no images; fill the class 'empty' or remove its folder"):
        load_data(str(tmp_path))
    (tmp_path / "train" / "empty" / "a.heic").write_bytes(b"1")
    with pytest.raises(
        DataError, match=r"train/empty holds no images but 1 file \(\.heic\); fill the class 'empty' or"
    ):
        load_data(str(tmp_path))


def test_an_empty_test_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 0)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="test holds no images in class folders; fill it or remove it"):
        load_data(str(tmp_path))


def test_splits_without_train(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4, n_val=4)
    (tmp_path / "train").rename(tmp_path / "lessons")
    with pytest.raises(DataError, match=r"holds test and val with .* no train folder .*; add one, or give .*test to"):
        load_data(str(tmp_path))


# What cannot be read


def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path, 8, 4)
    (tmp_path / "train" / "class_01" / "more").mkdir()
    listed = os.scandir

    def scandir(path: str | Path = ".") -> object:
        if Path(path).name == "more":  # permissions would not stop a test that runs as root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        DataError, match=r"class_01/more cannot be read \(Permission denied\); make it readable, or give --data another"
    ):
        load_data(str(tmp_path))


def test_unreadable_images_are_named_and_counted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 40, 4)
    broken = tmp_path / "train" / "class_00"
    (broken / "00000.png").write_bytes(b"")
    (broken / "00004.png").write_bytes(b"no image at all")
    whole = (broken / "00008.png").read_bytes()
    (broken / "00008.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"3 of 44 images cannot be read: {broken}/00000.png (empty file), ")
    assert "00004.png (no image that Pillow knows), " in message
    assert "00008.png (" in message
    assert message.endswith("; replace or remove them.")
    (broken / "00008.png").unlink()
    (broken / "00008.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"00008\.png \(No such file or directory\); replace or remove them"):
        load_data(str(tmp_path))
    for index in (12, 16):
        (broken / f"{index:05d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 44 images cannot be read: .* and 2 more; replace or remove them"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("limit", [60, 40, 20])
def test_pillows_size_limit_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    write_image_folder(tmp_path, 8, 4, size=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # from here to twice the limit Pillow only warns
    with pytest.raises(
        DataError,
        match=f"12 of 12 images cannot be read: .* \\(more than Pillow's limit of {limit} pixels: a photo has to be "
        r"scaled down\), .* and 9 more; replace or remove them",
    ):
        load_data(str(tmp_path))


def test_a_png_that_only_claims_to_be_huge(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    (tmp_path / "train" / "class_00" / "00000.png").write_bytes(file)
    with pytest.raises(DataError, match=r"1 of 12 images cannot be read: .*00000\.png \(more than Pillow's limit of"):
        load_data(str(tmp_path))


def test_images_that_do_not_fit_in_memory(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4)
    save(tmp_path / "train" / "class_00" / "wide.png", size=(50, 40))
    with pytest.raises(DataError, match=r"13 images of 1000000 x 1000000 pixels, the fewest .* smaller --image-size"):
        load_data(str(tmp_path), image_size=1_000_000)


@pytest.mark.parametrize(
    "names", [("Train", "Val", "Test"), ("Training", "Validation", "Testing"), ("TRAIN", "eval", "test")]
)
def test_splits_are_found_however_they_are_spelt(tmp_path: Path, names: tuple[str, str, str]) -> None:
    write_image_folder(tmp_path / "photos", n_val=4)
    for usual, name in zip(("train", "val", "test"), names, strict=True):
        (tmp_path / "photos" / usual).rename(tmp_path / "photos" / f"{name}-")  # in two steps: some disks know no case
        (tmp_path / "photos" / f"{name}-").rename(tmp_path / "photos" / name)
    splits = load_data(str(tmp_path / "photos"))
    assert splits.val is not None
    assert splits.test is not None
    assert (len(splits.classes), len(splits.val)) == (4, 4)
