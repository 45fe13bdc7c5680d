"""Image folders: what is found, how it is decoded, and what is refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import make_images, write_class_folders, write_image_folder
from PIL import Image

from finetune.data import load_data
from finetune.decode import decode_image, to_rgb
from finetune.folder import read_folder
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
    raw = read_folder(tmp_path, image_size=8)
    assert raw.test is not None
    assert raw.test.classes == ("apple", "banana", "cherry")
    assert raw.test.labels.tolist() == [2]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_does_not_have(tmp_path: Path, split: str) -> None:
    write_image_folder(tmp_path, 8, 4)
    save(tmp_path / split / "durian" / "1.png", size=(32, 32))
    with pytest.raises(
        DataError, match=f"{split}/durian is no class of the training images; expected one of class_00, "
    ):
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
    assert splits.notes == (f"2 files in {tmp_path} passed over: no image by their suffix.",)


def test_links_nested_folders_and_names_of_any_script(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "elsewhere" / f"{index}.png", (index, 0, 0))
        save(tmp_path / "data" / "train" / "été" / "deep" / "er" / f"写真{index}.png", (0, index, 0))
    (tmp_path / "data" / "train" / "naïve").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    raw = read_folder(tmp_path / "data", image_size=8)
    assert raw.train.classes == ("naïve", "été")
    assert raw.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("classes", [0, 1])
def test_too_few_classes(tmp_path: Path, classes: int) -> None:
    (tmp_path / "train" / "deeper").mkdir(parents=True)
    if classes:
        save(tmp_path / "train" / "deeper" / "1.png")
    else:
        (tmp_path / "train" / "deeper").rename(tmp_path / "train" / ".deeper")
        save(tmp_path / "lone" / "1.png")
    message = r"train holds one class folder \(deeper\)" if classes else r"holds one class folder|train holds no images"
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))


def test_an_empty_class(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="train/empty holds no images; fill the class 'empty' or remove its folder"):
        load_data(str(tmp_path))
    (tmp_path / "train" / "empty" / "a.heic").write_bytes(b"1")
    with pytest.raises(DataError, match=r"train/empty holds no images \(1 files are no images by their suffix\)"):
        load_data(str(tmp_path))


def test_an_empty_test_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 0)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="test holds no images in class folders; fill it or remove it"):
        load_data(str(tmp_path))


def test_splits_without_train(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 8, 4, n_val=4)
    (tmp_path / "train").rename(tmp_path / "training")
    with pytest.raises(DataError, match="holds val and test with class folders but no train folder to learn from"):
        load_data(str(tmp_path))


# How it is decoded


def test_images_of_one_size_keep_it(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 40, 0, size=20)
    assert read_folder(tmp_path, image_size=224).train.images.shape == (40, 3, 20, 20)
    assert read_folder(tmp_path, image_size=16).train.images.shape == (40, 3, 16, 16)


def test_one_image_of_another_size_resizes_all(tmp_path: Path) -> None:
    made = make_images(200, 0, classes=2, size=8)
    write_class_folders(tmp_path, made.train, made.train_labels, made.classes)
    odd = tmp_path / "class_00" / "00002.png"  # not among the images that are looked at first
    save(odd, size=(12, 30))
    calls: list[tuple[str, int, int]] = []
    raw = read_folder(tmp_path, image_size=24, progress=lambda *call: calls.append(call))
    assert raw.train.images.shape == (200, 3, 24, 24)
    assert raw.train.images[1].float().mean(dim=(1, 2)).tolist() == [10, 20, 30]
    assert calls[-1] == ("decode", 200, 200)


def test_the_centre_square_is_kept(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    image.save(tmp_path / "wide.png")
    pixels = decode_image(tmp_path / "wide.png", 20)
    assert pixels is not None
    assert pixels.reshape(3, -1).max(axis=1).tolist() == [0, 0, 255]
    small = decode_image(tmp_path / "wide.png", 10)
    assert small is not None
    assert small.shape == (3, 10, 10)
    assert (small[2, :, 1:-1] == 255).all()


def test_large_jpegs_shrink_without_aliasing(tmp_path: Path) -> None:
    checks = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.jpg", quality=95)
    pixels = decode_image(tmp_path / "checks.jpg", 32)
    assert pixels is not None
    assert abs(pixels.astype(int) - 128).max() <= 12


def test_exif_orientation(tmp_path: Path) -> None:
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8] = (255, 0, 0)  # red above
    for orientation, stored in ((3, upright[::-1, ::-1]), (6, np.rot90(upright)), (8, np.rot90(upright, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
        pixels = decode_image(tmp_path / "turned.png", 16)
        assert pixels is not None
        assert (pixels.transpose(1, 2, 0) == upright).all()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("I;16", 0xFFFF, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    save(tmp_path / "image.png", colour, mode=mode)
    pixels = decode_image(tmp_path / "image.png", 8)
    assert pixels is not None
    assert pixels.shape == (3, 8, 8)
    assert tuple(pixels[:, 3, 3].tolist()) == expected


def test_palettes_and_their_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    image.save(tmp_path / "bytes.png", transparency=b"\x00\xff")
    for name, left in (("plain", [0, 0, 0]), ("clear", [255, 255, 255]), ("bytes", [255, 255, 255])):
        pixels = decode_image(tmp_path / f"{name}.png", 8)
        assert pixels is not None
        assert pixels[:, 0, 0].tolist() == left
        assert pixels[:, 0, 7].tolist() == [10, 200, 30]


def test_cmyk_jpeg_and_webp(tmp_path: Path) -> None:
    save(tmp_path / "print.jpg", (0, 255, 255, 0), mode="CMYK")
    pixels = decode_image(tmp_path / "print.jpg", 8)
    assert pixels is not None
    assert np.abs(pixels[:, 0, 0].astype(int) - [255, 0, 0]).max() <= 8
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "image.webp", lossless=True)
    pixels = decode_image(tmp_path / "image.webp", 8)
    assert pixels is not None
    assert pixels[:, 0, 0].tolist() == [10, 200, 30]


def test_wide_integers_count_as_16_bit() -> None:
    assert to_rgb(Image.new("I", (2, 2), 257 * 100)).getpixel((0, 0)) == (100, 100, 100)
    assert to_rgb(Image.new("I;16B", (2, 2), 257 * 100)).getpixel((0, 0)) == (100, 100, 100)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point pixels have no agreed range"):
        to_rgb(Image.new("F", (8, 8), 0.5))


# What cannot be read


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
    for index in (12, 16):
        (broken / f"{index:05d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 44 images cannot be read: .* and 2 more; replace or remove them"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("limit", [60, 40, 20])
def test_pillows_size_limit_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    write_image_folder(tmp_path, 8, 4, size=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # from here to twice the limit Pillow only warns
    with pytest.raises(
        DataError, match=f"12 of 12 images cannot be read: .*more than Pillow's limit of {limit} pixels"
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
    with pytest.raises(DataError, match=r"13 images of 1000000 x 1000000 pixels need .* GiB .* smaller --image-size"):
        load_data(str(tmp_path), image_size=1_000_000)
